"""Where a step's time goes, from a list of what ran on the GPU: nothing here needs a GPU.

With dependent launch a kernel starts before the one before it has ended, so durations add up to more than the time that
passed. Here a kernel is given the part of its interval that lies beyond the end of everything before it ("own"); what comes
before that is "overlapped", and a stretch in which nothing ran is the "gap" before the kernel that ends it. So own times and
gaps add up to the step, exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

MIN_STEPS, MAX_PERIOD = 8, 1024


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that ran, in microseconds. launch: the call that enqueued it; a graph's kernels share one. is_copy: it
    may run on a stream of its own, beside any kernel of the step before. device: the GPU's number."""

    name: str
    start: float
    end: float
    launch: int = 0
    is_copy: bool = False
    device: int = 0


@dataclasses.dataclass
class Part:
    """What one kernel, or several of one kind, took; calls may be a mean over steps."""

    calls: float = 0.0
    own: float = 0.0
    overlapped: float = 0.0
    gap: float = 0.0

    def add(self, other: Part, factor: float = 1.0) -> None:
        self.calls += factor * other.calls
        self.own += factor * other.own
        self.overlapped += factor * other.overlapped
        self.gap += factor * other.gap


def short_name(name: str) -> str:
    """A kernel's name without namespaces, template arguments, parameters and what is around it."""
    name = re.sub(r"^\s*(static )?void ", "", name)
    name = name.replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name)[0].split("::")[-1].strip()


def read_trace(trace: dict[str, Any]) -> list[Event]:
    """The events of all devices in a chrome trace as torch.profiler writes it, in the order in which they began."""
    events = []
    for one in trace["traceEvents"]:
        if one.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            said = one.get("args", {})
            launch, device = int(said.get("correlation", 0)), int(said.get("device", 0))
            is_copy = one["cat"] != "kernel"
            events.append(Event(short_name(one["name"]), one["ts"], one["ts"] + one["dur"], launch, is_copy, device))
    return sorted(events, key=lambda event: (event.start, event.end))


def attribute(events: Sequence[Event], frontier: float) -> list[Part]:
    """A Part for each event. `frontier`: the end of all that ran before. The sum of own and gap is the time from there
    to the end of the last to end."""
    parts = []
    for event in events:
        begin = max(event.start, frontier)
        end = max(event.end, begin)
        overlapped = max(0.0, min(event.end, frontier) - event.start)
        parts.append(Part(1, end - begin, overlapped, begin - frontier))
        frontier = end
    return parts


def find_period(names: Sequence[str]) -> tuple[int, int, int]:
    """(period, first, end): the longest stretch names[first:end] in which every name is the one `period` places before.

    The layers of one step repeat too, but only within the step; the steps repeat to the end of the run. So the period that
    holds longest is the step's, and of its multiples, which hold about as long, the least is taken.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    ids = [numbers[name] for name in names]
    best, found = 0, (0, 0, 0)
    for period in range(1, min(MAX_PERIOD, len(ids) // MIN_STEPS) + 1):
        first, length = longest_run(ids, period)
        if length > best:
            best, found = length, (period, first, first + length + period)
    period, first, end = found
    if period == 0 or end - first < MIN_STEPS * period:
        raise ValueError(f"no sequence of names among {len(ids)} repeats {MIN_STEPS} times; the last: {names[-24:]}")
    return found


def longest_run(ids: Sequence[int], period: int) -> tuple[int, int]:
    """(first, length) of the longest run of places with ids[i] == ids[i + period]."""
    best, found, first = 0, 0, 0
    for i, (one, other) in enumerate(zip(ids, ids[period:])):
        if one != other:
            first = i + 1
        elif i + 1 - first > best:
            best, found = i + 1 - first, first
    return found, best


def first_of_step(events: Sequence[Event], period: int) -> int:
    """Where in the repeating stretch `events` a step begins: where a launch begins, if that is one place (a graph), and
    otherwise behind the longest pause."""

    def means(place: int) -> tuple[float, float]:
        pairs = [(events[i - 1], events[i]) for i in range(place or period, len(events), period)]
        begins = statistics.mean(one.launch != other.launch for one, other in pairs)
        return begins, statistics.mean(other.start - one.end for one, other in pairs)

    return max(range(period), key=means)


def split_steps(events: Sequence[Event]) -> list[tuple[float, list[Event]]]:
    """The whole steps: the end of all that ran before, and what began before the next step did. All have the same
    kernels in the same order; copies come where they come."""
    kernels = [i for i, event in enumerate(events) if not event.is_copy]
    period, first, end = find_period([events[i].name for i in kernels])
    stretch = kernels[first:end]
    offset = first_of_step([events[i] for i in stretch], period)
    frontiers = list(itertools.accumulate((event.end for event in events), max))
    starts = [start for start in stretch[offset::period] if start > 0]
    return [(frontiers[start - 1], list(events[start:stop])) for start, stop in itertools.pairwise(starts)]


@dataclasses.dataclass
class Step:
    """The mean of the steps around the median. keys: in the order in which they first come."""

    us: float
    steps: int
    parts: dict[tuple[str, str], Part]


def account(steps: Sequence[tuple[float, list[Event]]], roles: Callable[[Sequence[str]], Sequence[str]]) -> Step:
    """Adds up what ran in a step, kernels by name and role, copies by name. roles(the names of a step's kernels).

    Of the steps, sorted by time, the middle half counts: neighbours on the host delay one or the other.
    """
    names = [event.name for event in steps[0][1] if not event.is_copy]
    keys = list(zip(names, roles(names)))
    taken = []
    for frontier, events in steps:
        parts = attribute(events, frontier)
        taken.append((sum(part.own + part.gap for part in parts), list(zip(events, parts))))
    taken.sort(key=lambda one: one[0])
    middle = taken[len(taken) // 4 : len(taken) - len(taken) // 4]
    result: dict[tuple[str, str], Part] = {key: Part() for key in keys}
    for _, pairs in middle:
        remaining = iter(keys)
        for event, part in pairs:
            key = (event.name, "") if event.is_copy else next(remaining)
            result.setdefault(key, Part()).add(part, 1 / len(middle))
    return Step(statistics.mean(us for us, _ in middle), len(middle), result)
