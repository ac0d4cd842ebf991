from __future__ import annotations

import datetime
import ipaddress
import ssl
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from pipelines.client import login, settings
from tests.pipelines import kfp_api_server
from tests.pipelines.dex_server import SESSION, DexHandler, KubeflowBehindDex
from tests.pipelines.kfp_api_server import KfpServer, Snapshot, serving
from tests.submit.conftest import ROOT, TOKEN, Command


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "does not accept these credentials (401: Request header error"), (403, "refuses this user (403: ")],
)
def test_a_wrong_token(
    kfp: KfpServer, command: Command, monkeypatch: pytest.MonkeyPatch, status: int, message: str
) -> None:
    if status == 401:
        monkeypatch.setenv("KF_PIPELINES_TOKEN", "wr0ng")
    else:
        kfp.fail("GET", "/pipelines", 403)
    said = command("submit", "shellv", ROOT)
    assert said.code == 1
    assert message in said.err
    assert "--token-file" in said.err
    assert "wr0ng" not in said.err
    assert said.err.count("\n") == 1
    assert len(kfp.requests) <= 2


def test_a_token_file_is_read_again_for_each_request(
    kfp: KfpServer, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KF_PIPELINES_TOKEN")
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")

    def rotate() -> None:
        kfp.token = "a-new-0ne"
        file.write_text(kfp.token)

    kfp.script = [Snapshot("RUNNING"), Snapshot("RUNNING", then=rotate), Snapshot("SUCCEEDED")]
    said = command("submit", "shellv", ROOT, "--wait", "--token-file", str(file))
    assert said.code == 0, said.err
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(file))
    assert command("status").code == 0


def test_the_token_of_the_pod_is_taken_where_nothing_else_is_named(
    kfp: KfpServer, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KF_PIPELINES_TOKEN")
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    monkeypatch.setattr(settings, "POD_TOKEN_FILE", tmp_path / "token")
    monkeypatch.setattr(settings, "POD_NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setattr(settings, "POD_ENDPOINT", kfp.url)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "namespace").write_text("team")
    kfp.multi_user = True
    assert command("submit", "shellv", ROOT).code == 0
    (experiment,) = kfp.experiments.values()
    assert experiment["namespace"] == "team"


def test_a_server_of_several_users_needs_a_namespace(kfp: KfpServer, command: Command) -> None:
    kfp.multi_user = True
    said = command("submit", "shellv", ROOT)
    assert said.code == 2
    assert "give yours as --namespace" in said.err
    assert command("submit", "shellv", ROOT, "--namespace", "team").code == 0
    assert command("status", "--namespace", "team").code == 0
    said = command("status", "--namespace", "others")
    assert said.code == 1
    assert "refuses this user (403: User 'someone' is not authorized in namespace 'others')" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token-file", "/nowhere/token"], "--token-file: /nowhere/token cannot be read"),
        (["--endpoint", "https://me:pw@host"], "--endpoint holds a user name or password"),
        (["--user", "me"], "the password of me is missing: set KF_PIPELINES_PASSWORD"),
        (["--ca-file", "/nowhere/ca.pem"], "--ca-file: /nowhere/ca.pem cannot be read"),
    ],
)
def test_credentials_that_cannot_be_used(kfp: KfpServer, command: Command, arguments: list[str], message: str) -> None:
    said = command("status", *arguments)
    assert said.code == 2
    assert message in said.err
    assert "me:pw" not in said.err
    assert kfp.requests == []


@pytest.mark.parametrize(
    "options",
    [{"proxy": True}, {"proxy": False}, {"connectors": True}, {"approval": True, "proxy": False}],
    ids=["oauth2-proxy", "authservice", "several connectors", "approval"],
)
def test_a_login_through_dex_leaves_a_session(
    command: Command, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    with serving(KubeflowBehindDex(**options), DexHandler) as kubeflow:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kubeflow.url)
        monkeypatch.setenv("KF_PIPELINES_PASSWORD", kubeflow.password)
        said = command("submit", "shellv", ROOT, "--user", kubeflow.user)
        assert said.code == 0, said.err
        assert kubeflow.password not in said.out + said.err
        assert kubeflow.logins == 1
        assert all(SESSION in each["cookie"] for each in kubeflow.headers)
        assert not any("authorization" in each for each in kubeflow.headers)


