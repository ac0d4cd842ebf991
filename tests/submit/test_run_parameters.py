from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.client.parameters import gather
from shellv_core.errors import ConfigError


def definition(kind: str, **more: Any) -> dict[str, Any]:
    return {"parameterType": kind, "isOptional": True, **more}


DEFINITIONS = {
    "text": definition("STRING"),
    "count": definition("NUMBER_INTEGER"),
    "rate": definition("NUMBER_DOUBLE"),
    "flag": definition("BOOLEAN"),
    "names": definition("LIST"),
    "labels": definition("STRUCT"),
    "size": definition("NUMBER_INTEGER", literals=[1, 2]),
}


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("text=8", "8"),
        ("text=a=b: c", "a=b: c"),
        ("text=", ""),
        ("count=8", 8),
        ("rate=1e-3", 0.001),
        ("rate=2", 2.0),
        ("flag=true", True),
        ("names=[a, 1]", ["a", 1]),
        ("labels={pool: a100}", {"pool": "a100"}),
        ("size=2", 2),
    ],
)
def test_a_pair_is_read_by_the_declared_type(pair: str, expected: Any) -> None:
    (value,) = gather(DEFINITIONS, None, [pair]).values()
    assert (value, type(value)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("count=2.5", "count is 2.5; it must be a whole number."),
        ("count=true", "count is True; it must be a whole number."),
        ("count=many", "count is 'many'; it must be a whole number."),
        ("rate=fast", "rate is 'fast'; it must be a number."),
        ("rate=.nan", "rate is nan; it must be a number."),
        ("flag=1", "flag is 1; it must be true or false."),
        ("names={a: b}", "names is {'a': 'b'}; it must be a list."),
        ("names=[a", "names is '[a'; it must be a list."),
        ("labels=a", "labels is 'a'; it must be a mapping."),
        ("size=3", "size is 3; allowed: 1, 2"),
        ("lables={}", "unknown parameter 'lables'; did you mean 'labels'?"),
    ],
)
def test_what_does_not_fit_is_told(pair: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gather(DEFINITIONS, None, [pair])
    assert message in str(caught.value)


def test_pairs_win_over_the_file_and_what_is_required_must_be_in_one_of_them(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("count: 1\nflag: false\n")
    required = {"count": {"parameterType": "NUMBER_INTEGER", "description": "How many."}, "flag": DEFINITIONS["flag"]}
    assert gather(required, file, ["count=2"]) == {"count": 2, "flag": False}
    with pytest.raises(ConfigError, match=r"missing parameter count: How many\. Give it as count=VALUE or"):
        gather(required, None, ["flag=true"])


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    for text in ("- 1", "a: [", "nonsense"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"params\.yaml"):
            gather(DEFINITIONS, file, [])
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        gather(DEFINITIONS, tmp_path / "missing.yaml", [])
