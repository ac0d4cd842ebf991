"""docs/serving-api.md says what is so: endpoints, fields, codes and limits; and its commands run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from shellv_core.cli import main
from shellv_core.serving.http.chat_bodies import ChatRequest
from shellv_core.serving.http.completion_bodies import CompletionRequest
from shellv_core.serving.http.config import ApiConfig

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = (REPOSITORY / "docs" / "serving-api.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return DOCUMENT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def settings(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_the_limits_are_the_defaults() -> None:
    told = re.findall(r"^\| `([\w.]+)` \| (\S+) \|", section("Limits"), re.MULTILINE)
    shown = [
        (name, "none" if value == () else format(value, "g") if isinstance(value, float) else str(value))
        for name, value in settings(ApiConfig())
    ]
    assert told == shown


def test_the_fields_are_those_of_the_bodies() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", section("Fields of a request"), re.MULTILINE))
    chat, completion = set(ChatRequest.model_fields), set(CompletionRequest.model_fields)
    for kind, names in (("both", chat & completion), ("chat", chat - completion), ("completions", completion - chat)):
        assert {name for name, of in told.items() if of == kind} == names


def test_the_endpoints_are_those_of_the_description(http_schema: dict[str, Any]) -> None:
    told = set(re.findall(r"^\| `(\w+) (/\S+)` \|", section("Endpoints"), re.MULTILINE))
    described = {(method.upper(), path) for path, methods in http_schema["paths"].items() for method in methods}
    described.add(("GET", "/openapi.json"))
    operations = {
        ("GET", "/metrics"),
        ("GET", "/internal/load"),
        ("POST", "/admin/drain"),
        ("POST", "/admin/keys/reload"),
    }
    assert told == described | operations


def test_the_codes_are_those_of_the_code() -> None:
    told = set(re.findall(r"`(\w+)`", section("Errors").partition("| Status |")[2])) - {"code", "param", "Allow"}
    sources = "".join(path.read_text() for path in (REPOSITORY / "shellv_core" / "serving").rglob("*.py"))
    for code in told:
        assert f'"{code}"' in sources, code
    pattern = r'(?:code=|param, |messages", |model", |where, )"([a-z]+_[a-z_0-9]+)"'
    used = set(re.findall(pattern, sources)) | set(
        re.findall(r'^\s+"((?:image|invalid|remote|unsupported|text|too)_\w+)",$', sources, re.MULTILINE)
    )
    assert used - told == set()


@pytest.fixture(scope="module")
def http_schema(endpoint: Any) -> dict[str, Any]:
    import httpx

    schema: dict[str, Any] = httpx.get(f"{endpoint.url}/openapi.json", timeout=60).json()
    return schema


def test_the_commands_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = re.findall(r"^shellv key .*$", DOCUMENT, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert main(shlex.split(line.replace("/tmp/shellv-keys", str(tmp_path / "keys")))[1:]) == 0
        assert capsys.readouterr().out.startswith("shellv-")


def test_the_program_runs(endpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert code is not None
    exec(code[1].replace("http://127.0.0.1:8000", endpoint.url), {})
    assert capsys.readouterr().out.strip()
