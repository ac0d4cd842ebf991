"""A run's parameters, held against the compiled pipeline before anything goes to a server."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shellv_core.config import nearest, read_yaml
from shellv_core.errors import ConfigError

TYPES = {
    "STRING": "text",
    "NUMBER_INTEGER": "a whole number",
    "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false",
    "LIST": "a list",
    "STRUCT": "a mapping",
}


def gather(definitions: Mapping[str, Mapping[str, Any]], file: Path | None, pairs: Sequence[str]) -> dict[str, Any]:
    """The values of a parameters file and of ``key=value`` arguments, which win, each of the type that is declared.

    Args:
        definitions: the pipeline's ``inputDefinitions.parameters``.
        file: YAML file with a mapping of names to values.
        pairs: ``key=value``; a list or mapping is written as YAML, ``'overrides=[finetune.hacl.weight=0.5]'``.

    Returns:
        The given values only; the server knows the defaults.

    Raises:
        ConfigError: for an unknown name, a wrong type, a value that is not allowed or a missing parameter.
    """
    values: dict[str, Any] = {}
    for name, value in (read_yaml(file) if file else {}).items():
        values[name] = _checked(name, value, _definition(definitions, name))
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise ConfigError(f"parameter {pair!r}: write it as name=value.")
        definition = _definition(definitions, name)
        values[name] = _checked(name, _parsed(text, definition["parameterType"]), definition)
    missing = [name for name, each in definitions.items() if not _optional(each) and name not in values]
    if missing:
        told = "; ".join(f"{name}: {definitions[name].get('description', 'required')}" for name in missing)
        raise ConfigError(f"missing parameter {told} Give it as {missing[0]}=VALUE or in --params.")
    _check_settings(values, definitions)
    return values


def _definition(definitions: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    if name not in definitions:
        raise ConfigError(f"unknown parameter {name!r}; {nearest(name, definitions)}")
    return definitions[name]


def _optional(definition: Mapping[str, Any]) -> bool:
    return bool(definition.get("isOptional")) or "defaultValue" in definition


def _parsed(text: str, kind: str) -> Any:
    import yaml

    if kind == "STRING":
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if kind == "NUMBER_DOUBLE" and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text.
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _checked(name: str, value: Any, definition: Mapping[str, Any]) -> Any:
    kind = definition["parameterType"]
    fits = {
        "STRING": isinstance(value, str),
        "NUMBER_INTEGER": isinstance(value, int) and not isinstance(value, bool),
        "NUMBER_DOUBLE": isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
        "BOOLEAN": isinstance(value, bool),
        "LIST": isinstance(value, list),
        "STRUCT": isinstance(value, dict),
    }
    if not fits.get(kind, True):
        quote = f" Put it in quotes: {name}: '{value}'." if kind == "STRING" and isinstance(value, int | float) else ""
        raise ConfigError(f"parameter {name} is {value!r}; it must be {TYPES[kind]}.{quote}")
    literals = definition.get("literals")
    if literals and value not in literals:
        raise ConfigError(f"parameter {name} is {value!r}; {nearest(str(value), map(str, literals))}.")
    return float(value) if kind == "NUMBER_DOUBLE" else value


def _check_settings(values: dict[str, Any], definitions: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the settings of all stages, as each task would."""
    from shellv_core.stages import STAGE_NAMES
    from shellv_core.stages.presets import stage_config

    if "preset" not in definitions:
        return
    overrides = values.get("overrides", [])
    strange = [each for each in overrides if not isinstance(each, str)]
    if strange:
        raise ConfigError(f"parameter overrides holds {strange[0]!r}; each must be text, 'STAGE.key=value'.")
    stage_config(str(values.get("preset", definitions["preset"].get("defaultValue"))), STAGE_NAMES[0], overrides)
