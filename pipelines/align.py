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
    k8s_accelerator_gb: float = 0.0,
) -> None:
    """Compose a model and align its projector; the pipeline shellv then goes on from there.

    Args:
        root_uri: Folder of all outputs, s3://BUCKET/PREFIX; each goes to a folder named after its content.
        preset: Settings of the stages.
        overrides: Single settings that differ from the preset, as STAGE.key=value.
        train_nodes: Nodes that train together; above 1 with k8s_training_accelerators 0, as each training task then
            only waits for the pods that k8s_train_job describes.
        k8s_accelerator_gb: Memory of an accelerator in 10^9 bytes, held against what training needs; 0 for none.
    """
    settings = {"root_uri": root_uri, "preset": preset, "overrides": overrides}
    training = {"accelerator_gb": k8s_accelerator_gb, "nodes": train_nodes}
    launch = {"nodes": train_nodes, "pods": place.parameters["k8s_train_job"]}
    with dsl.ExitHandler(reported(place, root_uri), name="run"):
        checks = checked(place, STAGES, settings, training)
        data = place(prepare_data(**checks.settings("prepare_data")), "prepare data").after(*checks.tasks)
        projector = pretrain_projector(
            data_uri=data.outputs["Output"], **checks.settings("pretrain_projector"), **launch
        )
        place(projector, "pretrain projector")


SHELLV_ALIGN = Definition("shellv-align", "Shell-V: align a projector", shellv_align, ("training",))
