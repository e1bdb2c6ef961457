"""How a server process ends: drained, at once, or because its engine died."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from backends import free_port
from server_helpers import serving

from qwen_fast.server import ServerConfig, create_app
from qwen_fast.server.lifecycle import Watchdog, watch

MESSAGES = [{"role": "user", "content": "Tell me a story."}]


class Process:
    """A server in a process of its own."""

    def __init__(self, command: list[str], port: int | None = None) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, *command], stdout=pipe, stderr=pipe, text=True)
        assert self.process.stdout is not None
        self.port = port or int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        self.ended_at = 0.0

    async def ready(self, client: httpx.AsyncClient) -> None:
        for _ in range(600):
            assert self.process.poll() is None, self.stderr()
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.05)
        pytest.fail("the server does not become ready")

    async def ended(self, seconds: float) -> int:
        """The exit code, which must come within so long."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"the process does not end within {seconds} s"
            await asyncio.sleep(0.01)
        return self.process.returncode

    def stderr(self) -> str:
        return self.process.communicate(timeout=10)[1]


@contextlib.contextmanager
def started(command: list[str], port: int | None = None):
    one = Process(command, port)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.communicate(timeout=10)


@contextlib.contextmanager
def command(*options: str):
    """`qwen-fast serve demo`."""
    port = free_port()
    with started(["-m", "qwen_fast", "serve", "demo", "--num-threads=1", f"--port={port}", *options], port) as one:
        yield one


@contextlib.contextmanager
def failing(*options: str):
    with started([str(pathlib.Path(__file__).with_name("failing_server.py")), *options]) as one:
        yield one


def body(max_tokens: int, seed: int = 1, stream: bool = True) -> dict[str, Any]:
    return {
        "model": "demo",
        "messages": MESSAGES,
        "max_tokens": max_tokens,
        "seed": seed,
        "stream": stream,
        "ignore_eos": True,
    }


class Stream:
    """A streamed chat as it is read. events: the data of all that came."""

    def __init__(self) -> None:
        self.status = 0
        self.events: list[str] = []
        self.begun = asyncio.Event()

    async def read(self, client: httpx.AsyncClient, max_tokens: int, seed: int = 1) -> Stream:
        async with client.stream("POST", "/v1/chat/completions", json=body(max_tokens, seed)) as answer:
            self.status = answer.status_code
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    self.events.append(line[6:])
                    self.begun.set()
        return self

    @property
    def finish_reason(self) -> str | None:
        return json.loads(self.events[-2])["choices"][0]["finish_reason"]

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.events[-2])["error"]


@contextlib.asynccontextmanager
async def client_of(process: Process) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=process.url, timeout=60, limits=limits) as client:
        await process.ready(client)
        yield client


async def streams(client: httpx.AsyncClient, count: int, max_tokens: int) -> tuple[list[Stream], list[asyncio.Task]]:
    """So many chats, all of which have begun."""
    made = [Stream() for _ in range(count)]
    tasks = [asyncio.create_task(one.read(client, max_tokens, seed)) for seed, one in enumerate(made)]
    await asyncio.wait_for(asyncio.gather(*(one.begun.wait() for one in made)), 30)
    return made, tasks


def test_sigterm_drains_fifty_streams():
    async def main() -> None:
        with command("--shutdown-timeout=60") as process:
            async with client_of(process) as client:
                made, tasks = await streams(client, 50, 60)
                process.process.send_signal(signal.SIGTERM)
                statuses = []
                while not statuses or statuses[-1] != 503:
                    statuses.append((await client.get("/ready")).status_code)
                refused = await client.post("/v1/chat/completions", json=body(1, stream=False))
                assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is shutting down")
                assert "retry-after" in refused.headers
                assert (await client.get("/health")).status_code == 200
                await asyncio.wait_for(asyncio.gather(*tasks), 40)
                for one in made:
                    assert (one.status, one.events[-1], one.finish_reason) == (200, "[DONE]", "length")
                assert await process.ended(5) == 0, process.stderr()

    asyncio.run(main())


