"""Access control by the request's host, its origin, and a key.

A local server without a key is protected only by its address, and a web page can circumvent that: its owner makes one
of their host names resolve to 127.0.0.1 (DNS rebinding), and the visitor's browser then treats the server as part of
the page. Such a request still names the owner's host, so hosts are checked. Accepted are names that always mean this
machine, the address on which the connection arrived (an address cannot be rebound), and the names given. No CORS
headers are sent: pages of other origins cannot read answers.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from tuna.serve.errors import ApiError, shown

__all__ = ["Access", "check_key", "host_name"]

HOST = re.compile(r"(?P<name>[a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
OPEN = "/health"  # reveals nothing about the model, and monitors have no key


class Access:
    """ASGI middleware that rejects requests for other hosts, from other pages, or without the key.

    Args:
        app: the application to protect.
        hosts: names of the server in addition to `localhost` and loopback addresses.
        api_key: key required in `Authorization: Bearer`; None: no key.

    Raises:
        ValueError: an invalid host or key.
    """

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str] = (), api_key: str | None = None) -> None:
        self.app = app
        self.names = {"localhost", *map(host_name, hosts)}
        self.key = None if api_key is None else check_key(api_key).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward accepted requests."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        elif scope["type"] != "lifespan":  # WebSocket
            raise RuntimeError(f"{scope['type']} is not supported")
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        hosts = _values(scope, b"host")
        if len(hosts) != 1:
            raise ApiError(400, f"a request needs exactly one Host header, this one has {len(hosts)}")
        try:
            known = self._is_ours(host_name(hosts[0]), scope)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        if not known:
            self._refuse("host", hosts[0])
        for origin in _values(scope, b"origin"):
            if not self._is_our_page(origin, scope):
                self._refuse("origin", origin)
        if self.key is not None and scope["path"] != OPEN and not self._has_key(scope):
            raise ApiError(401, "missing or wrong key: send Authorization: Bearer KEY", code="invalid_api_key")

    def _is_ours(self, name: str, scope: Scope) -> bool:
        if name in self.names:
            return True
        address, server = _address(name), scope.get("server")
        arrived = _address(server[0]) if server else None
        return address is not None and (address.is_loopback or address == arrived)

    def _is_our_page(self, origin: str, scope: Scope) -> bool:
        try:
            parts = urlsplit(origin)
            return parts.scheme in ("http", "https") and self._is_ours(host_name(parts.netloc), scope)
        except ValueError:  # "null": a file, a sandboxed frame
            return False

    def _refuse(self, what: str, value: str) -> None:
        message = (
            f"requests with {what} {shown(value)} are rejected, since any web page could send them; if it is yours, "
            "start the server with --allow-host and its name"
        )
        raise ApiError(403, message, code=f"{what}_not_allowed")

    def _has_key(self, scope: Scope) -> bool:
        given = _values(scope, b"authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        # Compared in constant time.
        return hmac.compare_digest(key.strip().encode("latin-1"), self.key or b"") and scheme.lower() == "bearer"


def host_name(host: str) -> str:
    """The normalised name of a host, without its port, for comparison.

    Raises:
        ValueError: not a host.

    Examples:
        >>> host_name("Localhost.:8000"), host_name("[::1]:80")
        ('localhost', '::1')
    """
    found = HOST.fullmatch(host.strip().lower())
    name = "" if found is None else found["name"].removesuffix(".")
    if not name or (name.startswith("[") and _address(name) is None):
        raise ValueError(f"host {shown(host)} is not a name or an address, with or without a port")
    address = _address(name)
    return name if address is None else str(address)


def check_key(key: str) -> str:
    """Return `key` if it is valid.

    Raises:
        ValueError: it is empty, or not possible in a header; the message does not contain it.
    """
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError("the API key must be printable ASCII without spaces, and not empty")
    return key


def _address(name: str) -> Any:
    """A host as an IP address, with an IPv4-mapped IPv6 address as IPv4; None for a name."""
    try:
        address: Any = ipaddress.ip_address(name.strip("[]").partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]
