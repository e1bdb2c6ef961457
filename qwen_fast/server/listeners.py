"""uvicorn's server with a FastCGI listener beside HTTP, or in its place: one lifespan, one orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Any

import uvicorn

from .config import Limits, ServerConfig
from .connections import Connection, Handshake
from .fastcgi import FastCGILimits, listen
from .fastcgi_address import bind, parse_address

_LOG = logging.getLogger("qwen_fast.server")
_WEB_SERVER_PARAMS = 64  # about a request, beside its headers


class Listeners(uvicorn.Server):
    """Listens where both configurations say, from the app's startup on. The FastCGI socket is bound before that, so that
    a bad address fails at once (OSError)."""

    def __init__(self, config: uvicorn.Config, options: ServerConfig) -> None:
        super().__init__(config)
        self._options = options

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        address = self._options.fastcgi
        if address is None:
            await self._startup_http(sockets)
            return
        place = parse_address(address)
        listener = bind(place, self._options.fastcgi_mode)
        try:
            await self._startup_http([] if self._options.fastcgi_only else sockets)
        except BaseException:  # SystemExit where HTTP cannot listen
            listener.close()
            if isinstance(place, str):
                os.unlink(place)
            raise
        fastcgi: Any = await listen(
            self.config.loaded_app,
            address,
            limits=fastcgi_limits(self._options.limits),
            connections=self.server_state.connections,
            tasks=self.server_state.tasks,
            state=self.lifespan.state,
            listener=listener,
        )
        self.servers.append(fastcgi)
        _LOG.info("FastCGI at %s", address)

    async def _startup_http(self, sockets: list[socket.socket] | None) -> None:
        """uvicorn's own, but that connections count, and have a deadline, before TLS stands."""
        config = self.config
        kind: Any = config.http_protocol_class
        if sockets is not None or not config.is_ssl or not issubclass(kind, Connection):
            await super().startup(sockets)
            return
        listener = config.bind_socket()  # which ends the process where it cannot
        try:
            await super().startup([])
        except BaseException:
            listener.close()
            raise
        context = config.ssl
        assert context is not None

        def make() -> Connection:
            connection = kind(config=config, server_state=self.server_state, app_state=self.lifespan.state)
            assert isinstance(connection, Connection)
            return connection

        def accept() -> Handshake:
            return Handshake(make, context, self.server_state.connections)

        loop = asyncio.get_running_loop()
        self.servers.append(await loop.create_server(accept, sock=listener, backlog=config.backlog))


def fastcgi_limits(limits: Limits) -> FastCGILimits:
    """The server's limits, as far as they are about connections."""
    return FastCGILimits(
        connections=2 * limits.connections,  # a backstop, as for HTTP
        params_bytes=limits.header_bytes,
        params=limits.header_count + _WEB_SERVER_PARAMS,
        body_seconds=limits.body_seconds,
        write_seconds=limits.write_seconds,
    )