def test_what_does_not_finish_in_time_gets_an_error():
    async def main() -> None:
        with command("--shutdown-timeout=0.3") as process:
            async with client_of(process) as client:
                made, tasks = await streams(client, 3, 4000)
                whole = asyncio.create_task(client.post("/v1/chat/completions", json=body(4000, stream=False)))
                while (await client.get("/load")).json()["server_load"] < 4:
                    await asyncio.sleep(0.01)
                process.process.send_signal(signal.SIGINT)
                await asyncio.wait_for(asyncio.gather(*tasks), 10)
                for one in made:
                    assert one.error == {
                        "message": "the server is shutting down",
                        "type": "ServiceUnavailableError",
                        "param": None,
                        "code": "shutting_down",
                    }
                    assert one.events[-1] == "[DONE]"
                assert (await whole).status_code == 503
                assert await process.ended(5) == 0

    asyncio.run(main())


def test_a_second_sigterm_ends_the_process_at_once():
    async def main() -> None:
        with command("--shutdown-timeout=60") as process:
            async with client_of(process) as client:
                _, tasks = await streams(client, 2, 4000)
                process.process.send_signal(signal.SIGTERM)
                while (await client.get("/ready")).status_code != 503:
                    await asyncio.sleep(0.01)
                process.process.send_signal(signal.SIGTERM)
                assert await process.ended(5) == 128 + signal.SIGTERM
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(result, httpx.TransportError) for result in results)

    asyncio.run(main())


def test_idle_processes_end_at_once(tmp_path):
    """And SIGHUP begins a new audit log before."""
    log = tmp_path / "audit.log"

    async def main() -> None:
        with command(f"--audit-log={log}") as process:
            async with client_of(process) as client:
                assert log.exists()
                log.rename(tmp_path / "old")
                process.process.send_signal(signal.SIGHUP)
                while not log.exists():
                    await asyncio.sleep(0.01)
                assert (await client.get("/health")).status_code == 200
                process.process.send_signal(signal.SIGTERM)
                assert await process.ended(10) == 0

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("mode, seconds", [("fail", 60.0), ("hang", 1.0)])
def test_a_dead_engine_ends_the_process(mode, seconds):
    reason = "the engine failed: the device was lost" if mode == "fail" else "no step has finished for "

    async def main() -> None:
        with failing(mode, str(seconds)) as process:
            async with client_of(process) as client:
                made, tasks = await streams(client, 20, 4000)
                broken_at = time.monotonic()
                process.process.send_signal(signal.SIGUSR1)
                health = await client.get("/health")
                while health.status_code == 200:
                    await asyncio.sleep(0.02)
                    health = await client.get("/health")
                while "device" not in health.text and mode == "fail":
                    health = await client.get("/health")
                assert (health.status_code, health.json()["error"]["message"][: len(reason)]) == (503, reason)
                refused = await client.post("/v1/chat/completions", json=body(1))
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_error")
                await asyncio.wait_for(asyncio.gather(*tasks), 8)
                for one in made:
                    assert (one.error["code"], one.events[-1]) == ("engine_error", "[DONE]")
                    assert "device was lost" in one.error["message"] or reason in one.error["message"]
                assert await process.ended(10) == 1
                assert time.monotonic() - broken_at < 10
                said = process.stderr()
                assert reason in said
                assert ("Current thread" in said) == (mode == "hang")  # the threads' stacks

    asyncio.run(main())


@pytest.mark.long
def test_a_stuck_event_loop_does_not_keep_a_dead_process():
    async def main() -> None:
        with failing("stall", "1") as process:
            async with client_of(process) as client:
                _, tasks = await streams(client, 1, 4000)
                process.process.send_signal(signal.SIGUSR1)
                assert await process.ended(12) == 1
                await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_a_port_in_use_is_an_error():
    with command() as first:

        async def ready() -> None:
            async with client_of(first):
                pass

        asyncio.run(ready())
        with started(["-m", "qwen_fast", "serve", "demo", f"--port={first.port}"], first.port) as second:
            assert second.process.wait(20) != 0
            assert "address already in use" in second.stderr()


