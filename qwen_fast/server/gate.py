"""The ASGI middleware before every route: request id, size of headers, number of open requests, authentication, and the
shape of errors."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from .errors import ApiError, from_exception
from .http_io import CONTEXT, ClientGone, Context, Message, Receive, Send, discard_body, route_path, send_error
from .state import Principal, Server

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_WITHOUT_KEY = frozenset({"/health", "/ready", "/ping"})  # and /metrics where ServerConfig says so
_NOBODY = Principal()

App = Callable[[Message, Receive, Send], Awaitable[None]]


class Gate:
    def __init__(self, app: App, server: Server) -> None:
        self._app = app
        self._server = server
        self._open = 0
        self._open_by_key: dict[str, int] = {}
        config = server.config
        several_keys = len(getattr(server.auth, "limits", ())) > 1
        self._most_by_key = config.limits.connections // 2 if several_keys else 0  # none shuts the others out
        self._without_key = _WITHOUT_KEY | ({"/metrics"} if config.metrics_public else frozenset())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
                return
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        started = False
        unread = "content-length" in headers or "transfer-encoding" in headers

        async def receive_noting() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body", False))
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        self._open += 1
        key: str | None = None
        try:
            principal = self._admit(scope, headers)
            key = principal.name
            self._open_by_key[key] = self._open_by_key.get(key, 0) + 1
            scope[CONTEXT] = Context(request_id, principal, headers)
            await self._app(scope, receive_noting, send_with_id)
        except ClientGone:
            return
        except Exception as error:
            shown = from_exception(error, request_id)
            if started:  # what was promised cannot be kept: the connection is cut
                raise
            with contextlib.suppress(ClientGone):
                wanted = unread and "connection" not in shown.headers
                if wanted and not await discard_body(receive_noting, self._server.config.limits):
                    shown.headers["connection"] = "close"
                await send_error(send_with_id, shown)
        finally:
            self._open -= 1
            if key is not None:
                self._open_by_key[key] -= 1

    def _admit(self, scope: Message, headers: dict[str, str]) -> Principal:
        limits = self._server.config.limits
        pairs: list[Any] = scope["headers"]
        if len(pairs) > limits.header_count:
            raise ApiError(431, f"the request has {len(pairs)} headers; the limit is {limits.header_count}")
        size = sum(len(key) + len(value) for key, value in pairs)
        if size > limits.header_bytes:
            raise ApiError(431, f"the request has {size} bytes of headers; the limit is {limits.header_bytes}")
        if route_path(scope) in self._without_key:
            return _NOBODY
        if self._open > limits.connections:
            message = f"{self._open} requests are open; the limit is {limits.connections}"
            raise ApiError(503, message, code="too_many_connections", headers={"retry-after": "1"})
        principal = self._server.auth.principal(headers)
        if self._most_by_key and self._open_by_key.get(principal.name, 0) >= self._most_by_key:
            message = f"{principal.name} has {self._most_by_key} requests open; the limit is half of limits.connections"
            raise ApiError(429, message, code="too_many_connections", headers={"retry-after": "1"})
        return principal
