"""Drives an engine with so many users at once to a steady state, and measures it in windows.

A user is a closed loop: as soon as a request ends, the next one is asked. At the start the users are spread over the life
of a request (user i's first request is cut to i/users of its length), so that their prompts do not come in step. The
first request of every user is warm-up and counts nowhere. Then windows follow one another without a pause; each ends at
the end of a request, so that a window holds whole requests where there is one user. What differs between windows gives
the confidence intervals (batch means, Student's t, 95 %).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .sampler import METHODS, MemorySampler, thinned
from .statistics import interval, percentile
from .workloads import Workload

METHOD = (
    "closed loop: each user asks again at once; first request of each user is warm-up; windows without a pause between; "
    "95 % interval: Student's t over the windows"
)


@dataclass(frozen=True)
class Effort:
    """windows: how many. window_s: at least so long. min_finished: at least so many requests end in each, unless most_s,
    warm-up and windows together, is up first."""

    windows: int = 5
    window_s: float = 2.0
    min_finished: int = 3
    most_s: float = 120.0

    def __post_init__(self) -> None:
        if self.windows < 1 or self.window_s <= 0 or self.min_finished < 1 or self.most_s <= 0:
            raise ValueError(f"windows, window_s, min_finished and most_s must be above 0, got {self}")


QUICK = Effort(windows=3, window_s=0.25, min_finished=1, most_s=5.0)
FULL = Effort()


class NotMeasured(RuntimeError):
    """A run that gave no figure; the text says why."""


def run_load(llm: Any, workload: Workload, users: int, effort: Effort, seed: int = 1) -> dict[str, Any]:
    """One load in steady state, as plain JSON: "windows" (tokens, busy time and the meter's differences of each),
    "requests" (latencies of those that ended in a window), "memory" (span and curve). NotMeasured where no request
    ended in a window within effort.most_s."""
    if users < 1:
        raise ValueError(f"users must be at least 1, got {users}")
    gpus = device_indices(llm)
    llm.reset_prefix_cache()
    with MemorySampler(llm, gpus) as sampler:
        began = time.monotonic()
        load = _Load(llm, workload, users, effort, seed)
        try:
            load.warm_up()
            marks = load.windows()
        finally:
            load.cancel()
    windows = [_between(a, b) for a, b in itertools.pairwise(marks)]
    if not windows:
        raise NotMeasured(
            f"no request of {workload.label} with {users} users ended in a window within {effort.most_s:g} s"
        )
    start, stop = marks[0].at, marks[-1].at
    inside = [one for one in load.finished if start < one["finished_time"] <= stop and not one["warm_up"]]
    steady = sampler.between(start, stop)
    return {
        "workload": workload.name,
        "label": workload.label,
        "users": users,
        "prompt_tokens": workload.mean_prompt,
        "output_tokens": workload.mean_output,
        "warm_up_s": start - began,
        "window": f"{len(windows)} window{'s' if len(windows) > 1 else ''}, {stop - start:.1f} s; warm-up {start - began:.1f} s",
        "windows": windows,
        "requests": _latencies(inside, marks),
        "memory": {
            "kind": sampler.kind,
            "method": METHODS[sampler.kind],
            "low_bytes": min((used for _, used, _ in steady), default=None),
            "high_bytes": max((used for _, used, _ in steady), default=None),
            "kv_low_bytes": min((held for _, _, held in steady), default=None),
            "kv_high_bytes": max((held for _, _, held in steady), default=None),
            "curve": thinned(sampler.samples),
        },
    }


def device_indices(llm: Any) -> list[int]:
    """Numbers of the GPUs that the engine uses; empty on the CPU. The first is N of the option device="cuda:N", else 0
    ("cuda" and "auto" say no number); with several, those that follow it."""
    info = llm.info()
    if info["backend"] == "cpu":
        return []
    count = int(info.get("tensor_parallel_size") or 1)
    number = str(getattr(llm, "_device", "")).partition(":")[2]
    first = int(number) if number.isdecimal() else 0
    return list(range(first, first + count))


def meter_of(stats: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The meter's part of llm.stats(); None where the build has none or it is switched off."""
    meter = stats.get("meter")
    return meter if meter is not None and meter.get("enabled", True) else None


def why_no_meter(stats: Mapping[str, Any]) -> str:
    return "the meter is switched off (meter=False)" if "meter" in stats else "this build has no meter"


def measure_idle(llm: Any, seconds: float) -> dict[str, Any] | None:
    """Waits so that an idle baseline of each energy source can be taken, and returns {source: watts}; None where no
    source is measured."""
    meter = meter_of(llm.stats())
    if meter is None or not any(source["measured"] for source in meter["sources"]):
        return None
    before, began = meter["total"]["energy_uj"], time.monotonic()
    time.sleep(seconds)
    meter = meter_of(llm.stats()) or meter
    elapsed, after = time.monotonic() - began, meter["total"]["energy_uj"]
    found = {}
    for source in meter["sources"]:
        if source["measured"]:
            name = source["name"]
            known = source.get("idle_watts")
            found[name] = known if known is not None else (after[name] - before[name]) / 1e6 / elapsed
    return found


@dataclass(frozen=True)
class _Mark:
    at: float
    stats: dict[str, Any]


class _Load:
    def __init__(self, llm: Any, workload: Workload, users: int, effort: Effort, seed: int) -> None:
        self._engine = llm._engine
        self._ends = llm._eos_token_ids
        self._users, self._effort = users, effort
        limit = min(llm.vocab_size, len(llm.tokenizer) if llm.tokenizer is not None else llm.vocab_size)
        self._source = workload.requests(max(1, limit - 32), seed)
        self._pause = 0.0005 if llm.info()["backend"] != "cpu" else 0.002
        self._until = time.monotonic() + effort.most_s
        self._running: list[tuple[Any, bool]] = []
        self.finished: list[dict[str, Any]] = []

    def warm_up(self) -> None:
        for user in range(self._users):
            self._submit((user + 1) / self._users, True)
        while any(first for _, first in self._running):
            self._advance()
            if time.monotonic() > self._until:
                raise NotMeasured(f"the first {self._users} requests did not end within {self._effort.most_s:g} s")

    def windows(self) -> list[_Mark]:
        marks = [self._mark()]
        ended = len(self.finished)
        while len(marks) <= self._effort.windows:
            came = self._advance()
            now = time.monotonic()
            enough = (
                len(self.finished) - ended >= self._effort.min_finished and now - marks[-1].at >= self._effort.window_s
            )
            if came and enough:
                marks.append(self._mark())
                ended = len(self.finished)
            elif now > self._until:
                if len(self.finished) > ended and len(marks) == 1:
                    marks.append(self._mark())
                break
        return marks

    def cancel(self) -> None:
        for request, _ in self._running:
            request.cancel()
        for request, _ in self._running:
            while (output := request.read(5.0)) is not None and not output["finished"]:
                pass
        self._running.clear()

    def _mark(self) -> _Mark:
        return _Mark(time.monotonic(), self._engine.stats())

    def _submit(self, share: float, first: bool) -> None:
        ids, item, round_number = next(self._source)
        wanted = max(1, round(item.output_tokens * share))
        request = self._engine.submit(
            ids,
            max_tokens=wanted,
            temperature=0.0,
            ignore_eos=not item.ends,
            eos_token_ids=self._ends,
            cache_salt=round_number,  # a prompt asked a second time is computed again; equal beginnings in a round are shared
        )
        self._running.append((request, first))

    def _advance(self) -> bool:
        """Waits a moment; reads what has ended and asks again for each. Whether something has ended."""
        time.sleep(self._pause)
        before = len(self.finished)
        still = []
        for request, first in self._running:
            output = request.read(0)
            if output is not None and output["finished"]:
                if output["error"] is not None:
                    raise output["error"]
                self.finished.append({name: output[name] for name in _KEPT} | {"warm_up": first})
            else:
                still.append((request, first))
        self._running = still
        for _ in range(self._users - len(still)):
            self._submit(1.0, False)
        return len(self.finished) > before


_KEPT = (
    "num_prompt_tokens", "num_output_tokens", "num_cached_tokens", "num_preemptions", "arrival_time",
    "first_scheduled_time", "first_token_time", "last_token_time", "finished_time", "finish_reason",
)  # fmt: skip


def _between(a: _Mark, b: _Mark) -> dict[str, Any]:
    def gone(name: str) -> int:
        return b.stats[name] - a.stats[name]

    ended = ("num_finished_stop", "num_finished_length")
    before, after = meter_of(a.stats), meter_of(b.stats)
    return {
        "seconds": b.at - a.at,
        "prompt_tokens": gone("num_prompt_tokens") + gone("prefix_hit_tokens"),
        "cached_tokens": gone("prefix_hit_tokens"),
        "output_tokens": gone("num_generated_tokens"),
        "finished": sum(gone(name) for name in ended),
        "steps": gone("num_steps"),
        "busy_s": gone("busy_ns") / 1e9,
        "preemptions": gone("num_preemptions"),
        "meter": None if before is None or after is None else subtract(after["total"], before["total"]),
    }


def subtract(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The differences of counters, dicts within dicts; what is no number is left out."""
    found: dict[str, Any] = {}
    for name, value in after.items():
        if isinstance(value, Mapping):
            found[name] = subtract(value, before.get(name, {}))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = value - before.get(name, 0)
    return found


def _latencies(requests: list[dict[str, Any]], marks: list[_Mark]) -> dict[str, Any]:
    times: dict[str, list[tuple[float, float]]] = {"ttft_ms": [], "tpot_ms": [], "e2e_s": [], "queue_ms": []}
    for one in requests:
        at = one["finished_time"]
        times["e2e_s"].append((at, one["finished_time"] - one["arrival_time"]))
        times["queue_ms"].append((at, 1e3 * (one["first_scheduled_time"] - one["arrival_time"])))
        if one["num_output_tokens"] > 0:
            times["ttft_ms"].append((at, 1e3 * (one["first_token_time"] - one["arrival_time"])))
        if one["num_output_tokens"] > 1:
            decoding = one["last_token_time"] - one["first_token_time"]
            times["tpot_ms"].append((at, 1e3 * decoding / (one["num_output_tokens"] - 1)))
    return {"n": len(requests)} | {name: _spread(values, marks) for name, values in times.items()}


def _spread(timed: list[tuple[float, float]], marks: list[_Mark]) -> dict[str, Any] | None:
    if not timed:
        return None
    values = [value for _, value in timed]
    means = []
    for a, b in itertools.pairwise(marks):
        inside = [value for at, value in timed if a.at < at <= b.at]
        if inside:
            means.append(sum(inside) / len(inside))
    around = interval(means)
    return {
        "n": len(values),
        "mean": sum(values) / len(values),
        "low": around.low if around else None,
        "high": around.high if around else None,
        "p50": percentile(values, 0.5),
        "p90": percentile(values, 0.9),
        "p99": percentile(values, 0.99),
        "max": max(values),
        "values": [round(value, 4) for value in values[:400]],
    }
