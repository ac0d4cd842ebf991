"""Requests of someone who means harm, from a seed: bodies that break parsers, and bytes that are hardly HTTP."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field
from typing import Any

from tests.serving.hostile_pictures import hostile_url

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize")
SPECIAL = [
    "<image>",
    "</s>",
    "<s>",
    "<pad>",
    "USER: ",
    "ASSISTANT:",
    "<|im_start|>",
    "<|end|>",
    "{{ 7*7 }}",
    "{% raw %}",
    "\0",
    "\u202e",
    "﻿",
    "\U0001f600" * 3,
    "\ud83d",
    "\x1b[2J",
    "é" * 50,
    "data:image/png;base64,",
    "%s%n",
]
JUNK: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    4,
    5,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.5,
    -0.0,
    1e308,
    1e-320,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"b": {}}},
    "\ud800",
    "x" * 3000,
    [0] * 300,
    {str(each): 1 for each in range(100)},
]


@dataclass(frozen=True)
class Hostile:
    """A request: of these parts, or, where `raw` is there, these bytes and then the end of the connection."""

    method: str = "POST"
    path: str = PATHS[0]
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    raw: bytes | None = None


def hostile_request(rng: random.Random) -> Hostile:
    """One request; some reach the model."""
    makers = [
        (30, _changed),
        (12, _pictures),
        (10, _broken_json),
        (4, _special_text),
        (4, _sampling),
        (8, _odd_paths),
        (8, _raw),
    ]
    return rng.choices([make for _, make in makers], [weight for weight, _ in makers])[0](rng)


def _valid(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice(PATHS)
    text = "".join(rng.choices([*SPECIAL[:14], "cat ", "dog "], k=rng.randint(1, 6))).replace("\ud83d", "")
    if path == "/v1/completions":
        return path, {"prompt": text, "max_tokens": rng.randint(1, 2)}
    content: Any = text
    if rng.random() < 0.5:
        content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": hostile_url(rng)}}]
    messages: list[Any] = [{"role": "user", "content": content}]
    if rng.random() < 0.3:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *messages]
    return path, {"messages": messages} | ({"max_tokens": rng.randint(1, 2)} if path == PATHS[0] else {})


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as its container and key."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    for key in keys:
        found += _nodes(value[key])
    return found


def _changed(rng: random.Random) -> Hostile:
    """A good body with some of its places put out of order."""
    made_for, body = _valid(rng)
    path = rng.choice([made_for] * 9 + list(PATHS))
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(_nodes(body) or [(body, "x")])
        change = rng.randrange(4)
        if change == 0 or isinstance(container, list):
            container[key] = copy.deepcopy(rng.choice(JUNK))
        elif change == 1:
            container.pop(key, None)
        elif change == 2:
            container[rng.choice(["x", "", "tools", "stream", "__class__", "\ud800", "role" * 99])] = copy.deepcopy(
                rng.choice(JUNK)
            )
        else:
            names = [
                "temperature",
                "top_p",
                "n",
                "seed",
                "stop",
                "max_tokens",
                "logit_bias",
                "stream",
                "top_k",
                "user",
                "logprobs",
                "top_logprobs",
                "shellv",
                "min_p",
                "stream_options",
                "model",
                "min_tokens",
            ]
            body[rng.choice(names)] = copy.deepcopy(rng.choice(JUNK))
    length = body.get("max_tokens")
    if path != "/tokenize" and (length is None or isinstance(length, int) and length > 2):
        body["max_tokens"] = 1  # what is allowed should not take the model long
