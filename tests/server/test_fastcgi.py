"""FastCGI: records and scopes as pure functions, and the server over a real Unix socket."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import stat
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastcgi_peer import App, Peer, ends_of, params_of, request_bytes, response_of, stdout_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_fast.server import fastcgi_records as fcgi
from qwen_fast.server.fastcgi import FastCGILimits, FastCGIServer, listen
from qwen_fast.server.fastcgi_address import parse_address
from qwen_fast.server.fastcgi_scope import BadRequest, request_scope, response_head

# -- records -----------------------------------------------------------------------------------------------------

RECORDS = st.lists(st.tuples(st.integers(0, 255), st.integers(0, 65535), st.binary(max_size=200), st.integers(0, 255)))


def packed(kind: int, request_id: int, content: bytes, padding: int) -> bytes:
    return fcgi.HEADER.pack(1, kind, request_id, len(content), padding) + content + b"\xaa" * padding


@settings(max_examples=200, deadline=None)
@given(RECORDS, st.integers(0, 5000))
def test_records_survive_any_split(records, cut):
    data = b"".join(packed(*record) for record in records)
    first, used = fcgi.parse_records(data[:cut])
    second, rest = fcgi.parse_records(data[used:])
    assert [tuple(record) for record in first + second] == [record[:3] for record in records]
    assert used + rest == len(data)


def test_another_version_is_refused():
    with pytest.raises(fcgi.ProtocolError, match="version 0"):
        fcgi.parse_records(bytes(8))


@pytest.mark.parametrize("size", [0, 1, 65528, 65529, 200_000])
def test_streams_are_cut_into_records(size):
    data = os.urandom(size)
    records, used = fcgi.parse_records(written := fcgi.stream(fcgi.STDOUT, 7, data))
    assert used == len(written)
    assert b"".join(record.content for record in records) == data
    assert all(record.content and record.type == fcgi.STDOUT and record.request_id == 7 for record in records)


PAIRS = st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=300)), max_size=20)


@settings(max_examples=200, deadline=None)
@given(PAIRS)
def test_pairs_round_trip(pairs):
    assert fcgi.decode_pairs(fcgi.encode_pairs(pairs), len(pairs)) == pairs


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_pairs_of_random_bytes(data):
    try:
        pairs = fcgi.decode_pairs(data, 100)
    except fcgi.ProtocolError:
        return
    assert sum(len(name) + len(value) for name, value in pairs) <= len(data)


@pytest.mark.parametrize(
    "data", [b"\x01", b"\x01\x05a", b"\x80", b"\x80\x00\x00", b"\xff\xff\xff\xff\x01ab", b"\x02\x01a"]
)
def test_pairs_that_end_early(data):
    with pytest.raises(fcgi.ProtocolError):
        fcgi.decode_pairs(data, 100)


def test_too_many_pairs():
    with pytest.raises(fcgi.ProtocolError, match="more than 3"):
        fcgi.decode_pairs(fcgi.encode_pairs([(b"a", b"")] * 4), 3)


# -- scopes ------------------------------------------------------------------------------------------------------

NGINX = {
    b"QUERY_STRING": b"a=1&b=%20",
    b"REQUEST_METHOD": b"POST",
    b"CONTENT_TYPE": b"application/json",
    b"CONTENT_LENGTH": b"12",
    b"SCRIPT_NAME": "/v1/chat/é".encode(),
    b"REQUEST_URI": b"/v1/chat/%C3%A9?a=1&b=%20",
    b"SERVER_PROTOCOL": b"HTTP/1.1",
    b"REQUEST_SCHEME": b"https",
    b"HTTPS": b"on",
    b"REMOTE_ADDR": b"192.0.2.7",
    b"REMOTE_PORT": b"4711",
    b"SERVER_NAME": b"example.org",
    b"SERVER_PORT": b"443",
    b"HTTP_HOST": b"example.org",
    b"HTTP_AUTHORIZATION": b"Bearer key",
    b"HTTP_CONTENT_LENGTH": b"12",
    b"HTTP_CONTENT_TYPE": b"application/json",
    b"HTTP_CONNECTION": b"close",
    b"HTTP_X_REQUEST_ID": b"r-1",
}


def test_scope_behind_nginx():
    scope = request_scope(NGINX.items(), {"model": 1})
    assert scope == {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "https",
        "path": "/v1/chat/é",
        "raw_path": b"/v1/chat/%C3%A9",
        "query_string": b"a=1&b=%20",
        "root_path": "",
        "headers": [
            (b"host", b"example.org"),
            (b"authorization", b"Bearer key"),
            (b"x-request-id", b"r-1"),
            (b"content-type", b"application/json"),
            (b"content-length", b"12"),
        ],
        "client": ("192.0.2.7", 4711),
        "server": ("example.org", 443),
        "state": {"model": 1},
    }


def test_scope_behind_a_script():
    """The path is what follows the script; Apache's rewrite rules rename the Authorization that they let through."""
    variables = {
        b"REQUEST_METHOD": b"GET",
        b"SCRIPT_NAME": b"/cgi-bin/qwen.cgi",
        b"PATH_INFO": b"/v1/models",
        b"REDIRECT_HTTP_AUTHORIZATION": b"Bearer key",
        b"CONTENT_LENGTH": b"",
    }
    scope = request_scope(variables.items())
    assert (scope["path"], scope["scheme"], scope["client"]) == ("/v1/models", "http", None)
    assert scope["headers"] == [(b"authorization", b"Bearer key")]


