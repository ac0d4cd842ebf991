"""A component's README, made from its compiled interface and its metadata."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from components.metadata import metadata

KINDS = {
    "check": "looks, and changes nothing but what it cleans up",
    "control": "talks to services; needs no accelerator",
    "data": "reads and writes data; needs no accelerator",
    "training": "trains; takes as many accelerators as the profile or the run says",
    "merging": "holds a whole model in memory; needs no accelerator",
    "evaluation": "runs a model; takes as many accelerators as the profile or the run says",
}
#: Inputs that a run on this machine need not give.
HAVE_DEFAULTS = ("root_uri", "preset", "overrides")
EXAMPLES = {"STRING": "1", "NUMBER_INTEGER": "1", "NUMBER_DOUBLE": "1.0", "LIST": "[finetune]", "STRUCT": "{}"}


def readme(name: str, compiled: str) -> str:
    """The README of component `name`.

    Args:
        compiled: the component's YAML.
    """
    import yaml

    spec = next(yaml.safe_load_all(compiled))
    (executor,) = spec["deploymentSpec"]["executors"].values()
    (interface,) = spec["components"].values()
    facts = metadata(name)
    inputs = interface.get("inputDefinitions", {}).get("parameters", {})
    outputs = interface.get("outputDefinitions", {})
    cached = "yes" if facts.cached else "no: it looks at, or changes, what is outside its inputs"
    lines = [
        "<!-- Made by `python -m pipelines compile`. -->",
        f"# {name}",
        "",
        # kfp puts it into a comment alone.
        re.search(r"^# Description: (.*)$", compiled, re.MULTILINE)[1],  # type: ignore[index]
        "",
        f"- Image: `{executor['container']['image']}`",
        f"- Kind of task: {facts.kind}; it {KINDS[facts.kind]}",
        f"- Cached by Kubeflow Pipelines: {cached}",
        f"- Services: {', '.join(facts.services) or 'none'}",
        f"- Stability: {facts.stability}",
        f"- Tags: {', '.join(facts.tags)}",
        "- Compiled alone: [component.yaml](component.yaml)",
        "",
        "## Inputs",
        "",
        *_table(("name", "type", "default", "description"), (_input(key, each) for key, each in inputs.items())),
        "",
        "## Outputs",
        "",
        *_outputs(outputs),
        "",
    ]
    if "TASK_FINAL_STATUS" not in {each["parameterType"] for each in inputs.values()}:
        lines += ["## Alone", "", "```sh", *_commands(name, inputs), "```", ""]
    return "\n".join(lines)


def _input(name: str, parameter: Mapping[str, Any]) -> tuple[str, ...]:
    required = not parameter.get("isOptional")
    default = "" if required else f"`{json.dumps(parameter.get('defaultValue'), sort_keys=True)}`"
    return f"`{name}`", parameter["parameterType"].lower(), default, parameter.get("description", "")


def _outputs(outputs: Mapping[str, Any]) -> list[str]:
    parameters = [
        (f"`{name}`", each["parameterType"].lower(), each.get("description", ""))
        for name, each in outputs.get("parameters", {}).items()
    ]
    artifacts = [
        (f"`{name}`", each["artifactType"]["schemaTitle"], each.get("description", ""))
        for name, each in outputs.get("artifacts", {}).items()
    ]
    return _table(("name", "type", "description"), [*parameters, *artifacts])


def _commands(name: str, inputs: Mapping[str, Any]) -> list[str]:
    needed = [key for key, each in inputs.items() if not each.get("isOptional") and key not in HAVE_DEFAULTS]
    given = [f"{key}={_example(key, inputs[key]['parameterType'])}" for key in needed]
    return [
        f"python -m pipelines component {name} -o {name}.yaml  # a pipeline of this one task, for the UI",
        " ".join(["python -m pipelines component", name, "--run", *given, "preset=nano"]),
    ]


def _example(name: str, kind: str) -> str:
    return "URI" if name.endswith("_uri") else EXAMPLES[kind]


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [header, ("---",) * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
