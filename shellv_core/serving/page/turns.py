"""Conversations as the page holds them, and what undo, edit and resend make of them. Nothing here draws or asks.

A conversation is a list of turns ``{"role": "user" | "assistant", "content": text}``; the picture stands beside it and
belongs to its first question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shellv_core.endpoint.client import user_message

Turn = dict[str, Any]
History = list[Turn]


def plain(history: History | None) -> History:
    """`history` with nothing but roles and texts, from what the chat component returns."""
    return [{"role": turn["role"], "content": _text(turn["content"])} for turn in history or []]


def add_question(history: History, question: str) -> History:
    """`history` with a question; one that has no answer yet is replaced."""
    kept = history[:-1] if history and history[-1]["role"] == "user" else history
    return [*kept, {"role": "user", "content": question}]


def without_answer(history: History) -> History:
    """`history` up to its last question, that is, ready to be answered again."""
    kept = list(history)
    while kept and kept[-1]["role"] != "user":
        kept.pop()
    return kept


def without_exchange(history: History) -> tuple[History, str]:
    """`history` without its last question and answer, and that question."""
    kept = without_answer(history)
    return (kept[:-1], kept[-1]["content"]) if kept else ([], "")


def with_question(history: History, number: int, question: str) -> History:
    """`history` up to its question `number` (from 0), which is now `question`; unchanged where there is none."""
    places = [index for index, turn in enumerate(history) if turn["role"] == "user"]
    if number >= len(places):
        return history
    return [*history[: places[number]], {"role": "user", "content": question}]


def question_number(history: History, index: int) -> int:
    """Which question, from 0, the turn at `index` is."""
    return sum(turn["role"] == "user" for turn in history[:index])


def to_messages(history: History, image_path: str | None) -> History:
    """The conversation as the API takes it.

    Raises:
        ServingError: if the file at `image_path` is no picture that the API reads.
    """
    messages = [dict(turn) for turn in history]
    if image_path is not None and messages:
        messages[0] = user_message(messages[0]["content"], Path(image_path).read_bytes())
    return messages


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")
