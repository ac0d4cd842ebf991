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
    if path != "/tokenize" and (length is None or (isinstance(length, int) and length > 2)):
        body["max_tokens"] = 1  # what is allowed should not take the model long
    return Hostile(path=path, body=json.dumps(body).encode())


def _pictures(rng: random.Random) -> Hostile:
    count = rng.choice([1, 1, 1, 2, 3, 9])
    parts = [{"type": "image_url", "image_url": {"url": hostile_url(rng)}} for _ in range(count)]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "stream": rng.random() < 0.3}
    return Hostile(body=json.dumps(body).encode())


def _broken_json(rng: random.Random) -> Hostile:
    path, body = _valid(rng)
    whole = json.dumps(body).encode()
    bodies = [
        lambda: whole[: rng.randrange(len(whole))],
        lambda: b"[" * rng.choice([10, 1000, 100_000]),
        lambda: b'{"a":' * rng.choice([10, 1000, 100_000]),
        lambda: b"[" + b"[]," * rng.choice([100, 20_000, 300_000]) + b"0]",
        lambda: b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}",
        lambda: b"9" * rng.choice([100, 5000, 100_000]),
        lambda: whole.replace(b'"max_tokens"', b'"max_tokens": 1, "max_tokens"'),
        lambda: b"\xef\xbb\xbf" + whole,
        lambda: whole.decode().encode("utf-16"),
        lambda: whole.replace(b"a", b"\xff", 1),
        lambda: whole + whole,
        lambda: b"null",
        lambda: b'"' + b"x" * 300_000 + b'"',
        lambda: b"",
        lambda: rng.randbytes(200),
        lambda: json.dumps({f"field{index}": index for index in range(rng.choice([65, 3000]))}).encode(),
        lambda: json.dumps({"messages": [{"role": "user", "content": "x" * 300_000}]}).encode(),
        lambda: json.dumps({"messages": [{"role": "user", "content": "x"}] * 3000}).encode(),
    ]
    kinds = ["application/json"] * 6 + [
        "text/plain",
        "application/json; charset=utf-7",
        "multipart/form-data",
        "",
        "a/b+json",
    ]
    return Hostile(path=path, body=rng.choice(bodies)(), headers={"content-type": rng.choice(kinds)})


def _special_text(rng: random.Random) -> Hostile:
    text = "".join(rng.choices(SPECIAL, k=rng.randint(1, 60)))
    body = {
        "messages": [
            {"role": rng.choice(["user", "system", "assistant"]), "content": text},
            {"role": "user", "content": text},
        ]
    }
    return Hostile(path=rng.choice([PATHS[0], PATHS[2]]), body=json.dumps(body | {"max_tokens": 1}).encode())


def _sampling(rng: random.Random) -> Hostile:
    """Allowed, and at the edge of it."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": rng.randint(1, 3)}
    edges: dict[str, list[Any]] = {
        "temperature": [0, 1e-300, 2, 1],
        "top_p": [1e-300, 1],
        "top_k": [-1, 0, 1, 2**31],
        "min_p": [0, 1],
        "repetition_penalty": [1e-300, 10],
        "frequency_penalty": [-2, 2],
        "presence_penalty": [-2, 2],
        "seed": [-(2**63), 2**63 - 1, 0],
        "stop": ["a", ["\0"], ["x" * 256] * 4, "é", "<s>"],
        "n": [1, 4],
        "logit_bias": [{str(each): rng.choice([-100, 100]) for each in range(300)}, {}, {"999999999": 1}],
        "stream": [True, False],
        "logprobs": [True],
        "user": ["x" * 256],
        "shellv": [{"return_token_ids": True}, {}],
    }
    for name in rng.sample(sorted(edges), rng.randint(1, 6)):
        body[name] = rng.choice(edges[name])
    if body.get("logprobs"):
        body["top_logprobs"] = rng.choice([0, 20])
    return Hostile(body=json.dumps(body).encode())


def _odd_paths(rng: random.Random) -> Hostile:
    path = rng.choice([*PATHS, "/v1/models", "/healthz", "/openapi.json"])
    paths = [
        "/",
        "//",
        "/v1//models",
        "/v1/models/" + "%00",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/v1/models/" + "x" * 5000,
        "/v1/models/%ff%fe",
        "/%2e%2e/%2e%2e/etc/passwd",
        path + "?" + "a=b&" * 500,
        path + "/",
        path.upper(),
        path + ";x",
        "/metrics",
        "/admin/drain",
        "/internal/load",
        "/v1/models/<script>",
        "/v1/models/%F0%9F%98%80",
    ]
    headers = rng.choice(
        [
            {},
            {"x-request-id": "\xff" * 50},
            {"traceparent": "00-" + "g" * 55},
            {"authorization": "Bearer x"},
            {"content-type": "application/json"},
            {"expect": "100-continue"},
            {"upgrade": "websocket", "connection": "upgrade"},
            {"accept-encoding": "gzip" * 500},
            {"range": "bytes=0-" * 100},
        ]
    )
    method = rng.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "FOO"])
    return Hostile(method=method, path=rng.choice([*paths, path, path]), headers=headers)


def _raw(rng: random.Random) -> Hostile:
    path, content = _valid(rng)
    body = json.dumps(content).encode()
    line = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()
    lengths = [
        str(len(body) - 5),
        str(len(body) + 5),
        "-1",
        "+5",
        "0x10",
        "1e3",
        "9" * 30,
        " ",
        "5, 5",
        "\xb2",
        "00000000005",
    ]
    choices = [
        lambda: line + b"content-length: " + rng.choice(lengths).encode("latin-1") + b"\r\n\r\n" + body,
        lambda: line + b"content-length: 5\r\ncontent-length: 6\r\n\r\n" + body,
        lambda: line + b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
        lambda: (
            line
            + b"transfer-encoding: chunked\r\n\r\n"
            + rng.choice([b"fffffffffffffffff\r\n", b"-1\r\n", b"zz\r\n", b"5\r\nab"])
        ),
        lambda: line + b"transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        lambda: (
            line + b"content-length: %d\r\n\r\n" % len(body) + body + b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" * 5
        ),
        lambda: line + b"x: " + b"y" * 70_000 + b"\r\n\r\n",
        lambda: line + b"".join(b"h%d: x\r\n" % each for each in range(3000)) + b"\r\n",
        lambda: (
            line.replace(b"HTTP/1.1", rng.choice([b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.9", b"ICAP/1.0", b""])) + b"\r\n"
        ),
        lambda: line.replace(b"\r\n", b"\n") + b"\n",
        lambda: line.replace(b"host: x", b" host : x") + b"\r\n",
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        lambda: b"GET http://127.0.0.1:1/ HTTP/1.1\r\nhost: 127.0.0.1:1\r\n\r\n",
        lambda: b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nhost: x\r\n\r\n",
        lambda: rng.randbytes(rng.randint(1, 300)),
        lambda: line[: rng.randrange(len(line))],
    ]
    return Hostile(raw=rng.choice(choices)())
