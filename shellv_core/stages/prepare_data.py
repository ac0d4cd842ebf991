"""Turns synthetic scenes and image-text data of many formats into verified shards.

Output: ``train/`` and ``validation/`` shards, ``index/`` with the place and hash of every sample, ``rejected.jsonl``
with every bad row's address and reason, ``plan.json``, ``benchmarks/`` of the scenes; and in the manifest's details
``splits`` (shards with counts, bytes and SHA-256), ``rejected`` (the first bad rows) and ``rejected_counts``.

`run` does all of it on one machine. On a cluster `plan` comes first, `write` runs in as many pods as wanted, and `run`
ends it: it finds every unit written, joins and commits. The result is the same byte for byte.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from shellv_core.config import Config
from shellv_core.data.config import DataConfig
from shellv_core.stages.runner import (
    StageConfig,
    StageResult,
    StageRun,
    aborting,
    open_stage,
    run_stage,
    work_folder,
)

if TYPE_CHECKING:
    from shellv_core.data.plan import Plan
    from shellv_core.storage import OutputDirectory

CODE = (
    "data/config.py",
    "data/conversation.py",
    "data/hallucination",
    "data/index.py",
    "data/plan.py",
    "data/preparation.py",
    "data/rewriting.py",
    "data/samples.py",
    "data/scenes",
    "data/shards.py",
    "data/sources",
    "data/units.py",
    "templates.py",
)


class PrepareDataConfig(DataConfig, StageConfig):
    """Settings of prepare_data.

    Attributes:
        num_workers: processes; by default one for each core.
        content_stamp: identifies what the sources hold. Filled in by the stage; given, the plan that `plan` has left
            at the output is taken and the sources are not passed over again.
    """

    without_effect: ClassVar[frozenset[str]] = frozenset({"num_workers"})

    num_workers: int | None = Field(default=None, ge=1)
    content_stamp: str = ""


class DataPlan(Config):
    """What `plan` returns.

    Attributes:
        output_uri: where the output goes, its fingerprint filled in.
        content_stamp: for the settings of `run`.
        ranges: "FIRST:STOP of STAMP", units for `write`; empty if the output is there already.
    """

    output_uri: str
    content_stamp: str
    ranges: list[str]


def run(config: PrepareDataConfig) -> StageResult:
    """Write what is not written yet, join and commit.

    Raises:
        ConfigError: if a source's address cannot be used, all of them named.
        DataError: if more rows are bad than allowed, or none is good; nothing is left at the output then.
    """
    from shellv_core.data.preparation import finish, write_units

    config, found = _stamped(config)

    def body(run: StageRun[PrepareDataConfig]) -> None:
        settings, seed = run.config, run.config.seed
        plan, learned = _plan_at(settings, run.output, found)
        write_units(settings, seed, plan, run.output, run.work, num_workers=settings.num_workers, learned=learned)
        prepared = finish(settings, seed, plan, run.output, run.work)
        run.details.update(prepared.details)
        run.metrics.update(prepared.metrics)

    return run_stage("prepare_data", config, body, code=CODE)


def plan(config: PrepareDataConfig, num_ranges: int) -> DataPlan:
    """Pass over the sources, take the output folder and cut the work into at most `num_ranges` parts.

    Raises:
        ConfigError: if a source's address cannot be used, all of them named.
        DataError: if a source cannot be read.
        OutputNotEmptyError: if the output folder is another run's.
    """
    config, found = _stamped(config)
    output, _ = open_stage("prepare_data", config, {}, CODE)
    ranges: list[str] = []
    if output.finished() is None:
        output.begin()
        with aborting(output):
            parts = _plan_at(config, output, found)[0].ranges(num_ranges)
        ranges = [f"{first}:{stop} of {config.content_stamp}" for first, stop in parts]
    return DataPlan(output_uri=output.uri, content_stamp=config.content_stamp, ranges=ranges)


def write(config: PrepareDataConfig, units: str) -> str:
    """Write a range of units, as `plan` returned it, to the output that `plan` took; returns its content stamp.

    Raises:
        ConfigError: if `units` is no such range.
        DataError: if there is no such plan, or more rows are bad than allowed.
    """
    from shellv_core.data.preparation import write_units
    from shellv_core.errors import ConfigError

    form = re.fullmatch(r"(\d+):(\d+) of ([0-9a-f]{64})", units)
    if not form:
        raise ConfigError(f"units={units!r} is not FIRST:STOP of STAMP; give a range that the plan returned.")
    first, stop, stamp = int(form[1]), int(form[2]), form[3]
    config = config.model_copy(update={"content_stamp": stamp})
    output, _ = open_stage("prepare_data", config, {}, CODE)
    if output.finished() is not None:
        return stamp
    # A failure leaves the folder as it is: other tasks may be writing to it.
    output.begin()
    plan, learned = _plan_at(config, output, None)
    work = work_folder("prepare_data", output)
    write_units(config, config.seed, plan, output, work, plan.units[first:stop], config.num_workers, learned)
    return stamp


def _stamped(config: PrepareDataConfig) -> tuple[PrepareDataConfig, Plan | None]:
    """The settings with the stamp of what the sources hold now, and the plan, unless the stamp is given."""
    from shellv_core.data.preparation import plan_data

    if config.content_stamp:
        return config, None
    found = plan_data(config)
    return config.model_copy(update={"content_stamp": found.stamp}), found


def _plan_at(config: PrepareDataConfig, output: OutputDirectory, found: Plan | None) -> tuple[Plan, bytes]:
    """The plan that lies at the output, and what was learnt of the captions; both are put there if they are not yet."""
    import json

    from shellv_core.config import build_config, canonical_json
    from shellv_core.data.plan import Plan
    from shellv_core.data.preparation import LEARNED_NAME, PLAN_NAME, learn_captions
    from shellv_core.errors import DataError
    from shellv_core.storage import join, read_bytes

    done = output.done_files()
    if PLAN_NAME in done:
        plan = build_config(Plan, json.loads(read_bytes(join(output.uri, PLAN_NAME))))
        return plan, read_bytes(join(output.uri, LEARNED_NAME)) if LEARNED_NAME in done else b""
    if found is None:
        raise DataError(f"{output.uri} holds no plan for these settings; plan first, with the same settings and data.")
    learned = learn_captions(config, found)
    if learned:
        output.put_bytes(learned, LEARNED_NAME)
    # Last: where the plan is, all that was learnt is too.
    output.put_bytes(canonical_json(found), PLAN_NAME)
    return found, learned
