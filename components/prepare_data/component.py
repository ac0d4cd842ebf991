"""Image-text data as verified WebDataset shards: in one task, or planned by one and written by many."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("control"), install_kfp_package=False)
def prepare_data(
    root_uri: str,
    preset: str,
    overrides: list[str],
    dataset: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    written: list[str] = [],  # noqa: B006 - kfp reads the literal
) -> str:
    """Make verified WebDataset shards and benchmarks from scenes or image-text data of many formats.

    Args:
        root_uri: Folder below which the output goes, s3:// or file://.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.
        written: What write_data returned, where such tasks have written the shards before.

    Returns:
        Output: URI of the shards, benchmarks and manifest.
    """
    from shellv_core.logs import setup_logging
    from shellv_core.stages import prepare_data
    from shellv_core.stages.artifacts import write_metrics, write_reference
    from shellv_core.stages.presets import stage_config

    setup_logging()
    values = {"output_uri": f"{root_uri}/prepare_data/{{fingerprint}}", "content_stamp": "".join(written[:1])}
    result = prepare_data.run(stage_config(preset, "prepare_data", overrides, **values))
    write_reference(result, dataset)
    write_metrics(result, metrics)
    return result.output_uri


@dsl.component(base_image=image("control"), install_kfp_package=False)
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
    from shellv_core.logs import setup_logging
    from shellv_core.stages import prepare_data
    from shellv_core.stages.presets import stage_config

    setup_logging()
    values = {"output_uri": f"{root_uri}/prepare_data/{{fingerprint}}"}
    return prepare_data.plan(stage_config(preset, "prepare_data", overrides, **values), num_ranges).ranges


@dsl.component(base_image=image("control"), install_kfp_package=False)
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
    from shellv_core.logs import setup_logging
    from shellv_core.stages import prepare_data
    from shellv_core.stages.presets import stage_config

    setup_logging()
    values = {"output_uri": f"{root_uri}/prepare_data/{{fingerprint}}"}
    return prepare_data.write(stage_config(preset, "prepare_data", overrides, **values), units)
