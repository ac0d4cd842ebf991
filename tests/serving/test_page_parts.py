"""What the page does apart from drawing."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing

import pytest

from shellv_core.endpoint.client import EndpointClient
from shellv_core.errors import ServingError
from shellv_core.serving.page import turns
from shellv_core.serving.page.asking import Answer, Asked, ask, ask_all
from shellv_core.serving.page.hallucination import highlighted
from shellv_core.serving.page.texts import CHINESE, ENGLISH
from shellv_core.serving.page.transcripts import Shares, Talk, Transcript

QUESTION = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "world"}


def test_turns():
    history = [QUESTION, ANSWER, {"role": "user", "content": "and ?"}, {"role": "assistant", "content": "no"}]
    assert turns.without_answer(history) == history[:3]
    assert turns.without_exchange(history) == (history[:2], "and ?")
    assert turns.without_exchange([]) == ([], "")
    assert turns.add_question(history[:3], "so ?") == [*history[:2], {"role": "user", "content": "so ?"}]
    assert turns.with_question(history, 1, "so ?") == [*history[:2], {"role": "user", "content": "so ?"}]
    assert turns.with_question(history, 2, "so ?") == history
    assert [turns.question_number(history, index) for index in (0, 2)] == [0, 1]
    parts = [{"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]}]
    assert turns.plain(parts) == [QUESTION]


def test_transcripts_in_both_forms():
    talk = Talk.of("a", {"seed": 1}, [QUESTION, {"role": "assistant", "content": "```\n# no heading"}])
    transcript = Transcript(talks=(talk,), image="red.png")
    assert Transcript.model_validate(json.loads(transcript.to_json())) == transcript
    assert "````text\n```\n# no heading\n````" in transcript.to_markdown()


def test_shared_conversations_need_the_very_address(tmp_path):
    transcript = Transcript(talks=(Talk.of("a", {}, [QUESTION, ANSWER]),))
    address = Shares(tmp_path / "shared").add(transcript)
    shares = Shares(tmp_path / "shared")  # another process
    assert shares.find(address) == transcript
    name, _, signature = address.partition(".")
    others = (name, f"{name}.{'0' * 32}", f"../secret.{signature}", f"{'A' * 22}.{signature}", "", "é" * 22)
    for other in others:
        with pytest.raises(ServingError, match="no shared conversation"):
            shares.find(other)
    with pytest.raises(ServingError, match="too long"):
        shares.add(Transcript(talks=(Talk.of("a", {}, [{"role": "user", "content": "x" * (1 << 20)}]),)))


def test_a_hallucination_view_covers_the_text():
    text = "A dog sits. A cat runs."
    view = {
        "objects": [{"start": 2, "end": 5, "confidence": 0.95}, {"start": 14, "end": 17, "confidence": 0.2}],
        "sentences": [
            {"start": 0, "end": 11, "margin": 2.0, "marked": False},
            {"start": 12, "end": 23, "margin": -1.0, "marked": True},
        ],
    }
    spans = highlighted(text, view)
    assert "".join(span for span, _ in spans) == text
    assert [span for span in spans if span[1]] == [
        ("dog", "≥ 90 %"), ("A ", "⚠"), ("cat", "< 50 %"), (" runs.", "⚠")
    ]  # fmt: skip
    assert highlighted(text, None) == [(text, None)]


def test_both_languages_say_everything():
    assert ENGLISH.keys() == CHINESE.keys()


async def _last(client, asked):
    answers = []
    async with aclosing(ask(client, asked)) as steps:
        async for answer in steps:
            answers.append(answer)
    return answers


def test_answers_side_by_side_with_their_figures(endpoint):
    client = EndpointClient(endpoint.url)
    asked = {key: Asked([QUESTION], {"max_tokens": 8 + key}) for key in range(2)}

    async def collect():
        last: dict[int, Answer] = {}
        async with aclosing(ask_all(client, asked)) as steps:
            async for key, answer in steps:
                last[key] = answer
        return last

    last = asyncio.run(collect())
    assert {key: answer.tokens for key, answer in last.items()} == {0: 8, 1: 9}
    assert all(answer.done and not answer.failed and answer.first_seconds > 0 for answer in last.values())
    assert last[1].text.startswith(last[0].text)


def test_a_refusal_is_an_answer_with_a_note(endpoint):
    last = asyncio.run(_last(EndpointClient(endpoint.url), Asked([QUESTION], {"temperature": 9})))[-1]
    assert last.failed
    assert last.done
    assert last.note.startswith("Temperature: ")


def test_a_busy_server_is_asked_again(start_endpoint):
    from shellv_core.serving.transformers_engine import EngineConfig
    from tests.serving.gated_engine import wait_for

    with start_endpoint(engine_config=EngineConfig(slots=1, max_waiting=0)) as endpoint:
        client = EndpointClient(endpoint.url)

        async def crowd():
            first = asyncio.ensure_future(_last(client, Asked([QUESTION], {"max_tokens": 4000})))
            await asyncio.to_thread(wait_for, lambda: endpoint.engine.stats().running)
            answers = []
            async with aclosing(ask(client, Asked([QUESTION], {"max_tokens": 4}))) as steps:
                async for answer in steps:
                    answers.append(answer)
                    first.cancel()
            return answers

        answers = asyncio.run(crowd())
        assert "are allowed" in answers[0].note
        assert answers[-1].done
        assert answers[-1].tokens == 4
