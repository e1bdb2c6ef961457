"""From a measured load to the figures of the tables: every quotient in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .statistics import Interval, interval

BYTE_KINDS = (
    "weight_bytes", "head_bytes", "embedding_bytes", "kv_read_bytes", "kv_write_bytes", "activation_bytes", "host_bytes",
)  # fmt: skip


def centred(whole: float, values: list[float]) -> Interval | None:
    """A quotient of sums over all windows, with the width of the interval that the windows' own quotients have: so
    that tokens/s, ms per token and joules follow from one another exactly."""
    found = interval(values)
    if found is None or found.low is None or found.high is None:
        return None if found is None else Interval(whole, None, None, found.n)
    half = (found.high - found.low) / 2
    return Interval(whole, whole - half, whole + half, found.n)


class Derived:
    """Figures of one load. `why` says why what needs the meter is None; `why_energy` the same for joules."""

    def __init__(self, load: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        self.load = load
        self.windows = load["windows"]
        self.seconds = sum(window["seconds"] for window in self.windows)
        self.tokens_out = sum(window["output_tokens"] for window in self.windows)
        self.tokens_in = sum(window["prompt_tokens"] for window in self.windows)
        self.computed_in = self.tokens_in - sum(window["cached_tokens"] for window in self.windows)
        self.finished = sum(window["finished"] for window in self.windows)
        self.users = load["users"]
        meters = [window["meter"] for window in self.windows]
        self.metered = all(meter is not None for meter in meters)
        self.why = None if self.metered else f"not measured: {data['meter'].get('why', 'the meter gave nothing')}"
        self._meters = meters if self.metered else []
        self._idle = ((data["stages"].get("idle") or {}).get("watts")) or {}
        self.sources = [one["name"] for one in data["meter"].get("sources", ()) if one["measured"]]
        self.why_energy = self.why or (None if self.sources else f"not measured: {_energy_note(data)}")

    # -- time

    def per_window(self, over: str) -> list[float]:
        """tokens/s of each window, of "output_tokens" or "prompt_tokens"."""
        return [window[over] / window["seconds"] for window in self.windows]

    @property
    def tokens_s(self) -> Interval | None:
        return centred(self.tokens_out / self.seconds, self.per_window("output_tokens"))

    @property
    def tokens_in_s(self) -> Interval | None:
        return centred(self.tokens_in / self.seconds, self.per_window("prompt_tokens"))

    @property
    def ms_per_token(self) -> Interval | None:
        values = [1e3 * one["seconds"] / one["output_tokens"] for one in self.windows if one["output_tokens"]]
        return centred(1e3 * self.seconds / self.tokens_out, values) if self.tokens_out else None

    @property
    def busy(self) -> Interval | None:
        return interval([100 * min(1.0, one["busy_s"] / one["seconds"]) for one in self.windows])

    # -- the meter

    def total(self, name: str) -> int:
        return sum(meter.get(name, 0) for meter in self._meters)

    @property
    def all_bytes(self) -> int | None:
        return sum(self.total(name) for name in BYTE_KINDS if name != "host_bytes") if self.metered else None

    def bytes_per_1k(self, name: str | None = None) -> float | None:
        """Bytes of one kind (None: all but those over the host's bus) per 1,000 output tokens."""
        found = self.all_bytes if name is None else self.total(name)
        return None if not self.metered or not self.tokens_out or found is None else 1e3 * found / self.tokens_out

    @property
    def bytes_per_s(self) -> Interval | None:
        kinds = [name for name in BYTE_KINDS if name != "host_bytes"]
        rates = [
            sum(meter.get(name, 0) for name in kinds) / window["seconds"]
            for meter, window in zip(self._meters, self.windows)
        ]
        return interval(rates)

    @property
    def flops_per_s(self) -> Interval | None:
        return interval([meter["flops"] / window["seconds"] for meter, window in zip(self._meters, self.windows)])

    @property
    def prefill_share(self) -> float | None:
        device = self.total("device_ns")
        return self.total("prefill_device_ns") / device if device else None

    # -- energy

    def joules_of(self, position: int) -> float:
        energy = self._meters[position].get("energy_uj", {})
        return sum(energy.get(name, 0) for name in self.sources) / 1e6

    @property
    def joules(self) -> float | None:
        if self.why_energy:
            return None
        return sum(self.joules_of(position) for position in range(len(self._meters)))

    @property
    def idle_watts(self) -> float | None:
        known = [self._idle[name] for name in self.sources if self._idle.get(name) is not None]
        return sum(known) if self.sources and len(known) == len(self.sources) else None

    @property
    def watts(self) -> Interval | None:
        if self.why_energy:
            return None
        values = [self.joules_of(i) / window["seconds"] for i, window in enumerate(self.windows)]
        return centred((self.joules or 0.0) / self.seconds, values)

    def joules_per_1k(self, net: bool = False) -> Interval | None:
        if self.why_energy or (net and self.idle_watts is None):
            return None
        base = self.idle_watts if net and self.idle_watts is not None else 0.0
        values = []
        for position, window in enumerate(self.windows):
            if window["output_tokens"]:
                joules = self.joules_of(position) - base * window["seconds"]
                values.append(1e3 * joules / window["output_tokens"])
        if not self.tokens_out or self.joules is None:
            return None
        return centred(1e3 * (self.joules - base * self.seconds) / self.tokens_out, values)


def _energy_note(data: Mapping[str, Any]) -> str:
    notes = [one["note"] for one in data["meter"].get("sources", ()) if one.get("note")]
    return "; ".join(dict.fromkeys(notes)) or "this machine has no energy counter that can be read"


def loads_of(data: Mapping[str, Any], prefix: str = "load:") -> dict[str, Derived]:
    """By key, in the order of the run."""
    return {key: Derived(load, data) for key, load in data["stages"].items() if key.startswith(prefix)}
