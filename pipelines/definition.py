"""A pipeline before it is built for a cluster: what its tasks are and how they hang together."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kfp import dsl

from components.metadata import Kind
from pipelines.placement import Placement, parameters
from pipelines.profile import Profile


@dataclass(frozen=True)
class Definition:
    """A pipeline.

    Attributes:
        name: of the pipeline and of its compiled file.
        title: what the UI calls it.
        wire: makes the tasks; it takes the placement and then the pipeline's own parameters, documented in the
            docstring's ``Args``. Defaults that a profile has win over those here.
        accelerated: kinds of its tasks that get accelerators.
    """

    name: str
    title: str
    wire: Callable[..., None]
    accelerated: tuple[Kind, ...] = ()

    def build(self, profile: Profile) -> Any:
        """The pipeline for a cluster, as kfp knows it: its own parameters and those about placement."""
        defaults: dict[str, Any] = {
            "preset": profile.preset,
            "overrides": profile.overrides,
            "deploy_target": profile.deploy_target,
            "k8s_accelerator_gb": profile.accelerator_gb,
        }
        own = [
            each.replace(default=defaults.get(name, each.default))
            for name, each in list(inspect.signature(self.wire).parameters.items())[1:]
        ]
        placed = parameters(profile, self.accelerated)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        own += [inspect.Parameter(name, kind, default=p.default, annotation=p.type) for name, p in placed.items()]
        signature = inspect.Signature(sorted(own, key=lambda each: each.default is not inspect.Parameter.empty))

        def pipeline(*values: Any) -> None:
            given = dict(signature.bind(*values).arguments)
            place = Placement(profile, {name: given.pop(name) for name in placed})
            self.wire(place, **given)

        documentation = inspect.cleandoc(self.wire.__doc__ or "")
        pipeline.__doc__ = documentation + "".join(f"\n    {name}: {p.description}" for name, p in placed.items())
        pipeline.__name__ = self.wire.__name__
        pipeline.__signature__ = signature  # type: ignore[attr-defined]
        return dsl.pipeline(name=self.name, display_name=self.title)(pipeline)
