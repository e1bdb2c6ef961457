"""One FastCGI connection on an event loop, in front of an ASGI app.

One request at a time per connection: a second one is refused with CANT_MPX_CONN, as GET_VALUES announces. A connection
that closes, or ABORT_REQUEST, is http.disconnect to the app. Each chunk of a response is written at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from . import fastcgi_records as fcgi
from .fastcgi_limits import FastCGILimits
from .fastcgi_scope import BadRequest, content_length, error_response, request_scope, response_head

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

logger = logging.getLogger(__name__)


@dataclass
class Responder:
    """What the connections of a listener share."""

    app: App
    limits: FastCGILimits = field(default_factory=FastCGILimits)
    connections: set[Any] = field(default_factory=set)  # and other listeners', perhaps; each has shutdown()
    tasks: set[asyncio.Task[None]] = field(default_factory=set)  # one for each request that runs
    state: MutableMapping[str, Any] = field(default_factory=dict)  # of the app's lifespan
    open: int = 0  # connections of this listener


class _Request:
    """One request: what has arrived of it, and the app's two channels."""

    def __init__(self, connection: Connection, request_id: int, keep_connection: bool) -> None:
        self.id = request_id
        self.keep_connection = keep_connection
        self.params: bytearray | None = bytearray()  # None once they are complete
        self.body_complete = False
        self.answered = False  # END_REQUEST is written
        self.disconnected = False
        self._connection = connection
        self._responder = connection.responder
        self._scope: dict[str, Any] = {}
        self._body = bytearray()
        self._body_delivered = False
        self._body_bytes = 0
        self._expected_bytes: int | None = None
        self._changed = asyncio.Event()
        self._head: bytes | None = None
        self._head_written = False
        self._failure: tuple[int, str] | None = None  # why it was given up before the app answered

    # -- what arrives

    def start(self, params: bytes) -> None:
        """With all parameters there, starts the app. Raises BadRequest, or ProtocolError."""
        pairs = fcgi.decode_pairs(params, self._responder.limits.params)
        self._scope = request_scope(pairs, self._responder.state)
        self._expected_bytes = content_length(self._scope["headers"])
        task = asyncio.get_running_loop().create_task(self._run())
        self._responder.tasks.add(task)
        task.add_done_callback(self._responder.tasks.discard)

    def add_body(self, content: bytes) -> bool:
        """A part of the body, b"" at its end. Returns whether so much is unread that no more should be sent."""
        self._body += content
        self._body_bytes += len(content)
        self.body_complete = not content
        expected = self._expected_bytes
        if expected is not None and (self._body_bytes > expected or (not content and self._body_bytes < expected)):
            self.give_up(400, f"the body has {self._body_bytes} bytes; Content-Length says {expected}")
        self._changed.set()
        return len(self._body) > self._responder.limits.unread_body_bytes

    def give_up(self, status: int, message: str) -> None:
        """The app sees a disconnect; if it has not answered, the client gets this error."""
        self._failure = self._failure or (status, message)
        self.disconnect()

    def disconnect(self) -> None:
        self.disconnected = True
        self._body.clear()
        self._changed.set()

    # -- the app

    async def _run(self) -> None:
        try:
            await self._responder.app(self._scope, self._receive, self._send)
        except Exception as error:
            logger.error("%s failed", self._name(), exc_info=error)
        except BaseException:  # cancelled: the process is stopping
            if not self.answered:
                self._connection.abort()
            raise
        if self.answered:
            return
        if self.disconnected and self._failure is None:
            self._connection.answer(self, b"", app_status=1)
        elif self._head_written:
            logger.error("the response of %s broke off", self._name())
            self._connection.abort()  # without END_REQUEST, so that nobody takes it for the whole
        else:
            status, message = self._failure or (500, "the server failed to answer this request")
            self._connection.answer(self, error_response(status, message))

    def _name(self) -> str:
        """For the log: the path is percent-encoded there, so that it cannot begin a line."""
        return f"{self._scope['method']} {self._scope['raw_path'].decode('ascii')}"

    async def _receive(self) -> Message:
        while True:
            if self.disconnected or self.answered:
                return {"type": "http.disconnect"}
            if self._body or (self.body_complete and not self._body_delivered):
                body = bytes(self._body)
                self._body.clear()
                self._body_delivered = self.body_complete
                self._connection.resume_body()
                return {"type": "http.request", "body": body, "more_body": not self.body_complete}
            self._changed.clear()
            await self._changed.wait()

    async def _send(self, message: Message) -> None:
        if self.disconnected:
            return
        kind = message["type"]
        if kind == "http.response.start" and self._head is None:
            self._head = response_head(message["status"], message.get("headers", ()))
        elif kind == "http.response.body" and self._head is not None and not self.answered:
            more = message.get("more_body", False)
            data = b"" if self._scope["method"] == "HEAD" else message.get("body", b"")
            if not self._head_written:
                data = self._head + data
                self._head_written = True
            if more:
                self._connection.write(fcgi.stream(fcgi.STDOUT, self.id, data))
            else:
                self._connection.answer(self, data)
                self._changed.set()
            await self._connection.drain()
        else:
            raise RuntimeError(f"ASGI message {kind!r} at this point of a response")


