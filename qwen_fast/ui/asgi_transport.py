"""An httpx transport into an ASGI application of the same event loop that hands on each part of a response when it is
sent. httpx's own waits for the whole response, which would make a stream one block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import httpx

_WAITING_PARTS = 64  # a reader so far behind holds the application up
Message = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]


class StreamingASGITransport(httpx.AsyncBaseTransport):
    """A response that is closed before its end is a client gone: the application gets http.disconnect."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange = _Exchange(await request.aread())
        exchange.task = asyncio.create_task(exchange.run(self._app, _scope(request)))
        try:
            status, headers = await exchange.head
        except BaseException:
            await exchange.aclose()
            raise
        return httpx.Response(status, headers=headers, stream=exchange)


def _scope(request: httpx.Request) -> Message:
    url = request.url
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": url.scheme,
        "path": url.path,
        "raw_path": url.raw_path.partition(b"?")[0],
        "query_string": url.query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "client": ("127.0.0.1", 0),
        "server": (url.host, url.port or 80),
        "state": {},
    }


class _Exchange(httpx.AsyncByteStream):
    """One request: the application runs in a task, and its parts wait in a queue. None in it: the end."""

    def __init__(self, body: bytes) -> None:
        self.task: asyncio.Task[None] | None = None
        self.head: asyncio.Future[tuple[int, Any]] = asyncio.get_running_loop().create_future()
        self._body: bytes | None = body
        self._parts: asyncio.Queue[bytes | None] = asyncio.Queue(_WAITING_PARTS)
        self._closed = asyncio.Event()
        self._complete = False

    async def run(self, app: App, scope: Message) -> None:
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001  the caller's, whatever it is
            if not self.head.done():
                self.head.set_exception(httpx.RemoteProtocolError(f"{type(error).__name__}: {error}"))
        finally:
            if not self.head.done():
                self.head.set_exception(httpx.RemoteProtocolError("the application sent no response"))
                self.head.exception()  # whoever waited may be gone
            if not self._closed.is_set():
                await self._parts.put(None)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._closed.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if not self.head.done():
                self.head.set_result((message["status"], list(message.get("headers", ()))))
        elif message["type"] == "http.response.body" and not self._closed.is_set():
            self._complete = not message.get("more_body", False)
            if message.get("body"):
                await self._put(message["body"])

    async def _put(self, part: bytes) -> None:
        if not self._parts.full():
            self._parts.put_nowait(part)
            return
        putting = asyncio.ensure_future(self._parts.put(part))
        closing = asyncio.ensure_future(self._closed.wait())
        await asyncio.wait({putting, closing}, return_when=asyncio.FIRST_COMPLETED)
        putting.cancel()
        closing.cancel()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (part := await self._parts.get()) is not None:
            yield part
        if not self._complete:
            raise httpx.RemoteProtocolError("the response ended before its end")

    async def aclose(self) -> None:
        self._closed.set()
        while not self._parts.empty():
            self._parts.get_nowait()
        if self.task is not None and not self.task.done():
            await asyncio.wait({self.task}, timeout=5)
            self.task.cancel()
