"""Pipelines and their versions on a server; a version is named by its content, so that none is there twice."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.client.compiled import CompiledPipeline
from pipelines.client.connection import Server


@dataclass(frozen=True)
class UploadedVersion:
    """A version of a pipeline on a server.

    Attributes:
        pipeline_id, version_id: the server's names of both.
        name: the version's name.
        is_new: whether it was uploaded now.
        link: its page of the web interface.
    """

    pipeline_id: str
    version_id: str
    name: str
    is_new: bool
    link: str


def upload(server: Server, pipeline: CompiledPipeline) -> UploadedVersion:
    """Upload `pipeline`, unless the server has this very content; the pipeline is created where it is missing.

    Raises:
        PipelineServerError: if the server refuses or does not answer.
    """
    pipeline_id = _pipeline_id(server, pipeline)
    found = _find_version(server, pipeline_id, pipeline.version)
    version = found or _upload_version(server, pipeline_id, pipeline)
    return UploadedVersion(
        pipeline_id,
        version.pipeline_version_id,
        pipeline.version,
        is_new=found is None,
        link=server.link(f"pipelines/details/{pipeline_id}/version/{version.pipeline_version_id}"),
    )


def named(name: str) -> str:
    """A filter of the API for entries called `name`."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _pipeline_id(server: Server, pipeline: CompiledPipeline) -> str:
    import kfp_server_api

    def find() -> Any:
        listing = server.client.pipelines.pipeline_service_list_pipelines
        arguments: dict[str, Any] = {"namespace": server.namespace} if server.namespace else {}
        return next(server.pages(listing, "pipelines", filter=named(pipeline.name), **arguments), None)

    wanted = kfp_server_api.V2beta1Pipeline(
        display_name=pipeline.name,
        name=pipeline.name,
        description=pipeline.description,
        namespace=server.namespace,
    )
    found = find() or server.once(lambda: server.client.pipelines.pipeline_service_create_pipeline(wanted), find)
    return str(found.pipeline_id)


def _find_version(server: Server, pipeline_id: str, name: str) -> Any:
    listing = server.client.pipelines.pipeline_service_list_pipeline_versions
    return next(server.pages(listing, "pipeline_versions", pipeline_id=pipeline_id, filter=named(name)), None)


def _upload_version(server: Server, pipeline_id: str, pipeline: CompiledPipeline) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{pipeline.name}.yaml"
        path.write_text(pipeline.text, encoding="utf-8")
        return server.once(
            lambda: server.client.pipeline_uploads.upload_pipeline_version(
                str(path), name=pipeline.version, display_name=pipeline.version, pipelineid=pipeline_id
            ),
            lambda: _find_version(server, pipeline_id, pipeline.version),
        )
