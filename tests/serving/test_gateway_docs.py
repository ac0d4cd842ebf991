"""docs/serving.md and the README say what is so: settings, defaults, the example file, what LLaVA's flags became."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from shellv_core.cli import _parser
from shellv_core.config import build_config
from shellv_core.serving.gateway import replica, replicated, workers
from shellv_core.serving.gateway.config import ModelEntry, ModelsFile

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_settings_and_their_defaults() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`)? ?\|", DOCUMENT, re.MULTILINE))
    fields = ModelEntry.model_fields
    assert list(told) == list(fields)
    for name, text in told.items():
        default = None if fields[name].is_required() else fields[name].get_default()
        if isinstance(default, (str, bool, int, float, tuple, dict)) and default != "":
            assert yaml.safe_load(text) == (list(default) if isinstance(default, tuple) else default), name


def test_the_example_is_a_file_that_is_taken() -> None:
    block = re.search(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert block is not None
    content = build_config(ModelsFile, yaml.safe_load(block[1]))
    assert {entry.engine for entry in content.models} == {"embedded", "worker", "http"}


def test_the_options_that_upstreams_flags_became() -> None:
    rows = README.partition("### Coming from LLaVA\n")[2].partition("\n## ")[0]
    taken = {option for verb in ("serve", "chat") for option in _options(verb)}
    ours = set(re.findall(r"--[a-z][a-z-]+", "".join(row.rpartition(" | ")[2] for row in rows.splitlines())))
    assert ours <= taken
    for flag in (
        "--load-4bit",
        "--load-8bit",
        "--model-base",
        "--device mps",
        "--model-list-mode reload",
        "--image-file",
    ):
        assert flag in rows


def test_the_figures_are_those_of_the_code() -> None:
    assert (replicated.POLL_SECONDS, replica.MAX_FAILURES, replica.OPEN_SECONDS) == (2.0, 3, 10.0)
    assert (workers.FIRST_BACKOFF_SECONDS, workers.MAX_BACKOFF_SECONDS) == (0.5, 30.0)
    assert ModelsFile.model_fields["poll_seconds"].default == 5.0
    for text in (
        "every 2 seconds",
        "Three failures",
        "for 10 seconds",
        "after 0.5 s, doubling to 30 s",
        "every 5 seconds",
    ):
        assert text in " ".join(DOCUMENT.split()), text


def _options(verb: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]+", _parser(verb)._subparsers._group_actions[0].choices[verb].format_help()))  # type: ignore[union-attr,index]
