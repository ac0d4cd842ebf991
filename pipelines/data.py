"""The pipeline that prepares data in parallel: plan, write ranges of shards, join and commit."""

from kfp import dsl

from components.prepare_data.component import plan_data, prepare_data, write_data
from pipelines.placement import Placement


@dsl.pipeline(name="shellv-data", display_name="Shell-V: prepare data in parallel")
def shellv_data(
    root_uri: str,
    preset: str = "nano",
    overrides: list[str] = [],  # noqa: B006 - kfp reads the literal
    num_ranges: int = 16,
    k8s_secret: str = "shellv-storage",  # noqa: S107 - the name of a Secret
    k8s_config_map: str = "shellv-services",
) -> str:
    """Prepare a data set with as many pods as wanted; the result is the same as that of one prepare_data task.

    Args:
        root_uri: Folder of the output, s3://BUCKET/PREFIX.
        preset: Settings of the stage.
        overrides: Single settings that differ from the preset, as prepare_data.key=value.
        num_ranges: Tasks that write, at most.
        k8s_secret: Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
        k8s_config_map: ConfigMap with AWS_ENDPOINT_URL, AWS_REGION and MLFLOW_TRACKING_URI.

    Returns:
        URI of the data set.
    """
    place = Placement(k8s_secret, k8s_config_map)
    settings = {"root_uri": root_uri, "preset": preset, "overrides": overrides}
    planned = place.connect(plan_data(**settings, num_ranges=num_ranges))
    # It looks at the world outside its inputs, so a cached answer may be stale.
    planned.set_caching_options(False).set_display_name("plan data")
    with dsl.ParallelFor(planned.output, name="shards") as units:
        written = place.connect(write_data(**settings, units=units))
        place.retry(written).set_caching_options(False).set_display_name("write shards")
    joined = place.connect(prepare_data(**settings, written=dsl.Collected(written.output)))
    joined.set_caching_options(False).set_display_name("join and commit")
    return joined.outputs["Output"]
