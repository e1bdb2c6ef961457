"""The ASGI middleware before every route: request id, size of headers, authentication, number of open requests, and the
shape of errors."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from .config import Limits
from .errors import ApiError, from_exception
from .http_io import (
    CONNECTION,
    CONTEXT,
    ClientGone,
    Context,
    Message,
    Receive,
    Send,
    discard_body,
    route_path,
    send_error,
)
from .state import Principal, Server

if TYPE_CHECKING:
    from .connections import Connection

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_WITHOUT_KEY = frozenset({"/health", "/ready", "/ping"})  # and /metrics where ServerConfig says so
_NOBODY = Principal()
_DISCARDS = 64  # bodies of requests without a valid key that are read away at once
_DISCARD_BYTES = 2**20  # of each; any more and the connection is closed instead
_SLOW_START_S = 10.0  # until the rate of a body counts
_SEND_S = 5.0  # for an error to be sent

App = Callable[[Message, Receive, Send], Awaitable[None]]


class Gate:
    def __init__(self, app: App, server: Server) -> None:
        self._app = app
        self._server = server
        self._open = 0  # admitted requests
        self._open_by_key: Counter[str] = Counter()
        self._discards = 0
        config = server.config
        several_keys = len(getattr(server.auth, "limits", ())) > 1
        self._most_by_key = config.limits.connections // 2 if several_keys else 0  # none shuts the others out
        self._without_key = _WITHOUT_KEY | ({"/metrics"} if config.metrics_public else frozenset())
        size = min(config.limits.body_bytes, _DISCARD_BYTES)
        self._limits_of_strangers = dataclasses.replace(config.limits, body_bytes=size)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        connection: Connection | None = scope.get(CONNECTION)
        body = _Body(receive, headers, self._server.config.limits, connection)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            elif connection is not None and not message.get("more_body", False):
                connection.ending()
            await send(message)

        key: str | None = None
        try:
            principal, counts = self._admit(scope, headers)
            if counts:
                key = principal.name
                self._open += 1
                self._open_by_key[key] += 1
                if connection is not None:
                    connection.admit()
            scope[CONTEXT] = Context(request_id, principal, headers)
            await self._app(scope, body.receive, send_with_id)
        except ClientGone:
            return
        except Exception as error:
            shown = from_exception(error, request_id)
            if started:  # what was promised cannot be kept: the connection is cut
                raise
            await self._refuse(shown, body, send_with_id, connection, stranger=key is None)
        finally:
            if key is not None:
                self._open -= 1
                self._open_by_key[key] -= 1
                if not self._open_by_key[key]:
                    del self._open_by_key[key]
            if connection is not None:
                connection.update_soon()

    async def _refuse(
        self, shown: ApiError, body: _Body, send: Send, connection: Connection | None, stranger: bool
    ) -> None:
        """Sends an error, once the rest of the body is read away, or closes the connection after it."""
        try:
            if body.unread and "connection" not in shown.headers and not await self._discard(body, stranger):
                shown.headers["connection"] = "close"
            sending = send_error(send, shown)
            await (sending if connection is not None else asyncio.wait_for(sending, _SEND_S))  # HTTP has its deadline
        except (ClientGone, asyncio.TimeoutError):
            return

    async def _discard(self, body: _Body, stranger: bool) -> bool:
        if body.is_there:
            await body.receive()
            return True
        if not stranger:
            return await discard_body(body.receive, self._server.config.limits)
        if self._discards >= _DISCARDS:
            return False
        self._discards += 1
        try:
            return await discard_body(body.receive, self._limits_of_strangers)
        finally:
            self._discards -= 1

    def _admit(self, scope: Message, headers: dict[str, str]) -> tuple[Principal, bool]:
        """Who asks, and whether the request counts as one of a key's."""
        limits = self._server.config.limits
        pairs: list[Any] = scope["headers"]
        if len(pairs) > limits.header_count:
            raise ApiError(431, f"the request has {len(pairs)} headers; the limit is {limits.header_count}")
        size = sum(len(key) + len(value) for key, value in pairs)
        if size > limits.header_bytes:
            raise ApiError(431, f"the request has {size} bytes of headers; the limit is {limits.header_bytes}")
        if route_path(scope) in self._without_key:
            return _NOBODY, False
        principal = self._server.auth.principal(headers)
        if self._open >= limits.connections:
            message = f"{self._open + 1} requests are open; the limit is {limits.connections}"
            raise ApiError(503, message, code="too_many_connections", headers={"retry-after": "1"})
        if self._most_by_key and self._open_by_key[principal.name] >= self._most_by_key:
            message = f"{principal.name} has {self._most_by_key} requests open; the limit is half of limits.connections"
            raise ApiError(429, message, code="too_many_connections", headers={"retry-after": "1"})
        return principal, True


class _Body:
    """The receive() of a request, which bounds how slowly its body may come."""

    def __init__(
        self, receive: Receive, headers: dict[str, str], limits: Limits, connection: Connection | None
    ) -> None:
        self.unread = "content-length" in headers or "transfer-encoding" in headers
        self._receive = receive
        self._rate = limits.body_bytes_per_second
        self._connection = connection
        self._began = time.monotonic()
        self._size = 0

    @property
    def is_there(self) -> bool:
        """All of it has arrived, as far as one can tell: the next receive() has what is left, and does not wait."""
        return self._connection is not None and self._connection.body_is_complete

    async def receive(self) -> Message:
        """ApiError 408 where the body comes too slowly."""
        if not self.unread:
            return await self._receive()
        if not self._rate or self.is_there:
            message = await self._receive()
        else:
            late = self._began + max(_SLOW_START_S, (self._size + 1) / self._rate)
            try:
                message = await asyncio.wait_for(self._receive(), max(0.0, late - time.monotonic()))
            except asyncio.TimeoutError:
                text = f"the body comes more slowly than {self._rate} bytes a second"
                raise ApiError(408, text, headers={"connection": "close"}) from None
        self._size += len(message.get("body", b""))
        self.unread = bool(message.get("more_body", False))
        return message
