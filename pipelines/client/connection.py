"""kfp's own client with bounded patience: timeouts, retries of what is safe to repeat, and faults told in one line."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pipelines.client.errors import PipelineServerError, explained, not_pipelines
from pipelines.client.settings import ServerSettings
from shellv_core.errors import ConfigError

CONNECT_SECONDS, READ_SECONDS = 5, 60
RETRIES = 3
BACKOFF_SECONDS = 1.0
RETRIED_STATUSES = (429, 500, 502, 503, 504)
RETRIED_METHODS = ("GET", "HEAD", "PUT", "DELETE")
MAX_PAGES = 100
T = TypeVar("T")


class Server:
    """A Kubeflow Pipelines server.

    Attributes:
        settings: where it is and who we are.
        client: kfp's client; its generated services are ``runs``, ``pipelines``, ``pipeline_uploads``,
            ``recurring_runs`` and ``experiments``.
        namespace: profile namespace of a multi-user server, None otherwise.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        with explained(settings.endpoint), _quiet():
            self.client = _client(settings)
        self._api = self.client.runs.run_service_get_run.__self__.api_client
        # The generated client knows no default: without one, a server that hangs keeps us for ever.
        self._api.request = functools.partial(_request, self._api.request)
        health = self.health()
        if health.multi_user and not settings.namespace:
            raise ConfigError(
                f"{settings.endpoint} serves several namespaces: give yours as --namespace or KF_PIPELINES_NAMESPACE."
            )
        self.namespace = settings.namespace if health.multi_user else None

    def health(self) -> Any:
        """The server's ``healthz``; a `PipelineServerError` where something else answers."""
        health, headers = self._get("/apis/v2beta1/healthz", "V2beta1GetHealthzResponse")
        if "json" not in headers.get("Content-Type", "json"):
            raise not_pipelines(self.settings.endpoint)
        return health

    def version(self) -> str:
        """The server's release, as ``2.17.0``; empty where it does not tell."""
        answer, _ = self._get("/apis/v1beta1/healthz", "object")
        tag = str(answer.get("tag_name", "")) if isinstance(answer, dict) else ""
        return tag.removeprefix("v") if tag[:1].isdigit() or tag[:1] == "v" else ""

    def _get(self, path: str, kind: str) -> tuple[Any, Any]:
        with self.talking():
            answer, _, headers = self._api.call_api(path, "GET", response_type=kind, auth_settings=["Bearer"])
        return answer, headers

    def link(self, path: str) -> str:
        """The address of a page of the web interface."""
        return f"{self.settings.ui_endpoint}/#/{path}"

    def renew(self) -> bool:
        """Log in again after a session's end; False where there is no login to repeat."""
        if not self.settings.user:
            return False
        self._api.cookie = _cookie(self.settings)
        return True

    def talking(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the server's faults become a `PipelineServerError`."""
        return explained(self.settings.endpoint)

    def once(self, create: Callable[[], T], find: Callable[[], T | None]) -> T:
        """``create()``, exactly once although answers get lost: before another try, ``find()`` looks for the first's.

        Raises:
            PipelineServerError: if the server refuses, or if a few tries fail.
        """
        for attempt in range(RETRIES):
            try:
                with self.talking():
                    return create()
            except PipelineServerError as error:
                # Somebody else may have created it in the meantime.
                taken = error.status == HTTPStatus.CONFLICT
                if not error.transient and not taken:
                    raise
                if not taken:
                    time.sleep(BACKOFF_SECONDS * 2**attempt)
                if (found := find()) is not None:
                    return found
                if taken:
                    raise
        with self.talking():
            return create()

    def pages(self, list_page: Callable[..., Any], field: str, size: int = 100, **arguments: Any) -> Iterator[Any]:
        """All entries of a listing, `size` to a page; `field` is the answer's attribute that holds them."""
        token = ""
        for _ in range(MAX_PAGES):
            with self.talking():
                page = list_page(page_token=token, page_size=size, **arguments)
            yield from getattr(page, field) or ()
            token = page.next_page_token
            if not token:
                return


def _client(settings: ServerSettings) -> Any:
    import kfp
    from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials
    from urllib3.util import Retry

    class Client(kfp.Client):
        """kfp's client without its side effects."""

        def _load_config(self, *arguments: Any, **named: Any) -> Any:
            config = super()._load_config(*arguments, **named)
            config.retries = Retry(
                total=RETRIES,
                redirect=0,
                raise_on_redirect=False,  # a redirect leads to a login page
                status_forcelist=RETRIED_STATUSES,
                allowed_methods=RETRIED_METHODS,
                raise_on_status=False,
                backoff_factor=BACKOFF_SECONDS,
            )
            return config

        def _load_context_setting_or_default(self) -> None:
            # The original reads a file of the user's home, which another server's settings may fill.
            self._context_setting = {"namespace": settings.namespace}

        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
            # The original asks five times, 5 s apart, with tracebacks; `Server.health` asks instead.
            import kfp_server_api

            return kfp_server_api.V2beta1GetHealthzResponse(multi_user=False)

    return Client(
        host=settings.endpoint,
        ui_host=settings.ui_endpoint,
        existing_token=settings.token or None,
        credentials=ServiceAccountTokenVolumeCredentials(str(settings.token_file)) if settings.token_file else None,
        cookies=_cookie(settings) or None,
        proxy=_proxy(settings.endpoint),
        ssl_ca_cert=str(settings.ca_file) if settings.ca_file else None,
    )


def _cookie(settings: ServerSettings) -> str:
    from pipelines.client.login import session_cookie

    if not settings.user:
        return settings.cookie
    return session_cookie(settings.endpoint, settings.user, settings.password, settings.ca_file)


def _proxy(endpoint: str) -> str | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name, at which kfp's client does not look."""
    parts = urlsplit(endpoint)
    if proxy_bypass(parts.netloc):
        return None
    return getproxies().get(parts.scheme)


def _request(request: Callable[..., Any], *arguments: Any, _request_timeout: Any = None, **named: Any) -> Any:
    return request(*arguments, _request_timeout=_request_timeout or (CONNECT_SECONDS, READ_SECONDS), **named)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
