"""Whether an object is one that the API server would take, unknown fields refused.

Core kinds go to kubernetes-validate. Custom kinds go to the schema of that name in schemas/, which knows just the
fields that this project uses; training kinds to the models of kubeflow-trainer-api, which drop what they do not know.
Pod specifications inside custom kinds are core again.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.k8s.rendering import Manifest, pods

# The oldest release with preStop's `sleep`, and the newest that kubernetes-validate knows.
VERSIONS = ("1.30", "1.37")
CORE = re.compile(r"(v1|(apps|autoscaling|policy|batch)/v\d|(networking|rbac\.authorization)\.k8s\.io/v1)")
SCHEMAS = Path(__file__).parent / "schemas"
# Fields that KServe puts beside those of a pod.
PREDICTOR_FIELDS = (
    "minReplicas",
    "maxReplicas",
    "scaleMetric",
    "scaleTarget",
    "timeout",
    "deploymentStrategy",
    "labels",
)


class InvalidError(Exception):
    """An object that an API server would refuse."""


def validate(manifest: Manifest) -> None:
    """Raise InvalidError unless `manifest` is valid, and of a kind that is known here."""
    # Overlays share most of their objects, and a schema takes a tenth of a second.
    _validate_text(json.dumps(manifest))


@functools.cache
def _validate_text(text: str) -> None:
    manifest = json.loads(text)
    version, kind = manifest["apiVersion"], manifest["kind"]
    if CORE.fullmatch(version):
        _validate_core(manifest)
        return
    if version.startswith("trainer.kubeflow.org/"):
        _validate_training(manifest)
    else:
        path = SCHEMAS / f"{kind}.yaml"
        if not path.is_file():
            raise InvalidError(f"{version} {kind}: no schema; add {path.name} to tests/k8s/schemas")
        try:
            jsonschema.validate(manifest, yaml.safe_load(path.read_text()), jsonschema.Draft202012Validator)
        except jsonschema.ValidationError as error:
            raise InvalidError(f"{kind} {error.json_path}: {error.message}") from None
    for _, labels, spec in pods([manifest]):
        own = {key: value for key, value in spec.items() if kind != "InferenceService" or key not in PREDICTOR_FIELDS}
        _validate_core({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "labels": labels}, "spec": own})


def _validate_core(manifest: Manifest) -> None:
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            name = manifest["metadata"]["name"]
            raise InvalidError(f"{manifest['kind']} {name} in Kubernetes {version}: {error}") from None


def _validate_training(manifest: Manifest) -> None:
    from kubeflow_trainer_api import models

    model: Any = getattr(models, f"TrainerV1alpha1{manifest['kind']}")
    kept = model.from_dict(manifest).to_dict()
    lost = _difference(manifest, kept)
    if lost:
        raise InvalidError(f"{manifest['kind']}: unknown to kubeflow-trainer-api: {', '.join(lost)}")


def _difference(given: Any, kept: Any, path: str = "") -> list[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        return [each for key in given for each in _difference(given[key], kept.get(key), f"{path}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [
            each
            for number, (one, other) in enumerate(zip(given, kept, strict=True))
            for each in _difference(one, other, f"{path}[{number}]")
        ]
    return [] if given == kept else [path]
