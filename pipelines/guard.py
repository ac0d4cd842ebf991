"""What surrounds the stages of every pipeline: checks before them, and a report after them, however they end."""

from collections.abc import Sequence
from typing import Any

from components.check_training.component import check_training
from components.preflight.component import preflight
from components.report_run.component import report_run
from pipelines.placement import Placement
from pipelines.profile import gigabytes


def reported(place: Placement, root_uri: Any) -> Any:
    """The exit handler's task."""
    return place(report_run(root_uri=root_uri), "report")


def checked(
    place: Placement,
    stages: Sequence[str],
    settings: dict[str, Any],
    training: dict[str, Any] | None = None,
    deploy_target: Any = "",
) -> list[Any]:
    """The tasks that all others wait for; the first is `preflight`'s.

    Args:
        stages: of the pipeline.
        settings: its root_uri, preset and overrides.
        training: the memory of an accelerator and the nodes that train together; None where nothing is trained.
    """
    first = place(preflight(**settings, stages=list(stages), deploy_target=deploy_target), "preflight")
    if training is None:
        return [first]
    fits = check_training(
        preset=settings["preset"],
        overrides=settings["overrides"],
        stages=list(stages),
        **training,
        num_accelerators=place.parameters["k8s_training_accelerators"],
        pods=place.parameters["k8s_train_job"],
        scratch_gb=gigabytes(place.profile.tasks.training.scratch),
    )
    return [first, place(fits, "check training")]
