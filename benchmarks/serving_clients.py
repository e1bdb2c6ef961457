"""The load for serving.py: processes that each read many event streams from plain sockets, and say what that cost them.

A client knows as much HTTP as it needs: it counts events and bytes, notes when the first and the last ones came, and looks
at the end of a stream for its usage. Times are those of time.perf_counter(), which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_TAIL_BYTES = 4096  # kept of a stream's end: the usage is there
_STATUS = b"HTTP/1.1 200"
_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
_EVENT = b"\ndata: {"  # no line of JSON holds a line feed, so nothing else looks like this
_OVERLAP = len(_EVENT) - 1
_COMPLETED = re.compile(rb'"completion_tokens":\s*(\d+)')
_FINISHED = b'"finish_reason":"length"'
START_AHEAD_S = 0.05  # from the word to all clients until they begin


@dataclass(slots=True)
class Job:
    """Requests for one client. seeds: one for each prompt. arrivals: seconds after the start, one for each request, or
    None for a closed loop of `slots` requests at a time."""

    seeds: list[int]
    slots: int
    arrivals: list[float] | None
    prompt_tokens: int
    new_tokens: int
    vocab_size: int
    extra: dict[str, Any]


@dataclass(slots=True)
class Record:
    """One finished request. due: when it was to be sent; the times are absolute."""

    due: float
    first: float
    last: float
    events: int
    size: int
    tokens: int


def random_prompt(seed: int, length: int, vocab_size: int) -> list[int]:
    """Token ids that no other seed begins with."""
    return random.Random(seed).choices(range(min(vocab_size, 151643)), k=length)


def request_bytes(ids: Sequence[int], new_tokens: int, extra: dict[str, Any]) -> bytes:
    """POST /v1/completions of token ids, as a stream of exactly new_tokens tokens."""
    body = {
        "prompt": list(ids),
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }
    text = json.dumps(body, separators=(",", ":")).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(text)}\r\n\r\n".encode() + text


class Stream(asyncio.Protocol):
    """A kept connection that carries one request after the other."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: Any = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionResetError(f"the server closed the connection after {self._tail!r}"))

    async def ask(self, request: bytes) -> None:
        """Sends a request and waits for its end; the fields then say what came."""
        self._tail, self._events, self._size, self._first, self._last = b"", 0, 0, 0.0, 0.0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        seen = self._tail[-_OVERLAP:] + data
        events = seen.count(_EVENT)
        if events:
            self._events += events
            self._first = self._first or now
            self._last = now
        whole = self._tail + data
        if self._size < len(_STATUS) and not whole.startswith(_STATUS[: len(whole)]):
            self._fail(f"the server answered {whole[:600]!r}")
        self._size += len(data)
        self._tail = whole[-_TAIL_BYTES:]
        if self._tail.endswith(_END) and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, said: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(RuntimeError(said))

    def record(self, due: float, new_tokens: int) -> Record:
        """What the last request gave; RuntimeError where it is not what was asked for."""
        found = _COMPLETED.findall(self._tail)
        if not found or int(found[-1]) != new_tokens or _FINISHED not in self._tail:
            raise RuntimeError(f"a stream of {new_tokens} tokens was expected; it ended with {self._tail[-600:]!r}")
        return Record(due, self._first, self._last, self._events, self._size, new_tokens)

    def close(self) -> None:
        self._transport.close()


