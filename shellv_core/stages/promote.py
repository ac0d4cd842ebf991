"""Registers a model and decides, on its evaluation, whether it becomes the champion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from shellv_core.stages.runner import StageConfig, StageResult, StageRun, run_stage

if TYPE_CHECKING:
    from shellv_core.evaluation.statistics import PairedComparison
    from shellv_core.storage import InputDirectory, Manifest
    from shellv_core.tracking.championship import Kind
    from shellv_core.tracking.gate import Thresholds, Verdict
    from shellv_core.tracking.registry import ModelRegistry, RegisteredVersion

MAX_TAG_LENGTH = 4900  # MLflow keeps 5000 characters
MAX_DECISIONS = 5  # as often as others may take over while this stage compares


class PromoteConfig(StageConfig):
    """Settings of promote."""

    evaluation_uri: str = ""  # output of evaluate for this model
    model_uri: str = ""  # output of merge_lora
    registered_model: str = Field(default="shellv", pattern=r"^[A-Za-z0-9._-]+$")
    thresholds_uri: str = "default"  # YAML file, or the name of one that comes with the library: default, smoke
    override_reason: str = Field(default="", max_length=1000)  # promote even if the gate fails, and record why


def run(config: PromoteConfig) -> StageResult:
    """Register the model as `candidate`; if it passes the gate, let `champion` name it too.

    A rejected candidate is a result, not a fault: the stage succeeds with ``promoted`` 0 and the reasons in the
    verdict, the alias `champion` stays where it is, and deploy serves that. A version that was rolled back fails the
    gate; `override_reason` promotes what fails, and stays on record with what it failed. An earlier verdict about the
    same model and evaluation stands as long as the thresholds are the same and the registry's aliases are as it left
    them; a run that was cut off comes to the verdict that it would have come to. Where another model becomes champion
    in the meantime, the candidate is compared with that one.

    Output: ``verdict.json``. Metrics: ``promoted`` and ``version``. Details: the verdict, with version and aliases, and
    the lineage: every output that the model was made from, back to the data.

    Raises:
        PromotionError: if the evaluation is of another model, the thresholds name an unknown metric, or other models
            become champion all the time.
        TrackingError: if MLflow does not answer or refuses.
    """
    inputs = {"evaluation": config.evaluation_uri, "model": config.model_uri}

    def stands(committed: Manifest) -> bool:
        return _stands(config, committed)

    return run_stage("promote", config, _body, inputs=inputs, code=("tracking",), reuse=stands)


def _stands(config: PromoteConfig, committed: Manifest) -> bool:
    from shellv_core.tracking.registry import CANDIDATE, CHAMPION, ModelRegistry

    if _read_thresholds(config.thresholds_uri).model_dump(mode="json") != committed.details["thresholds"]:
        return False
    registry = ModelRegistry(config.registered_model)
    now = [found.version if found else None for found in map(registry.find, (CANDIDATE, CHAMPION))]
    return now == [committed.details["version"], committed.details["champion_version"]]


def _body(run: StageRun[PromoteConfig]) -> None:
    import json

    from shellv_core.errors import PromotionError
    from shellv_core.tracking.championship import hand_over
    from shellv_core.tracking.lock import exclusive
    from shellv_core.tracking.registry import CANDIDATE, CHAMPION, ModelRegistry

    config, evaluation, model = run.config, run.inputs["evaluation"], run.inputs["model"]
    judged = evaluation.manifest.inputs.get("model")
    if judged is None or judged.content_sha256 != model.content_sha256:
        raise PromotionError(
            f"{evaluation.uri} is not an evaluation of the model at {model.uri}, but of"
            f" {judged.uri if judged else 'none'}. Give the evaluate stage's output for this model."
        )
    thresholds = _read_thresholds(config.thresholds_uri)
    registry = ModelRegistry(config.registered_model)
    tags, lineage = _description(run, thresholds)
    for _ in range(MAX_DECISIONS):
        # Decide before registering: thresholds that do not fit leave the registry as it was.
        champion = registry.find(CHAMPION)
        verdict, rival = _decide(run, registry, champion, thresholds)
        is_champion = champion is not None and _is_of(champion, model)
        promoted = verdict.promoted or bool(config.override_reason)
        with exclusive(registry.name) as still_held:
            found = registry.find(CHAMPION)
            if (found and found.version) != (champion and champion.version):
                continue
            registered = registry.register(
                model.uri, model.manifest.fingerprint, model.content_sha256, tags, run.tracked.run_id
            )
            registry.set_alias(CANDIDATE, registered.version)
            if promoted and not is_champion:
                kind: Kind = "promotion" if verdict.promoted else "override"
                reason = "passed the gate" if verdict.promoted else config.override_reason
                hand_over(registry, champion.version if champion else "", registered.version, kind, reason, still_held)
            now_champion = registry.find(CHAMPION)
        break
    else:
        raise PromotionError(
            f"other models became champion of {registry.name!r} {MAX_DECISIONS} times while this one was compared with"
            " the champion. Run promote again when they are done."
        )
    run.details.update(
        registered_model=registered.name,
        version=registered.version,
        model_uri=registered.model_uri,
        decision="promoted" if promoted else "rejected",
        promoted=promoted,
        overridden=promoted and not verdict.promoted,
        reasons=verdict.reasons,
        thresholds=thresholds.model_dump(mode="json"),
        champion_version=now_champion.version if now_champion else None,
        compared_with_version=rival.version if rival else None,
        lineage=lineage,
    )
    run.metrics.update(promoted=float(promoted), version=float(registered.version))
    _record(run, registry)
    run.output.put_bytes((json.dumps(run.details, indent=1) + "\n").encode(), "verdict.json")


def _is_of(version: RegisteredVersion, model: InputDirectory) -> bool:
    from shellv_core.tracking.registry import SHA256_TAG

    return version.tags.get(SHA256_TAG) == model.content_sha256


def _decide(
    run: StageRun[PromoteConfig], registry: ModelRegistry, champion: RegisteredVersion | None, thresholds: Thresholds
) -> tuple[Verdict, RegisteredVersion | None]:
    """The verdict, and the version that the candidate was compared with."""
    from shellv_core.tracking.championship import PREVIOUS_TAG, ROLLED_BACK_TAG
    from shellv_core.tracking.gate import Check, Verdict, decide

    evaluation, model = run.inputs["evaluation"], run.inputs["model"]
    rival, rolled_back = champion, None
    if champion is not None and _is_of(champion, model):
        # Not with itself: with the one that it took over from.
        previous = champion.tags.get(PREVIOUS_TAG)
        rival = registry.get(previous) if previous else None
    else:
        left = (each for each in registry.versions() if _is_of(each, model) and ROLLED_BACK_TAG in each.tags)
        rolled_back = next(left, None)
    others, paired = (None, {}) if rival is None else _compare(run, rival, thresholds)
    verdict = decide(evaluation.manifest.metrics, others, thresholds, paired)
    if rolled_back is not None:
        reason = (
            f"version {rolled_back.version} was rolled back ({rolled_back.tags[ROLLED_BACK_TAG]}); it comes back with"
            " override_reason alone"
        )
        verdict = Verdict(False, (*verdict.checks, Check(False, reason)))
    return verdict, rival


def _description(run: StageRun[PromoteConfig], thresholds: Thresholds) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The version's tags (its evaluation, the metrics that the gate looks at, its lineage), and its lineage whole."""
    from shellv_core.tracking.lineage import ancestry, lineage_tags
    from shellv_core.tracking.registry import EVALUATION_SHA256_TAG, EVALUATION_TAG, METRIC_PREFIX

    evaluation, model = run.inputs["evaluation"], run.inputs["model"]
    ancestors = ancestry(model.uri, model.content_sha256)
    values = evaluation.manifest.metrics
    metrics = {f"{METRIC_PREFIX}{name}": f"{values[name]:.4f}" for name in thresholds.metrics() if name in values}
    judged = {EVALUATION_TAG: evaluation.uri, EVALUATION_SHA256_TAG: evaluation.content_sha256}
    tags = {**judged, **metrics, **lineage_tags(ancestors)}
    return tags, [ancestor.record() for ancestor in ancestors]


