"""HTTP connections with deadlines, and a bound on those that have no admitted request."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
import ssl
from collections.abc import Callable
from typing import Any, Protocol

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .config import Limits
from .errors import ApiError
from .http_io import CONNECTION

_LOG = logging.getLogger("qwen_fast.server")
_LATE_S = 5.0  # after the application's own deadline for a body: time for its answer
_OTHER_FILES = 256  # open beside connections


class Abortable(Protocol):
    def abort(self) -> None:
        """Ends the connection at once; it must leave Waiting before this returns."""


class Waiting:
    """The connections of a server that have no admitted request: silent ones, those between two requests, and those
    whose request is refused. Beyond a limit, the one that has waited longest is ended: whoever has a key and sends its
    request finds room, however many connections strangers open."""

    def __init__(self, limits: Limits) -> None:
        room = max(1, (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_FILES) // 2)
        self._most = min(limits.waiting_connections, room)
        self._most_of_address = limits.address_connections
        self._addresses: dict[Abortable, str | None] = {}  # the longest waiting first
        self._of_address: dict[str, dict[Abortable, None]] = {}

    def __len__(self) -> int:
        return len(self._addresses)

    def add(self, connection: Abortable, address: str | None) -> None:
        """From now on it waits. address: None where it has none."""
        self.remove(connection)
        self._addresses[connection] = address
        if address is not None:
            same = self._of_address.setdefault(address, {})
            same[connection] = None
            if len(same) > self._most_of_address:
                next(iter(same)).abort()
        if len(self._addresses) > self._most:
            next(iter(self._addresses)).abort()

    def remove(self, connection: Abortable) -> None:
        address = self._addresses.pop(connection, None)
        if address is not None:
            same = self._of_address[address]
            del same[connection]
            if not same:
                del self._of_address[address]


def address_of(transport: asyncio.BaseTransport) -> str | None:
    """Of the peer: an IPv4 address, or the first 64 bits of one of IPv6, which are one customer's."""
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple) or not peer:
        return None
    address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.IPv6Address(int(address) >> 64 << 64))
        address = address.ipv4_mapped
    return str(address)


