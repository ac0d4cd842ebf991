"""Registered models in MLflow, by reference: a version is an address with tags, its bytes stay where they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shellv_core.errors import TrackingError
from shellv_core.tracking.runs import NOT_FOUND, open_client, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CANDIDATE, CHAMPION = "candidate", "champion"
FINGERPRINT_TAG, SHA256_TAG = "shellv.fingerprint", "shellv.content_sha256"
EVALUATION_TAG, EVALUATION_SHA256_TAG = "shellv.evaluation_uri", "shellv.evaluation_sha256"
DECISION_TAG, METRIC_PREFIX = "shellv.decision", "shellv.metric."
LOCK_SUFFIX = ".lock"  # see `shellv_core.tracking.lock`
_PAGE = 1000


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model.

    Attributes:
        model_uri: the committed folder that holds the model.
        tags: among them its fingerprint, the hash of its content and the address of its evaluation.
        created: when it was registered, in milliseconds since 1970.
    """

    name: str
    version: str
    model_uri: str
    tags: Mapping[str, str]
    created: int = field(default=0, compare=False)


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
            # The first, should two processes have registered it at the same time.
            same = [each for each in self.versions() if each.model_uri == model_uri]
            found = next((each for each in same if identity.items() <= each.tags.items()), None)
            if found is None:
                made = self._client.create_model_version(
                    self.name, source=model_uri, run_id=run_id, tags={**identity, **tags}
                )
                return self.get(str(made.version))
            self.set_tags(found.version, {key: value for key, value in tags.items() if found.tags.get(key) != value})
            return self.get(found.version)

    def versions(self) -> list[RegisteredVersion]:
        """All versions, the first one first; none where there is no such model."""
        quote = "'" if "'" not in self.name else '"'
        condition = f"name = {quote}{self.name}{quote}"

        def page(token: str | None) -> Any:
            return self._client.search_model_versions(condition, max_results=_PAGE, page_token=token)

        with self._mapped():
            return sorted(map(_read, _pages(page)), key=lambda each: int(each.version))

    def get(self, version: str) -> RegisteredVersion:
        """The version with this number."""
        with self._mapped():
            return _read(self._client.get_model_version(self.name, version))

    def set_tags(self, version: str, tags: Mapping[str, str]) -> None:
        """Set tags on a version."""
        with self._mapped():
            for key, value in tags.items():
                self._client.set_model_version_tag(self.name, version, key, value)

    def delete_tag(self, version: str, tag: str) -> None:
        """Take a tag off a version; one that is not there is no fault."""
        with self._mapped():
            self._client.delete_model_version_tag(self.name, version, tag)

    def model_tags(self) -> dict[str, str]:
        """Tags of the model as a whole."""
        with self._mapped():
            return dict(self._client.get_registered_model(self.name).tags)

    def set_model_tag(self, key: str, value: str) -> None:
        """Set a tag on the model as a whole."""
        with self._mapped():
            self._client.set_registered_model_tag(self.name, key, value)

    def aliases(self) -> dict[str, str]:
        """Alias -> number of the version that it names."""
        with self._mapped():
            found = self._client.get_registered_model(self.name).aliases
        return {alias: str(version) for alias, version in found.items()}

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
            if error.error_code in NOT_FOUND:
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


def registered_models() -> list[str]:
    """Names of all registered models.

    Raises:
        TrackingError: if MLflow does not answer.
    """
    client = open_client()

    def page(token: str | None) -> Any:
        return client.search_registered_models(max_results=_PAGE, page_token=token)

    return sorted(each.name for each in _pages(page) if not each.name.endswith(LOCK_SUFFIX))


def _pages(page: Callable[[str | None], Any]) -> Iterator[Any]:
    token = None
    while True:
        found = page(token)
        yield from found
        token = found.token
        if not token:
            return


def _read(version: ModelVersion) -> RegisteredVersion:
    return RegisteredVersion(
        version.name,
        str(version.version),
        str(version.source),
        dict(version.tags),
        int(version.creation_timestamp or 0),
    )
