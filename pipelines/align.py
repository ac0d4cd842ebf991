"""The pipeline that aligns a projector and stops there."""

from kfp import dsl

from components.prepare_data.component import prepare_data
from components.pretrain_projector.component import pretrain_projector
from pipelines.definition import Definition
from pipelines.guard import checked, reported
from pipelines.placement import Placement

STAGES = ("prepare_data", "pretrain_projector")


def shellv_align(
    place: Placement,
    root_uri: str,
    preset: str = "nano",
    overrides: list[str] = [],  # noqa: B006 - kfp reads the literal
    train_nodes: int = 1,
) -> None:
    """Compose a model and align its projector; the pipeline shellv then goes on from there.

    Args:
        root_uri: Folder of all outputs, s3://BUCKET/PREFIX; each goes to a folder named after its content.
        preset: Settings of the stages.
        overrides: Single settings that differ from the preset, as STAGE.key=value.
        train_nodes: Nodes that train together.
    """
    settings = {"root_uri": root_uri, "preset": preset, "overrides": overrides}
    with dsl.ExitHandler(reported(place, root_uri), name="run"):
        checks = checked(place, STAGES, settings, train_nodes)
        data = place(prepare_data(**settings), "prepare data").after(*checks)
        place(pretrain_projector(data_uri=data.outputs["Output"], **settings), "pretrain projector")


SHELLV_ALIGN = Definition("shellv-align", "Shell-V: align a projector", shellv_align, ("training",))
