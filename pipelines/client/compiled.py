"""The pipeline that goes to a server: compiled in memory, named by its content."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shellv_core
from pipelines.compile import DEFAULT_PROFILE, compiled_yaml

HASH_DIGITS = 12


@dataclass(frozen=True)
class CompiledPipeline:
    """A compiled pipeline.

    Attributes:
        name: name of the pipeline, on the server too.
        text: its YAML.
    """

    name: str
    text: str

    @property
    def version(self) -> str:
        """Name of this version: the library's version and the first 12 hexadecimal digits of the text's SHA-256.

        Small letters, digits, dots and dashes, so that it can name a Kubernetes resource too.
        """
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:HASH_DIGITS]
        return f"{shellv_core.__version__}-{digest}".lower().replace("+", "-")

    @functools.cached_property
    def documents(self) -> list[dict[str, Any]]:
        """The specification and, where there is one, the platform's part."""
        import yaml

        return list(yaml.safe_load_all(self.text))

    @property
    def description(self) -> str:
        """What the pipeline does, in one line."""
        return str(self.documents[0]["pipelineInfo"].get("description", ""))

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Definitions of the pipeline's parameters, by name: ``parameterType``, ``literals``, ``isOptional`` ..."""
        return dict(self.documents[0]["root"].get("inputDefinitions", {}).get("parameters", {}))

    @property
    def images(self) -> set[str]:
        """References of all images."""
        executors = self.documents[0]["deploymentSpec"]["executors"].values()
        return {each["container"]["image"] for each in executors if "container" in each}

    def manifests(self) -> str:
        """The pipeline and this version as Kubernetes resources, for a server that keeps them in Kubernetes."""
        import yaml

        spec, *platform = self.documents
        shown = spec["pipelineInfo"].get("displayName", self.name)

        def resource(kind: str, name: str, title: str, more: dict[str, Any]) -> dict[str, Any]:
            described = {"displayName": title, "description": self.description, **more}
            return {
                "apiVersion": "pipelines.kubeflow.org/v2beta1",
                "kind": kind,
                "metadata": {"name": name},
                "spec": described,
            }

        content = {"pipelineName": self.name, "pipelineSpec": spec}
        if platform:
            content["platformSpec"] = platform[0]
        return yaml.safe_dump_all(
            [
                resource("Pipeline", self.name, shown, {}),
                resource("PipelineVersion", f"{self.name}-{self.version}", self.version, content),
            ],
            sort_keys=True,
        )

    def without_cache(self) -> CompiledPipeline:
        """The same pipeline with no task cached: a version of its own, since the server has no switch per run."""
        import yaml

        documents = list(yaml.safe_load_all(self.text))
        spec = documents[0]
        for graph in [spec["root"]["dag"], *(each["dag"] for each in spec["components"].values() if "dag" in each)]:
            for task in graph["tasks"].values():
                if "cachingOptions" in task:  # a group has none
                    task["cachingOptions"] = {}
        return CompiledPipeline(self.name, yaml.safe_dump_all(documents, sort_keys=True))


def compiled(name: str, profile: str = DEFAULT_PROFILE, lock: Path | None = None) -> CompiledPipeline:
    """The pipeline `name`, compiled now.

    Args:
        profile: name of one of ``pipelines/profiles``, or the path of a YAML file.
        lock: lock file whose digests name the images; None names them by registry and tag.

    Raises:
        ConfigError: if there is no such pipeline or profile, with the nearest name, or the lock file cannot be used.
    """
    return CompiledPipeline(name, compiled_yaml(name, profile, lock))
