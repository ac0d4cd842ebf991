"""A connection to a cluster: credentials as any client finds them, bounded retries, errors in one line."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shellv_core.errors import ClusterError
from shellv_core.logs import get_logger

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

logger = get_logger(__name__)

ATTEMPTS = 8
#: Between attempts, in seconds, doubled each time up to the second; about two minutes in all.
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 30.0
#: To connect, and for the longest silence within an answer.
TIMEOUT_SECONDS = (5.0, 60.0)
RETRIED_STATUSES = (429, 500, 502, 503, 504)
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
APPLY, JSON = "application/apply-patch+yaml", "application/json"


class ApiError(ClusterError):
    """The API refused: `status` is the HTTP status, `reason` the API's word for it, as in ``AlreadyExists``."""

    def __init__(self, message: str, status: int, reason: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Resource:
    """A kind of namespaced object, as the API's addresses name it."""

    group: str
    version: str
    plural: str

    def path(self, namespace: str, name: str = "") -> str:
        """The address of all objects of this kind in `namespace`, or of one."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        return f"{root}/namespaces/{namespace}/{self.plural}" + (f"/{name}" if name else "")


DEPLOYMENTS = Resource("apps", "v1", "deployments")
PODS = Resource("", "v1", "pods")
EVENTS = Resource("", "v1", "events")


@dataclass(frozen=True)
class ServiceAddress:
    """Where a Service's API is, with the token and the certificates that the way there needs."""

    url: str
    token: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None


class Cluster:
    """The API server that a pod's service account, or else the kubeconfig file, names.

    Args:
        namespace: where everything happens; empty takes the pod's own or the kubeconfig context's.

    Raises:
        ClusterError: if there are no credentials.
    """

    def __init__(self, namespace: str = "") -> None:
        self.api, found = _connect()
        self.namespace = namespace or found

    @property
    def host(self) -> str:
        """The API server's address."""
        return str(self.api.configuration.host)

    def service(self, name: str, port: int) -> ServiceAddress:
        """How a Service is reached: by its name inside of the cluster, from elsewhere through the API server."""
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            return ServiceAddress(f"http://{name}.{self.namespace}:{port}/v1")
        settings = self.api.configuration
        url = f"{self.host}/api/v1/namespaces/{self.namespace}/services/http:{name}:{port}/proxy/v1"
        token = str(settings.get_api_key_with_prefix("authorization") or "").removeprefix("Bearer ")
        if not url.startswith("https:"):
            return ServiceAddress(url, token)
        tls = ssl.create_default_context(cafile=settings.ssl_ca_cert)
        if not settings.verify_ssl:
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        if settings.cert_file:
            tls.load_cert_chain(settings.cert_file, settings.key_file)
        return ServiceAddress(url, token, tls)

    def get(self, resource: Resource, name: str) -> dict[str, Any] | None:
        """An object; None if there is none of this name."""
        try:
            found: dict[str, Any] = self.request("GET", resource.path(self.namespace, name))
        except ApiError as error:
            if error.status == http.client.NOT_FOUND:
                return None
            raise
        return found

    def list(self, resource: Resource, labels: str = "", fields: str = "") -> list[dict[str, Any]]:
        """All objects with these labels and fields, each ``name=value,...``."""
        query = {"labelSelector": labels, "fieldSelector": fields}
        items: list[dict[str, Any]] = self.request("GET", resource.path(self.namespace), query=query)["items"]
        return items

    def create(self, resource: Resource, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create an object.

        Raises:
            ApiError: with status 409 if there is one of this name, 400 if it has a field that the cluster does not
                know: unless asked to refuse it, the API drops it.
        """
        query = {"fieldValidation": "Strict"}
        created: dict[str, Any] = self.request("POST", resource.path(self.namespace), body, query)
        return created

    def apply(self, resource: Resource, body: Mapping[str, Any], manager: str) -> dict[str, Any]:
        """Server-side apply: the fields in `body` are `manager`'s from now on, whoever's they were."""
        path = resource.path(self.namespace, body["metadata"]["name"])
        query = {"fieldManager": manager, "force": "true"}
        applied: dict[str, Any] = self.request("PATCH", path, body, query, APPLY)
        return applied

    def delete(self, resource: Resource, name: str) -> bool:
        """Delete an object and what it made; returns whether there was one."""
        try:
            self.request("DELETE", resource.path(self.namespace, name), query={"propagationPolicy": "Background"})
        except ApiError as error:
            if error.status == http.client.NOT_FOUND:
                return False
            raise
        return True

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        content_type: str = JSON,
    ) -> Any:
        """One call of the API, tried again while the server is overloaded, restarting or out of reach.

        Raises:
            ApiError: if it refuses.
            ClusterError: if it does not answer.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self.api.call_api(
                    path,
                    method,
                    query_params=[(key, value) for key, value in (query or {}).items() if value],
                    header_params={"Accept": JSON, "Content-Type": content_type},
                    body=body,
                    response_type="object",
                    auth_settings=["BearerToken"],
                    _return_http_data_only=True,
                    _request_timeout=TIMEOUT_SECONDS,
                )
            except ApiException as error:
                fault: ClusterError = refusal(self, method, path, error)
                again = error.status in RETRIED_STATUSES
                if not error.status:
                    # What goes wrong with TLS comes in this shape.
                    reason = " ".join(str(error.reason).split())
                    fault = ClusterError(f"the Kubernetes API at {self.host} does not answer ({reason}).")
                    again = "CERTIFICATE_VERIFY_FAILED" not in reason
            except (HTTPError, OSError) as error:
                fault = ClusterError(f"the Kubernetes API at {self.host} does not answer ({_short(error)}).")
                again = True
            if not again or attempt == ATTEMPTS:
                raise fault
            wait = min(BACKOFF_SECONDS * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS)
            logger.warning("%s Attempt %d of %d; the next in %.0f s.", fault, attempt, ATTEMPTS, wait)
            time.sleep(wait)
        raise AssertionError("unreachable")


def _connect() -> tuple[ApiClient, str]:
    """A client, and the namespace that its credentials come with."""
    try:
        from kubernetes import config
        from kubernetes.client import ApiClient, Configuration
    except ImportError:
        raise ClusterError("the package kubernetes is not installed here; install the extra 'cluster'.") from None

    settings = Configuration()
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST"):
            config.load_incluster_config(client_configuration=settings)
            namespace = NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else ""
        else:
            # The client itself looks at the variable only once, when it is imported.
            path = os.environ.get("KUBECONFIG")
            config.load_kube_config(path, client_configuration=settings)
            namespace = config.list_kube_config_contexts(path)[1]["context"].get("namespace", "")
    except (config.ConfigException, OSError) as error:
        raise ClusterError(
            f"no credentials for a cluster ({_short(error)}). Run in a pod with a service account, or name a kubeconfig"
            " file in KUBECONFIG."
        ) from None
    # Retries are ours, so that they are counted once and reported.
    settings.retries = False
    return ApiClient(settings), namespace or "default"


def refusal(cluster: Cluster, method: str, path: str, error: Any) -> ApiError:
    """The client's exception in this project's words."""
    try:
        status = json.loads(error.body)
        message, reason = str(status["message"]), str(status.get("reason", ""))
    except (TypeError, ValueError, KeyError):
        message, reason = str(error.reason), ""
    hint = {
        401: " Its credentials are not valid, or no longer.",
        403: " The account lacks a permission; shellv_core/cluster/permissions.py lists what is needed.",
    }.get(error.status, "")
    return ApiError(
        f"the Kubernetes API at {cluster.host} refused {method} {path} ({error.status}): {message}.{hint}",
        error.status,
        reason,
    )


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
