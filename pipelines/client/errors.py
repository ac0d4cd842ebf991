"""Faults of a Kubeflow Pipelines server, each told in one line with what to do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from shellv_core.errors import ShellVError

MAX_MESSAGE_LENGTH = 500
AUTHENTICATION_HELP = (
    "check the token (KF_PIPELINES_TOKEN or --token-file), the cookie (KF_PIPELINES_COOKIE) or the login (--user)"
)


class PipelineServerError(ShellVError):
    """Kubeflow Pipelines refused a request or does not answer.

    Attributes:
        status: HTTP status of the answer, 0 where there was none.
        transient: whether the same request may work later, and whether it was carried out is unknown.
    """

    def __init__(self, message: str, status: int = 0, transient: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.transient = transient

    @property
    def unauthenticated(self) -> bool:
        """Whether the server does not know who asks, as after a session's end."""
        return self.status == HTTPStatus.UNAUTHORIZED or 300 <= self.status < 400


@contextlib.contextmanager
def explained(endpoint: str) -> Iterator[None]:
    """Raise a `PipelineServerError` for what kfp's client or its transport raises inside."""
    from kfp_server_api.exceptions import ApiException
    from urllib3.exceptions import HTTPError, MaxRetryError

    try:
        yield
    except ApiException as error:
        raise _refused(endpoint, error) from None
    except HTTPError as error:
        cause = error.reason if isinstance(error, MaxRetryError) and error.reason else error
        raise _unreachable(endpoint, cause) from None
    except OSError as error:
        raise _unreachable(endpoint, error) from None


def not_pipelines(endpoint: str) -> PipelineServerError:
    """Something else answers at `endpoint`."""
    return PipelineServerError(
        f"{endpoint} answers with a web page, not with the Kubeflow Pipelines API. Give the address of the API: with"
        " the whole of Kubeflow it ends in /pipeline."
    )


def _refused(endpoint: str, error: Any) -> PipelineServerError:
    status = int(error.status or 0)
    if status == 0:  # kfp's client wraps faults of TLS so
        return _unreachable(endpoint, error.reason)
    said = message_of(error.body) or str(error.reason)
    if status == HTTPStatus.UNAUTHORIZED:
        text = f"{endpoint} does not accept these credentials (401: {said}); {AUTHENTICATION_HELP}."
    elif status == HTTPStatus.FORBIDDEN:
        text = (
            f"{endpoint} refuses this user (403: {said}); {AUTHENTICATION_HELP}, and with several namespaces"
            " --namespace."
        )
    elif 300 <= status < 400:
        where = str((error.headers or {}).get("Location", "another page")).split("?")[0]
        text = f"{endpoint} sends us to {where} ({status}), as a login page or another address does; log in with --user"
        text += ", give a token, or give the other address."
    elif status == HTTPStatus.NOT_FOUND:
        text = f"{endpoint} does not know this (404: {said})."
    elif status >= 500 or status == HTTPStatus.TOO_MANY_REQUESTS:
        text = f"{endpoint} has a fault of its own ({status}: {said}); try again, and look at the log of ml-pipeline."
    else:
        text = f"{endpoint} refused the request ({status}: {said})."
    return PipelineServerError(text, status, status >= 500 or status == HTTPStatus.TOO_MANY_REQUESTS)


def _unreachable(endpoint: str, cause: Any) -> PipelineServerError:
    said = str(cause).splitlines()[-1] if str(cause) else type(cause).__name__
    # urllib3 puts its own objects before the reason.
    said = said.split(">: ")[-1].split("): ")[-1]
    if "CERTIFICATE_VERIFY_FAILED" in said or "certificate" in said:
        text = f"{endpoint}: the certificate is not trusted ({said}); name its authority's file with --ca-file."
        return PipelineServerError(text)
    return PipelineServerError(
        f"{endpoint} does not answer ({said}). Check --endpoint or KF_PIPELINES_ENDPOINT, and that it runs;"
        " from outside the cluster `kubectl port-forward -n kubeflow svc/ml-pipeline 8888` opens it at"
        " http://localhost:8888.",
        transient=True,
    )


def message_of(body: Any) -> str:
    """The server's own words in the body of a refusal, one line of at most 500 characters."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    try:
        document = json.loads(text)
    except ValueError:
        text = "" if "<" in text else text
    else:
        if isinstance(document, dict):
            text = str(document.get("message") or document.get("error_message") or document.get("error") or "")
    return " ".join(text.split())[:MAX_MESSAGE_LENGTH]
