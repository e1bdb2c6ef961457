"""Many clients at once against a server in a process of its own: cost per token, disconnects, memory."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from qwen_fast.server.pacing import Pacer

LIMIT_US = 60.0  # of CPU in the event loop's thread per streamed token, 32 streams at once


@pytest.fixture(scope="module")
def process() -> Iterator[tuple[int, int]]:
    """(process id, port) of `qwen-fast serve demo`."""
    command = [sys.executable, "-m", "qwen_fast", "serve", "demo", "--device", "cpu", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            for line in running.stderr:
                if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                    break
            else:
                pytest.fail("the server does not start")
            yield running.pid, int(found[1])
        finally:
            running.kill()


def loop_cpu_s(pid: int) -> float:
    """CPU seconds of the process's main thread, to 10 ms."""
    fields = pathlib.Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def stream(port: int, max_tokens: int, seed: int, leave_after: int | None = None) -> tuple[int, int, float]:
    """(events, tokens, seconds to the first event). leave_after: closes the connection after so many events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    body = {
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": max_tokens,
        "seed": seed,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    text = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(text)}"
    began = time.perf_counter()
    writer.write(head.encode() + b"\r\nconnection: close\r\n\r\n" + text)
    events, tokens, first = 0, 0, 0.0
    try:
        while line := await reader.readline():
            if line.startswith(b"HTTP/1.1"):
                assert b" 200 " in line, line
            if line.startswith(b"data: {"):
                assert b'"error"' not in line, line
                first = first or time.perf_counter() - began
                events += 1
                if leave_after is not None and events >= leave_after:
                    return events, 0, first
            elif line.startswith(b"data: [DONE]"):
                return events, tokens, first
            if found := re.search(rb'"completion_tokens":(\d+)', line):
                tokens = int(found[1])
    finally:
        writer.close()
    raise AssertionError("the stream was cut")


@pytest.mark.long
def test_cpu_per_streamed_token(process):
    pid, port = process

    async def run() -> list[tuple[int, int, float]]:
        return await asyncio.gather(*(stream(port, 400, seed) for seed in range(32)))

    asyncio.run(run())  # warm
    before = loop_cpu_s(pid)
    results = [one for _ in range(3) for one in asyncio.run(run())]
    used = loop_cpu_s(pid) - before
    tokens, events = sum(one[1] for one in results), sum(one[0] for one in results)
    print(f"{used / tokens * 1e6:.1f} us of CPU per token, {tokens / events:.2f} tokens per event")
    assert tokens == 3 * 32 * 400
    assert used / tokens * 1e6 < LIMIT_US


@pytest.mark.long
def test_two_hundred_clients_of_which_many_leave(process):
    """For 60 s; nobody who stays is failed, and memory does not grow."""
    pid, port = process
    first_events: list[float] = []
    left = stayed = 0
    sizes: list[int] = []

    async def client(number: int, until: float) -> None:
        nonlocal left, stayed
        chance = random.Random(number)
        while time.monotonic() < until:
            leaves = chance.randrange(1, 30) if chance.random() < 0.3 else None
            _, _, first = await stream(port, chance.randrange(5, 80), chance.randrange(2**31), leaves)
            first_events.append(first)
            left, stayed = left + (leaves is not None), stayed + (leaves is None)

    async def watch(until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(5)
            sizes.append(resident_bytes(pid))

    async def run() -> None:
        until = time.monotonic() + 60
        await asyncio.gather(watch(until), *(client(number, until) for number in range(200)))

    asyncio.run(run())
    first_events.sort()
    p50, p99 = (first_events[int(len(first_events) * share)] * 1e3 for share in (0.5, 0.99))
    print(f"{stayed} stayed, {left} left; first event after {p50:.0f} ms (P50), {p99:.0f} ms (P99)")
    print("resident MiB:", [size >> 20 for size in sizes])
    assert stayed > 200 and left > 50
    assert sizes[-1] < sizes[2] * 1.1 + 20 * 2**20
    deadline = time.monotonic() + 5
    while httpx.get(f"http://127.0.0.1:{port}/load").json()["server_load"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    usage = re.search(
        r"^vllm:kv_cache_usage_perc\S* (\S+)$", httpx.get(f"http://127.0.0.1:{port}/metrics").text, re.MULTILINE
    )
    assert usage is not None and float(usage[1]) == 0  # every block is free again


def test_the_pacer(monkeypatch):
    """An idle loop sends at once; a busy one waits, never longer than its limit; a quiet moment ends it."""
    now, cpu = [100.0], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "thread_time", lambda: cpu[0])
    pacer = Pacer(20.0)

    def run(seconds: float, load: float) -> float:
        delay = 0.0
        for _ in range(round(seconds / 0.01)):
            now[0] += 0.01
            cpu[0] += 0.01 * load
            delay = pacer.delay()
            assert 0.0 <= delay <= 0.020
        return delay

    assert run(1.0, 0.0) == 0.0 and run(1.0, 0.3) == 0.0
    assert 0.004 < run(1.0, 0.6) < 0.016
    assert run(1.0, 1.0) > 0.0199
    assert run(1.0, 0.1) == 0.0
    run(1.0, 1.0)
    now[0] += 60.0
    assert pacer.delay() == 0.0
    assert Pacer(0.0).delay() == 0.0
