"""Registered models in MLflow, by reference: a version is an address with tags, its bytes stay where they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shellv_core.errors import TrackingError
from shellv_core.tracking.runs import open_client, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CANDIDATE, CHAMPION = "candidate", "champion"
FINGERPRINT_TAG, SHA256_TAG, EVALUATION_TAG = "shellv.fingerprint", "shellv.content_sha256", "shellv.evaluation_uri"
PREVIOUS_TAG = "shellv.previous_champion"  # the version that a champion took over from; empty for the first


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model.

    Attributes:
        model_uri: the committed folder that holds the model.
        tags: among them its fingerprint, the hash of its content and the address of its evaluation.
    """

    name: str
    version: str
    model_uri: str
    tags: Mapping[str, str]


class ModelRegistry:
    """Versions and aliases of one registered model.

    Raises:
        TrackingError: if MLflow does not answer or refuses, here and in every method.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._client: MlflowClient = open_client()

    def register(
        self, model_uri: str, fingerprint: str, content_sha256: str, tags: Mapping[str, str], run_id: str | None = None
    ) -> RegisteredVersion:
        """The version of this very model at this address; made if there is none, its `tags` set in any case."""
        identity = {FINGERPRINT_TAG: fingerprint, SHA256_TAG: content_sha256}
        with self._mapped():
            self._ensure_model()
            found = next(
                (
                    each
                    for each in self._client.search_model_versions(f"name = '{self.name}'")
                    if each.source == model_uri and identity.items() <= each.tags.items()
                ),
                None,
            )
            if found is None:
                found = self._client.create_model_version(
                    self.name, source=model_uri, run_id=run_id, tags={**identity, **tags}
                )
            else:
                for key, value in tags.items():
                    if found.tags.get(key) != value:
                        self._client.set_model_version_tag(self.name, found.version, key, value)
            return _read(self._client.get_model_version(self.name, found.version))

    def get(self, version: str) -> RegisteredVersion:
        """The version with this number."""
        with self._mapped():
            return _read(self._client.get_model_version(self.name, version))

    def set_tags(self, version: str, tags: Mapping[str, str]) -> None:
        """Set tags on a version."""
        with self._mapped():
            for key, value in tags.items():
                self._client.set_model_version_tag(self.name, version, key, value)

    def set_alias(self, alias: str, version: str) -> None:
        """Let `alias` name `version`, and no other version."""
        with self._mapped():
            self._client.set_registered_model_alias(self.name, alias, version)

    def find(self, alias: str) -> RegisteredVersion | None:
        """The version that `alias` names; None if there is no such alias or model."""
        from mlflow.exceptions import MlflowException

        try:
            return _read(self._client.get_model_version_by_alias(self.name, alias))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise self._fault(error) from None

    def _ensure_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            raise self._fault(error) from None

    def _fault(self, error: Exception) -> TrackingError:
        reason = str(error).splitlines()[0]
        return TrackingError(f"MLflow at {tracking_uri()} refused an action on the model {self.name!r}: {reason}")


def _read(version: ModelVersion) -> RegisteredVersion:
    return RegisteredVersion(version.name, str(version.version), str(version.source), dict(version.tags))
