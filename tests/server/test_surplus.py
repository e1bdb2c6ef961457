"""More requests than are admitted: the surplus gets 429 at once, and costs the admitted ones next to nothing."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from server_helpers import serving

from qwen_fast import AsyncLLM
from qwen_fast.server import ServerConfig
from qwen_fast.server.admission import QueueAdmission

ADMITTED = 16
SURPLUS = 4 * ADMITTED
PAUSE_S = 0.05  # of a surplus client between a refusal and the next request: 20 times what Retry-After allows
WINDOW_S = 0.6
PAIRS = 24
MOST_RISE = 0.10


@contextlib.contextmanager
def clients(port: int, count: int, samples: int, nice: int) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process, and what it says, once this is left."""
    script = str(pathlib.Path(__file__).with_name("load_clients.py"))
    command = ["nice", "-n", str(nice), sys.executable, script, str(port), str(count), str(samples), str(PAUSE_S)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said: dict[str, Any] = {}
    try:
        yield process, said
        process.send_signal(signal.SIGCONT)
        process.terminate()
        said |= json.loads(process.communicate(timeout=20)[0])
    finally:
        process.kill()
        process.wait()


def threads() -> dict[str, tuple[int, int]]:
    """Of each thread of this process: nanoseconds that it ran, and that it was ready to run and the core did something
    else."""
    found = {}
    for path in pathlib.Path("/proc/self/task").iterdir():
        ran, waited, _ = (path / "schedstat").read_text().split()
        found[path.name] = int(ran), int(waited)
    return found


@dataclass
class Window:
    """Of a step, on average: microseconds in all, microseconds of these in which its core did something else, tokens."""

    step_us: float
    waited_us: float
    tokens: float

    @property
    def own_us(self) -> float:
        return self.step_us - self.waited_us


def window(llm: AsyncLLM, thread: str) -> Window:
    """thread: the engine's."""
    before, waited = llm.stats(), threads()[thread][1]
    time.sleep(WINDOW_S)
    after = llm.stats()
    waited = threads()[thread][1] - waited
    steps = after["num_steps"] - before["num_steps"]
    tokens = after["num_generated_tokens"] - before["num_generated_tokens"]
    return Window((after["busy_ns"] - before["busy_ns"]) / steps / 1e3, waited / steps / 1e3, tokens / steps)


@pytest.mark.long
def test_the_steps_of_those_admitted_hardly_slow_down():
    """Windows with and without the surplus take turns, for which the process of the surplus stops and goes on: the
    machine's other work meets both alike. The engine has one thread, so that two cores hold it and the event loop, and
    the surplus clients have the lowest priority. What decides is a step without the time in which its core did
    something else: here the clients take cores, which in earnest are elsewhere."""
    known = set(threads())
    llm = AsyncLLM("demo", device="cpu", num_threads=1)
    config = ServerConfig(port=0, log_level="warning")
    with serving(llm, config, admission=QueueAdmission(ADMITTED)) as running, contextlib.ExitStack() as stack:
        port = running.address[1]
        admitted, of_admitted = stack.enter_context(clients(port, ADMITTED, 1, 0))
        time.sleep(2)
        # Eight samples each never fit into the places that are free between two streams.
        surplus, of_surplus = stack.enter_context(clients(port, SURPLUS, 8, 19))
        before = threads()
        time.sleep(2)
        engine = max(set(threads()) - known, key=lambda one: threads()[one][0] - before.get(one, (0, 0))[0])
        pairs = []
        for number in range(PAIRS):
            pair = {}
            for kind in ("alone", "surplus") if number % 2 else ("surplus", "alone"):
                surplus.send_signal(signal.SIGCONT if kind == "surplus" else signal.SIGSTOP)
                time.sleep(0.15)
                pair[kind] = window(llm, engine)
            pairs.append(pair)
        assert admitted.poll() is None and surplus.poll() is None
    llm.close()
    for kind in ("alone", "surplus"):
        total, own, tokens = (
            statistics.median(getattr(pair[kind], name) for pair in pairs) for name in ("step_us", "own_us", "tokens")
        )
        print(f"{kind}: {own:.0f} us a step, {total:.0f} us with its waits for a core, {tokens:.1f} tokens")
        assert tokens > 0.85 * ADMITTED
    rise, rise_of_all = (
        statistics.median(getattr(pair["surplus"], name) / getattr(pair["alone"], name) for pair in pairs) - 1
        for name in ("own_us", "step_us")
    )
    print(f"rise, by the median of {PAIRS} pairs: {100 * rise:+.1f} %, with the waits {100 * rise_of_all:+.1f} %")
    print("surplus:", of_surplus, "admitted:", of_admitted)
    assert of_surplus["others"] == of_surplus["without_retry_after"] == 0
    assert of_surplus["streamed"] < 0.01 * of_surplus["refused"]
    assert of_admitted["others"] == 0 and of_admitted["streamed"] > 0
    assert of_surplus["refused"] > 5 * SURPLUS
    assert rise < MOST_RISE


def test_no_body_is_parsed_for_a_refusal(demo: AsyncLLM):
    """Where not even one sequence has a place, what a request asks for does not matter; a wrong body gets 429 too."""
    admission = QueueAdmission(1)
    body = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with serving(demo, ServerConfig(port=0, log_level="critical"), admission=admission) as running:
        url = f"{running.url}/v1/completions"
        with httpx.stream("POST", url, json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            for content in (b"{", b'{"prompt": "Once"}'):
                refused = httpx.post(url, content=content, headers={"content-type": "application/json"})
                assert refused.status_code == 429 and refused.headers["retry-after"]
                assert "1 sequences run or wait and 1 more are asked for" in refused.json()["error"]["message"]
        assert running.idle()
        wrong = httpx.post(url, content=b"{", headers={"content-type": "application/json"})
        assert wrong.status_code == 400
        assert httpx.post(url, json={**body, "stream": False, "max_tokens": 2}).status_code == 200
