"""The work of writing shards, cut into ranges for many tasks."""

from components.base import component


@component("control")
def plan_data(root_uri: str, preset: str, overrides: list[str], num_ranges: int) -> list:
    """Pass over the sources once and cut the work of writing shards into ranges.

    Args:
        root_uri: Folder below which the output goes, s3:// or file://.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.
        num_ranges: Tasks that will write, at most.

    Returns:
        Output: One string for each writing task; none where the output is there already.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages import prepare_data
    from shellv_core.stages.presets import stage_config

    values = {"output_uri": f"{root_uri}/prepare_data/{{fingerprint}}"}
    return prepare_data.plan(stage_config(preset, "prepare_data", overrides, **values), num_ranges).ranges
