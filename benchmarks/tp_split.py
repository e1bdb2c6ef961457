"""How the ranks of one model spend a step: kernels, messages to one another, gaps. From a list of what ran on the GPUs: nothing
here needs one.

As in timeline.py a kernel has the part of its interval that lies beyond the end of everything before it on its GPU, and a
stretch in which nothing ran is a gap, so a rank's kernels, messages and gaps add up to its step exactly. A message is a
kernel that exchanges something with other GPUs: sums over the ranks (with the residual and the norm that are part of the
kernel), logits to rank 0, sampled tokens from it. A rank that comes early waits inside its message; of each message the
least time over the ranks is the message's own, what a rank's took more is its waiting. What a kernel exchanges beside other
work counts as that kernel.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from timeline import Event, Part, attribute

BEGIN = "qf_step_begin_kernel"  # the first of every step
MIN_STEPS = 8
MESSAGE = re.compile(r"all_?reduce|qf_gather|share_tokens|nccl|peer", re.IGNORECASE)

Stretch = tuple[float, list[Event]]  # the end of what ran before, and what ran


def is_message(event: Event) -> bool:
    return not event.is_copy and MESSAGE.search(event.name) is not None


def by_device(events: Iterable[Event]) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    for event in events:
        found.setdefault(event.device, []).append(event)
    return dict(sorted(found.items()))


@dataclasses.dataclass
class Rank:
    """A mean step in microseconds: kernels + messages + gaps = us. waiting: the part of the messages that was spent for
    other ranks, where it is known. parts: by kernel."""

    us: float = 0.0
    kernels: float = 0.0
    messages: float = 0.0
    gaps: float = 0.0
    calls: float = 0.0  # of messages
    waiting: float | None = None
    parts: dict[str, Part] = dataclasses.field(default_factory=dict)

    @property
    def outside(self) -> float:
        return self.kernels + self.gaps

    def said(self) -> dict[str, object]:
        """As plain JSON."""
        parts = {
            name: {"calls": one.calls, "us": one.own, "gap_us": one.gap, "overlapped_us": one.overlapped}
            for name, one in sorted(self.parts.items(), key=lambda item: -item[1].own)
        }
        return {
            "step_us": self.us,
            "kernels_us": self.kernels,
            "messages_us": self.messages,
            "gaps_us": self.gaps,
            "message_calls": self.calls,
            "waiting_us": self.waiting,
            "parts": parts,
        }


def split(ranks: Mapping[int, Sequence[Stretch]]) -> dict[int, Rank]:
    """The mean over the same stretches on every rank. ranks: the first one's stretches are taken as they are, of the
    others' those that began nearest to them; a stretch that not every rank has within half its length is left out."""
    first, *others = ranks
    starts = {rank: [events[0].start for _, events in stretches] for rank, stretches in ranks.items()}
    found = {rank: Rank() for rank in ranks}
    taken = 0
    waits: dict[int, float] | None = dict.fromkeys(ranks, 0.0)
    for frontier, events in ranks[first]:
        half = (max(event.end for event in events) - frontier) / 2
        same = {first: (frontier, events)}
        for rank in others:
            at = nearest(starts[rank], events[0].start)
            if abs(starts[rank][at] - events[0].start) <= half:
                same[rank] = ranks[rank][at]
        if len(same) < len(ranks):
            continue
        taken += 1
        own = {rank: add(found[rank], *stretch) for rank, stretch in same.items()}
        waits = add_waits(waits, own)
    if taken == 0:
        raise ValueError(f"the ranks {', '.join(map(str, ranks))} have no stretch of time in common")
    for rank, one in found.items():
        scale(one, 1 / taken)
        one.waiting = None if waits is None else waits[rank] / taken
    return found


def nearest(starts: Sequence[float], wanted: float) -> int:
    at = bisect.bisect(starts, wanted)
    return min((i for i in (at - 1, at) if 0 <= i < len(starts)), key=lambda i: abs(starts[i] - wanted))


def add(rank: Rank, frontier: float, events: Sequence[Event]) -> list[float]:
    """Adds one stretch up; the times of its messages, in order."""
    messages = []
    for event, part in zip(events, attribute(events, frontier)):
        rank.parts.setdefault(event.name, Part()).add(part)
        rank.us += part.own + part.gap
        rank.gaps += part.gap
        if is_message(event):
            messages.append(part.own)
            rank.messages += part.own
            rank.calls += 1
        else:
            rank.kernels += part.own
    return messages


def add_waits(waits: dict[int, float] | None, own: Mapping[int, list[float]]) -> dict[int, float] | None:
    """None once two ranks had different numbers of messages: then which belongs to which is not known."""
    if waits is None or len({len(times) for times in own.values()}) > 1:
        return None
    for times in zip(*own.values()):
        for rank, mine in zip(own, times):
            waits[rank] += mine - min(times)
    return waits


def scale(rank: Rank, factor: float) -> None:
    for name in ("us", "kernels", "messages", "gaps", "calls"):
        setattr(rank, name, factor * getattr(rank, name))
    for name, part in rank.parts.items():
        mean = Part()
        mean.add(part, factor)
        rank.parts[name] = mean


def whole_steps(events: Sequence[Event]) -> list[Stretch]:
    """Of one GPU, what runs from one beginning of a step to the next, of those steps whose kernels are the most common ones:
    the decode steps, where prompts came before them. The last step has no end."""
    begins = [i for i, event in enumerate(events) if event.name == BEGIN]
    frontiers = list(itertools.accumulate((event.end for event in events), max))
    steps = [(frontiers[i - 1], list(events[i:j])) for i, j in itertools.pairwise(begins) if i > 0]
    kernels = [tuple(event.name for event in step if not event.is_copy) for _, step in steps]
    common, count = max(collections.Counter(kernels).items(), key=lambda item: item[1], default=((), 0))
    if count < MIN_STEPS:
        raise ValueError(f"{count} equal steps among {len(steps)}; expected {MIN_STEPS}")
    return [step for step, names in zip(steps, kernels) if names == common]


def decode_steps(events: Iterable[Event]) -> dict[int, list[Stretch]]:
    """Of each GPU the decode steps; of the first one only the middle half by time."""
    found: dict[int, list[Stretch]] = {}
    for device, mine in by_device(events).items():
        steps = whole_steps(mine)
        if not found:
            steps = sorted(steps, key=lambda step: max(event.end for event in step[1]) - step[0])
            steps = steps[len(steps) // 4 : len(steps) - len(steps) // 4]
        found[device] = steps
    return found


def prompt_runs(events: Iterable[Event], pause_us: float, least_us: float) -> dict[int, list[Stretch]]:
    """Of each GPU the stretches of at least `least_us` between pauses of `pause_us`. What runs before the first kernel, as
    the copies that prepare it, is not part of one."""
    found: dict[int, list[Stretch]] = {}
    for device, mine in by_device(events).items():
        runs: list[list[Event]] = []
        frontier = float("-inf")
        for event in mine:
            if event.start - frontier > pause_us:
                runs.append([])
            if runs[-1] or not event.is_copy:
                runs[-1].append(event)
            frontier = max(frontier, event.end)
        long = [run for run in runs if run and max(event.end for event in run) - run[0].start >= least_us]
        found[device] = [(run[0].start, run) for run in long]
    if not found or not all(found.values()):
        raise ValueError(f"no stretch of {least_us:.0f} us on a GPU among {sum(map(len, found.values()))} of all GPUs")
    return found
