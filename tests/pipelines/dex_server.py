"""A Kubeflow behind a login: Dex's pages, with oauth2-proxy or the older authservice in front of the API."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.pipelines.kfp_api_server import Handler, KfpServer

SESSION = "oauth2_proxy_kubeflow=the-session"


class KubeflowBehindDex(KfpServer):
    """A server that knows one user.

    Args:
        proxy: whether oauth2-proxy shows its own page first, as in Kubeflow since 1.8; authservice redirects at once.
        connectors: whether Dex offers several ways to log in.
        approval: whether Dex asks the user to approve.
    """

    def __init__(self, proxy: bool = True, connectors: bool = False, approval: bool = False) -> None:
        super().__init__(cookie=SESSION)
        self.proxy, self.connectors, self.approval = proxy, connectors, approval
        self.user, self.password = "user@example.com", "s3cret-of-dex"
        self.logins = 0


class DexHandler(Handler):
    """The pages of the login, in a browser's order; everything below /apis is the API."""

    kfp: KubeflowBehindDex

    def handle_request(self, method: str) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/apis/"):
            super().handle_request(method)
            return
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        back = "/oauth2/callback?code=the-code&state=the-state"
        inside = self.kfp.cookie in (self.headers.get("Cookie") or "")
        if path == "/":
            if inside:
                self.page(200, "Kubeflow")
            elif self.kfp.proxy:
                self.page(403, "Sign in with Dex")
            else:
                self.redirect("/dex/auth?client_id=kubeflow&state=the-state")
        elif path == "/oauth2/start":
            self.redirect("/dex/auth?client_id=kubeflow&state=the-state", "_oauth2_proxy_csrf=anything")
        elif path == "/dex/auth":
            if self.kfp.connectors:
                self.page(200, "Log in with e-mail, or with another account")
            else:
                self.redirect("/dex/auth/local?client_id=kubeflow&state=the-state")
        elif path == "/dex/auth/local":
            self.redirect("/dex/auth/local/login?back=&state=the-request")
        elif (method, path) == ("GET", "/dex/auth/local/login"):
            self.page(200, "Log in to Your Account")
        elif path == "/dex/auth/local/login":
            if (form["login"], form["password"]) != ([self.kfp.user], [self.kfp.password]):
                self.page(401, "Invalid Email Address and password.")
            else:
                self.redirect("/dex/approval?req=the-request" if self.kfp.approval else back)
        elif (method, path) == ("GET", "/dex/approval"):
            self.page(200, "Grant Access")
        elif path == "/dex/approval" and form.get("approval") == ["approve"]:
            self.redirect(back)
        elif path == "/oauth2/callback":
            self.kfp.logins += 1
            self.redirect("/", self.kfp.cookie)
        else:
            self.page(404, "not found")

    def page(self, status: int, text: str) -> None:
        self.reply(status, f"<html><body>{text}</body></html>", {"Content-Type": "text/html"})

    def redirect(self, where: str, cookie: str = "") -> None:
        self.reply(303, "", {"Location": where, **({"Set-Cookie": f"{cookie}; Path=/; HttpOnly"} if cookie else {})})

    def reply(self, status: int, text: str, headers: dict[str, Any]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())
