"""Pictures from other places, fetched so that a request cannot make this server reach what it should not.

Off unless hosts are listed. Then: https on port 443 of a listed host alone; its name is resolved once, and refused if
any of its addresses is not public; the connection goes to the very address that was checked, so that a name which
resolves otherwise a moment later changes nothing; no redirect is followed, no proxy of the environment used, no
cookie kept; size and time are bounded.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import field_validator

from shellv_core.config import Config
from shellv_core.serving.engine import RequestError

if TYPE_CHECKING:
    import httpcore

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str], Awaitable[list[str]]]

HOST = re.compile(r"(?:\*\.)?(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
CONTENT_TYPES = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
}
NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
# Python's is_global of some versions lets these through.
NEVER = [
    ipaddress.ip_network(each)
    for each in (
        "0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/3",
        "::/96", "2001::/23", "3fff::/20", "fec0::/10",
    )
]  # fmt: skip


class RemoteImageConfig(Config):
    """From where pictures may be fetched."""

    hosts: tuple[str, ...] = ()
    """Names like ``images.example.org`` or ``*.example.org``; none, and nothing is fetched."""
    timeout_seconds: float = 5.0
    """From the resolution of the name to the last byte."""
    max_concurrent: int = 8

    @field_validator("hosts")
    @classmethod
    def _are_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if HOST.fullmatch(host) is None:
                raise ValueError(f"{host!r} is not a host name like images.example.org or *.example.org")
        return hosts


async def resolve(host: str) -> list[str]:
    """All addresses of `host`, as the system resolves it."""
    found = await asyncio.get_running_loop().getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]


def is_public(text: str) -> bool:
    """Whether `text` is an address that anyone on the internet may reach, whatever it wraps."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False  # with a scope, for example
    if isinstance(address, ipaddress.IPv6Address):
        inner = _embedded(address)
        if inner is not None:
            return _is_plainly_public(inner)
    return _is_plainly_public(address)


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a translator or tunnel would make of `address`."""
    if any(address in network for network in NAT64):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo and teredo[1])


def _is_plainly_public(address: Address) -> bool:
    special = address.is_multicast or address.is_reserved or address.is_unspecified
    return (
        address.is_global
        and not special
        and not any(address in network for network in NEVER if network.version == address.version)
    )


class RemoteImages:
    """Fetches pictures from listed hosts.

    Args:
        config: which hosts, and how long.
        max_bytes: of one picture file.
        resolve: host name to addresses.
        ssl_context: whom to trust; the system's authorities by default.
        dial: opens a TCP connection to an address and a port; for tests.
    """

    def __init__(
        self,
        config: RemoteImageConfig,
        max_bytes: int,
        resolve: Resolve = resolve,
        ssl_context: ssl.SSLContext | None = None,
        dial: Callable[[str, int], Awaitable[httpcore.AsyncNetworkStream]] | None = None,
    ) -> None:
        self._config, self._max_bytes = config, max_bytes
        self._resolve, self._ssl_context, self._dial = resolve, ssl_context, dial
        self._places = asyncio.Semaphore(config.max_concurrent)

    async def fetch(self, url: str, param: str) -> tuple[bytes, str]:
        """A picture file's bytes and its format as Pillow calls it.

        Args:
            url: what the request names.
            param: the request's field, for the error.

        Raises:
            RequestError: if the URL is not one that may be fetched, or nothing usable comes from there in time.
        """
        host, target = self._parse(url, param)
        try:
            async with self._places, asyncio.timeout(self._config.timeout_seconds):
                return await self._get(host, target, param)
        except TimeoutError:
            reason = f"did not come within {self._config.timeout_seconds:g} s"
        except _RefusedError as refused:
            reason = str(refused)
        except (OSError, ValueError) as error:
            reason = f"could not be fetched ({type(error).__name__})"
        # What the host answered is not told: it would show what stands behind a door.
        raise RequestError(f"the picture at {host} {reason}.", param, "remote_image_failed")

    def _parse(self, url: str, param: str) -> tuple[str, str]:
        """Host and target of `url`."""
        if not self._config.hosts:
            raise RequestError(
                "this server fetches no pictures from other places; send the picture itself as"
                " data:image/png;base64,... (png, jpeg, webp or gif).",
                param,
                "remote_image_refused",
            )
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        host = parts.hostname or ""
        # The host is taken from the URL's letters alone, so that no two readers of it can differ.
        authority = host if port is None else f"{host}:443"
        plain = url.isascii() and url.isprintable() and " " not in url and "\\" not in url
        if not plain or parts.scheme != "https" or parts.netloc.lower() != authority or len(url) > 2048:
            raise RequestError(
                "a picture's address must be https://HOST/PATH without user, port or blanks, or a data: URL.",
                param,
                "invalid_image_url",
            )
        if not any(_matches(host, allowed) for allowed in self._config.hosts):
            allowed = ", ".join(self._config.hosts)
            raise RequestError(f"pictures are fetched from {allowed} only.", param, "remote_image_refused")
        return host, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    async def _get(self, host: str, target: str, param: str) -> tuple[bytes, str]:
        import httpcore

        pool = httpcore.AsyncConnectionPool(
            ssl_context=self._ssl_context or ssl.create_default_context(),
            max_keepalive_connections=0,
            network_backend=_checked_backend(self._resolve, self._dial),
        )
        url = httpcore.URL(scheme=b"https", host=host.encode(), port=443, target=target.encode())
        headers = [("host", host), ("accept", ", ".join(CONTENT_TYPES)), ("accept-encoding", "identity")]
        try:
            async with pool, pool.stream("GET", url, headers=headers) as response:
                if response.status != 200:
                    raise _RefusedError("was not answered with 200 (redirects are not followed)")
                fields = {name.lower(): value.decode("latin-1") for name, value in response.headers}
                image_format = CONTENT_TYPES.get(fields.get(b"content-type", "").partition(";")[0].strip().lower())
                if image_format is None or fields.get(b"content-encoding", "identity") != "identity":
                    raise _RefusedError(f"is not one of {', '.join(CONTENT_TYPES)}")
                data = bytearray()
                async for chunk in response.aiter_stream():
                    data += chunk
                    if len(data) > self._max_bytes:
                        raise _RefusedError(f"has more than {self._max_bytes} bytes")
                return bytes(data), image_format
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
            raise _RefusedError(f"could not be fetched ({type(error).__name__})") from None


class _RefusedError(Exception):
    """Why nothing comes from there, as the end of a sentence."""


def _matches(host: str, allowed: str) -> bool:
    return host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed


def _checked_backend(resolve: Resolve, dial: Any) -> httpcore.AsyncNetworkBackend:
    import httpcore

    class CheckedBackend(httpcore.AnyIOBackend):
        """Connects to public addresses only: to the very one that was checked."""

        async def connect_tcp(
            self,
            host: str,
            port: int,
            timeout: float | None = None,
            local_address: str | None = None,
            socket_options: Iterable[Any] | None = None,
        ) -> httpcore.AsyncNetworkStream:
            addresses = await resolve(host)
            if not addresses or not all(map(is_public, addresses)):
                raise _RefusedError("has an address that is not public")
            failure: Exception = httpcore.ConnectError()
            for address in addresses:
                try:
                    if dial is not None:
                        stream: httpcore.AsyncNetworkStream = await dial(address, port)
                        return stream
                    return await super().connect_tcp(address, port, timeout, local_address, socket_options)
                except httpcore.NetworkError as error:
                    failure = error
            raise failure

        async def connect_unix_socket(self, *arguments: Any, **options: Any) -> httpcore.AsyncNetworkStream:
            raise _RefusedError("names a socket")

    return CheckedBackend()