@pytest.mark.parametrize(
    "change, message",
    [
        ({b"REQUEST_METHOD": b""}, "no FastCGI parameter REQUEST_METHOD"),
        ({b"REQUEST_METHOD": b"PO ST"}, "REQUEST_METHOD is 'PO ST'"),
        ({b"REQUEST_METHOD": b"A" * 99}, "REQUEST_METHOD is"),
        ({b"SCRIPT_NAME": b""}, "the path is ''"),
        ({b"SCRIPT_NAME": b"v1"}, "must begin with /"),
        ({b"CONTENT_LENGTH": b"-1"}, "Content-Length is '-1'"),
        ({b"CONTENT_LENGTH": b"1e3"}, "Content-Length is '1e3'"),
        ({b"CONTENT_LENGTH": b"9" * 19}, "Content-Length is"),
    ],
)
def test_parameters_that_are_no_request(change, message):
    with pytest.raises(BadRequest, match=message):
        request_scope({**NGINX, **change}.items())


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*NGINX, b"PATH_INFO", b"HTTP_\xff", b"HTTP_"]), st.binary(max_size=20)))
def test_scopes_of_random_values(variables):
    try:
        scope = request_scope({**NGINX, **variables}.items())
    except BadRequest:
        return
    assert scope["path"].startswith("/")
    scope["raw_path"].decode("ascii")
    assert all(name and name == name.lower() for name, _ in scope["headers"])


def test_response_head():
    head = response_head(404, [(b"content-type", b"text/plain"), (b"Connection", b"close"), (b"status", b"200")])
    assert head == b"Status: 404\r\ncontent-type: text/plain\r\n\r\n"


@pytest.mark.parametrize("name, value", [(b"a b", b""), (b"", b""), (b"a", b"b\r\nc: d"), (b"a", b"\0"), (b"a\n", b"")])
def test_response_headers_that_would_break_lines(name, value):
    with pytest.raises(ValueError, match="response header"):
        response_head(200, [(name, value)])


# -- the server --------------------------------------------------------------------------------------------------

QUICK = FastCGILimits(idle_seconds=5, params_seconds=5, body_seconds=5, linger_seconds=5)
Scenario = Callable[[App, FastCGIServer, str], Awaitable[None]]