def test_a_session_that_ends_during_a_wait_is_renewed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(KubeflowBehindDex(), DexHandler) as kubeflow:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kubeflow.url)
        monkeypatch.setenv("KF_PIPELINES_USER", kubeflow.user)
        monkeypatch.setenv("KF_PIPELINES_PASSWORD", kubeflow.password)

        def end_session() -> None:
            kubeflow.cookie = "oauth2_proxy_kubeflow=another-session"

        kubeflow.script = [Snapshot("RUNNING"), Snapshot("RUNNING", then=end_session), Snapshot("SUCCEEDED")]
        said = command("submit", "shellv", ROOT, "--wait")
        assert said.code == 0, said.err
        assert kubeflow.logins == 2


def test_what_can_go_wrong_at_a_login(command: Command, monkeypatch: pytest.MonkeyPatch, kfp: KfpServer) -> None:
    monkeypatch.setenv("KF_PIPELINES_PASSWORD", "wr0ng")
    monkeypatch.delenv("KF_PIPELINES_TOKEN")
    said = command("status", "--user", "me")
    assert said.code == 1
    assert "no login form of Dex was found" in said.err or "asks for no login" in said.err
    with serving(KubeflowBehindDex(), DexHandler) as kubeflow:
        said = command("status", "--user", "me", "--endpoint", kubeflow.url)
        assert said.code == 1
        assert "Dex refused user me or the password." in said.err
        assert "wr0ng" not in said.err
        # Without a login, the way to it is told.
        said = command("status", "--endpoint", kubeflow.url)
        assert said.code == 1
        assert "sends us to /dex/auth (302), as a login page or another address does; log in with --user" in said.err
        assert said.err.count("\n") == 1


def test_a_cookie_of_a_browser(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(KubeflowBehindDex(), DexHandler) as kubeflow:
        monkeypatch.setenv("KF_PIPELINES_COOKIE", SESSION)
        said = command("status", "--endpoint", kubeflow.url)
        assert (said.code, said.out) == (0, "no runs\n")


def test_an_address_at_which_a_web_page_answers(command: Command) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>Kubeflow Central Dashboard</html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(KfpServer(), Page) as page:
        said = command("status", "--endpoint", page.url)
    assert said.code == 1
    assert "answers with a web page, not with the Kubeflow Pipelines API" in said.err


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate that signs itself for 127.0.0.1, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubeflow of the test")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "ca.pem", folder / "key.pem"
    certificate_file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_file, key_file


def test_a_private_certificate_authority(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    certificate_file, key_file = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)

    class TlsServer(kfp_api_server.HttpServer):
        def get_request(self) -> tuple[ssl.SSLSocket, object]:
            connection, address = super().get_request()
            return context.wrap_socket(connection, server_side=True), address

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that does not trust us hangs up."""

    monkeypatch.setattr(kfp_api_server, "HttpServer", TlsServer)
    with serving(KubeflowBehindDex(), DexHandler) as kubeflow:
        endpoint = kubeflow.url.replace("http://", "https://")
        monkeypatch.setenv("KF_PIPELINES_PASSWORD", kubeflow.password)
        for arguments in ([], ["--user", kubeflow.user]):
            said = command("status", "--endpoint", endpoint, *arguments)
            assert said.code == 1
            assert "the certificate is not trusted" in said.err
            assert "--ca-file" in said.err
            assert said.err.count("\n") == 1
        said = command("status", "--endpoint", endpoint, "--user", kubeflow.user, "--ca-file", str(certificate_file))
        assert (said.code, said.out) == (0, "no runs\n"), said.err


def test_cookies_go_to_their_own_host_only() -> None:
    assert login._belongs("kubeflow.example", "kubeflow.example")
    assert login._belongs(".example.org", "kubeflow.example.org")
    assert login._belongs("localhost.local", "localhost")
    assert not login._belongs("dex.example.org", "kubeflow.example.org")
