"""What the tests of FastCGI share: a web server's side of a connection, and small ASGI apps to stand behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable
from typing import Any

from qwen_fast.server import fastcgi_records as fcgi

POST = {b"REQUEST_METHOD": b"POST", b"SCRIPT_NAME": b"/echo", b"SERVER_PROTOCOL": b"HTTP/1.1"}


def params_of(variables: dict[bytes, bytes], request_id: int = 1) -> bytes:
    pairs = fcgi.encode_pairs(variables.items())
    return fcgi.stream(fcgi.PARAMS, request_id, pairs) + fcgi.record(fcgi.PARAMS, request_id)


def request_bytes(
    path: bytes = b"/echo", body: bytes = b"", keep: bool = False, request_id: int = 1, **variables: bytes
) -> bytes:
    """A whole request, as a web server sends it."""
    named = {name.encode("ascii"): value for name, value in variables.items()}
    known = {**POST, b"SCRIPT_NAME": path, b"CONTENT_LENGTH": b"%d" % len(body), **named}
    parts = [fcgi.begin_request(request_id, keep), params_of(known, request_id)]
    parts += [fcgi.stream(fcgi.STDIN, request_id, body), fcgi.record(fcgi.STDIN, request_id)]
    return b"".join(parts)


def stdout_of(records: Iterable[fcgi.Record], request_id: int = 1) -> bytes:
    return b"".join(r.content for r in records if r.type == fcgi.STDOUT and r.request_id == request_id)


def response_of(records: Iterable[fcgi.Record], request_id: int = 1) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a CGI response."""
    head, _, body = stdout_of(records, request_id).partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode("latin-1").split("\r\n"))
    return int(headers.pop("Status")), {name.lower(): value for name, value in headers.items()}, body


def ends_of(records: Iterable[fcgi.Record]) -> list[tuple[int, int]]:
    """(request id, protocol status) of each END_REQUEST."""
    return [(r.request_id, fcgi.END_BODY.unpack(r.content)[1]) for r in records if r.type == fcgi.END_REQUEST]


class Peer(contextlib.AsyncExitStack):
    """A connection to a FastCGI server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__()
        self.callback(writer.close)
        self.reader = reader
        self.writer = writer
        self._buffer = bytearray()
        self._records: list[fcgi.Record] = []

    @classmethod
    async def connect(cls, path: str) -> Peer:
        return cls(*await asyncio.open_unix_connection(path))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def record(self) -> fcgi.Record | None:
        """The next record; None if the server closed."""
        while not self._records:
            data = await asyncio.wait_for(self.reader.read(65536), 5)
            if not data:
                return None
            self._buffer += data
            self._records, used = fcgi.parse_records(self._buffer)
            del self._buffer[:used]
        return self._records.pop(0)

    async def until_end(self) -> list[fcgi.Record]:
        """All records up to END_REQUEST, or to the end of the connection."""
        records = []
        while (record := await self.record()) is not None:
            records.append(record)
            if record.type == fcgi.END_REQUEST:
                break
        return records

    async def closed(self) -> bool:
        """Whether the server closes, and sends nothing before."""
        return await self.record() is None


async def read_body(receive: Any) -> bytes | None:
    """The whole body; None if the client went away before its end."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message["body"]
        if not message["more_body"]:
            return body


async def respond(send: Any, body: bytes, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


class App:
    """Answers by path; `disconnects` counts the clients that it saw go."""

    def __init__(self) -> None:
        self.disconnects = 0
        self.running = 0
        self.gate = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.running += 1
        try:
            await getattr(self, "on_" + scope["path"].strip("/").replace("/", "_"))(scope, receive, send)
        finally:
            self.running -= 1

    async def on_echo(self, scope: Any, receive: Any, send: Any) -> None:
        body = await read_body(receive)
        if body is None:
            self.disconnects += 1
            return
        shown = {**scope, "headers": [[k.decode("latin-1"), v.decode("latin-1")] for k, v in scope["headers"]]}
        shown = {k: v.decode("latin-1") if isinstance(v, bytes) else v for k, v in shown.items()}
        shown["body"] = body.decode("latin-1")
        await respond(send, json.dumps(shown).encode(), headers=[(b"content-type", b"application/json")])

    async def on_stream(self, scope: Any, receive: Any, send: Any) -> None:
        """Events until the client goes away, or as many as the query says; every 10 ms."""
        await read_body(receive)
        count = int(scope["query_string"] or 1000)
        gone = asyncio.create_task(receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for i in range(count):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % i, "more_body": True})
            await asyncio.wait([gone], timeout=0.01)
            if gone.done():
                self.disconnects += 1
                return
        gone.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def on_gated(self, scope: Any, receive: Any, send: Any) -> None:
        """Reads no body until the gate opens."""
        await self.gate.wait()
        body = await read_body(receive)
        await respond(send, b"gone" if body is None else b"%d" % len(body))

    async def on_refuse(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers without the body."""
        await respond(send, b"too large", 413)

    async def on_raise(self, scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a planted failure")

    async def on_nothing(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def on_broken(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("a planted failure")

    async def on_headers(self, scope: Any, receive: Any, send: Any) -> None:
        """A response header that would be two."""
        await respond(send, b"", headers=[(b"x-name", b"a\r\nx-other: b")])

    async def on_flood(self, scope: Any, receive: Any, send: Any) -> None:
        """More than any buffer takes."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for self.flooded in range(1, 1001):
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    flooded = 0
