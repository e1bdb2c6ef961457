"""The numbers of the live panel: of one answer, and of the server."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from .client import Model


class TurnStats:
    """Counts one answer as its chunks come. clock: seconds.

    The counts are the server's own (usage); where it sends none, the chunks with text are counted, which may hold more
    than one token each: then `exact` is False.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()
        self._first: float | None = None
        self._last = self._began
        self._at_first = 0
        self._chunks = 0
        self._usage: Mapping[str, Any] = {}
        self.finish_reason = ""

    def chunk(self, chunk: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The deltas of the first choice in a chunk of a stream. TypeError where they are not OpenAI's."""
        deltas: list[Mapping[str, Any]] = []
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self._usage = usage
        for choice in chunk.get("choices") or ():
            if not isinstance(choice, dict) or (choice.get("index") or 0) != 0:
                continue
            delta = choice.get("delta") or {}
            if not isinstance(delta, dict):
                raise TypeError(f"delta must be an object, got {str(delta)[:80]!a}")
            if delta.get("content") or delta.get("tool_calls"):
                self._token(delta)
                deltas.append(delta)
            if choice.get("finish_reason"):
                self.finish_reason = str(choice["finish_reason"])
        return deltas

    def _token(self, delta: Mapping[str, Any]) -> None:
        self._last = self._clock()
        self._chunks += 1
        if self._first is None:
            self._first = self._last
            self._at_first = self._tokens_out()

    def _tokens_out(self) -> int:
        return _count(self._usage.get("completion_tokens")) or self._chunks

    def numbers(self) -> dict[str, Any]:
        """tokens_out, exact; where known: tokens_in, ttft_s, tokens_per_s (after the first chunk), and what
        measured_cost() gives."""
        tokens = self._tokens_out()
        found: dict[str, Any] = {"tokens_out": tokens, "exact": bool(_count(self._usage.get("completion_tokens")))}
        prompt = _count(self._usage.get("prompt_tokens"))
        if prompt:
            found["tokens_in"] = prompt
        if self._first is not None:
            found["ttft_s"] = self._first - self._began
            later = tokens - max(self._at_first, 1)
            if later > 0 and self._last > self._first:
                found["tokens_per_s"] = later / (self._last - self._first)
        found.update(measured_cost(self._usage))
        return found


def measured_cost(usage: Mapping[str, Any]) -> dict[str, Any]:
    """joules (with provisional, where they may still grow), moved_bytes and cost (a text) from a usage that has `cost`: an
    amount, or an object with joules (or energy_uj: microjoules by source, and energy_provisional), total_bytes, amount
    (or total) and currency."""
    cost = usage.get("cost")
    if not isinstance(cost, dict):
        amount = _finite(cost)
        return {} if amount is None else {"cost": f"{amount:.6g}"}
    found: dict[str, Any] = {}
    joules = _finite(cost.get("joules"))
    sources = cost.get("energy_uj")
    if joules is None and isinstance(sources, dict) and sources:
        parts = [_finite(part) for part in sources.values()]
        joules = None if None in parts else sum(part for part in parts if part is not None) / 1e6
    amount = next((value for name in ("amount", "total") if (value := _finite(cost.get(name))) is not None), None)
    if joules is not None:
        found["joules"] = joules
        if cost.get("energy_provisional") is True:
            found["provisional"] = True
    if moved := _count(cost.get("total_bytes")):
        found["moved_bytes"] = moved
    if amount is not None:
        found["cost"] = f"{amount:.6g} {str(cost.get('currency') or '')[:8]}".strip()
    return found


def stream_options(model: Model) -> dict[str, bool]:
    """What makes the server count for us."""
    return {"include_usage": True, **({"continuous_usage_stats": True} if model.counts_as_it_goes else {})}


_SERVER = {
    "kv_cache_usage_perc": "kv_use",
    "num_requests_running": "running",
    "num_requests_waiting": "waiting",
    "memory_bytes": "memory_bytes",
}


def server_numbers(page: str) -> dict[str, float]:
    """kv_use (0 to 1), memory_bytes, running, waiting from the text of /metrics, as far as it has them, under our names
    or vLLM's. Samples that differ in their labels are added up."""
    found: dict[str, dict[str, float]] = {"qwen_fast:": {}, "vllm:": {}}
    for line in page.splitlines():
        name, _, rest = line.partition(" ") if "{" not in line else (*line.partition("{")[:2], line.rpartition("}")[2])
        prefix, _, short = name.partition(":")
        family, known = found.get(f"{prefix}:"), _SERVER.get(short)
        words = rest.split()
        if family is None or known is None or not words:
            continue
        value = _finite(words[0])
        if value is not None:
            family[known] = family.get(known, 0.0) + value
    return {**found["vllm:"], **found["qwen_fast:"]}


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
