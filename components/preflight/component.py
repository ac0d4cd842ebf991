"""All that can be known to be wrong before a run starts."""

from typing import NamedTuple

from kfp import dsl

from components.base import component


@component("control")
def preflight(
    root_uri: str,
    preset: str,
    overrides: list[str],
    stages: list[str],
    report: dsl.Output[dsl.Markdown],
    deploy_target: str = "",
) -> NamedTuple(  # type: ignore[valid-type]
    "Settings",
    prepare_data=list,
    pretrain_projector=list,
    finetune=list,
    merge_lora=list,
    evaluate=list,
    promote=list,
    deploy=list,
    cache_salt=str,
):
    """Check settings, object store, MLflow and disk, and report all faults at once.

    Args:
        root_uri: Folder of all outputs, s3:// or file://; it is written to, read and listed.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.
        stages: Those that the pipeline has.
        deploy_target: Where its deploy stage deploys to; empty for what the settings say.

    Returns:
        prepare_data: Overrides that concern this stage; others leave its cache alone.
        pretrain_projector: Overrides that concern this stage.
        finetune: Overrides that concern this stage.
        merge_lora: Overrides that concern this stage.
        evaluate: Overrides that concern this stage.
        promote: Overrides that concern this stage.
        deploy: Overrides that concern this stage.
        cache_salt: Empty, or the run's id where it evaluates with a judge, so that no cached evaluation stands in.
        report: What was checked and found.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages import preflight
    from shellv_core.stages.artifacts import write_text

    config = preflight.PreflightConfig(
        root_uri=root_uri, preset=preset, overrides=overrides, stages=stages, deploy_target=deploy_target
    )
    write_text(preflight.table(preflight.run(config)), report)
    return preflight.settings(config)
