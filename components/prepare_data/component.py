"""Image-text data as verified WebDataset shards."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("control"), install_kfp_package=False)
def prepare_data(
    root_uri: str,
    preset: str,
    overrides: list[str],
    dataset: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Make verified WebDataset shards and benchmarks from scenes or LLaVA-format data.

    Args:
        root_uri: Folder below which the output goes, s3:// or file://.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.

    Returns:
        Output: URI of the shards, benchmarks and manifest.
    """
    from shellv_core.logs import setup_logging
    from shellv_core.stages import prepare_data
    from shellv_core.stages.artifacts import write_metrics, write_reference
    from shellv_core.stages.presets import stage_config

    setup_logging()
    uris = {"output_uri": f"{root_uri}/prepare_data/{{fingerprint}}"}
    result = prepare_data.run(stage_config(preset, "prepare_data", overrides, **uris))
    write_reference(result, dataset)
    write_metrics(result, metrics)
    return result.output_uri
