"""Section 2: time to first token, time per token, throughput, the knee, and what 100 tokens more cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .derive import Derived, loads_of
from .measure import METHOD
from .statistics import Knee, difference, knee
from .tables import Cell, around, cell, column, plot, row, section, series, table


def time_section(data: Mapping[str, Any]) -> dict[str, Any]:
    loads = loads_of(data)
    found = _knee(data)
    lead = "No load was measured."
    if loads:
        slow = min(loads.values(), key=lambda one: one.users)
        fast = max(loads.values(), key=lambda one: one.tokens_s.mean if one.tokens_s else 0.0)
        lead = (
            f"One user of {slow.load['label']} gets {_mean(slow.tokens_s):,.0f} tokens/s; all users together get the most with "
            f"{fast.users} of {fast.load['label']}: {_mean(fast.tokens_s):,.0f} tokens/s. {_knee_said(found)}"
        )
    tables = [_main(loads, data), _latency(loads), _split(loads, data), _sweep_table(data), _plus(data)]
    plots = [_throughput_plot(loads), _tail_plot(loads), _split_plot(loads), _sweep_plot(data, found)]
    return section("time", "Time", lead, tables, plots)


def label(one: Derived) -> str:
    """short QA, 16 users (120 in / 280 out)"""
    title, _, lengths = one.load["label"].rpartition(", ")
    return f"{title}, {one.users} user{'s' if one.users != 1 else ''} ({lengths})"


def _mean(found: Any) -> float:
    return found.mean if found else 0.0


def spread_cell(load: Mapping[str, Any], name: str, key: str = "mean") -> Cell:
    """A latency of a load; its mean comes with the interval over windows."""
    found = load["requests"][name]
    if found is None:
        return cell(None, "not measured: no request of the windows had one")
    if key != "mean":
        return cell(found[key])
    return cell(found["mean"], None, found["low"], found["high"])


def _main(loads: Mapping[str, Derived], data: Mapping[str, Any]) -> dict[str, Any]:
    columns = [
        column("ttft", "TTFT", "ms", "measured: mean over requests", "ttft"),
        column("tpot", "TPOT", "ms", "measured: mean over requests", "tpot"),
        column("tokens", "output", "tokens/s", "measured: tokens over wall time", "tokens_s"),
        column("ms", "ms per token", "ms", "computed: wall time over output tokens", "ms_token"),
        column("per_1k", "ms per 1,000 tokens", "ms", "computed: 1,000 times the one before", "ms_token"),
        column("prompt", "prompts", "tokens/s", "measured: prompt tokens over wall time", "tokens_s"),
    ]
    rows = []
    for one in loads.values():
        cells = {
            "ttft": spread_cell(one.load, "ttft_ms"),
            "tpot": spread_cell(one.load, "tpot_ms"),
            "tokens": around(one.tokens_s),
            "ms": around(one.ms_per_token),
            "per_1k": around(one.ms_per_token, 1000.0),
            "prompt": around(one.tokens_in_s),
        }
        rows.append(row(label(one), one.load["window"], cells))
    rows += skipped_rows(data, "load:", columns)
    return table("time-main", "Speed of each load", "load", columns, rows, METHOD)


def skipped_rows(data: Mapping[str, Any], prefix: str, columns: Any) -> list[dict[str, Any]]:
    return [
        row(
            key.removeprefix(prefix).replace(":", ", ") + " users",
            "none",
            {one["key"]: cell(None, why) for one in columns},
        )
        for key, why in data["skipped"].items()
        if key.startswith(prefix)
    ]


def _latency(loads: Mapping[str, Derived]) -> dict[str, Any]:
    names = (("ttft_ms", "TTFT", "ms", "ttft"), ("tpot_ms", "TPOT", "ms", "tpot"), ("e2e_s", "end to end", "s", "e2e"))
    columns = [
        column(f"{name}-{key}", f"{title} {key.upper()}", unit, "measured: nearest rank over requests", "p99")
        for name, title, unit, _ in names
        for key in ("p50", "p99")
    ]
    columns.append(column("n", "requests", "count", "measured: ended in the windows", "p99"))
    rows = []
    for one in loads.values():
        cells = {f"{name}-{key}": spread_cell(one.load, name, key) for name, *_ in names for key in ("p50", "p99")}
        rows.append(row(label(one), one.load["window"], {**cells, "n": cell(one.load["requests"]["n"])}))
    return table("time-latency", "Latency: the middle and the tail", "load", columns, rows)


def _split(loads: Mapping[str, Derived], data: Mapping[str, Any]) -> dict[str, Any]:
    columns = [
        column("prefill", "prefill", "% of device time", "measured: the meter's device time", "split"),
        column("decode", "decode", "% of device time", "measured: the meter's device time", "split"),
        column(
            "first", "until the first token", "% of a request", "measured: TTFT over end-to-end time, means", "ttft"
        ),
        column("rest", "after it", "% of a request", "measured: the rest", "tpot"),
    ]
    rows = []
    for one in loads.values():
        share = one.prefill_share
        why = one.why or "not measured: no device time in the windows"
        first = None
        times = one.load["requests"]
        if times["ttft_ms"] and times["e2e_s"] and times["e2e_s"]["mean"]:
            first = min(100.0, times["ttft_ms"]["mean"] / 10 / times["e2e_s"]["mean"])
        cells = {
            "prefill": cell(None if share is None else 100 * share, why),
            "decode": cell(None if share is None else 100 * (1 - share), why),
            "first": cell(first, "not measured: no request ended"),
            "rest": cell(None if first is None else 100 - first, "not measured: no request ended"),
        }
        rows.append(row(label(one), one.load["window"], cells))
    return table("time-split", "Prefill and decode", "load", columns, rows)


# -- over the prompt's length


def _points(data: Mapping[str, Any]) -> list[tuple[float, float]]:
    found = []
    for key, load in data["stages"].items():
        if key.startswith("sweep:") and load["requests"]["ttft_ms"]:
            found.append((float(key.split(":")[1]), load["requests"]["ttft_ms"]["p50"]))
    return sorted(found)


def _knee(data: Mapping[str, Any]) -> Knee | None:
    return knee(_points(data))


def _knee_said(found: Knee | None) -> str:
    if found is None:
        return "The time to the first token has no knee over the prompt lengths tried."
    return f"The time to the first token has a knee at {found.at:,.0f} prompt tokens."


def _sweep_table(data: Mapping[str, Any]) -> dict[str, Any]:
    columns = [
        column("p50", "TTFT P50", "ms", "measured: 1 user", "ttft"),
        column("max", "TTFT, longest", "ms", "measured: 1 user", "ttft"),
        column("per", "per 1,000 prompt tokens", "ms", "computed: P50 over length, times 1,000", "ttft"),
        column("n", "requests", "count", "measured: ended in the windows", "p99"),
    ]
    rows = []
    for length, middle in _points(data):
        load = data["stages"][f"sweep:{length:.0f}"]
        cells = {
            "p50": cell(middle),
            "max": spread_cell(load, "ttft_ms", "max"),
            "per": cell(1000 * middle / length),
            "n": cell(load["requests"]["n"]),
        }
        rows.append(row(f"{length:,.0f} prompt tokens", load["window"], cells))
    for key, why in data["skipped"].items():
        if key.startswith("sweep:"):
            rows.append(
                row(f"{int(key[6:]):,} prompt tokens", "none", {one["key"]: cell(None, why) for one in columns})
            )
    return table(
        "time-sweep", "Time to first token over the prompt's length", "prompt", columns, rows, _knee_said(_knee(data))
    )


def _plus(data: Mapping[str, Any]) -> dict[str, Any]:
    columns = [
        column("ms", "end to end, more by", "ms", "measured: difference of means, Welch's 95 % interval", "plus100")
    ]
    stages, skipped = data["stages"], data["skipped"]
    base = stages.get("plus:base")
    rows = []
    for key, title in (("in", "+100 prompt tokens"), ("out", "+100 output tokens")):
        other = stages.get(f"plus:{key}")
        if base and other and base["requests"]["e2e_s"] and other["requests"]["e2e_s"]:
            found = difference(other["requests"]["e2e_s"]["values"], base["requests"]["e2e_s"]["values"])
            window = f"{other['window']}; base: {base['label'].removeprefix('plus 100, ')}"
            rows.append(row(title, window, {"ms": around(found, 1000.0)}))
        else:
            why = skipped.get(f"plus:{key}") or skipped.get("plus:base") or "not measured: longer than max_model_len"
            rows.append(row(title, "none", {"ms": cell(None, why)}))
    return table("time-plus", "What 100 tokens more take", "change", columns, rows)


# -- plots


def by_workload(loads: Mapping[str, Derived]) -> dict[str, list[Derived]]:
    found: dict[str, list[Derived]] = {}
    for one in loads.values():
        found.setdefault(one.load["label"], []).append(one)
    return {name: sorted(group, key=lambda one: one.users) for name, group in found.items()}


def _throughput_plot(loads: Mapping[str, Derived]) -> dict[str, Any]:
    lines = []
    for name, group in by_workload(loads).items():
        points = [
            (one.users, one.tokens_s.mean, one.tokens_s.low, one.tokens_s.high)
            for one in group
            if one.tokens_s is not None
        ]
        lines.append(series(name, points))
    more = {} if lines else {"why": "not measured: no load was run"}
    return plot(
        "plot-throughput", "Output tokens/s of all users together", "line", ("users", "count"), ("output", "tokens/s"), lines,
        "measured; bars: 95 % interval", log_x=True, **more,
    )  # fmt: skip


def _tail_plot(loads: Mapping[str, Derived]) -> dict[str, Any]:
    lines = []
    for name, group in by_workload(loads).items():
        points = [
            (one.users, one.load["requests"]["tpot_ms"]["p99"]) for one in group if one.load["requests"]["tpot_ms"]
        ]
        lines.append(series(name, points))
    more = {} if lines else {"why": "not measured: no load was run"}
    return plot(
        "plot-tpot", "TPOT of the slowest 1 %", "line", ("users", "count"), ("TPOT P99", "ms"), lines,
        "measured: nearest rank over requests", log_x=True, **more,
    )  # fmt: skip


def _split_plot(loads: Mapping[str, Derived]) -> dict[str, Any]:
    metered = [one for one in loads.values() if one.prefill_share is not None]
    shares = [(position, 100 * (one.prefill_share or 0.0)) for position, one in enumerate(metered)]
    lines = [series("prefill", shares), series("decode", [(position, 100 - share) for position, share in shares])]
    why = next((one.why for one in loads.values() if one.why), "not measured: no load was run")
    more = {} if metered else {"why": why}
    return plot(
        "plot-split", "Device time: prefill and decode", "stacked", ("", ""), ("device time", "%"), lines,
        "measured: the meter's device time", labels=[f"{one.load['workload']} x{one.users}" for one in metered], **more,
    )  # fmt: skip


def _sweep_plot(data: Mapping[str, Any], found: Knee | None) -> dict[str, Any]:
    points = _points(data)
    more: dict[str, Any] = {} if points else {"why": "not measured: no length of the sweep was run"}
    if found is not None:
        more["mark"] = [found.at, f"knee {found.at:,.0f}"]
    return plot(
        "plot-knee", "Time to first token over the prompt's length", "line", ("prompt", "tokens"), ("TTFT P50", "ms"),
        [series("1 user", points)], "measured: 1 user", **more,
    )  # fmt: skip
