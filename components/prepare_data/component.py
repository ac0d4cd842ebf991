"""Image-text data as verified WebDataset shards, in one task or joined from what write_data wrote."""

from kfp import dsl

from components.base import component


@component("control")
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
        dataset: Where the data set lies, its hash, counts and lineage.
        metrics: Counts.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages import prepare_data
    from shellv_core.stages.artifacts import write_metrics, write_reference
    from shellv_core.stages.presets import stage_config

    values = {"output_uri": f"{root_uri}/prepare_data/{{fingerprint}}", "content_stamp": "".join(written[:1])}
    result = prepare_data.run(stage_config(preset, "prepare_data", overrides, **values))
    write_reference(result, dataset)
    write_metrics(result, metrics)
    return result.output_uri
