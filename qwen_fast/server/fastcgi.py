"""A FastCGI responder: web servers with fastcgi_pass reach the ASGI app through it.

server = await listen(app, "unix:/run/qwen.sock")
...
server.close()
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from .fastcgi_address import bind, parse_address
from .fastcgi_connection import App, Connection, Responder
from .fastcgi_limits import FastCGILimits

__all__ = ["FastCGILimits", "FastCGIServer", "listen"]


class FastCGIServer:
    """A listener. Its connections outlive close(): shutdown() of each ends it after its request."""

    def __init__(self, server: asyncio.Server, responder: Responder, path: str | None) -> None:
        self.connections = responder.connections
        self.tasks = responder.tasks
        self._server = server
        self._path = path
        self._inode = os.stat(path).st_ino if path else 0

    @property
    def sockets(self) -> tuple[Any, ...]:
        """The listening socket, as asyncio.Server has it."""
        return self._server.sockets

    def close(self) -> None:
        """Accepts no more connections, and removes the file of its Unix socket."""
        self._server.close()
        if self._path is not None:
            with suppress(OSError):  # another process may have put its own socket there
                if os.stat(self._path).st_ino == self._inode:
                    os.unlink(self._path)
            self._path = None

    async def wait_closed(self) -> None:
        await self._server.wait_closed()

    async def drain(self, grace_seconds: float) -> bool:
        """Closes, lets the running requests end for so long, then cancels them. Returns whether all ended."""
        self.close()
        for connection in list(self.connections):
            connection.shutdown()
        if self.tasks:
            await asyncio.wait(list(self.tasks), timeout=grace_seconds)
        late = list(self.tasks)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=1.0)
        return not late


async def listen(
    app: App,
    address: str,
    *,
    mode: int = 0o660,
    limits: FastCGILimits | None = None,
    connections: set[Any] | None = None,
    tasks: set[asyncio.Task[None]] | None = None,
    state: MutableMapping[str, Any] | None = None,
    backlog: int = 2048,
    listener: socket.socket | None = None,
) -> FastCGIServer:
    """Serves an ASGI app by FastCGI until close().

    address: "unix:/path", or "127.0.0.1:port" (loopback only; port 0: any). mode: permissions of the Unix socket.
    connections, tasks: sets shared with other listeners, such as uvicorn's, so that their shutdown covers these too.
    state: of the app's lifespan, which is not run here. listener: what bind() gave for the address. Raises ValueError for an address that is none, OSError if it
    cannot listen there.
    """
    place = parse_address(address)
    responder = Responder(
        app,
        limits or FastCGILimits(),
        set() if connections is None else connections,
        set() if tasks is None else tasks,
        {} if state is None else state,
    )
    listener = listener or bind(place, mode)
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    if isinstance(place, str):
        server = await loop.create_unix_server(lambda: Connection(responder), sock=listener, backlog=backlog)
        return FastCGIServer(server, responder, place)
    server = await loop.create_server(lambda: Connection(responder), sock=listener, backlog=backlog)
    return FastCGIServer(server, responder, None)
