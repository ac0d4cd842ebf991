"""A pipeline of one task, made from a component: to run that component alone, on outputs of an earlier run.

What a component reads are addresses, which are parameters: content-addressed ones, so that a task hits the cache though
the one before it ran anew. The pipeline's parameters are the component's.
"""

import inspect
from typing import Any

from components.metadata import load, metadata
from pipelines.definition import Definition
from pipelines.placement import ACCELERATED, Placement

#: kfp's names of parameter types.
TYPES: dict[str, Any] = {
    "String": str,
    "Integer": int,
    "Float": (int, float),
    "Boolean": bool,
    "List": list,
    "Dict": dict,
}
#: Inputs with defaults from the profile, and the address that a run on this machine has one for.
DEFAULTED = {"preset", "overrides", "root_uri"}


def single(name: str) -> Definition:
    """The pipeline of component `name` alone.

    Raises:
        ConfigError: if there is no such component, or it has no meaning alone.
    """
    from shellv_core.errors import ConfigError

    component, facts = load(name), metadata(name)
    inputs = component.component_spec.inputs
    if any(each.type == "PipelineTaskFinalStatus" for each in inputs.values()):
        raise ConfigError(f"{name} reports how a pipeline run ended; it has no meaning alone.")

    # What the profile has for a training component's job is a parameter about placement already.
    placed_inputs = {"pods"} if facts.kind == "training" else set()

    def wire(place: Placement, **values: Any) -> None:
        if placed_inputs:
            values["pods"] = place.parameters["k8s_train_job"]
        place(component(**values), name)

    signature = inspect.signature(component.python_func)
    own = [signature.parameters[key] for key in inputs if key not in placed_inputs]
    placed = inspect.Parameter("place", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wire.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [placed, *sorted(own, key=lambda each: each.default is not inspect.Parameter.empty)]
    )
    wire.__doc__, wire.__name__ = component.python_func.__doc__.partition("    Returns:")[0].rstrip(), name
    accelerated = (facts.kind,) if facts.kind in ACCELERATED else ()
    return Definition(f"shellv-{name.replace('_', '-')}", f"Shell-V: {name} alone", wire, accelerated)


def arguments(name: str, pairs: list[str]) -> dict[str, Any]:
    """Arguments of component `name` from ``key=value`` texts; values are YAML where the parameter is no text.

    Raises:
        ConfigError: naming every key that is unknown, missing or has a value of the wrong type.
    """
    import yaml

    from shellv_core.config import nearest
    from shellv_core.errors import ConfigError

    inputs = load(name).component_spec.inputs
    given, faults = {}, []
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or key not in inputs:
            faults.append(f"{pair!r}: {nearest(key, inputs) if separator else 'give key=value'}")
            continue
        try:
            value = text if inputs[key].type == "String" else yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        kind = inputs[key].type.partition("[")[0]
        if not isinstance(value, TYPES[kind]):
            faults.append(f"{key}={text!r}: a value of type {kind.lower()} is expected")
            value = 0
        given[key] = float(value) if kind == "Float" else value
    missing = [key for key, each in inputs.items() if not each.optional and key not in given.keys() | DEFAULTED]
    faults += [f"{key} is required; give {key}=VALUE" for key in missing]
    if faults:
        raise ConfigError(f"{name}: {'; '.join(faults)}.")
    return given
