"""``shellv models``: what is registered, who is champion and why, and what a version was made from."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from shellv_core.errors import TrackingError

if TYPE_CHECKING:
    from shellv_core.tracking.lineage import Ancestor
    from shellv_core.tracking.registry import ModelRegistry, RegisteredVersion

DESCRIPTION = """\
Registered models, the versions of one, or one version with all that it was made from:

  shellv models
  shellv models shellv-nano
  shellv models shellv-nano champion --verify

A version's lineage is followed through the manifests, from its model back to the data; exit code 1 if an output is gone
or is not what was used.
"""
_METRIC_COLUMNS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is shown."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", nargs="?", metavar="NAME", help="a registered model")
    parser.add_argument("version", nargs="?", metavar="VERSION", help="one version: a number or an alias")
    parser.add_argument("--verify", action="store_true", help="of a version, compare every byte with the manifests")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def main(args: argparse.Namespace) -> int:
    """Show; returns the exit code.

    Raises:
        TrackingError: if there is no such model or version, or MLflow does not answer.
    """
    if args.version is None:
        if args.verify:
            raise TrackingError("--verify is of one version: shellv models NAME VERSION --verify.")
        records, text = (_models(), _models_text) if args.name is None else (_versions(args.name), _versions_text)
        _write(records, args.json, text)
        return 0
    with _storage(args.name, args.version) as (registry, version):
        record, sound = _version(registry, version, args.verify)
    _write(record, args.json, _version_text)
    return 0 if sound else 1


def _models() -> list[dict[str, Any]]:
    from shellv_core.tracking.registry import CANDIDATE, CHAMPION, ModelRegistry, registered_models

    records = []
    for name in registered_models():
        registry = ModelRegistry(name)
        aliases, versions = registry.aliases(), registry.versions()
        records.append({
            "name": name,
            "num_versions": len(versions),
            "champion": aliases.get(CHAMPION),
            "candidate": aliases.get(CANDIDATE),
            "last_registered": _when(max((each.created for each in versions), default=0)),
        })  # fmt: skip
    return records


def _versions(name: str) -> list[dict[str, Any]]:
    registry = _open(name)
    aliases = registry.aliases()
    return [_summary(each, aliases) for each in registry.versions()]


def _version(registry: ModelRegistry, version: RegisteredVersion, every_byte: bool) -> tuple[dict[str, Any], bool]:
    from shellv_core.storage import InputReference
    from shellv_core.tracking.championship import moves
    from shellv_core.tracking.lineage import ancestry, look_up
    from shellv_core.tracking.registry import EVALUATION_SHA256_TAG, EVALUATION_TAG, SHA256_TAG

    sha256 = version.tags.get(SHA256_TAG)
    if sha256 is None:
        raise TrackingError(
            f"version {version.version} of {version.name!r} was not registered by promote: it has no tag {SHA256_TAG}."
        )
    chain = ancestry(version.model_uri, sha256)
    lineage = [each.record() for each in chain]
    checked = list(chain)
    evaluation: dict[str, Any] | None = None
    if uri := version.tags.get(EVALUATION_TAG):
        found = look_up(InputReference(uri=uri, content_sha256=version.tags.get(EVALUATION_SHA256_TAG, "")))
        of = found.inputs.get("model")
        evaluation = found.record() | {"metrics": found.manifest.metrics if found.manifest else {}}
        if of is not None and of.content_sha256 != sha256:
            evaluation["problem"] = f"it is of another model, at {of.uri}"
        checked.append(found)
    if every_byte:
        for ancestor, record in zip(checked, [*lineage, *([evaluation] if evaluation else [])], strict=True):
            if damage := _damage(ancestor):
                record["problem"] = "; ".join(filter(None, [record.get("problem"), *damage]))
    sound = not any("problem" in each for each in [*lineage, *([evaluation] if evaluation else [])])
    record = _summary(version, registry.aliases()) | {
        "tags": dict(version.tags),
        "lineage": lineage,
        "evaluation": evaluation,
        "every_byte_verified": every_byte,
        "sound": sound,
        "moves": [asdict(move) for move in moves(registry)],
    }
    return record, sound


def _damage(ancestor: Ancestor) -> list[str]:
    from shellv_core.data.verification import verify
    from shellv_core.storage import InputDirectory

    if ancestor.manifest is None:
        return []
    return [str(each) for each in verify(InputDirectory(ancestor.uri))]


def _summary(version: RegisteredVersion, aliases: dict[str, str]) -> dict[str, Any]:
    from shellv_core.tracking.championship import OVERRIDE_TAG, PREVIOUS_TAG, ROLLED_BACK_TAG
    from shellv_core.tracking.registry import DECISION_TAG, METRIC_PREFIX

    tags = version.tags
    return {
        "name": version.name,
        "version": version.version,
        "aliases": sorted(alias for alias, number in aliases.items() if number == version.version),
        "decision": tags.get(DECISION_TAG),
        "override": tags.get(OVERRIDE_TAG),
        "rolled_back": tags.get(ROLLED_BACK_TAG),
        "took_over_from": tags.get(PREVIOUS_TAG) or None,
        "metrics": {
            key.removeprefix(METRIC_PREFIX): float(value)
            for key, value in sorted(tags.items())
            if key.startswith(METRIC_PREFIX)
        },
        "registered": _when(version.created),
        "model_uri": version.model_uri,
    }


def _models_text(models: list[dict[str, Any]]) -> str:
    from shellv_core.evaluation.table import markdown

    if not models:
        return "No model is registered; run promote first.\n"
    header = ["model", "versions", "champion", "candidate", "last registered"]
    rows = [[str(value or "") for value in each.values()] for each in models]
    return "\n".join(markdown([header, *rows])) + "\n"


def _versions_text(versions: list[dict[str, Any]]) -> str:
    from shellv_core.evaluation.table import markdown

    if not versions:
        return "It has no version.\n"
    known = [name for each in versions for name in each["metrics"]]
    metrics = sorted(sorted(set(known)), key=known.count, reverse=True)[:_METRIC_COLUMNS]
    header = ["version", "aliases", "verdict", *metrics, "registered", "model"]
    rows = [
        [
            each["version"],
            ", ".join(each["aliases"]),
            _verdict(each),
            *(f"{each['metrics'][name]:.4f}" if name in each["metrics"] else "" for name in metrics),
            each["registered"],
            each["model_uri"],
        ]
        for each in versions
    ]
    return "\n".join(markdown([header, *rows])) + "\n"


def _version_text(record: dict[str, Any]) -> str:
    aliases = f" ({', '.join(record['aliases'])})" if record["aliases"] else ""
    facts = {
        "model": record["model_uri"],
        "registered": record["registered"],
        "verdict": _verdict(record),
        "against the gate": record["override"],
        "rolled back": record["rolled_back"],
        "took over from": record["took_over_from"] and f"version {record['took_over_from']}",
        "metrics": ", ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items()),
    }
    lines = [f"{record['name']} version {record['version']}{aliases}"]
    lines += [f"  {name:<16}  {value}" for name, value in facts.items() if value]
    lines += [f"  {'':<16}  {reason}" for reason in record["tags"].get("shellv.reasons", "").splitlines()]
    lines += ["", "made from, the data first:"]
    for made in record["lineage"]:
        lines += _made_text(made)
    if record["evaluation"]:
        lines += ["judged by:", *_made_text(record["evaluation"])]
    lines += ["", "moves of the champion:"]
    for move in record["moves"]:
        versions = f"{move['before'] or 'none'} -> {move['after']}"
        lines.append(f"  {move['time'][:19]}Z  {versions}  {move['kind']} by {move['by']}: {move['reason']}")
    if not record["moves"]:
        lines.append("  none is recorded")
    what = "every byte is" if record["every_byte_verified"] else "all manifests are"
    lines += ["", f"{what} as recorded" if record["sound"] else "NOT as recorded: see the problems above"]
    return "\n".join(lines) + "\n"


def _made_text(made: dict[str, Any]) -> Iterator[str]:
    yield f"  {made['stage']:<18}  {made['uri']}"
    names = {
        "content_sha256": "content",
        "code_sha256": "code",
        "library_version": "shellv",
        "commit": "commit",
        "image": "image",
        "pipeline_run": "pipeline run",
        "mlflow_run": "MLflow run",
    }
    short = {key: value[:12] if key.endswith("sha256") else value for key, value in made.items() if key in names}
    yield f"  {'':<18}  " + ", ".join(f"{text} {short[key]}" for key, text in names.items() if short.get(key))
    if "problem" in made:
        yield f"  {'':<18}  PROBLEM: {made['problem']}"


def _verdict(record: dict[str, Any]) -> str:
    decision = "promoted against the gate" if record["override"] else record["decision"] or ""
    return f"{decision}, rolled back" if record["rolled_back"] else decision


def _when(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC") if milliseconds else ""


def _write(record: Any, as_json: bool, text: Any) -> None:
    sys.stdout.write(json.dumps(record, indent=1) + "\n" if as_json else text(record))


def _open(name: str) -> ModelRegistry:
    from shellv_core.config import nearest
    from shellv_core.tracking.registry import ModelRegistry, registered_models

    names = registered_models()
    if name not in names:
        raise TrackingError(
            f"no model {name!r} is registered; {nearest(name, names) if names else 'there is none: run promote first'}"
        )
    return ModelRegistry(name)


@contextlib.contextmanager
def _storage(name: str, number: str) -> Iterator[tuple[ModelRegistry, RegisteredVersion]]:
    """The model and the version with this number or alias, and the store that holds it."""
    from shellv_core.storage.seaweedfs import embedded_s3, external_s3_configured

    registry = _open(name)
    aliases, versions = registry.aliases(), registry.versions()
    version = next((each for each in versions if each.version == aliases.get(number, number)), None)
    if version is None:
        known = ", ".join([*aliases, *(each.version for each in versions)])
        raise TrackingError(f"{name!r} has no version {number!r}; it has {known or 'none'}.")
    own_store = version.model_uri.startswith("s3://") and not external_s3_configured()
    with embedded_s3() if own_store else contextlib.nullcontext():
        yield registry, version
