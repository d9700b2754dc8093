"""Limits on idle connections: uvicorn waits for headers without time limit, on any number of connections."""

from __future__ import annotations

import asyncio
import resource
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["BoundedProtocol", "Server"]

HEADER_SECONDS = 20.0  # from the connection, or a request's first byte, to the end of its headers
SPARE = 64  # files the process needs in addition to connections
MOST = 8192
LAST_WORDS = 1.0  # seconds for requests that were cancelled at the end to be answered


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol with limits on connections without a request.

    A connection is closed if the headers of a request are not complete within `HEADER_SECONDS` of the connection or of
    the request's first byte. At the limit of open connections, a new one replaces the one that has waited longest.
    """

    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's."""
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > most_connections():
            self._let_one_go()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's."""
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Set the time limit while there is no request, and remove it during one."""
        asks = self.cycle is not None and not self.cycle.response_complete
        if asks:
            self._unwatch()
        elif self._due is None and not self.transport.is_closing():
            self._due = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _unwatch(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _let_one_go(self) -> None:
        others: Any = self.connections
        waiting = [(other._due.when(), id(other), other) for other in others if other._due is not None]
        min(waiting)[2].transport.abort()


class Server(uvicorn.Server):
    """uvicorn's server, which waits for the answers to requests it cancelled: SIGTERM kills the process right after."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().shutdown(sockets)
        if self.server_state.tasks and not self.force_exit:
            await asyncio.wait(self.server_state.tasks, timeout=LAST_WORDS)


def most_connections() -> int:
    """Maximum number of open connections."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if files == resource.RLIM_INFINITY else max(1, min(MOST, files - SPARE))