class Connection(asyncio.Protocol):
    """One connection of a web server."""

    def __init__(self, responder: Responder) -> None:
        self.responder = responder
        self._limits = responder.limits
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._request: _Request | None = None
        self._requests = 0
        self._refusing = False  # too many connections
        self._closing = False  # after the answer, or at once if there is no request
        self._body_paused = False
        self._write_paused = False
        self._replies_paused = False
        self._lingering_id: int | None = None  # of a request answered before the end of its body
        self._drained = asyncio.Event()
        self._drained.set()
        self._timers: dict[str, asyncio.TimerHandle] = {}

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.responder.connections.add(self)
        self.responder.open += 1
        self._refusing = self.responder.open > self._limits.connections
        self._set_timer(self._limits.idle_seconds, self.shutdown)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.responder.connections.discard(self)
        self.responder.open -= 1
        self._set_timer(None)
        self._set_timer(None, which="reading")
        self._drained.set()
        if self._request:
            self._request.disconnect()

    def eof_received(self) -> None:
        if self._request:
            self._request.disconnect()

    def pause_writing(self) -> None:
        self._write_paused = True
        self._drained.clear()
        if self._transport is not None:
            self._set_timer(self._limits.write_seconds, self._transport.abort, "reading")

    def resume_writing(self) -> None:
        self._write_paused = self._replies_paused = False
        self._set_timer(None, which="reading")
        self._drained.set()
        self._read_if_allowed()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            records, used = fcgi.parse_records(self._buffer)
            del self._buffer[:used]
            for record in records:
                if self._transport is None or self._transport.is_closing():
                    return
                self._handle(record)
        except fcgi.ProtocolError as error:
            logger.warning("FastCGI connection closed: %s", error)
            self.abort()

    # -- records

    def _handle(self, record: fcgi.Record) -> None:
        kind, request_id, content = record
        request = self._request
        if kind == fcgi.GET_VALUES and request_id == fcgi.MANAGEMENT:
            self._reply(fcgi.record(fcgi.GET_VALUES_RESULT, fcgi.MANAGEMENT, self._values(content)))
        elif kind == fcgi.BEGIN_REQUEST and request_id != fcgi.MANAGEMENT:
            self._begin(request_id, content)
        elif kind in (fcgi.ABORT_REQUEST, fcgi.PARAMS, fcgi.STDIN, fcgi.DATA) and request_id != fcgi.MANAGEMENT:
            if request is None or request.id != request_id:  # refused, or answered before its body ended
                if kind == fcgi.STDIN and not content and request_id == self._lingering_id:
                    self._close()
                return
            if kind == fcgi.ABORT_REQUEST:
                request.disconnect()
                if request.params is not None:
                    self.answer(request, b"", app_status=1)  # no app was started
            elif kind == fcgi.PARAMS:
                self._params(request, content)
            elif kind == fcgi.STDIN:
                self._stdin(request, content)
        else:
            self._reply(fcgi.unknown_type(kind))

    def _values(self, content: bytes) -> bytes:
        known = {
            b"FCGI_MAX_CONNS": b"%d" % self._limits.connections,
            b"FCGI_MAX_REQS": b"%d" % self._limits.connections,
            b"FCGI_MPXS_CONNS": b"0",
        }
        asked = {name for name, _ in fcgi.decode_pairs(content, self._limits.params)}
        return fcgi.encode_pairs((name, value) for name, value in known.items() if name in asked)

    def _begin(self, request_id: int, content: bytes) -> None:
        if len(content) != fcgi.BEGIN_BODY.size:
            raise fcgi.ProtocolError(f"BEGIN_REQUEST has {len(content)} bytes; it must have {fcgi.BEGIN_BODY.size}")
        role, flags = fcgi.BEGIN_BODY.unpack(content)
        if self._request is not None:
            if self._request.id == request_id:
                raise fcgi.ProtocolError(f"request {request_id} begins twice")
            self._reply(fcgi.end_request(request_id, fcgi.CANT_MPX_CONN))
            return
        if self._closing:
            return  # it has lingered for the end of a body only
        request = _Request(self, request_id, bool(flags & fcgi.KEEP_CONN))
        if role != fcgi.RESPONDER:
            self.answer(request, b"", protocol_status=fcgi.UNKNOWN_ROLE)
        elif self._refusing:
            self._closing = True  # a kept connection would go on refusing when there is room again
            body = error_response(503, "too many connections; try again later", ((b"retry-after", b"1"),))
            self.answer(request, body, protocol_status=fcgi.OVERLOADED)
        else:
            self._request = request
            self._requests += 1
            self._set_timer(self._limits.params_seconds, self.abort)

    def _params(self, request: _Request, content: bytes) -> None:
        if request.params is None:
            raise fcgi.ProtocolError("PARAMS after their end")
        if content:
            request.params += content
            if len(request.params) > self._limits.params_bytes:
                message = f"the parameters have more than {self._limits.params_bytes} bytes"
                self.answer(request, error_response(431, message))
            return
        params, request.params = bytes(request.params), None
        self._set_timer(self._limits.body_seconds, self._body_late)
        try:
            request.start(params)
        except (BadRequest, fcgi.ProtocolError) as error:  # the records themselves are in order
            self.answer(request, error_response(400, str(error)))

    def _stdin(self, request: _Request, content: bytes) -> None:
        if request.params is not None:
            raise fcgi.ProtocolError("STDIN before the end of PARAMS")
        if request.body_complete:
            raise fcgi.ProtocolError("STDIN after its end")
        if request.disconnected:
            request.body_complete = not content
            return
        self._body_paused = request.add_body(content) or self._body_paused
        if request.body_complete or self._body_paused or request.disconnected:
            self._set_timer(None)
        else:
            self._set_timer(self._limits.body_seconds, self._body_late)
        self._read_if_allowed()

    # -- for the request

    def write(self, data: bytes) -> None:
        if self._transport is not None and data and not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Waits while the peer reads more slowly than the app writes."""
        await self._drained.wait()

    def answer(
        self, request: _Request, data: bytes, protocol_status: int = fcgi.REQUEST_COMPLETE, app_status: int = 0
    ) -> None:
        """The last of a response and END_REQUEST. Then the connection waits for another request, or closes; if the
        body is still being sent it is read to its end first, or the peer would lose the answer."""
        request.answered = True
        end = fcgi.stream(fcgi.STDOUT, request.id, data)
        if protocol_status == fcgi.REQUEST_COMPLETE:
            end += fcgi.record(fcgi.STDOUT, request.id)
        self._reply(end + fcgi.end_request(request.id, protocol_status, app_status))
        self._request = None
        self._body_paused = False
        self._closing |= not request.keep_connection or self._requests >= self._limits.requests_per_connection
        if not self._closing:
            self._set_timer(self._limits.idle_seconds, self.shutdown)
        elif request.body_complete:
            self._close()
        else:
            self._lingering_id = request.id
            self._set_timer(self._limits.linger_seconds, self._close)
        self._read_if_allowed()

    def resume_body(self) -> None:
        if self._body_paused:
            self._body_paused = False
            if self._request and not self._request.body_complete:
                self._set_timer(self._limits.body_seconds, self._body_late)
            self._read_if_allowed()

    def abort(self) -> None:
        """Closes at once, without END_REQUEST."""
        self._closing = True
        if self._request:
            self._request.disconnect()
        self._close()

    def shutdown(self) -> None:
        """Closes when the request that runs is answered, or at once."""
        self._closing = True
        if self._request is None:
            self._close()
        else:
            self._request.keep_connection = False

    # -- the connection

    def _body_late(self) -> None:
        if self._request:
            self._request.give_up(408, f"no part of the body for {self._limits.body_seconds:g} s")

    def _reply(self, data: bytes) -> None:
        """Writes what the peer caused; a peer that does not read it causes no more."""
        self.write(data)
        self._replies_paused = self._write_paused
        self._read_if_allowed()

    def _read_if_allowed(self) -> None:
        """Reads, unless the app has enough of the body or the peer does not read what it is answered."""
        if self._transport is None or self._transport.is_closing():
            return
        if self._body_paused or self._replies_paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()  # once all is sent, for which the peer has so long:
            self._set_timer(self._limits.body_seconds, self._transport.abort)

    def _set_timer(self, seconds: float | None, then: Callable[[], None] | None = None, which: str = "next") -> None:
        if which in self._timers:
            self._timers.pop(which).cancel()
        if seconds is not None and then is not None and self._transport is not None:
            self._timers[which] = asyncio.get_running_loop().call_later(seconds, then)
