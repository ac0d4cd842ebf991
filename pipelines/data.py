"""The pipeline that prepares data in parallel: plan, write ranges of shards, join and commit."""

from kfp import dsl

from components.plan_data.component import plan_data
from components.prepare_data.component import prepare_data
from components.write_data.component import write_data
from pipelines.definition import Definition
from pipelines.guard import checked, reported
from pipelines.placement import Placement


def shellv_data(
    place: Placement,
    root_uri: str,
    preset: str = "nano",
    overrides: list[str] = [],  # noqa: B006 - kfp reads the literal
    data_num_ranges: int = 16,
) -> None:
    """Prepare a data set with as many pods as wanted; the result is the same as that of one prepare_data task.

    Args:
        root_uri: Folder of the output, s3://BUCKET/PREFIX.
        preset: Settings of the stage.
        overrides: Single settings that differ from the preset, as prepare_data.key=value.
        data_num_ranges: Tasks that write, at most.
    """
    settings = {"root_uri": root_uri, "preset": preset, "overrides": overrides}
    with dsl.ExitHandler(reported(place, root_uri), name="run"):
        checks = checked(place, ("prepare_data",), settings)
        # All overrides: none of these is cached, and kfp.local hands a loop's tasks an element of another task's list.
        planned = place(plan_data(**settings, num_ranges=data_num_ranges), "plan data").after(*checks.tasks)
        with dsl.ParallelFor(planned.output, name="shards") as units:
            written = place(write_data(**settings, units=units), "write shards")
        place(prepare_data(**settings, written=dsl.Collected(written.output)), "join and commit")


SHELLV_DATA = Definition("shellv-data", "Shell-V: prepare data in parallel", shellv_data)
