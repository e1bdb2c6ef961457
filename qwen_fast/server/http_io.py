"""Bodies in and out of ASGI: reading under limits, sending JSON, noticing that the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .config import Limits
from .errors import ApiError, shortened
from .state import Principal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")

CONNECTION = "qwen_fast.connection"  # key of a scope that holds its Connection, where it came over HTTP
CONTEXT = "qwen_fast"  # key of a scope that holds its Context
_DISCARD_S = 5.0  # for a body that nobody wants
_LAST_WORDS_S = 1.0  # for an error to reach a client that reads slowly


@dataclass(frozen=True, slots=True)
class Context:
    """What the gate found out about a request. headers: by lower-case name."""

    request_id: str
    principal: Principal
    headers: Mapping[str, str]


class ClientGone(Exception):
    """The client closed its connection."""


def route_path(scope: Message) -> str:
    """The path without the prefix that a proxy stripped and the server put back."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


async def read_body(
    scope: Message, receive: Receive, limits: Limits, charge: Callable[[int], None] = lambda size: None
) -> bytes:
    """The body, which must be JSON by its headers. ApiError 408, 413 or 415. charge: is told the size of each part
    before it is kept, and may refuse it."""
    headers = scope[CONTEXT].headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"content-type must be application/json, got {shortened(ascii(kind))}")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "content-encoding must be identity: compressed bodies are not read")
    declared = headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and len(declared) < 20 and int(declared) > limits.body_bytes:
        raise _too_large(limits)
    connection = scope.get(CONNECTION)
    if connection is not None and connection.body_is_complete:  # there is nothing to wait for
        return await _read_parts(receive, limits, charge)
    try:
        return await asyncio.wait_for(_read_parts(receive, limits, charge), limits.body_seconds)
    except asyncio.TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} s"
        raise ApiError(408, message, headers={"connection": "close"}) from None


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413, f"the body has more than {limits.body_bytes} bytes, the limit", headers={"connection": "close"}
    )


async def _read_parts(receive: Receive, limits: Limits, charge: Callable[[int], None]) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limits.body_bytes:
            raise _too_large(limits)
        charge(len(part))
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _skip_body(receive: Receive, limits: Limits) -> None:
    """As _read_parts, keeping nothing: it is nobody's who has shown a key."""
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        size += len(message.get("body", b""))
        if size > limits.body_bytes:
            raise _too_large(limits)
        more = message.get("more_body", False)


async def discard_body(receive: Receive, limits: Limits) -> bool:
    """Reads what is left of a body that nobody wants, so that the connection can carry the next request. False where
    it is too large or too slow for that; ClientGone where there is no connection any more."""
    try:
        await asyncio.wait_for(_skip_body(receive, limits), min(limits.body_seconds, _DISCARD_S))
    except (ApiError, asyncio.TimeoutError):
        return False
    return True


async def send_json(send: Send, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
    """A whole JSON response. value: bytes are sent as they are."""
    body = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
    pairs = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    pairs += [(name.encode("latin-1"), text.encode("latin-1")) for name, text in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError) -> None:
    await send_json(send, error.status, error.body_bytes(), error.headers)


async def while_connected(
    work: Coroutine[Any, Any, T],
    receive: Receive,
    seconds: float,
    limit: float,
    interruption: asyncio.Future[tuple[str, str]],
) -> T:
    """The result of work, which is cancelled when the client goes (ClientGone), the time is up (ApiError 504), or the
    server interrupts it (ApiError 503, see Server.interruption).

    seconds: what is left of `limit`.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        awaited: set[asyncio.Future[Any]] = {task, watcher, interruption}
        done, _ = await asyncio.wait(awaited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if watcher in done:
            watcher.result()
            raise ClientGone
        if interruption in done:
            message, code = interruption.result()
            raise ApiError(503, message, code=code)
        raise ApiError(504, f"the request took longer than {limit:g} s", code="request_timeout")
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)
        elif watcher.done() and not watcher.cancelled():
            watcher.exception()  # nobody else asks for it


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_last_words(send: Send, body: bytes) -> None:
    """Ends a response that has begun; gives up on a client that does not read."""
    message = {"type": "http.response.body", "body": body}
    try:
        await asyncio.wait_for(send(message), _LAST_WORDS_S)
    except asyncio.TimeoutError:
        raise ClientGone from None
