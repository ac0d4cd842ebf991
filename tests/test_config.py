from __future__ import annotations

from typing import ClassVar

import pytest
from pydantic import Field

from shellv_core.config import Config, apply_overrides, effective_values, fingerprint, merge_values, read_yaml
from shellv_core.errors import ConfigError


class Inner(Config):
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


class Outer(Config):
    steps: int = Field(10, ge=1)
    inner: Inner = Inner()
    optional: Inner | None = None
    name: str = "a"


def test_overrides_reach_nested_fields_and_keep_types() -> None:
    config = apply_overrides(
        Outer(), ["steps=3", "inner.learning_rate=2e-5", "inner.betas=[0.8, 0.9]", "name=s3://b/k=v"]
    )
    assert config == Outer(steps=3, inner=Inner(learning_rate=2e-5, betas=(0.8, 0.9)), name="s3://b/k=v")


def test_override_of_an_absent_optional_section_makes_it() -> None:
    assert apply_overrides(Outer(), ["optional.learning_rate=1"]).optional == Inner(learning_rate=1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "unknown key 'stepz'.*did you mean 'steps'"),
        ("inner.learning_rat=3", "unknown key 'inner.learning_rat'.*did you mean 'learning_rate'"),
        ("steps=0", "steps=0: .*greater than or equal to 1"),
        ("steps=many", "steps='many': .*integer"),
        ("steps", "not of the form key=value"),
    ],
)
def test_a_bad_override_names_key_value_and_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(Outer(), [override])


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer().steps = 5  # type: ignore[misc]


def test_yaml_states_only_differences(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("inner: {learning_rate: 0.5}\n")
    assert merge_values(Outer(), read_yaml(path)) == Outer(inner=Inner(learning_rate=0.5))
    with pytest.raises(ConfigError, match=r"unknown key 'innner'.*'inner'"):
        merge_values(Outer(), {"innner": {}})
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path / "none.yaml")
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="list"):
        read_yaml(path)


def test_fingerprint_depends_on_values_and_not_on_key_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(Outer()) == fingerprint(Outer().model_dump())
    assert fingerprint(Outer()) != fingerprint(Outer(steps=11))
    assert fingerprint("a", "b") != fingerprint("ab")


def test_settings_without_effect_do_not_count_at_any_depth() -> None:
    class Leaf(Config):
        without_effect: ClassVar[frozenset[str]] = frozenset({"num_workers"})
        num_workers: int = 1
        size: int = 2

    class Root(Config):
        without_effect: ClassVar[frozenset[str]] = frozenset({"log_every"})
        log_every: int = 5
        leaf: Leaf = Leaf()
        absent: Leaf | None = None

    assert effective_values(Root()) == {"leaf": {"size": 2}, "absent": None}
    assert effective_values(Root(absent=Leaf(num_workers=3))) == {"leaf": {"size": 2}, "absent": {"size": 2}}
