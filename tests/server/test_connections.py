"""Clients that send nothing, or drop by drop, or never read, and strangers that open one connection after the other:
over TCP, TLS and a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from typing import Any

import h11
import httpx
import pytest
from backends import free_port

from qwen_fast import AsyncLLM
from qwen_fast.server import ServerConfig, create_app
from qwen_fast.server.config import Limits
from qwen_fast.server.connections import Waiting, _Writer
from qwen_fast.server.listeners import Listeners
from qwen_fast.server.serve import plug_ins, uvicorn_config

KEYS = ("sk-one", "sk-two")
QUICK = {"header_seconds": 1.0, "write_seconds": 1.0}
STORY = {"prompt": "Once", "max_tokens": 800, "ignore_eos": True, "stream": True}
PATIENCE_S = 20.0  # for what has to happen after tenths of a second


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(key, certificate) of localhost."""
    folder = tmp_path_factory.mktemp("tls")
    key, path = str(folder / "key.pem"), str(folder / "certificate.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", key, "-out", path, "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(command, check=True, capture_output=True)
    return key, path


def head_of(length: int, more: bytes = b"") -> bytes:
    """Of a completion request by a key."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer sk-one\r\n"
    return head + b"content-type: application/json\r\ncontent-length: %d\r\n%s\r\n" % (length, more)


class Site:
    """The server in the test's own event loop, with keys."""

    def __init__(self, kind: str, server: Listeners, waiting: Waiting, config: ServerConfig, state: Any) -> None:
        self.kind, self.server, self.waiting, self.config, self.state = kind, server, waiting, config, state

    def num_connections(self) -> int:
        return len(self.server.server_state.connections)

    async def connect(self, secure: bool = True, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """secure: without it the TLS handshake does not begin."""
        if self.config.uds is not None:
            return await asyncio.open_unix_connection(self.config.uds, **options)
        if self.kind == "tls" and secure:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            options["ssl"] = context
        return await asyncio.open_connection("127.0.0.1", self.config.port, **options)

    async def ask(self, key: str = "sk-one", path: str = "/v1/models") -> int:
        """The status of a request on a connection of its own."""
        reader, writer = await self.connect()
        writer.write(
            f"GET {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\nconnection: close\r\n\r\n".encode()
        )
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
        return int(answer.split(b" ")[1])

    async def until(self, holds: Any, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, what
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def site(
    kind: str, demo: AsyncLLM, certificate: tuple[str, str], folder: pathlib.Path, **limits: Any
) -> AsyncIterator[Site]:
    options: dict[str, Any] = {"uds": str(folder / "http.sock")} if kind == "unix" else {"port": free_port()}
    if kind == "tls":
        options["ssl_keyfile"], options["ssl_certfile"] = certificate
    config = ServerConfig(log_level="critical", api_key=KEYS, limits=Limits(**{**QUICK, **limits}), **options)
    with plug_ins(demo, config) as parts:
        app = create_app(demo, config, **parts)
        settings = uvicorn_config(app, config)
        server = Listeners(settings, config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        task = asyncio.create_task(server.serve())
        while not (server.started and server.servers):
            assert not task.done(), "the server does not start"
            await asyncio.sleep(0.01)
        try:
            yield Site(kind, server, settings.http_protocol_class.waiting, config, app.state.server)
        finally:
            server.should_exit = True
            await asyncio.wait_for(task, 20)


@pytest.fixture(params=["tcp", "tls", "unix"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def at_site(kind, demo, certificate, tmp_path) -> Any:
    """Runs a coroutine function with a Site."""

    def run(scenario: Any, **limits: Any) -> None:
        async def main() -> None:
            async with site(kind, demo, certificate, tmp_path, **limits) as one:
                await scenario(one)

        asyncio.run(asyncio.wait_for(main(), 60))

    return run


async def whole(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the other side has had enough."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(65536):
            answer += part
    return answer


async def drip(writer: asyncio.StreamWriter, data: bytes, seconds: float = 0.05) -> None:
    """Sends a byte at a time, until the other side has had enough."""
    with contextlib.suppress(ConnectionError):
        for i in range(len(data)):
            writer.write(data[i : i + 1])
            await writer.drain()
            await asyncio.sleep(seconds)


# -- too slow: each of these against one site, all at once


async def silence(site: Site, secure: bool) -> None:
    began = time.monotonic()
    reader, _ = await site.connect(secure)
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    assert time.monotonic() - began > QUICK["header_seconds"] * 0.9


async def silence_after_a_request(site: Site) -> None:
    reader, writer = await site.connect()
    writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    await asyncio.wait_for(reader.read(), 4)  # below uvicorn's own patience with idle connections


async def headers_drop_by_drop(site: Site, drops: int) -> None:
    """drops: many never end, and the answer may be lost: what comes after it resets the connection."""
    reader, writer = await site.connect()
    writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\nx: ")
    dripping = asyncio.create_task(drip(writer, b"y" * drops))
    answer = await whole(reader)
    dripping.cancel()
    if drops < 10:
        assert answer.startswith(b"HTTP/1.1 408 ") and b"connection: close" in answer.lower()
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["type"] == "RequestTimeoutError" and "within 1 s" in error["message"]


async def a_body_drop_by_drop(site: Site, drops: int) -> None:
    reader, writer = await site.connect()
    writer.write(head_of(5000))
    dripping = asyncio.create_task(drip(writer, b" " * drops))
    answer = await whole(reader)
    dripping.cancel()
    if drops < 10:
        assert answer.startswith(b"HTTP/1.1 408 ") and b"more slowly than 300 bytes a second" in answer


async def a_body_that_comes_slowly_enough(site: Site) -> None:
    body = json.dumps({"prompt": "Once", "max_tokens": 1}).encode() + b" " * 600
    reader, writer = await site.connect()
    writer.write(head_of(len(body), b"connection: close\r\n"))
    for start in range(0, len(body), 100):
        writer.write(body[start : start + 100])
        await asyncio.sleep(0.1)
    assert (await reader.read()).startswith(b"HTTP/1.1 200")


async def the_rest_of_an_unwanted_body(site: Site) -> None:
    """The answer does not wait for it, and it gets no longer than headers would."""
    reader, writer = await site.connect()
    writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\ncontent-length: 5000\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    dripping = asyncio.create_task(drip(writer, b"x" * 5000))
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), 4)
    dripping.cancel()


async def a_stream_that_nobody_reads(site: Site) -> asyncio.StreamWriter:
    _, writer = await site.connect(limit=1024)
    body = json.dumps({**STORY, "max_tokens": 1500, "logprobs": 5}).encode()
    writer.write(head_of(len(body)) + body)
    writer.transport.pause_reading()
    await site.until(lambda: any(one.stream for one in site.state.in_flight.values()), "the request does not run")
    return writer


async def answers_that_nobody_reads(site: Site) -> asyncio.StreamWriter:
    """Every one of them is complete."""
    _, writer = await site.connect(limit=1024)
    writer.transport.pause_reading()
    with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
        for _ in range(300):
            writer.write(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n" * 100)
            await asyncio.wait_for(writer.drain(), 0.2)
    return writer


def test_slow_clients(at_site, monkeypatch):
    """None keeps its connection, its request or the engine's time; the others are served meanwhile."""
    monkeypatch.setattr("qwen_fast.server.gate._SLOW_START_S", 0.6)

    async def scenario(site: Site) -> None:
        for server in site.server.servers:
            for listener in server.sockets:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        slow = [a_body_that_comes_slowly_enough, silence_after_a_request]
        slow += [the_rest_of_an_unwanted_body, a_stream_that_nobody_reads, answers_that_nobody_reads]
        work = [one(site) for one in slow] + [silence(site, True), silence(site, False)]
        work += [one(site, drops) for one in (headers_drop_by_drop, a_body_drop_by_drop) for drops in (3, 1000)]
        kept = await asyncio.wait_for(asyncio.gather(*work), 20)
        assert await site.ask() == 200
        await site.until(lambda: not site.state.in_flight, "a request is left")
        await site.until(lambda: not site.num_connections() and not len(site.waiting), "connections are left")
        stats = site.state.llm.stats
        await site.until(lambda: not stats()["num_running"] + stats()["num_paused"], "the engine is not idle")
        for writer in filter(None, kept):
            writer.close()

    at_site(scenario, body_bytes_per_second=300)


# -- too many


def test_strangers_do_not_fill_the_server(at_site, kind):
    """However many connections they open, whoever has a key is answered, and running requests stay."""

    async def scenario(site: Site) -> None:
        reader, writer = await site.connect()
        body = json.dumps(STORY).encode()
        writer.write(head_of(len(body)) + body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        strangers = [await site.connect(secure=False) for _ in range(60)]
        refused = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 500000\r\n\r\n"
        for _ in range(20):
            stranger = await site.connect()
            stranger[1].write(refused)
            strangers.append(stranger)
        assert len(site.waiting) <= 8
        await site.until(lambda: site.num_connections() <= 9, "more connections are left than the limit allows")
        for key in KEYS:
            assert await site.ask(key) == 200
        assert await site.ask("sk-three") == 401
        while (line := await asyncio.wait_for(reader.readline(), PATIENCE_S)) != b"data: [DONE]\n":
            assert line
        for _, other in strangers:
            other.close()

    at_site(scenario, header_seconds=30.0, waiting_connections=8, connections=4)


def test_one_address_has_a_limit_of_its_own(at_site, kind):
    async def scenario(site: Site) -> None:
        silent = [await site.connect(secure=False) for _ in range(20)]
        await site.until(lambda: len(site.waiting) == (20 if kind == "unix" else 5), "the wrong number waits")
        ended = 0
        for reader, _ in silent[:15]:
            with contextlib.suppress(asyncio.TimeoutError, ConnectionError):
                ended += await asyncio.wait_for(reader.read(), 0.02 if kind == "unix" else 1) == b""
        assert ended == (0 if kind == "unix" else 15)  # the oldest
        assert await site.ask() == 200

    at_site(scenario, header_seconds=30.0, address_connections=5)


@pytest.mark.parametrize("kind", ["tcp"])
def test_bodies_of_strangers_are_read_away_up_to_a_number(at_site, monkeypatch):
    monkeypatch.setattr("qwen_fast.server.gate._DISCARDS", 3)

    async def scenario(site: Site) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n"
        slow = [await site.connect() for _ in range(3)]
        for _, writer in slow:
            writer.write(head + b"x")
        await asyncio.sleep(0.2)
        reader, writer = await site.connect()
        writer.write(head + b"x")
        answer = await asyncio.wait_for(reader.read(), 2)
        assert answer.startswith(b"HTTP/1.1 401") and b"connection: close" in answer.lower()
        assert await site.ask() == 200
        for reader, writer in slow:  # these keep their connections
            writer.write(b"x" * 999 + b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
            assert answer.startswith(b"HTTP/1.1 401") and b"HTTP/1.1 200" in answer

    at_site(scenario, header_seconds=30.0)


def test_http_still_works(at_site):
    async def scenario(site: Site) -> None:
        assert [await site.ask(path=path) for path in ("/health", "/v1/models", "/nothing")] == [200, 200, 404]
        if site.kind != "unix":
            scheme = "https" if site.kind == "tls" else "http"
            async with httpx.AsyncClient(verify=False, headers={"authorization": "Bearer sk-two"}) as http:
                for _ in range(3):
                    body = {"prompt": "Once", "max_tokens": 2}
                    answer = await http.post(f"{scheme}://127.0.0.1:{site.config.port}/v1/completions", json=body)
                    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2

    at_site(scenario)


def test_the_writer_sends_what_h11_would():
    """In fewer parts: the head with what follows, the last part of a body with the end."""
    chunked = ([("transfer-encoding", "chunked")], [b"one", b"", b"two" * 1000])
    held: list[int] = []
    counted = ([("content-length", "6")], [b"onetwo"])
    for headers, parts in (chunked, counted, ([], [b"until the end"])):
        written = []
        held.clear()
        writer = _Writer(65536, lambda: held.append(1))
        plain = h11.Connection(h11.SERVER)
        for connection in (writer, plain):
            connection.receive_data(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            connection.next_event()
            connection.next_event()
            sent = [connection.send(h11.Response(status_code=200, headers=headers))]
            for part in parts:
                if connection is writer and part is parts[-1]:
                    writer.ending = True
                sent.append(connection.send(h11.Data(data=part)))
            sent.append(connection.send(h11.EndOfMessage()))
            written.append(sent)
        assert b"".join(written[0]) == b"".join(written[1]) and held == [1] and writer.flush() == b""
        assert written[0][0] == b"" and written[0][-2] == b"" and writer.our_state is plain.our_state is h11.DONE
    writer = _Writer(65536, lambda: None)
    writer.receive_data(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    writer.next_event()
    assert writer.send(h11.Response(status_code=200, headers=[])) == b""
    assert writer.flush().startswith(b"HTTP/1.1 200") and writer.flush() == b""
