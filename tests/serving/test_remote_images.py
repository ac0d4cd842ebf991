"""Pictures of other hosts: what may be fetched, and that nothing else is reached, by whatever trick."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import ssl
import threading

import httpx
import pytest

from shellv_core.errors import ConfigError
from shellv_core.serving.engine import RequestError
from shellv_core.serving.remote_images import RemoteImageConfig, RemoteImages, is_public
from tests.serving.tiny_model import picture

HOST = "pictures.example.org"
ON = RemoteImageConfig(hosts=(HOST, "*.cdn.example.org"), timeout_seconds=20)
PUBLIC = "93.184.215.14"


class Canary:
    """A port that nothing must ever reach; every family of loopback that there is."""

    def __init__(self):
        self.hits = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.hits.append(connection.recv(200))
                connection.close()

    def close(self):
        self._listener.close()


@pytest.fixture(scope="module")
def canary():
    canary = Canary()
    yield canary
    canary.close()


def hostile_urls(port):
    hosts = [
        *[
            "127.0.0.1",
            "localhost",
            "0.0.0.0",
            "0",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "0177.0.0.1",
            "017700000001",
        ],
        *[
            "127.000.000.001",
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
        ],
        *["[0:0:0:0:0:ffff:127.0.0.1]", "localhost.", "127.0.0.1.nip.io", "LOCALHOST", "①②⑦.⓪.⓪.①", "127。0。0。1"],
        *["169.254.169.254", "metadata.google.internal", "cdn.example.org", "xcdn.example.org"],
        *(f"{HOST}@127.0.0.1", f"127.0.0.1#@{HOST}", f"127.0.0.1?@{HOST}", f"127.0.0.1\\@{HOST}"),
        *(f"user:{HOST}@localhost", f"{HOST}.evil.example", f"evil{HOST}", f"{HOST}%00.evil.example"),
    ]
    for host in hosts:
        for scheme in ("http", "https"):
            yield f"{scheme}://{host}:{port}/a.png"
            yield f"{scheme}://{host}/a.png"
    for scheme in [
        "file",
        "gopher",
        "ftp",
        "dict",
        "ldap",
        "jar:http",
        "javascript",
        "blob",
        "unix",
        "view-source",
        "//",
    ]:
        yield f"{scheme}://127.0.0.1:{port}/a.png"
    for authority in (f"{HOST}:{port}", f"{HOST}:0", f"{HOST}:443443", f"[{HOST}]", "[::1", "[fe80::1%25eth0]", ""):
        yield f"https://{authority}/a.png"
    yield from (
        *(f"http://{HOST}/a.png", f"https:{HOST}/a.png", f"https:/{HOST}/a.png", f"https:///{HOST}/a.png"),
        *(f" https://{HOST}/", f"https://{HOST}/ a", f"https://{HOST}/\r\nhost: 127.0.0.1", f"https://{HOST}\t/a"),
        *("https://", "http:", "https:", f"HTTPS://127.0.0.1:{port}", "", "data:", f"https://{HOST}/" + "a" * 3000),
        *("file:///etc/passwd", "/etc/passwd", "./a.png", "C:\\a.png", "\\\\127.0.0.1\\share\\a.png", "a.png"),
    )


def fetch(images, url):
    return asyncio.run(images.fetch(url, "here"))


async def resolve_to_loopback(host):
    return ["127.0.0.1"]


@pytest.mark.parametrize("config", [RemoteImageConfig(), ON], ids=["off", "on"])
def test_not_one_hit(canary, config):
    """Every trick by itself, with a resolver that answers loopback for whatever name it is asked."""
    images = RemoteImages(config, 1 << 20, resolve=resolve_to_loopback)
    for url in hostile_urls(canary.port):
        with pytest.raises(RequestError) as caught:
            fetch(images, url)
        assert caught.value.code in ("remote_image_refused", "invalid_image_url", "remote_image_failed"), url
    assert canary.hits == []


@pytest.mark.parametrize("hosts", [[], [HOST, "*.cdn.example.org"]], ids=["off", "on"])
def test_not_one_hit_through_the_api(canary, start_endpoint, hosts):
    from shellv_core.serving.http.config import ApiConfig, RequestLimits

    config = RemoteImageConfig(hosts=hosts, timeout_seconds=5)
    remote = RemoteImages(config, 1 << 20, resolve=resolve_to_loopback)
    api = ApiConfig(request=RequestLimits(remote_images=config))
    with start_endpoint(api, remote=remote) as endpoint, httpx.Client(base_url=endpoint.url, timeout=60) as client:
        for url in hostile_urls(canary.port):
            content = [{"type": "image_url", "image_url": {"url": url}}]
            response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
            assert response.status_code == 400, url
            assert response.json()["error"]["param"] == "messages[0].content[0].image_url.url"
    assert canary.hits == []


@pytest.mark.parametrize(
    "address",
    [
        *[
            "127.0.0.1",
            "127.8.8.8",
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
        ],
        *[
            "192.0.0.1",
            "192.0.2.1",
            "198.18.0.1",
            "198.51.100.1",
            "203.0.113.1",
            "192.88.99.1",
            "224.0.0.1",
            "240.0.0.1",
        ],
        *["255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::7f00:1", "64:ff9b::7f00:1"],
        *[
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2002:a00:1::1",
            "2001:0:7f00:1::",
            "2001:db8::1",
            "fe80::1",
        ],
        *["fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "100::1", "3fff::1", "words"],
        "",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_addresses_that_are(address):
    assert is_public(address)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for the allowed host, and a client's trust in it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    pem = folder / "cert.pem"
    pem.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)
    return server, ssl.create_default_context(cafile=pem)


class Origin:
    """What stands behind the allowed host: answers every request with `answer`, and remembers the heads."""

    def __init__(self, answer, pause=0.0):
        self.answer, self.pause, self.heads = answer, pause, []

    async def handle(self, reader, writer):
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        with contextlib.suppress(OSError):
            for piece in self.answer:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(self.pause)
        writer.close()


def response(status="200 OK", headers=(), body=b""):
    lines = [f"HTTP/1.1 {status}", "connection: close", *headers]
    return [("\r\n".join(lines) + "\r\n\r\n").encode(), body]


def get(certificate, origin, addresses=(PUBLIC,), config=ON, url=f"https://{HOST}/a/b.png?c=d"):
    """Fetch `url` with all connections led to `origin`; returns the answer and the addresses that were dialled."""
    import httpcore

    dialled = []

    async def run():
        server = await asyncio.start_server(origin.handle, "127.0.0.1", 0, ssl=certificate[0])
        port = server.sockets[0].getsockname()[1]

        async def dial(address, wanted_port):
            dialled.append((address, wanted_port))
            return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", port)

        answers = iter(addresses) if isinstance(addresses, list) else None

        async def resolve(host):
            return next(answers) if answers else list(addresses)

        images = RemoteImages(config, 100_000, resolve, certificate[1], dial)
        async with server:
            return await images.fetch(url, "here")

    try:
        return asyncio.run(run()), dialled
    except RequestError as error:
        return error, dialled


def test_an_allowed_picture(certificate):
    origin = Origin(response(headers=["content-type: image/png"], body=picture()))
    found, dialled = get(certificate, origin)
    assert found == (picture(), "PNG")
    assert dialled == [(PUBLIC, 443)]  # the address that was checked, and no name
    head = origin.heads[0].decode().lower()
    assert head.startswith("get /a/b.png?c=d http/1.1\r\n")
    assert f"host: {HOST}\r\n" in head
    assert "cookie" not in head
    assert "authorization" not in head


def test_the_name_is_resolved_once(certificate):
    """Rebinding: public when it is checked, loopback when asked again; it is not asked again."""
    origin = Origin(response(headers=["content-type: image/png"], body=picture()))
    found, dialled = get(certificate, origin, addresses=[[PUBLIC], ["127.0.0.1"]])
    assert found[1] == "PNG"
    assert dialled == [(PUBLIC, 443)]


@pytest.mark.parametrize("addresses", [("127.0.0.1",), (PUBLIC, "127.0.0.1"), ("::ffff:10.0.0.1",), ()])
def test_a_name_with_an_address_that_is_not_public(certificate, addresses):
    found, dialled = get(certificate, Origin([]), addresses=addresses)
    assert "an address that is not public" in str(found)
    assert dialled == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (response("302 Found", ["location: http://169.254.169.254/"]), "redirects are not followed"),
        (response("301 Moved", [f"location: https://{HOST}/b.png"]), "redirects are not followed"),
        (response("404 Not Found", ["content-type: image/png"], b"secret"), "not answered with 200"),
        (response(headers=["content-type: text/html"], body=b"<html>secret"), "is not one of image/png"),
        (response(headers=[], body=picture()), "is not one of"),
        (response(headers=["content-type: image/png", "content-encoding: gzip"], body=b"x"), "is not one of"),
        (response(headers=["content-type: image/png"], body=b"x" * 100_001), "more than 100000 bytes"),
        (response(headers=["content-type: image/png", "content-length: 50"], body=b"x"), "could not be fetched"),
        ([b"nonsense secret\r\n\r\n"], "could not be fetched"),
    ],
)
def test_answers_that_are_not_taken(certificate, answer, message):
    found, dialled = get(certificate, Origin(answer))
    assert message in str(found)
    assert (found.code, found.param) == ("remote_image_failed", "here")
    assert "secret" not in str(found)
    assert len(dialled) == 1


def test_an_answer_that_drips(certificate):
    origin = Origin([b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n", *[b"x"] * 1000], pause=0.05)
    found, _ = get(certificate, origin, config=RemoteImageConfig(hosts=(HOST,), timeout_seconds=1.0))
    assert "did not come within 1 s" in str(found)


def test_a_certificate_of_another_host(certificate):
    origin = Origin(response(headers=["content-type: image/png"], body=picture()))
    found, _ = get(certificate, origin, url="https://a.cdn.example.org/a.png")
    assert "could not be fetched" in str(found)
    assert origin.heads == []


def test_proxies_of_the_environment_are_not_used(certificate, canary, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
    found, _ = get(certificate, Origin(response(headers=["content-type: image/png"], body=picture())))
    assert found[1] == "PNG"
    assert canary.hits == []


@pytest.mark.parametrize(
    "host", ["", "*", "127.0.0.1", "::1", "https://a.org", "a.org/", "a.org:443", "*.org*", "A.org", "a b.org"]
)
def test_hosts_that_cannot_be_allowed(host):
    from shellv_core.config import build_config

    with pytest.raises(ConfigError, match="not a host name"):
        build_config(RemoteImageConfig, {"hosts": [host]})


def test_the_canary_sings():
    """It would have noticed."""
    canary = Canary()
    socket.create_connection(("127.0.0.1", canary.port)).close()
    for _ in range(1000):
        if canary.hits:
            break
        threading.Event().wait(0.01)
    assert canary.hits == [b""]
    canary.close()
