"""Requests straight to the ASGI application, beside a clock that notes how long the event loop is held up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any


class Ticker:
    """`worst`: the longest that the event loop was late for a timer, seconds."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def run(self) -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.001)
            self.worst = max(self.worst, time.perf_counter() - begun - 0.001)


@contextlib.asynccontextmanager
async def ticking() -> AsyncIterator[Ticker]:
    ticker = Ticker()
    task = asyncio.ensure_future(ticker.run())
    await asyncio.sleep(0.005)
    ticker.worst = 0.0
    try:
        yield ticker
        await asyncio.sleep(0.002)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def ask(app: Any, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
    """Status and body of the answer to a POST of JSON."""
    pairs = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(key.encode(), value.encode()) for key, value in pairs.items()],
    }
    incoming = [body[i : i + 65536] for i in range(0, len(body), 65536)] or [b""]
    status, answer = 0, b""
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if incoming:
            part = incoming.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(incoming)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, answer
        status = message.get("status", status)
        answer += message.get("body", b"")

    await app(scope, receive, send)
    return status, answer


def message_of(answer: bytes) -> str:
    return json.loads(answer)["error"]["message"]
