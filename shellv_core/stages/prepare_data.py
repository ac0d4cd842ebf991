"""Turns synthetic scenes and LLaVA-format data into shards, with a manifest of what went in and what did not."""

from __future__ import annotations

from pydantic import Field, model_validator

from shellv_core.data.config import LlavaSource, ScenesSource
from shellv_core.stages.runner import StageConfig, StageResult, StageRun, run_stage


class PrepareDataConfig(StageConfig):
    """Settings of prepare_data; with both sources given, the data set is their union."""

    scenes: ScenesSource | None = None
    llava: LlavaSource | None = None
    samples_per_shard: int = Field(default=512, ge=1)  # for LLaVA data: rows, bad ones included

    @model_validator(mode="after")
    def _some_source(self) -> PrepareDataConfig:
        if self.scenes is None and self.llava is None:
            raise ValueError(
                "no data source is given; set scenes.num_train=N for synthetic scenes, or llava.annotations=FILE.json"
                " and llava.image_folder=FOLDER"
            )
        return self


def run(config: PrepareDataConfig) -> StageResult:
    """Write the shards and benchmarks of all sources.

    Output: ``train/`` and ``validation/`` shards, ``benchmarks/`` of the scenes, and in the manifest's details
    ``splits`` (shards with counts, bytes and SHA-256), ``rejected`` (row addresses with reasons) and
    ``rejected_counts`` by reason.

    Raises:
        ConfigError: if annotations or image folders are missing, all of them named.
        DataError: if more rows are bad than allowed, or none is good; nothing is left at the output then.
    """
    from shellv_core.data.preparation import prepare, with_content_stamp

    if config.llava is not None:
        config = config.model_copy(update={"llava": with_content_stamp(config.llava)})

    def body(run: StageRun[PrepareDataConfig]) -> None:
        prepared = prepare(config.scenes, config.llava, config.samples_per_shard, config.seed, run.output, run.work)
        run.details.update(prepared.details())
        run.metrics.update(prepared.metrics())

    return run_stage("prepare_data", config, body, code=("data",))
