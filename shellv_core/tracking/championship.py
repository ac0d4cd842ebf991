"""Who is champion of a registered model, who was before, and why: every move of the alias leaves a record.

A version that takes over keeps the number of the one that it took over from; one that was rolled back keeps the reason,
and comes back by an explicit decision alone. The model itself has a tag for each move. All of this is written before
the alias moves, so that a process that is killed leaves nothing to be made up: whoever comes next does the same again.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from shellv_core.errors import PromotionError
from shellv_core.tracking.lineage import lineage_from_environment
from shellv_core.tracking.lock import exclusive
from shellv_core.tracking.registry import CHAMPION, ModelRegistry, RegisteredVersion

PREVIOUS_TAG = "shellv.previous_champion"  # the version that a champion took over from; empty for the first
ROLLED_BACK_TAG = "shellv.rolled_back"  # why a version is champion no longer
OVERRIDE_TAG = "shellv.override"  # why a version was promoted though it failed the gate
MOVE_PREFIX = "shellv.move."  # on the model; then the time in UTC

Kind = Literal["promotion", "override", "rollback"]


@dataclass(frozen=True)
class Move:
    """The alias `champion` moved.

    Attributes:
        before, after: versions; `before` is "" where there was no champion.
        by: the workflow run, or the user and machine.
        time: ISO 8601, UTC; its order is that of the moves.
    """

    kind: Kind
    before: str
    after: str
    by: str
    reason: str
    time: str


def hand_over(
    registry: ModelRegistry,
    before: str,
    after: str,
    kind: Kind,
    reason: str,
    still_held: Callable[[], None] = lambda: None,
) -> Move:
    """Let `after` be champion instead of `before`, with the record of it; call it under the model's lock.

    Raises:
        TrackingError: if MLflow refuses, or `still_held` raises.
    """
    move = Move(kind, before, after, actor(), reason, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
    if kind == "rollback":
        registry.set_tags(before, {ROLLED_BACK_TAG: f"{move.time} by {move.by}: {reason}"})
    else:
        registry.set_tags(after, {PREVIOUS_TAG: before})
        registry.delete_tag(after, ROLLED_BACK_TAG)
    registry.set_model_tag(
        MOVE_PREFIX + move.time, json.dumps({key: value for key, value in asdict(move).items() if key != "time"})
    )
    still_held()
    registry.set_alias(CHAMPION, after)
    return move


def roll_back(
    registry: ModelRegistry, to: str | None, reason: str, check: Callable[[RegisteredVersion], None]
) -> tuple[Move, RegisteredVersion]:
    """Let the version that the champion took over from be champion again, or the version `to`.

    Args:
        check: raises if that version cannot be served any more; nothing has changed then.

    Raises:
        PromotionError: if there is no champion, no version to go back to, or the champion has changed in the meantime.
        TrackingError: if MLflow does not answer or refuses.
    """
    champion = registry.find(CHAMPION)
    if champion is None:
        raise PromotionError(f"{registry.name!r} has no champion, so that there is nothing to roll back.")
    target = _explicit(registry, champion, to) if to else _previous(registry, champion)
    check(target)
    with exclusive(registry.name) as still_held:
        now = registry.find(CHAMPION)
        if now is None or now.version != champion.version:
            raise PromotionError(
                f"the champion of {registry.name!r} has changed from version {champion.version} to"
                f" {now.version if now else 'none'} in the meantime. Look at it, and run this again if need be."
            )
        move = hand_over(registry, champion.version, target.version, "rollback", reason, still_held)
    return move, target


def moves(registry: ModelRegistry) -> list[Move]:
    """All recorded moves of the alias, the first one first."""
    tags = registry.model_tags()
    found = [(key.removeprefix(MOVE_PREFIX), value) for key, value in tags.items() if key.startswith(MOVE_PREFIX)]
    return [Move(**json.loads(value), time=time) for time, value in sorted(found)]


def actor() -> str:
    """Who acts, for the record: the workflow run, else the user and the machine."""
    run = lineage_from_environment().get("pipeline_run")
    if run:
        return f"pipeline run {run}"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())  # Containers know no names.
    return f"{user}@{socket.gethostname()}"


def _explicit(registry: ModelRegistry, champion: RegisteredVersion, to: str) -> RegisteredVersion:
    versions = {each.version: each for each in registry.versions()}
    if to not in versions:
        raise PromotionError(
            f"{registry.name!r} has no version {to!r}; it has {', '.join(versions)}. shellv models {registry.name}"
            " shows them."
        )
    if to == champion.version:
        raise PromotionError(f"version {to} of {registry.name!r} is the champion already.")
    return versions[to]


def _previous(registry: ModelRegistry, champion: RegisteredVersion) -> RegisteredVersion:
    instead = f"Name another with --to VERSION; shellv models {registry.name} shows them."
    number = champion.tags.get(PREVIOUS_TAG, "")
    if not number:
        raise PromotionError(
            f"version {champion.version} of {registry.name!r} took over from none, so that there is none to go back to."
            f" {instead}"
        )
    target = next((each for each in registry.versions() if each.version == number), None)
    if target is None:
        raise PromotionError(
            f"version {number} of {registry.name!r}, which version {champion.version} took over from, is deleted."
            f" {instead}"
        )
    if ROLLED_BACK_TAG in target.tags:
        raise PromotionError(
            f"version {number} of {registry.name!r}, which version {champion.version} took over from, was itself rolled"
            f" back ({target.tags[ROLLED_BACK_TAG]}). {instead}"
        )
    return target
