"""A session cookie of a Kubeflow behind Dex, with oauth2-proxy or the older authservice in front of it.

The way is a browser's: the endpoint leads to Dex's login form, the form takes name and password, and the answer leads
back with a session cookie. Source: Kubeflow's guide "Connect the SDK to the API" and Dex's handlers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from pipelines.client.errors import PipelineServerError

TIMEOUT_SECONDS = 30
SIGN_IN_STATUSES = (401, 403)


def session_cookie(endpoint: str, user: str, password: str, ca_file: Path | None = None) -> str:
    """Log in and return the value of the header ``Cookie`` for `endpoint`.

    Raises:
        PipelineServerError: if there is no login page, Dex refuses the password, or a page would take the password
            over an unencrypted connection where the endpoint's is encrypted.
    """
    import requests

    with requests.Session() as session:
        # For each request: requests lets REQUESTS_CA_BUNDLE win over a session's own setting.
        ask = functools.partial(session.request, timeout=TIMEOUT_SECONDS, verify=str(ca_file) if ca_file else None)
        try:
            return _log_in(session, ask, endpoint, user, password)
        except requests.exceptions.SSLError:
            raise PipelineServerError(
                f"{endpoint}: the certificate is not trusted; name its authority's file with --ca-file."
            ) from None
        except requests.exceptions.RequestException as error:
            raise PipelineServerError(
                f"{endpoint}: the login page does not answer ({type(error).__name__}). Check --endpoint.",
                transient=True,
            ) from None


def _log_in(session: Any, ask: Callable[..., Any], endpoint: str, user: str, password: str) -> str:
    page = ask("GET", f"{endpoint}/")
    if page.status_code in SIGN_IN_STATUSES:
        # oauth2-proxy shows its own page before it sends a browser to Dex.
        start = urljoin(endpoint, f"/oauth2/start?rd={urlsplit(endpoint).path or '/'}")
        page = ask("GET", start)
    if not page.history and not session.cookies:
        raise PipelineServerError(f"{endpoint} asks for no login; leave --user away.")
    form = urlsplit(page.url)
    if form.path.endswith("/auth"):
        # Several ways to log in: the local one takes a name and a password.
        page = ask("GET", form._replace(path=f"{form.path}/local").geturl())
    if page.status_code >= 400 or "/auth/" not in urlsplit(page.url).path:
        raise PipelineServerError(
            f"{endpoint}: no login form of Dex was found (at {page.url.split('?')[0]}, {page.status_code}). Log in with"
            " a browser and give the session's cookie in KF_PIPELINES_COOKIE, or use a token."
        )
    if urlsplit(endpoint).scheme == "https" and urlsplit(page.url).scheme != "https":
        raise PipelineServerError(
            f"{page.url.split('?')[0]}: this login page is not encrypted; the password stays here."
        )
    answer = ask("POST", page.url, data={"login": user, "password": password})
    if not answer.history:
        raise PipelineServerError(f"{endpoint}: Dex refused user {user} or the password.", status=401)
    if urlsplit(answer.url).path.endswith("/approval"):
        answer = ask("POST", answer.url, data={"approval": "approve"})
    host = urlsplit(endpoint).hostname or ""
    cookies = {each.name: each.value for each in session.cookies if _belongs(each.domain, host)}
    if answer.status_code >= 500 or not cookies:
        raise PipelineServerError(f"{endpoint}: the login left no session cookie ({answer.status_code}).", status=401)
    return "; ".join(f"{name}={value}" for name, value in cookies.items())


def _belongs(domain: str, host: str) -> bool:
    domain = domain.removesuffix(".local") if "." not in host else domain
    return host == domain.lstrip(".") or host.endswith(f".{domain.lstrip('.')}")
