"""Server-side apply as the API server does it, for objects without a schema: who owns which field, and who may set it.

A field is a path of keys. Items of the lists below are told apart by a key; any other list is one value.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

LIST_KEYS = {"containers": "name", "env": "name", "volumes": "name", "ports": "containerPort", "conditions": "type"}
Path = tuple[Any, ...]
#: They name the object; nobody owns them.
UNOWNED = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace")}


class Conflict(Exception):
    """Others own fields that were to be set to another value."""

    def __init__(self, fields: dict[Path, str]) -> None:
        named = ", ".join(f'conflict with "{owner}": .{".".join(map(str, path))}' for path, owner in fields.items())
        super().__init__(f"Apply failed with {len(fields)} conflict(s): {named}")


def owned_fields(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of an object that somebody can own, with their values."""
    if path in UNOWNED or path[:1] == ("status",):
        return
    if isinstance(value, dict):
        for key, each in value.items():
            yield from owned_fields(each, (*path, key))
        if not value:
            yield path, {}
    elif isinstance(value, list) and path and path[-1] in LIST_KEYS:
        key = LIST_KEYS[path[-1]]
        for item in value:
            yield from owned_fields(item, (*path, (key, item[key])))
    else:
        yield path, value


def apply(
    live: dict[str, Any], owners: dict[str, set[Path]], manager: str, wanted: dict[str, Any], force: bool
) -> dict[str, Any]:
    """The object after `manager` applied `wanted`; `owners` is changed along.

    Raises:
        Conflict: without `force`, if another manager owns a field that differs.
    """
    live = copy.deepcopy(live)
    present, new = dict(owned_fields(live)), dict(owned_fields(wanted))
    conflicts = {
        path: owner
        for owner, paths in owners.items()
        for path in paths & set(new)
        if owner != manager and path in present and present[path] != new[path]
    }
    if conflicts and not force:
        raise Conflict(conflicts)
    for path, owner in conflicts.items():
        owners[owner].discard(path)
    dropped = owners.get(manager, set()) - set(new)
    owners[manager] = set(new)
    # An item's key goes last, and with it the item.
    for path in sorted(dropped, key=lambda each: isinstance(each[-2], tuple) and each[-1] == each[-2][0]):
        if not any(path in paths for paths in owners.values()):
            _remove(live, path)
    for path, value in new.items():
        _set(live, path, value)
    return live


def _set(target: Any, path: Path, value: Any) -> None:
    step, *rest = path
    if isinstance(step, tuple):
        key, name = step
        item = next((each for each in target if each.get(key) == name), None)
        if item is None:
            item = {key: name}
            target.append(item)
        _set(item, tuple(rest), value)
    elif rest:
        empty: Any = [] if isinstance(rest[0], tuple) else {}
        _set(target.setdefault(step, empty), tuple(rest), value)
    elif value != {}:
        target[step] = value
    else:
        # An empty map owns that there is one, and nothing in it.
        target.setdefault(step, {})


def _remove(target: Any, path: Path) -> None:
    step, *rest = path
    if isinstance(step, tuple):
        key, name = step
        item = next((each for each in target if each.get(key) == name), None)
        if item is not None and tuple(rest) != (key,):
            _remove(item, tuple(rest))
        elif item == {key: name}:
            target.remove(item)
    elif rest:
        if step in target:
            _remove(target[step], tuple(rest))
            if not target[step]:
                del target[step]
    else:
        target.pop(step, None)
