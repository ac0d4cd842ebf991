"""What can be known to fail before it does: settings, object store, tracking and disk, checked in seconds.

Needs no GPU and no GPU library. The memory of training is `check_training`'s, which needs one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from pydantic import Field

from shellv_core.config import Config
from shellv_core.errors import ConfigError, DiskFullError, ShellVError, without_passwords
from shellv_core.logs import get_logger
from shellv_core.stages import STAGE_NAMES
from shellv_core.stages.task import run_id

logger = get_logger(__name__)
GIGA = 1e9


class PreflightConfig(Config):
    """What a pipeline run is about to do.

    Attributes:
        stages: that it has.
        deploy_target: where its deploy stage deploys to; empty for what the settings say.
        min_free_gb: bytes (10^9) that must be free on the disk of the project folder.
    """

    root_uri: str
    preset: str
    overrides: list[str] = []
    stages: list[str] = list(STAGE_NAMES)
    deploy_target: str = ""
    min_free_gb: float = Field(default=1.0, ge=0.0)


class Finding(Config):
    """One thing that was checked; `fault` is empty if it is well."""

    name: str
    found: str = ""
    fault: str = ""


def run(config: PreflightConfig) -> list[Finding]:
    """Check everything, whatever fails on the way.

    Returns:
        What was found, for people.

    Raises:
        ShellVError: with all faults at once; a `ConfigError` if all of them are wrong settings.
    """
    checks = {
        "settings": lambda: _check_settings(config),
        "object store": lambda: _check_store(config.root_uri),
        "MLflow": _check_tracking,
        "disk": lambda: _check_disk(config.min_free_gb),
    }
    return gather(checks)


def gather(checks: Mapping[str, Callable[[], str]]) -> list[Finding]:
    """Run all `checks`, each of which returns what it found or raises.

    Raises:
        ShellVError: with all faults at once.
    """
    findings, errors = [], []
    for name, check in checks.items():
        try:
            findings.append(Finding(name=name, found=without_passwords(check())))
            logger.info("preflight: %s: %s", name, findings[-1].found)
        except ShellVError as error:
            errors.append(error)
            findings.append(Finding(name=name, fault=without_passwords(str(error))))
    if errors:
        kind = ConfigError if all(isinstance(error, ConfigError) for error in errors) else ShellVError
        faults = [f"{each.name}: {each.fault}" for each in findings if each.fault]
        raise kind(f"{len(faults)} fault(s), and nothing was started:\n" + "\n".join(faults))
    return findings


class Settings(NamedTuple):
    """What the tasks after this one get.

    Attributes:
        cache_salt: what keeps a cached evaluation from standing in: the run's id with a judge, who may decide anew.

    The others are the overrides that concern a stage: a workflow engine that knows a task by its inputs then takes it
    from its cache whatever else is overridden.
    """

    prepare_data: list[str]
    pretrain_projector: list[str]
    finetune: list[str]
    merge_lora: list[str]
    evaluate: list[str]
    promote: list[str]
    deploy: list[str]
    cache_salt: str


def settings(config: PreflightConfig) -> Settings:
    """What the tasks of the run get."""
    from shellv_core.stages.presets import overrides_of, stage_config

    judged = "evaluate" in config.stages and stage_config(config.preset, "evaluate", config.overrides).judge_uri
    of_stages = {stage: overrides_of(stage, config.overrides) for stage in STAGE_NAMES}
    return Settings(**of_stages, cache_salt=run_id() if judged else "")


def table(findings: Iterable[Finding]) -> str:
    """What was found, as a Markdown table."""
    rows = [f"| {each.name} | {(each.fault or each.found).replace('|', chr(92) + '|')} |" for each in findings]
    return "\n".join(["| checked | found |", "| --- | --- |", *rows]) + "\n"


def _check_settings(config: PreflightConfig) -> str:
    from shellv_core.config import override_faults
    from shellv_core.stages.deploy import DEPLOYERS
    from shellv_core.stages.presets import overrides_of, preset, stage_config

    misplaced = [each for each in config.overrides if not any(overrides_of(stage, [each]) for stage in STAGE_NAMES)]
    own = [each for stage in STAGE_NAMES for each in overrides_of(stage, config.overrides)]
    faults = override_faults(preset(config.preset), [*misplaced, *own])
    unknown = [stage for stage in config.stages if stage not in STAGE_NAMES]
    faults += [f"{stage!r} is no stage; allowed: {', '.join(STAGE_NAMES)}" for stage in unknown]
    if not faults:
        target = config.deploy_target or stage_config(config.preset, "deploy", config.overrides).target
        if "deploy" in config.stages and target not in DEPLOYERS:
            faults.append(f"target={target!r} is not a place to deploy to; allowed: {', '.join(DEPLOYERS)}")
    if faults:
        raise ConfigError(" | ".join(dict.fromkeys(faults)))
    return f"preset {config.preset} with {len(config.overrides)} override(s), for {', '.join(config.stages)}"


def _check_store(root_uri: str) -> str:
    from shellv_core.storage import probe

    probe(root_uri)
    return f"{root_uri}: written, read, listed and deleted"


def _check_tracking() -> str:
    from mlflow.exceptions import MlflowException

    from shellv_core.errors import TrackingError
    from shellv_core.tracking.runs import open_client, tracking_uri

    client = open_client()
    try:
        client.search_registered_models(max_results=1)
    except MlflowException as error:
        raise TrackingError(
            f"MLflow at {tracking_uri()} has no model registry that answers ({str(error).splitlines()[0]}). Give it a"
            " database as its backend store."
        ) from None
    return f"{tracking_uri()} answers, with its model registry"


def _check_disk(min_free_gb: float) -> str:
    from shellv_core.storage import home

    folder = home()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIGA
    if free < min_free_gb:
        raise DiskFullError(
            f"{folder} has {free:.1f} GB free, and {min_free_gb:g} GB are needed at least. Free some space or point"
            " SHELLV_HOME elsewhere."
        )
    return f"{free:.1f} GB free at {folder}"
