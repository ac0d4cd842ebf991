"""What surrounds the stages of every pipeline: checks before them, and a report after them, however they end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from components.check_training.component import check_training
from components.preflight.component import preflight
from components.report_run.component import report_run
from pipelines.placement import Placement
from pipelines.profile import gigabytes


@dataclass(frozen=True)
class Checked:
    """What the stages wait for and go by.

    Attributes:
        tasks: that come before all others; the first is `preflight`'s.
    """

    tasks: list[Any]
    root_uri: Any
    preset: Any

    def settings(self, stage: str) -> dict[str, Any]:
        """Inputs of `stage`'s components: no overrides but its own, so that others leave its cache alone."""
        overrides = self.tasks[0].outputs[stage]
        return {"root_uri": self.root_uri, "preset": self.preset, "overrides": overrides}

    @property
    def cache_salt(self) -> Any:
        """Of evaluate."""
        return self.tasks[0].outputs["cache_salt"]


def reported(place: Placement, root_uri: Any) -> Any:
    """The exit handler's task."""
    return place(report_run(root_uri=root_uri), "report")


def checked(
    place: Placement,
    stages: Sequence[str],
    settings: dict[str, Any],
    training: dict[str, Any] | None = None,
    deploy_target: Any = "",
) -> Checked:
    """Check before anything else.

    Args:
        stages: of the pipeline.
        settings: its root_uri, preset and overrides.
        training: the memory of an accelerator and the nodes that train together; None where nothing is trained.
    """
    first = place(preflight(**settings, stages=list(stages), deploy_target=deploy_target), "preflight")
    found = Checked([first], settings["root_uri"], settings["preset"])
    if training is None:
        return found
    fits = check_training(
        preset=settings["preset"],
        overrides=settings["overrides"],
        stages=list(stages),
        **training,
        num_accelerators=place.parameters["k8s_training_accelerators"],
        pods=place.parameters["k8s_train_job"],
        scratch_gb=gigabytes(place.profile.tasks.training.scratch),
    )
    found.tasks.append(place(fits, "check training"))
    return found
