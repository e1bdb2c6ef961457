"""Which connections wait, and for how long: the count of them, open files, FastCGI, the gate on its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from backends import free_port
from fastcgi_peer import Peer, request_bytes

from qwen_fast.server import ServerConfig, create_app
from qwen_fast.server.config import Limits
from qwen_fast.server.connections import Waiting, address_of, raise_file_limit
from qwen_fast.server.gate import Gate
from qwen_fast.server.listeners import Listeners
from qwen_fast.server.serve import uvicorn_config
from qwen_fast.server.state import Server

STORY = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True, "logprobs": 5}


class Idle:
    """A connection for Waiting."""

    def __init__(self, waiting: Waiting) -> None:
        self.waiting, self.aborted = waiting, False

    def abort(self) -> None:
        self.waiting.remove(self)
        self.aborted = True


def test_who_has_waited_longest_goes():
    waiting = Waiting(Limits(waiting_connections=6, address_connections=3))
    ones = [Idle(waiting) for _ in range(9)]
    for one in ones[:4]:
        waiting.add(one, "1.2.3.4")
    assert [one.aborted for one in ones[:4]] == [True, False, False, False]
    waiting.add(ones[1], "1.2.3.4")  # it had a request meanwhile: the youngest again
    waiting.add(ones[4], "1.2.3.4")
    assert ones[2].aborted and not ones[1].aborted
    for one in ones[5:]:
        waiting.add(one, None)
    assert len(waiting) == 6 and ones[3].aborted and not ones[1].aborted
    for one in ones:
        waiting.remove(one)
        waiting.remove(one)
    assert len(waiting) == 0 and not waiting._of_address


@pytest.mark.parametrize(
    "peer, address",
    [
        (("1.2.3.4", 5), "1.2.3.4"),
        (("::ffff:1.2.3.4", 5, 0, 0), "1.2.3.4"),
        (("2001:db8:1:2:3:4:5:6", 5, 0, 0), "2001:db8:1:2::"),
        (("fe80::1%eth0", 5, 0, 2), "fe80::"),
        ("", None),
        (None, None),
    ],
)
def test_addresses(peer, address):
    class Transport:
        def get_extra_info(self, name: str) -> Any:
            assert name == "peername"
            return peer

    assert address_of(Transport()) == address


def test_the_gate_does_not_wait_for_a_client_that_reads_no_error(demo, monkeypatch):
    """Where no HTTP connection looks after that."""
    monkeypatch.setattr("qwen_fast.server.gate._SEND_S", 0.05)

    async def main() -> None:
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("there is no body")

        async def send(message: Any) -> None:
            sent.append(message["status"])
            await asyncio.sleep(60)

        gate = Gate(app_that_is_not_reached, Server(demo, ServerConfig(limits=Limits(header_count=8))))
        scope = {"type": "http", "method": "GET", "path": "/health", "headers": [(b"a", b"b")] * 9}
        await asyncio.wait_for(gate(scope, receive, send), 5)
        assert sent == [431]

    asyncio.run(main())


async def app_that_is_not_reached(*_: Any) -> None:
    raise AssertionError


def test_fastcgi_has_room_whatever_http_holds(demo, tmp_path):
    """And cuts a peer that reads nothing."""
    path = tmp_path / "fastcgi.sock"

    async def main() -> None:
        config = ServerConfig(
            port=free_port(),
            log_level="critical",
            fastcgi=f"unix:{path}",
            limits=Limits(connections=2, write_seconds=0.4),
        )
        app = create_app(demo, config)
        server = Listeners(uvicorn_config(app, config), config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        task = asyncio.create_task(server.serve())
        while not path.exists() or not server.started:
            await asyncio.sleep(0.01)
        silent = [await asyncio.open_connection("127.0.0.1", config.port) for _ in range(6)]
        async with await Peer.connect(str(path)) as peer:
            peer.send(request_bytes(b"/health", REQUEST_METHOD=b"GET"))
            assert (await peer.record()).content.startswith(b"Status: 200")
        for _, writer in silent:
            writer.close()
        _, writer = await asyncio.open_unix_connection(str(path), limit=1024)
        writer.transport.pause_reading()
        body = json.dumps(STORY).encode()
        writer.write(request_bytes(b"/v1/completions", body, CONTENT_TYPE=b"application/json"))
        deadline = time.monotonic() + 20
        while not app.state.server.in_flight:
            await asyncio.sleep(0.01)
        while app.state.server.in_flight or len(server.server_state.connections):
            assert time.monotonic() < deadline, "the connection is left"
            await asyncio.sleep(0.01)
        writer.close()
        server.should_exit = True
        await asyncio.wait_for(task, 20)

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture
def file_limit() -> Iterator[tuple[int, int]]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield limits
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_limit_on_open_files_follows(file_limit, caplog):
    hard = file_limit[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
    assert Waiting(Limits())._most == (600 - 256) // 2  # half of what is there is for requests
    raise_file_limit(Limits(connections=400, waiting_connections=300))
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (956, hard) and not caplog.records
    raise_file_limit(Limits(connections=100, waiting_connections=100))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 956
    code = "import logging, resource; from qwen_fast.server.connections import raise_file_limit as go, Limits\n"
    code += "logging.basicConfig(); resource.setrlimit(resource.RLIMIT_NOFILE, (500, 700)); go(Limits())\n"
    code += "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "700\n" and "700 files can be open" in done.stderr


def test_options():
    for name in ("header_seconds", "write_seconds", "waiting_connections", "address_connections"):
        with pytest.raises(ValueError, match=f"{name} must be from"):
            Limits(**{name: 0})
    assert Limits(body_bytes_per_second=0).body_bytes_per_second == 0
