"""What all components have in common: an image with the library, and nothing that is installed when a task starts."""

from collections.abc import Callable
from typing import Any, Literal

from kfp import dsl

import shellv_core
from components.images import image


def component(image_name: Literal["control", "train"]) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that makes a Kubeflow component of a function whose body imports all that it uses.

    Its tasks carry the version of the library that they were compiled with and the name of their image; see
    `shellv_core.stages.task`.

    Args:
        image_name: ``control`` for stages that need no GPU library, ``train`` for those that load a model.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        reference = image(image_name)
        made = dsl.component(base_image=reference, install_kfp_package=False)(function)
        made.component_spec.implementation.container.env = {
            "SHELLV_IMAGE": reference,
            "SHELLV_PIPELINE_VERSION": shellv_core.__version__,
        }
        return made

    return decorate
