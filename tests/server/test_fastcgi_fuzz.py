"""FastCGI under hostile peers: random bytes, and streams of records cut, repeated, mixed up and changed.

Whatever comes: no exception leaves the connection, memory stays within the limits, no task outlives its connection, and
a good request on the next connection is answered.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

import pytest
from fastcgi_peer import params_of, read_body, request_bytes, respond, response_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_fast.server import fastcgi_records as fcgi
from qwen_fast.server.fastcgi_connection import Connection, FastCGILimits, Responder

LIMITS = FastCGILimits(params_bytes=2000, params=20, unread_body_bytes=3000, requests_per_connection=50)
LARGEST_RECORD = fcgi.HEADER.size + fcgi.MAX_CONTENT + 255


class Transport(asyncio.Transport):
    """A socket whose other end reads, or does not, as the test says."""

    HIGH_WATER = 4096

    def __init__(self, connection: Connection, reads: bool) -> None:
        super().__init__()
        self.connection = connection
        self.reads = reads
        self.reading = True
        self.closing = False
        self.written = bytearray()
        self.unread = 0
        self.most_unread = 0

    def write(self, data: Any) -> None:
        assert not self.closing
        self.written += data
        if not self.reads:
            was, self.unread = self.unread, self.unread + len(data)
            self.most_unread = max(self.most_unread, self.unread)
            if was <= self.HIGH_WATER < self.unread:
                self.connection.pause_writing()

    def read_all(self) -> None:
        """The peer reads what is there."""
        if self.unread > self.HIGH_WATER:
            self.connection.resume_writing()
        self.unread = 0

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)

    abort = close


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/raise":
        raise RuntimeError("a planted failure")
    if scope["path"] == "/refuse":
        await respond(send, b"no", 403)
        return
    if await read_body(receive) is not None:
        await respond(send, scope["path"].encode() * 100, headers=[(b"x-length", b"%d" % len(scope["headers"]))])


async def turns(count: int = 12) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def talk(chunks: list[bytes], reads: bool) -> None:
    """Sends the chunks on one connection, closes it, and asks for something on another."""
    responder = Responder(app, LIMITS)
    connection = Connection(responder)
    transport = Transport(connection, reads)
    connection.connection_made(transport)
    for chunk in chunks:
        await turns(2)
        if not transport.reading:
            await turns()
            transport.read_all()
            await turns()
        if transport.closing:
            break
        assert transport.reading, "nothing resumes the connection"
        connection.data_received(chunk)
        assert transport.closing or len(connection._buffer) < LARGEST_RECORD
        request = connection._request
        if request is not None:
            assert len(request.params or b"") <= LIMITS.params_bytes + fcgi.MAX_CONTENT
            assert len(request._body) <= LIMITS.unread_body_bytes + len(chunk) + LARGEST_RECORD
        assert transport.most_unread <= Transport.HIGH_WATER + 100_000 + 4 * len(chunk)
        parsed, used = fcgi.parse_records(transport.written)
        assert used == len(transport.written)
        assert all(record.type in (fcgi.STDOUT, fcgi.END_REQUEST, 10, 11) for record in parsed)
    transport.close()
    await turns()
    assert not responder.connections
    assert not responder.tasks, "a task outlives its connection"
    assert not connection._timers

    connection = Connection(responder)
    transport = Transport(connection, True)
    connection.connection_made(transport)
    connection.data_received(request_bytes(b"/good", b"body"))
    await turns()
    status, headers, body = response_of(fcgi.parse_records(transport.written)[0])
    assert (status, headers, body) == (200, {"x-length": "1"}, b"/good" * 100)
    assert transport.closing
    assert not responder.tasks


@pytest.fixture(scope="module")
def converse():
    """converse(chunks, reads) runs talk() on one event loop for all examples; failures of the app are not printed."""
    logger = logging.getLogger("qwen_fast.server.fastcgi_connection")
    logger.setLevel(logging.CRITICAL)
    loop = asyncio.new_event_loop()
    problems: list[Any] = []
    loop.set_exception_handler(lambda _, context: problems.append(context))

    def run(chunks: list[bytes], reads: bool) -> None:
        loop.run_until_complete(asyncio.wait_for(talk(chunks, reads), 5))
        assert not problems

    yield run
    loop.close()
    logger.setLevel(logging.NOTSET)


IDS = st.sampled_from([0, 1, 1, 1, 2, 65535])
TYPES = st.one_of(st.sampled_from(range(1, 12)), st.integers(0, 255))
VALUES = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"POST", b"/echo", b"/raise", b"/refuse", b"5", b"x" * 3000])
)
NAMES = st.sampled_from(
    [b"REQUEST_METHOD", b"SCRIPT_NAME", b"PATH_INFO", b"CONTENT_LENGTH", b"QUERY_STRING", b"HTTP_AUTHORIZATION", b"X"]
)
SMALL_RECORDS = st.builds(
    lambda kind, request_id, content: fcgi.record(kind, request_id, content), TYPES, IDS, st.binary(max_size=64)
)
BEGINS = st.builds(fcgi.begin_request, st.sampled_from([1, 1, 1, 2]), st.booleans(), st.sampled_from([1, 1, 1, 1, 2]))
PARAMS = st.builds(params_of, st.dictionaries(NAMES, VALUES, max_size=6), st.sampled_from([1, 1, 2]))
BODIES = st.builds(
    lambda size, end: fcgi.stream(fcgi.STDIN, 1, bytes(size)) + (fcgi.record(fcgi.STDIN, 1) if end else b""),
    st.integers(0, 20_000),
    st.booleans(),
)
REQUESTS = st.builds(
    lambda path, size, keep: request_bytes(path, bytes(size), keep),
    st.sampled_from([b"/echo", b"/raise", b"/refuse"]),
    st.integers(0, 20_000),
    st.booleans(),
)
STREAMS = st.lists(st.one_of(SMALL_RECORDS, BEGINS, PARAMS, BODIES, REQUESTS), max_size=12).map(b"".join)


@st.composite
def mutated(draw: Any) -> bytes:
    """A stream of records with some of its bytes changed, dropped, repeated or added."""
    data = bytearray(draw(STREAMS))
    for _ in range(draw(st.integers(0, 4))):
        if not data:
            break
        start = draw(st.integers(0, len(data) - 1))
        end = min(len(data), start + draw(st.integers(1, 30)))
        change = draw(st.sampled_from(["set", "drop", "repeat", "insert"]))
        if change == "set":
            data[start] = draw(st.integers(0, 255))
        elif change == "drop":
            del data[start:end]
        elif change == "repeat":
            data[end:end] = data[start:end]
        else:
            data[start:start] = draw(st.binary(max_size=20))
    return bytes(data)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


CUTS = st.lists(st.integers(0, 60_000), max_size=12)


def check(converse: Any, data: bytes, cuts: list[int], reads: bool) -> None:
    converse(split(data, cuts), reads)


HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


@settings(max_examples=150, deadline=None, suppress_health_check=HEALTH)
@given(data=st.binary(max_size=600), cuts=CUTS, reads=st.booleans())
def test_random_bytes(converse, data, cuts, reads):
    check(converse, b"\x01" + data, cuts, reads)


@settings(max_examples=800, deadline=None, suppress_health_check=HEALTH)
@given(data=mutated(), cuts=CUTS, reads=st.booleans())
def test_mutated_records(converse, data, cuts, reads):
    check(converse, data, cuts, reads)


@pytest.mark.long
@settings(max_examples=20_000, deadline=None, suppress_health_check=HEALTH)
@given(data=mutated(), cuts=CUTS, reads=st.booleans())
def test_mutated_records_long(converse, data, cuts, reads):
    check(converse, data, cuts, reads)


@pytest.mark.parametrize("size", [1, 3, 17, 118])
def test_whole_requests_in_small_pieces(converse, size):
    data = request_bytes(body=bytes(5000), keep=True) + request_bytes(b"/refuse", body=b"x") + b"rest"
    converse([data[i : i + size] for i in range(0, len(data), size)], True)