@pytest.fixture
def serve(tmp_path):
    """serve(scenario, **limits) runs scenario(app, server, path) beside a server; no request may be left over."""

    def run(scenario: Scenario, **limits: Any) -> None:
        async def main() -> None:
            app, path = App(), str(tmp_path / "fastcgi.sock")
            server = await listen(app, f"unix:{path}", limits=FastCGILimits(**{**vars(QUICK), **limits}))
            try:
                await asyncio.wait_for(scenario(app, server, path), 20)
                assert await server.drain(2), "a request did not end"
                assert app.running == 0
            finally:
                server.close()
            for _ in range(100):
                if not server.connections:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError(f"{len(server.connections)} connections are left")

        asyncio.run(main())

    return run


async def eventually(condition: Callable[[], object], what: str) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(what)


def test_a_request(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            body = os.urandom(200_000)
            peer.send(request_bytes(body=body, HTTP_AUTHORIZATION=b"Bearer k", QUERY_STRING=b"x=1"))
            records = await peer.until_end()
            status, headers, answer = response_of(records)
            seen = json.loads(answer)
            assert (status, headers["content-type"], seen["path"]) == (200, "application/json", "/echo")
            assert seen["body"].encode("latin-1") == body
            assert ["authorization", "Bearer k"] in seen["headers"]
            assert seen["query_string"] == "x=1"
            assert records[-2] == (fcgi.STDOUT, 1, b"")
            assert ends_of(records) == [(1, fcgi.REQUEST_COMPLETE)]
            assert await peer.closed()

    serve(scenario)


def test_a_response_is_streamed(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.send(request_bytes(b"/stream", QUERY_STRING=b"20"))
            arrivals = []
            while (record := await peer.record()) and record.type == fcgi.STDOUT and record.content:
                arrivals.append((time.monotonic(), record.content))
            assert arrivals[0][1].endswith(b"\r\n\r\ndata: 0\n\n")
            assert [content for _, content in arrivals[1:]] == [b"data: %d\n\n" % i for i in range(1, 20)]
            gaps = [b - a for (a, _), (b, _) in itertools.pairwise(arrivals)]
            assert sum(gap > 0.005 for gap in gaps) >= 15, gaps

    serve(scenario)


def test_a_kept_connection_takes_many_requests(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            for i in range(20):
                peer.send(request_bytes(body=b"%d" % i, keep=True, request_id=i % 3 + 1))
                _, _, answer = response_of(await peer.until_end(), i % 3 + 1)
                assert json.loads(answer)["body"] == str(i)

    serve(scenario)


def test_requests_per_connection_are_limited(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            for _ in range(3):
                peer.send(request_bytes(keep=True))
                assert ends_of(await peer.until_end()) == [(1, 0)]
            assert await peer.closed()

    serve(scenario, requests_per_connection=3)


@pytest.mark.parametrize("end", ["close", "abort"])
def test_a_client_that_goes_away_is_a_disconnect(serve, end):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.send(request_bytes(b"/stream", keep=True))
            assert (await peer.record()).type == fcgi.STDOUT
            if end == "close":
                peer.writer.close()
            else:
                peer.send(fcgi.record(fcgi.ABORT_REQUEST, 1))
            gone_at = time.monotonic()
            await eventually(lambda: app.disconnects == 1 and not app.running, "the app saw no disconnect")
            assert time.monotonic() - gone_at < 1
            if end == "abort":
                assert ends_of(await peer.until_end()) == [(1, fcgi.REQUEST_COMPLETE)]
                peer.send(request_bytes(keep=True))
                assert response_of(await peer.until_end())[0] == 200

    serve(scenario)


def test_a_client_that_goes_away_before_the_end_of_its_body(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            whole = request_bytes(body=b"x" * 1000)
            peer.send(whole[:-100])
            await eventually(lambda: app.running, "the app was not started")
        await eventually(lambda: app.disconnects == 1, "the app saw no disconnect")

    serve(scenario)


def test_an_abort_before_the_parameters_end(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.send(fcgi.begin_request(1, True) + fcgi.record(fcgi.ABORT_REQUEST, 1) + request_bytes(keep=True))
            assert ends_of(await peer.until_end()) == [(1, fcgi.REQUEST_COMPLETE)]
            assert response_of(await peer.until_end())[0] == 200

    serve(scenario)


def test_a_second_request_at_once_is_refused(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.send(request_bytes(b"/stream", QUERY_STRING=b"5", keep=True))
            peer.send(request_bytes(request_id=2, keep=True))
            records = await peer.until_end() + await peer.until_end()
            assert ends_of(records) == [(2, fcgi.CANT_MPX_CONN), (1, fcgi.REQUEST_COMPLETE)]
            assert stdout_of(records, 1).endswith(b"data: 4\n\n")
            assert stdout_of(records, 2) == b""

    serve(scenario)


def test_management_records(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            asked = [(b"FCGI_MPXS_CONNS", b""), (b"FCGI_MAX_REQS", b""), (b"OTHER", b"")]
            peer.send(fcgi.record(fcgi.GET_VALUES, 0, fcgi.encode_pairs(asked)))
            kind, request_id, content = await peer.record()
            assert (kind, request_id) == (fcgi.GET_VALUES_RESULT, 0)
            assert dict(fcgi.decode_pairs(content, 9)) == {b"FCGI_MPXS_CONNS": b"0", b"FCGI_MAX_REQS": b"1024"}
            peer.send(fcgi.record(77, 0, b"what") + fcgi.record(fcgi.STDERR, 3, b"not for a server"))
            assert await peer.record() == (fcgi.UNKNOWN_TYPE, 0, bytes([77]) + bytes(7))
            assert await peer.record() == (fcgi.UNKNOWN_TYPE, 0, bytes([fcgi.STDERR]) + bytes(7))
            peer.send(fcgi.begin_request(1, True, role=2) + request_bytes(keep=True))
            assert ends_of(await peer.until_end()) == [(1, fcgi.UNKNOWN_ROLE)]
            assert response_of(await peer.until_end())[0] == 200

    serve(scenario)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        fcgi.record(fcgi.BEGIN_REQUEST, 1, b"short"),
        fcgi.begin_request(1) + fcgi.begin_request(1),
        fcgi.begin_request(1) + fcgi.record(fcgi.STDIN, 1, b"x"),
        request_bytes(b"/gated") + fcgi.record(fcgi.STDIN, 1, b"x"),
        request_bytes(b"/gated") + params_of({b"A": b"b"}),
        fcgi.record(fcgi.GET_VALUES, 0, b"\x05"),
    ],
)
def test_what_is_not_fastcgi_closes_the_connection(serve, data):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.send(data)
            assert await peer.closed()
        app.gate.set()
        async with await Peer.connect(path) as peer:
            peer.send(request_bytes())
            assert response_of(await peer.until_end())[0] == 200

    serve(scenario)


LONG = b"x" * 70_000


@pytest.mark.parametrize(
    "data, status, message",
    [
        (request_bytes(body=b"abc", CONTENT_LENGTH=b"5"), 400, "the body has 3 bytes; Content-Length says 5"),
        (request_bytes(body=b"abc", CONTENT_LENGTH=b"2"), 400, "the body has 3 bytes; Content-Length says 2"),
        (request_bytes(body=b"abc", CONTENT_LENGTH=b"x"), 400, "Content-Length is 'x'"),
        (request_bytes(REQUEST_METHOD=b""), 400, "include fastcgi_params"),
        (request_bytes(HTTP_X=LONG), 431, "more than 65536 bytes"),
        (request_bytes(**{f"HTTP_{i}": b"" for i in range(300)}), 400, "more than 256 name-value pairs"),
        (request_bytes(b"/raise"), 500, "the server failed to answer this request"),
        (request_bytes(b"/nothing"), 500, "the server failed to answer this request"),
        (request_bytes(b"/headers"), 500, "the server failed to answer this request"),
    ],
)
def test_errors(serve, data, status, message):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.send(data)
            records = await peer.until_end()
            got, headers, body = response_of(records)
            assert (got, headers["content-type"]) == (status, "application/json")
            error = json.loads(body)["error"]
            assert message in error["message"]
            assert error["code"] == status
            assert ends_of(records) == [(1, fcgi.REQUEST_COMPLETE)]
            assert await peer.closed()

    serve(scenario)


def test_a_path_cannot_write_lines_into_the_log(serve, caplog):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.send(request_bytes(b"/no\nERROR all is lost"))
            assert response_of(await peer.until_end())[0] == 500

    serve(scenario)
    (entry,) = [entry for entry in caplog.records if entry.name == "qwen_fast.server.fastcgi_connection"]
    assert entry.getMessage() == "POST /no%0AERROR%20all%20is%20lost failed"


def test_a_response_that_breaks_off_has_no_end(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.send(request_bytes(b"/broken", keep=True))
            records = await peer.until_end()
            assert stdout_of(records).endswith(b"\r\n\r\nhalf")
            assert not ends_of(records)
            assert await peer.closed()

    serve(scenario)


def test_an_answer_before_the_end_of_the_body_arrives(serve):
    """The connection stays open until the peer has sent the rest: closed before, the answer would be lost."""

    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.send(fcgi.begin_request(1) + params_of({b"REQUEST_METHOD": b"POST", b"SCRIPT_NAME": b"/refuse"}))
            await eventually(lambda: server.connections and not app.running, "no answer")
            for _ in range(30):
                peer.send(fcgi.stream(fcgi.STDIN, 1, LONG))
                await peer.writer.drain()
            peer.send(fcgi.record(fcgi.STDIN, 1))
            assert response_of(await peer.until_end())[::2] == (413, b"too large")
            assert await peer.closed()

    serve(scenario)


def test_a_body_waits_for_the_app(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            body = bytes(20_000_000)
            peer.send(request_bytes(b"/gated", body=body))
            await asyncio.sleep(0.3)
            (connection,) = server.connections
            assert len(connection._request._body) < 500_000
            assert peer.writer.transport.get_write_buffer_size() > 15_000_000
            app.gate.set()
            assert response_of(await peer.until_end())[2] == b"%d" % len(body)

    serve(scenario)


def test_a_response_waits_for_the_client(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.writer.transport.pause_reading()
            peer.send(request_bytes(b"/flood"))
            await asyncio.sleep(0.3)
            assert 0 < app.flooded < 50
            peer.writer.transport.resume_reading()
            assert len(stdout_of(await peer.until_end())) > 1000 * 65536
        async with await Peer.connect(path) as peer:
            peer.writer.transport.pause_reading()
            peer.send(request_bytes(b"/flood"))
            await asyncio.sleep(0.1)
        await eventually(lambda: not app.running, "the app still waits for a client that has gone")

    serve(scenario)


def test_replies_wait_for_the_peer(serve):
    """A peer that asks and does not read what it is answered is not read from."""

    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.writer.transport.pause_reading()
            peer.send(request_bytes(b"/gated"))
            peer.send(fcgi.record(77, 0) * 2_000_000)
            await asyncio.sleep(0.5)
            (connection,) = server.connections
            assert connection._transport.get_write_buffer_size() < 2_000_000
            assert peer.writer.transport.get_write_buffer_size() > 5_000_000
            peer.writer.transport.abort()
        app.gate.set()

    serve(scenario)


def test_what_comes_late_is_not_waited_for(serve):
    async def scenario(app, server, path):
        for data in (b"", fcgi.begin_request(1), fcgi.begin_request(1)[:5]):
            async with await Peer.connect(path) as peer:
                peer.send(data)
                assert await peer.closed()
        async with await Peer.connect(path) as peer:
            peer.send(request_bytes(body=b"abc")[:-9])
            assert response_of(await peer.until_end())[0] == 408

    serve(scenario, idle_seconds=0.1, params_seconds=0.1, body_seconds=0.1, linger_seconds=0.1)


def test_too_many_connections(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as first, await Peer.connect(path) as second:
            first.send(request_bytes(keep=True))
            assert response_of(await first.until_end())[0] == 200
            second.send(request_bytes(keep=True))
            records = await second.until_end()
            assert response_of(records)[:1] == (503,)
            assert response_of(records)[1]["retry-after"] == "1"
            assert ends_of(records) == [(1, fcgi.OVERLOADED)]
            first.send(request_bytes(keep=True))
            assert response_of(await first.until_end())[0] == 200

    serve(scenario, connections=1)


def test_head_has_no_body(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.send(request_bytes(REQUEST_METHOD=b"HEAD"))
            assert response_of(await peer.until_end())[::2] == (200, b"")

    serve(scenario)


def test_drain_lets_requests_end(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as idle, await Peer.connect(path) as busy:
            busy.send(request_bytes(b"/stream", QUERY_STRING=b"20", keep=True))
            assert (await busy.record()).type == fcgi.STDOUT
            drained = asyncio.create_task(server.drain(5))
            assert await idle.closed()
            assert stdout_of(await busy.until_end()).endswith(b"data: 19\n\n")
            assert await busy.closed()
            assert await drained
            assert not os.path.exists(path)

    serve(scenario)


def test_drain_cancels_what_is_late(serve):
    async def scenario(app, server, path):
        async with await Peer.connect(path) as peer:
            peer.send(request_bytes(b"/stream"))
            await peer.record()
            assert not await server.drain(0.1)
            assert not ends_of(await peer.until_end())

    serve(scenario)


# -- where it listens --------------------------------------------------------------------------------------------


def listening(address: str, **options: Any) -> FastCGIServer:
    async def start() -> FastCGIServer:
        server = await listen(App(), address, **options)
        server.close()
        return server

    return asyncio.run(start())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("unix:/run/qwen.sock", "/run/qwen.sock"),
        ("127.0.0.1:9000", ("127.0.0.1", 9000)),
        ("tcp:127.0.0.1:0", ("127.0.0.1", 0)),
        ("localhost:1", ("127.0.0.1", 1)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_addresses(text, expected):
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "neither"),
        ("unix:", "names no socket"),
        ("unix:" + "x" * 108, "more than 107 bytes"),
        ("/run/qwen.sock", "neither"),
        ("127.0.0.1:65536", "0..65535"),
        ("127.0.0.1:-1", "0..65535"),
        ("0.0.0.0:9000", "not of this machine"),
        (":9000", "not of this machine"),
        ("192.0.2.1:9000", "not of this machine"),
        ("example.org:9000", "not of this machine"),
    ],
)
def test_addresses_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_address(text)


def test_the_mode_of_the_socket(tmp_path):
    path = tmp_path / "fastcgi.sock"

    async def modes(**options: Any) -> int:
        server = await listen(App(), f"unix:{path}", **options)
        mode = stat.S_IMODE(path.stat().st_mode)
        server.close()
        return mode

    assert asyncio.run(modes()) == 0o660
    assert asyncio.run(modes(mode=0o600)) == 0o600
    assert not path.exists()


def test_a_socket_that_a_dead_process_left_is_replaced(tmp_path):
    path = tmp_path / "fastcgi.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
        old.listen()
        with pytest.raises(OSError, match="another process listens"):
            listening(f"unix:{path}")
    listening(f"unix:{path}")


def test_a_file_is_not_replaced(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("keep")
    with pytest.raises(OSError, match="is no socket"):
        listening(f"unix:{path}")
    assert path.read_text() == "keep"
    with pytest.raises(OSError, match="cannot listen on"):
        listening(f"unix:{tmp_path}/missing/fastcgi.sock")


def test_over_tcp():
    async def main() -> None:
        server = await listen(App(), "127.0.0.1:0")
        port = server.sockets[0].getsockname()[1]
        peer = Peer(*await asyncio.open_connection("127.0.0.1", port))
        peer.send(request_bytes())
        assert response_of(await peer.until_end())[0] == 200
        peer.writer.close()
        assert await server.drain(1)

    asyncio.run(main())