def raise_file_limit(limits: Limits) -> None:
    """Lets the process open as many connections as the limits allow, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + limits.waiting_connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            _LOG.warning("%d files can be open, and the limits on connections need %d (ulimit -n)", most, wanted)


class _Writer(h11.Connection):
    """h11's, with fewer system calls: the head of a response waits for what
    comes with it, and the last part of a body for the end of the message. `held` is called where the head waits, and
    calls flush() a turn of the event loop later.

    ending: the next part of the body is the last.
    """

    def __init__(self, most_bytes: int, held: Callable[[], None]) -> None:
        super().__init__(h11.SERVER, most_bytes)
        self.ending = False
        self._held = held
        self._waiting = b""

    def flush(self) -> bytes:
        """What still waits."""
        waiting, self._waiting = self._waiting, b""
        return waiting

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        if type(event) is h11.Response:
            self.ending = False
            self._waiting = super().send(event) or b""
            self._held()
            return b""
        sent = super().send(event)
        if self._waiting and sent is not None:
            sent = self.flush() + sent
        if self.ending and type(event) is h11.Data:
            self.ending = False
            self._waiting = sent or b""
            return b""
        return sent


class Connection(H11Protocol):
    """uvicorn's connection, with deadlines for headers, bodies and readers. The class is made by connection_class()."""

    limits: Limits
    waiting: Waiting

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn: _Writer = _Writer(self.limits.header_bytes, self._flush_soon)
        self._address: str | None = None
        self._early = b""  # arrived before connection_made(), which TLS allows
        self._lost = False
        self._phase = ""
        self._deadline: asyncio.TimerHandle | None = None
        self._reading_deadline: asyncio.TimerHandle | None = None  # for the peer to read

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if self._lost:
            return
        super().connection_made(transport)
        self._address = address_of(transport)
        self.waiting.add(self, self._address)
        if self._early:
            early, self._early = self._early, b""
            super().data_received(early)
        self.update()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        self.waiting.remove(self)
        self._set_deadline(None)
        if self._reading_deadline is not None:
            self._reading_deadline.cancel()
        if self.transport is not None:
            super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self.transport is None:
            self._early += data
            return
        super().data_received(data)
        self.update()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reading_deadline is None:
            self._reading_deadline = self.loop.call_later(self.limits.write_seconds, self.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading_deadline is not None:
            self._reading_deadline.cancel()
            self._reading_deadline = None

    # -- uvicorn's

    def on_response_complete(self) -> None:
        self._phase = ""
        if not self._lost:
            self.waiting.add(self, self._address)
        super().on_response_complete()
        self.update()

    def shutdown(self) -> None:
        super().shutdown()
        self.update()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.update()

    def _flush_soon(self) -> None:
        self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        if (waiting := self.conn.flush()) and not self._lost:
            self.transport.write(waiting)

    # -- for the gate

    def admit(self) -> None:
        """The request that runs has been admitted."""
        self.waiting.remove(self)

    def ending(self) -> None:
        """The next part of the answer is its last."""
        self.conn.ending = True

    @property
    def body_is_complete(self) -> bool:
        return self.cycle is not None and not self.cycle.more_body

    def abort(self) -> None:
        """Ends the connection at once; what it has not sent yet is lost."""
        self.waiting.remove(self)
        self.transport.abort()

    def update_soon(self) -> None:
        """After the application has returned."""
        self.loop.call_soon(self.update)

    # -- deadlines

    def update(self) -> None:
        """Sets the deadline of the phase that the connection has come to."""
        if self._lost:
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            scope: Any = self.scope
            scope[CONNECTION] = self
        if self.transport.is_closing():
            phase = "closing"
        elif not answering:
            phase = "header"
        else:
            phase = "body" if self.cycle.more_body else "answer"
        if phase == self._phase:
            return
        self._phase = phase
        if phase == "closing":
            self._set_deadline(self.limits.write_seconds, self.abort)
        elif phase == "header":
            self._set_deadline(self.limits.header_seconds, self._header_late)
        elif phase == "body":
            self._set_deadline(self.limits.body_seconds + _LATE_S, self.abort)
        else:
            self._set_deadline(None)

    def _set_deadline(self, seconds: float | None, then: Callable[[], None] | None = None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None and then is not None:
            self._deadline = self.loop.call_later(seconds, then)

    def _header_late(self) -> None:
        """A client that has begun a request is told; a silent one, or one with the rest of an unwanted body, is not."""
        begun = self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]
        if not begun:
            self.abort()
            return
        error = ApiError(408, f"the headers did not arrive within {self.limits.header_seconds:g} s")
        body = error.body_bytes()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self.update()


def connection_class(limits: Limits) -> type[Connection]:
    """For uvicorn's http=: its connections count together."""
    return type("Connection", (Connection,), {"limits": limits, "waiting": Waiting(limits)})


class Handshake(asyncio.Protocol):
    """A connection from its first byte on until TLS stands; then it is a Connection.

    make: a Connection. connections: of the server, for its shutdown.
    """

    def __init__(self, make: Callable[[], Connection], context: ssl.SSLContext, connections: set[Any]) -> None:
        self._make = make
        self._context = context
        self._connections = connections
        self._waiting: Waiting | None = None
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        connection = self._make()
        self._transport, self._waiting = transport, connection.waiting
        self._connections.add(self)
        self._waiting.add(self, address_of(transport))
        self._task = asyncio.get_running_loop().create_task(self._shake(transport, connection))

    def abort(self) -> None:
        if self._waiting is not None and self._transport is not None:
            self._waiting.remove(self)
            self._transport.abort()

    def shutdown(self) -> None:
        """As uvicorn asks its connections."""
        self.abort()

    async def _shake(self, transport: asyncio.Transport, connection: Connection) -> None:
        assert self._waiting is not None
        seconds = connection.limits.header_seconds
        try:
            secured = await asyncio.get_running_loop().start_tls(
                transport, connection, self._context, server_side=True, ssl_handshake_timeout=seconds
            )
        except OSError as error:  # ssl.SSLError, too late, or gone
            _LOG.debug("no TLS: %s", error)
            transport.abort()
            return
        finally:
            self._connections.discard(self)
            self._waiting.remove(self)
        if secured is not None and not secured.is_closing():
            connection.connection_made(secured)