class Client:
    """One process's connections."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        self._address = address
        self._idle: list[Stream] = []

    async def open(self, count: int) -> None:
        self._idle = [await self._connect() for _ in range(count)]

    async def _connect(self) -> Stream:
        loop = asyncio.get_running_loop()
        if isinstance(self._address, str):
            return (await loop.create_unix_connection(Stream, self._address))[1]
        return (await loop.create_connection(Stream, *self._address))[1]

    async def one(self, request: bytes, due: float, new_tokens: int) -> Record:
        while self._idle and self._idle[-1].closed:
            self._idle.pop()
        stream = self._idle.pop() if self._idle else await self._connect()
        await stream.ask(request)
        self._idle.append(stream)
        return stream.record(due, new_tokens)

    async def run(self, job: Job, requests: list[bytes], start: float) -> list[Record]:
        await asyncio.sleep(start - time.perf_counter())
        if job.arrivals is not None:
            at = [start + arrival for arrival in job.arrivals]
            return await _gathered([self._later(*one, job.new_tokens) for one in zip(requests, at)])
        records: list[Record] = []
        waiting = deque(requests)

        async def slot() -> None:
            while waiting:
                request = waiting.popleft()
                records.append(await self.one(request, time.perf_counter(), job.new_tokens))

        await _gathered([slot() for _ in range(job.slots)])
        return records

    async def _later(self, request: bytes, due: float, new_tokens: int) -> Record:
        await asyncio.sleep(due - time.perf_counter())
        return await self.one(request, due, new_tokens)

    def close(self) -> None:
        for stream in self._idle:
            stream.close()


async def _gathered(calls: list[Any]) -> list[Any]:
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _work(pipe: Any, address: str | tuple[str, int]) -> None:
    while (job := pipe.recv()) is not None:
        requests = [
            request_bytes(random_prompt(seed, job.prompt_tokens, job.vocab_size), job.new_tokens, job.extra)
            for seed in job.seeds
        ]
        client = Client(address)
        await client.open(min(job.slots, len(requests)))
        pipe.send("ready")
        start = pipe.recv()
        cpu, begin = time.process_time(), time.perf_counter()
        records = await client.run(job, requests, start)
        busy = (time.process_time() - cpu) / (time.perf_counter() - begin)
        client.close()
        pipe.send((records, busy))


def _main(pipe: Any, address: str | tuple[str, int]) -> None:
    """A client process: jobs come by the pipe until a None."""
    try:
        asyncio.run(_work(pipe, address))
    except Exception as error:  # noqa: BLE001 - told by the parent
        pipe.send(f"{type(error).__name__}: {error}")


class Clients:
    """Client processes for one server. address: the path of a Unix socket, or (host, port)."""

    def __init__(self, count: int, address: str | tuple[str, int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(theirs, address), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(
        self,
        seeds: Sequence[int],
        slots: int,
        arrivals: Sequence[float] | None,
        seconds: float,
        *,
        prompt_tokens: int,
        new_tokens: int,
        vocab_size: int,
        **extra: Any,
    ) -> tuple[list[Record], float, list[float]]:
        """The records, when the first request was due, and each client's share of a CPU. seconds: RuntimeError when it
        takes longer."""
        count = min(len(self._pipes), slots, len(seeds))
        pipes = self._pipes[:count]
        for i, pipe in enumerate(pipes):
            own_slots = len(range(i, slots, count))
            own = [at for at in range(len(seeds)) if at % slots % count == i]  # each slot gets as many as any other
            own_arrivals = [arrivals[at] for at in own] if arrivals is not None else None
            own_seeds = [seeds[at] for at in own]
            pipe.send(Job(own_seeds, own_slots, own_arrivals, prompt_tokens, new_tokens, vocab_size, extra))
        deadline = time.monotonic() + seconds
        for pipe in pipes:
            self._receive(pipe, deadline)
        start = time.perf_counter() + START_AHEAD_S
        for pipe in pipes:
            pipe.send(start)
        results = [self._receive(pipe, deadline) for pipe in pipes]
        return [record for records, _ in results for record in records], start, [busy for _, busy in results]

    def _receive(self, pipe: Any, deadline: float) -> Any:
        if not pipe.poll(max(deadline - time.monotonic(), 0)):
            raise RuntimeError("the requests did not end in time")
        found = pipe.recv()
        if isinstance(found, str) and found != "ready":
            raise RuntimeError(f"a client failed: {found}")
        return found

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes):
            if process.is_alive():
                pipe.send(None)
            process.join(5)
            process.kill()
