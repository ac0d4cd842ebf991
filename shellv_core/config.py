"""Frozen, typed settings with overrides, and their fingerprint.

Knows nothing of any stage. A default is written once, beside the field that it belongs to; YAML files and
``key=value`` overrides state only differences.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shellv_core.errors import ConfigError


class Config(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error.

    Attributes:
        without_effect: names of settings that do not change what comes out; see `effective_values`.
    """

    without_effect: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


C = TypeVar("C", bound=Config)


def build_config(config_class: type[C], values: Mapping[str, Any]) -> C:
    """Validate `values` as a `config_class`.

    Raises:
        ConfigError: naming every bad key with the value received and what is allowed; an unknown key comes with the
            nearest known name.
    """
    try:
        return config_class.model_validate(dict(values))
    except ValidationError as error:
        faults = "; ".join(_describe(config_class, fault) for fault in error.errors())
        raise ConfigError(f"{config_class.__name__}: {faults}.") from None


def apply_overrides(config: C, overrides: Iterable[str]) -> C:
    """Return `config` with ``key=value`` strings applied; keys are dotted, values are YAML scalars, lists or maps.

    Raises:
        ConfigError: if an override has no ``=``, its key is unknown (the nearest name is given) or its value is not
            allowed.
    """
    values = config.model_dump()
    for override in overrides:
        _apply(type(config), values, override)
    return build_config(type(config), values)


def override_faults(config: Config, overrides: Iterable[str]) -> list[str]:
    """All that `apply_overrides` would refuse, where it stops at the first unknown key."""
    values, faults = config.model_dump(), []
    for override in overrides:
        try:
            _apply(type(config), values, override)
        except ConfigError as error:
            faults.append(str(error))
    try:
        build_config(type(config), values)
    except ConfigError as error:
        faults.append(str(error))
    return faults


def _apply(config_class: type[Config], values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, for example seed=1.")
    _set(config_class, values, key, _parse_value(key, text))


def merge_values(config: C, values: Mapping[str, Any]) -> C:
    """Return `config` with the nested mapping `values` (a YAML file's content) laid over it."""
    return build_config(type(config), _merge(config.model_dump(), values))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: if the file is missing or does not hold a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, but a mapping of settings is expected.")
    return content


def fingerprint(*parts: Any) -> str:
    """SHA-256 (64 hex digits) over the canonical JSON of `parts`; configs count by their values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(canonical_json(part))
        digest.update(b"\0")
    return digest.hexdigest()


def effective_values(config: Config) -> dict[str, Any]:
    """The values of `config`, in JSON's types, less those that its class or an inner one names as without effect."""
    values = config.model_dump(mode="json", exclude=set(config.without_effect))
    inner = {name: getattr(config, name) for name in values}
    return values | {name: effective_values(each) for name, each in inner.items() if isinstance(each, Config)}


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, so that equal values give equal bytes."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence tail that names the nearest of `known`, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(names)}"


def _parse_value(key: str, text: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        # YAML 1.1 reads 1e-3 as a string; users mean a number.
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _set(config_class: type[BaseModel], values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    level: Any = values
    level_class: type[BaseModel] | None = config_class
    for depth, name in enumerate([*parents, last]):
        if level_class is not None and name not in level_class.model_fields:
            where = ".".join(key.split(".")[:depth]) or config_class.__name__
            hint = nearest(name, level_class.model_fields)
            raise ConfigError(f"unknown key {key!r}: {where} has no {name!r}; {hint}")
        if depth == len(parents):
            level[name] = value
            return
        level_class = _nested_class(level_class, name)
        if not isinstance(level.get(name), dict):
            level[name] = {}
        level = level[name]


def _nested_class(config_class: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    if config_class is None:
        return None
    annotation = config_class.model_fields[name].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _merge(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return merged


def _describe(config_class: type[BaseModel], fault: Any) -> str:
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        level: type[BaseModel] | None = config_class
        for name in location[:-1]:
            level = _nested_class(level, name) if level and name in level.model_fields else None
        hint = f"; {nearest(location[-1], level.model_fields)}" if level else ""
        return f"unknown key {key!r}{hint}"
    if fault["type"] == "missing":
        return f"{key} is required; give it as {key}=VALUE"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if not key or isinstance(fault["input"], Mapping):
        return f"{key}: {message}" if key else message
    return f"{key}={fault['input']!r}: {message}"
