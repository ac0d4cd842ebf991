"""The TrainJob's definition for an API server, made of the models of kubeflow-trainer-api.

The models say which fields there are, their types, and which are required. They do not say how lists merge, nor what
Kubeflow Trainer's own definition demands beyond that; one rule of it is added here: a job's runtime does not change.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from shellv_core.cluster.train_job import TRAIN_JOBS

Schema = dict[str, Any]
IMMUTABLE = {"rule": "self == oldSelf", "message": "field is immutable"}
#: A number or text with a unit; the model is a class that no JSON schema tells.
QUANTITY = "IoK8sApimachineryPkgApiResourceQuantity"


@functools.cache
def definition() -> Schema:
    """The CustomResourceDefinition; not to be changed."""
    version = {
        "name": TRAIN_JOBS.version,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": train_job_schema()},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{TRAIN_JOBS.plural}.{TRAIN_JOBS.group}",
            # The API asks for it from everyone who defines something in a group of the Kubernetes community.
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"},
        },
        "spec": {
            "group": TRAIN_JOBS.group,
            "scope": "Namespaced",
            "names": {
                "plural": TRAIN_JOBS.plural,
                "singular": "trainjob",
                "kind": "TrainJob",
                "listKind": "TrainJobList",
            },
            "versions": [version],
        },
    }


@functools.cache
def train_job_schema() -> Schema:
    """The structural schema of a TrainJob; not to be changed."""
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    whole = TrainerV1alpha1TrainJob.model_json_schema(by_alias=True)
    schema = _structural(whole, whole["$defs"])
    # The server knows these itself.
    schema["properties"]["metadata"] = {"type": "object"}
    schema["properties"]["spec"]["properties"]["runtimeRef"]["x-kubernetes-validations"] = [IMMUTABLE]
    return schema


def unknown_fields(item: Any, schema: Schema | None = None, path: str = "") -> Iterator[str]:
    """The fields of a TrainJob that it does not have, in the API's way of naming them."""
    schema = schema or train_job_schema()
    if isinstance(item, list):
        for number, each in enumerate(item):
            yield from unknown_fields(each, schema.get("items", {}), f"{path}[{number}]")
    elif isinstance(item, dict) and "properties" in schema:
        for name, each in item.items():
            here = f"{path}.{name}" if path else name
            if name not in schema["properties"]:
                yield here
            elif here != "metadata":
                yield from unknown_fields(each, schema["properties"][name], here)


def _structural(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    """A JSON schema without references, alternatives and prose."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name == QUANTITY:
            return {"x-kubernetes-int-or-string": True}
        return _structural(definitions[name], definitions)
    if "anyOf" in schema:
        kinds = [each for each in schema["anyOf"] if each.get("type") != "null"]
        if len(kinds) == 1:
            return _structural(kinds[0], definitions)
        if {each.get("type") for each in kinds} == {"integer", "string"}:
            return {"x-kubernetes-int-or-string": True}
        raise ValueError(f"a structural schema has no word for {kinds}")
    if "type" not in schema:
        return {"x-kubernetes-preserve-unknown-fields": True}
    found: Schema = {key: schema[key] for key in ("type", "format", "required", "enum") if key in schema}
    if "properties" in schema:
        found["properties"] = {key: _structural(each, definitions) for key, each in schema["properties"].items()}
    if "items" in schema:
        found["items"] = _structural(schema["items"], definitions)
    values = schema.get("additionalProperties")
    if isinstance(values, Mapping):
        found["additionalProperties"] = _structural(values, definitions)
    elif found["type"] == "object" and "properties" not in found:
        found["x-kubernetes-preserve-unknown-fields"] = True
    return found
