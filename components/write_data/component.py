"""The shards of one range of units."""

from components.base import component


@component("control")
def write_data(root_uri: str, preset: str, overrides: list[str], units: str) -> str:
    """Write the shards of one range of units.

    Args:
        root_uri: Folder below which the output goes, s3:// or file://.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.
        units: One of the ranges that plan_data returned.

    Returns:
        Output: The content stamp that the range was planned with.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages import prepare_data
    from shellv_core.stages.presets import stage_config

    values = {"output_uri": f"{root_uri}/prepare_data/{{fingerprint}}"}
    return prepare_data.write(stage_config(preset, "prepare_data", overrides, **values), units)