def _read_thresholds(uri: str) -> Thresholds:
    from importlib.resources import files

    from shellv_core.config import nearest
    from shellv_core.errors import PromotionError
    from shellv_core.storage import read_bytes
    from shellv_core.tracking.gate import read_thresholds

    if "://" in uri:
        return read_thresholds(read_bytes(uri).decode("utf-8"), uri)
    shipped = {
        path.name.removesuffix(".yaml"): path
        for path in files("shellv_core.tracking").joinpath("gates").iterdir()
        if path.name.endswith(".yaml")
    }
    if uri not in shipped:
        raise PromotionError(
            f"thresholds_uri={uri!r} is neither an address (s3://, file://) nor the name of thresholds that come with"
            f" the library; {nearest(uri, shipped)}"
        )
    return read_thresholds(shipped[uri].read_text(encoding="utf-8"), uri)


def _compare(
    run: StageRun[PromoteConfig], champion: RegisteredVersion, thresholds: Thresholds
) -> tuple[dict[str, float], dict[str, PairedComparison]]:
    """The champion's metrics, and paired comparisons of what both evaluations asked alike."""
    from shellv_core.errors import PromotionError, StorageError
    from shellv_core.evaluation.evidence import read_evaluation, same_questions
    from shellv_core.evaluation.statistics import compare_paired
    from shellv_core.storage import InputDirectory
    from shellv_core.tracking.gate import ALL
    from shellv_core.tracking.registry import EVALUATION_TAG

    evaluation = run.inputs["evaluation"]
    try:
        previous = InputDirectory(champion.tags.get(EVALUATION_TAG, ""))
        if not same_questions(evaluation, previous):
            return previous.manifest.metrics, {}
        new, old = read_evaluation(evaluation), read_evaluation(previous)
    except StorageError as error:
        raise PromotionError(
            f"the champion (version {champion.version} of {champion.name!r}) has no readable evaluation"
            f" ({error}) Restore it, evaluate and promote that version again, or delete the alias 'champion'."
        ) from None
    both = [metric for metric in new.outcomes if old.outcomes.get(metric) and new.outcomes[metric]]
    asked = {*thresholds.not_worse_than_champion, *thresholds.require_gain}
    asked.update(both if thresholds.no_loss == ALL else thresholds.no_loss)
    return previous.manifest.metrics, {
        metric: compare_paired(new.outcomes[metric], old.outcomes[metric], new.clusters(metric), seed=run.config.seed)
        for metric in both
        if metric in asked
    }


def _record(run: StageRun[PromoteConfig], registry: ModelRegistry) -> None:
    """Put the verdict where people look: the version's tags, the run's tags and the log."""
    from shellv_core.logs import get_logger
    from shellv_core.tracking.championship import OVERRIDE_TAG
    from shellv_core.tracking.registry import DECISION_TAG

    details = run.details
    tags = {DECISION_TAG: details["decision"], "shellv.reasons": "\n".join(details["reasons"])[:MAX_TAG_LENGTH]}
    if details["overridden"]:
        tags[OVERRIDE_TAG] = run.config.override_reason
    else:
        registry.delete_tag(details["version"], OVERRIDE_TAG)
    registry.set_tags(details["version"], tags)
    run.tracked.set_tags({**tags, "shellv.version": details["version"]})
    logger = get_logger(__name__)
    against = f" against the gate: {run.config.override_reason}" if details["overridden"] else ""
    logger.info(
        "promote: version %s of %s is %s%s",
        details["version"], details["registered_model"], details["decision"], against,
    )  # fmt: skip
    for reason in details["reasons"]:
        logger.info("promote: %s", reason)