def test_a_library_installs_no_signal_handlers(demo):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    async def main() -> None:
        before = [signal.getsignal(number) for number in numbers]
        transport = httpx.ASGITransport(create_app(demo))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            answer = await client.post("/v1/chat/completions", json=body(3, stream=False))
            assert answer.status_code == 200
            assert [signal.getsignal(number) for number in numbers] == before

    asyncio.run(main())


# -- the watchdog by itself


def stats(steps: int, running: int = 0, waiting: int = 0, paused: int = 0, failed: bool = False) -> dict[str, Any]:
    return {
        "num_steps": steps,
        "num_running": running,
        "num_waiting": waiting,
        "num_paused": paused,
        "failed": failed,
    }


def last_word(watchdog: Watchdog, *spans: tuple[float, dict[str, Any]]) -> str:
    """What the watchdog says at the end of these spans: seconds, and the stats all through them. It looks 4 times a
    second."""
    now, said = 1000.0, ""
    for seconds, seen in spans:
        for _ in range(round(4 * seconds)):
            said = watchdog.look(seen, now)
            now += 0.25
    return said


@pytest.mark.parametrize(
    "spans, reason",
    [
        ([(200, stats(5))], ""),  # idle
        ([(200, stats(5)), (9, stats(5, 1))], ""),  # has just begun
        ([(200, stats(5)), (10.5, stats(5, 1))], "no step has finished for 10"),
        ([(9, stats(5, 1)), (9, stats(6, 1)), (9, stats(7, 1))], ""),
        ([(11, stats(5, 1, 2))], "no step has finished for 10"),
        ([(9, stats(5, 1)), (1, stats(5)), (9, stats(5, 1))], ""),
        ([(11, stats(5, 0, 1))], "no step has finished for 10"),
        ([(11, stats(5, 0, 1, 3))], ""),  # no room: the clients of three do not read
        ([(0.25, stats(5, failed=True))], "the engine failed"),
    ],
)
def test_watchdog(spans, reason):
    said = last_word(Watchdog(10), *spans)
    assert said.startswith(reason) if reason else said == ""


def test_time_in_which_the_process_did_not_run_is_not_held_against_the_engine():
    watchdog = Watchdog(10)
    assert [watchdog.look(stats(5, 1), at) for at in (0, 1e6, 1e6 + 0.25)] == ["", "", ""]


def test_watchdog_off():
    watchdog = Watchdog(0)
    assert last_word(watchdog, (1000, stats(5, 1))) == ""
    assert watchdog.look(stats(5, failed=True), 0) == "the engine failed"


def test_a_step_that_hangs_in_the_engine():
    """A sequence that waits for a mask which nobody fills: no step ends."""
    from qwen_fast import LLM

    with LLM("demo", device="cpu", num_threads=1) as llm:
        said: list[tuple[str, bool]] = []
        waiting = llm._engine.submit([1, 2, 3], guided=True, mask_timeout=30.0)
        arguments = (llm, Watchdog(0.6), lambda *what: said.append(what), threading.Event())
        thread = threading.Thread(target=watch, args=arguments)
        thread.start()
        thread.join(20)
        waiting.cancel()
    ((reason, hung),) = said
    assert hung and reason.startswith("no step has finished for ")


def test_interrupted_requests_share_no_error(demo):
    """Each gets its own, and the server goes on being closed in order."""
    with serving(demo, ServerConfig(port=0, log_level="warning")) as running:

        async def main() -> None:
            async with httpx.AsyncClient(base_url=running.url, timeout=30) as client:
                made, tasks = await streams(client, 5, 4000)
                loop = running.server.interruption().get_loop()
                loop.call_soon_threadsafe(running.server.interrupt, "that is all", "ended")
                await asyncio.gather(*tasks)
                assert [one.error["message"] for one in made] == ["that is all"] * 5

        asyncio.run(main())
        assert running.idle()
