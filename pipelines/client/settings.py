"""Which Kubeflow Pipelines server to use and how to tell it who we are: flags, then the environment, then the pod.

A secret is never an argument, which every user of a machine can read in its list of processes.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shellv_core.errors import ConfigError

ENDPOINT = "KF_PIPELINES_ENDPOINT"
UI_ENDPOINT = "KF_PIPELINES_UI_ENDPOINT"
NAMESPACE = "KF_PIPELINES_NAMESPACE"
CA_FILE = "KF_PIPELINES_CA_FILE"
SYSTEM_CA_FILE = "SSL_CERT_FILE"
TOKEN = "KF_PIPELINES_TOKEN"  # noqa: S105 - the variable's name
TOKEN_FILE = "KF_PIPELINES_SA_TOKEN_PATH"  # noqa: S105 - as kfp calls it
COOKIE = "KF_PIPELINES_COOKIE"
USER = "KF_PIPELINES_USER"
PASSWORD = "KF_PIPELINES_PASSWORD"  # noqa: S105 - the variable's name

POD_TOKEN_FILE = Path("/var/run/secrets/kubeflow/pipelines/token")
POD_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
POD_ENDPOINT = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"


@dataclass(frozen=True)
class ServerSettings:
    """A server and the credentials for it.

    Attributes:
        endpoint: address of the API, without a slash at its end.
        ui_endpoint: address of the web pages, for links.
        namespace: profile namespace of a multi-user server; empty otherwise.
        ca_file: certificates that sign the server's; None for the system's usual ones.
        token_file: file with a bearer token, read again for each request.
        token, cookie, password: secrets.
        user: name for a login by Dex.
    """

    endpoint: str
    ui_endpoint: str
    namespace: str = ""
    ca_file: Path | None = None
    token_file: Path | None = None
    token: str = field(default="", repr=False)
    cookie: str = field(default="", repr=False)
    user: str = ""
    password: str = field(default="", repr=False)

    @property
    def method(self) -> str:
        """How we say who we are, in words and without secrets."""
        if self.token_file:
            return f"token of {self.token_file}"
        if self.token:
            return f"token of {TOKEN}"
        if self.user:
            return f"login as {self.user}"
        return f"cookie of {COOKIE}" if self.cookie else "no credentials"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the server's flags to a command."""
    group = parser.add_argument_group("server", "secrets come from files or the environment: see docs/submitting.md")
    group.add_argument("--endpoint", metavar="URL", help=f"address of the Kubeflow Pipelines API ({ENDPOINT})")
    group.add_argument("--namespace", metavar="NAME", help=f"profile namespace of a multi-user server ({NAMESPACE})")
    group.add_argument("--token-file", metavar="FILE", type=Path, help=f"file with a bearer token ({TOKEN_FILE})")
    group.add_argument("--user", metavar="NAME", help=f"log in through Dex; password in {PASSWORD} or asked ({USER})")
    group.add_argument("--ca-file", metavar="FILE", type=Path, help=f"certificates that sign the server's ({CA_FILE})")


def settings(options: argparse.Namespace) -> ServerSettings:
    """The server that flags and environment name.

    Raises:
        ConfigError: if no server is named, or an address or file cannot be used.
    """
    endpoint = options.endpoint or os.environ.get(ENDPOINT) or ""
    if not endpoint and "KUBERNETES_SERVICE_HOST" in os.environ:
        endpoint = POD_ENDPOINT
    if not endpoint:
        raise ConfigError(
            f"which Kubeflow Pipelines server? Give --endpoint or set {ENDPOINT}, as http://localhost:8888 after"
            " `kubectl port-forward -n kubeflow svc/ml-pipeline 8888`."
        )
    endpoint = _address(endpoint, "--endpoint")
    # kfp's client looks at no system-wide setting of its own accord.
    authorities = {"--ca-file": options.ca_file, **{name: os.environ.get(name) for name in (CA_FILE, SYSTEM_CA_FILE)}}
    ca_file = next((_file(value, name) for name, value in authorities.items() if value), None)
    common: dict[str, Any] = {
        "endpoint": endpoint,
        "ui_endpoint": _address(os.environ.get(UI_ENDPOINT) or endpoint, UI_ENDPOINT),
        "namespace": options.namespace or os.environ.get(NAMESPACE) or _text(POD_NAMESPACE_FILE),
        "ca_file": ca_file,
    }
    # A flag says more than the environment does; within one of them, the first that is set counts.
    if options.token_file:
        return ServerSettings(**common, token_file=_file(options.token_file, "--token-file"))
    if options.user:
        return ServerSettings(**common, user=options.user, password=_password(options.user))
    if token := os.environ.get(TOKEN, "").strip():
        return ServerSettings(**common, token=token)
    if token_file := os.environ.get(TOKEN_FILE):
        return ServerSettings(**common, token_file=_file(token_file, TOKEN_FILE))
    if user := os.environ.get(USER):
        return ServerSettings(**common, user=user, password=_password(user))
    if cookie := os.environ.get(COOKIE, "").strip():
        return ServerSettings(**common, cookie=cookie)
    if POD_TOKEN_FILE.is_file():
        return ServerSettings(**common, token_file=POD_TOKEN_FILE)
    return ServerSettings(**common)


def _address(value: str, name: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{name} is {value!r}; it must be an address as https://HOST/pipeline or http://HOST:PORT.")
    if parts.username or parts.password:
        raise ConfigError(f"{name} holds a user name or password; give --user and {PASSWORD} instead.")
    return value.split("#")[0].rstrip("/")


def _file(value: Path | str | None, name: str) -> Path | None:
    if not value:
        return None
    path = Path(value)
    try:
        readable = bool(path.read_text(encoding="utf-8").strip())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {path} cannot be read ({error}).") from None
    if not readable:
        raise ConfigError(f"{name}: {path} is empty.")
    return path


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _password(user: str) -> str:
    import getpass
    import sys

    if password := os.environ.get(PASSWORD):
        return password
    if not sys.stdin.isatty():
        raise ConfigError(f"the password of {user} is missing: set {PASSWORD}, or run this on a terminal to be asked.")
    return getpass.getpass(f"Password of {user}: ")
