"""Sections 5 and 6: the levers, and how many users a bound on P99 allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .derive import Derived, loads_of
from .levers import TITLES
from .money import Prices
from .section_memory import MIB
from .section_power import Bill
from .section_time import by_workload, spread_cell
from .statistics import Interval, difference
from .tables import Cell, around, cell, column, plot, row, section, series, table

_COLUMNS = (
    column("tokens", "output", "tokens/s", "measured: tokens over wall time", "tokens_s"),
    column("more", "against the base", "%", "computed; Welch's 95 % interval", "lever"),
    column("p99", "end to end P99", "ms", "measured: nearest rank", "p99"),
    column("fixed", "weights, workspace", "MiB", "counted: the plan", "plan"),
    column("context", "1,000 tokens of context", "MiB", "counted: KV blocks", "kv_per_token"),
    column("held", "KV held, highest", "MiB", "measured: block pool", "kv_held"),
    column("jitter", "memory jitter", "± MiB", "measured: KV held", "jitter"),
    column("joules", "gross", "J per 1,000 output tokens", "measured: counter", "joules"),
    column("moved", "moved", "GB per 1,000 output tokens", "counted: the meter", "bytes_1k"),
)


def levers_section(data: Mapping[str, Any]) -> dict[str, Any]:
    by_lever: dict[str, list[Mapping[str, Any]]] = {}
    for case in data.get("levers", ()):
        by_lever.setdefault(case["lever"], []).append(case)
    found = loads_of(data, "lever:")
    tables, gains = [], []
    for lever, cases in by_lever.items():
        base = next((found.get(case["key"]) for case in cases if case["base"]), None)
        rows = [_lever_row(case, found.get(case["key"]), base, data) for case in cases]
        label = cases[0]["label"] + (f", {cases[0]['users']} users" if lever != "batch" else "")
        title = TITLES[lever][0].upper() + TITLES[lever][1:]
        tables.append(table(f"lever-{lever}", title, "setting", _COLUMNS, rows, f"Load: {label}."))
        gains += _gains(lever, cases, found, base)
    if not tables:
        empty = {one["key"]: cell(None, "not measured: left out (--no-levers)") for one in _COLUMNS}
        tables.append(table("lever-none", "Levers", "setting", _COLUMNS, [row("all levers", "none", empty)]))
    lead = "Each option alone is changed and measured on this machine, in this run; the first row of each table is the base."
    drift = _drift(data, found)
    if drift is not None:
        lead += (
            f" The same base case, measured {drift[1]} times between the levers, varied by {drift[0]:.2g} %: smaller changes say "
            "nothing."
        )
    least = drift[0] if drift is not None else 0.0
    best = max(
        (gain for gain in gains if gain[0] > least and _certain(gain[2])), default=None, key=lambda gain: gain[0]
    )
    if best is not None:
        lead += f" The largest gain in throughput that is more than noise: {best[1]}, {best[0]:+.0f} %."
    elif gains:
        lead += " No gain in throughput is more than the noise of this run."
    return section("levers", "Levers", lead, tables, [_gain_plot(gains), _batch_plot(by_lever.get("batch", []), found)])


def _gains(
    lever: str, cases: Any, found: Mapping[str, Derived], base: Derived | None
) -> list[tuple[float, str, Interval]]:
    """Change in percent, name, and the same with its interval, of every case but the base."""
    gains = []
    for case in cases:
        one = found.get(case["key"])
        if one is not None and base is not None and not case["base"]:
            change = _change(one, base)
            if change is not None:
                gains.append((change.mean, f"{TITLES[lever]}: {case['setting']}", change))
    return gains


def _change(one: Derived, base: Derived) -> Interval | None:
    """Percent of output tokens/s against the base."""
    if one is base:
        return Interval(0.0, None, None, 1)
    before, after = base.tokens_s, one.tokens_s
    gap = difference(one.per_window("output_tokens"), base.per_window("output_tokens"))
    if before is None or after is None or gap is None or not before.mean:
        return None
    mean = 100 * (after.mean / before.mean - 1)
    if gap.low is None or gap.high is None:
        return Interval(mean, None, None, 1)
    half = 50 * (gap.high - gap.low) / before.mean
    return Interval(mean, mean - half, mean + half, gap.n)


def _drift(data: Mapping[str, Any], found: Mapping[str, Derived]) -> tuple[float, int] | None:
    """How far the highest of equal base cases is above the lowest, in percent, and how many there were."""
    groups: dict[tuple[str, int], list[float]] = {}
    for case in data.get("levers", ()):
        one = found.get(case["key"])
        if case["base"] and case["plain"] and one is not None and one.tokens_s is not None:
            groups.setdefault((case["label"], case["users"]), []).append(one.tokens_s.mean)
    most = max(groups.values(), key=len, default=[])
    if len(most) < 2 or min(most) <= 0:
        return None
    return 100 * (max(most) / min(most) - 1), len(most)


def _certain(change: Interval) -> bool:
    """Whether the interval leaves out 0."""
    return change.low is not None and change.high is not None and (change.low > 0 or change.high < 0)


def _lever_row(
    case: Mapping[str, Any], one: Derived | None, base: Derived | None, data: Mapping[str, Any]
) -> dict[str, Any]:
    name = case["setting"] + (" (base)" if case["base"] else "")
    if one is None:
        why = data["skipped"].get(case["key"], "not measured")
        return row(name, "none", {entry["key"]: cell(None, why) for entry in _COLUMNS})
    load, memory = one.load, one.load["memory"]
    high, low = memory["kv_high_bytes"], memory["kv_low_bytes"]
    moved = one.bytes_per_1k()
    no_base = "not measured: the base case was not"
    p99 = spread_cell(load, "e2e_s", "p99")
    if p99["value"] is not None:
        p99["value"] *= 1000
    sample = "not measured: no sample fell into the windows"
    cells = {
        "tokens": around(one.tokens_s),
        "more": around(_change(one, base) if base else None, 1.0, no_base),
        "p99": p99,
        "fixed": cell(_without_cache(load) / MIB),
        "context": cell(1000 * load["kv_block_bytes"] / _block_size(case, data) / MIB),
        "held": cell(None if high is None else high / MIB, sample),
        "jitter": cell(None if high is None else (high - low) / 2 / MIB, sample),
        "joules": around(one.joules_per_1k(), 1, one.why_energy),
        "moved": cell(None if moved is None else moved / 1e9, one.why),
    }
    return row(name, load["window"], cells)


def _without_cache(load: Mapping[str, Any]) -> int:
    return sum(size for part, size in load["plan_bytes"].items() if part != "kv_cache")


def _block_size(case: Mapping[str, Any], data: Mapping[str, Any]) -> int:
    return int(case["setting"]) if case["lever"] == "block_size" else data["plan"]["block_size"]


def _gain_plot(gains: list[tuple[float, str, Interval]]) -> dict[str, Any]:
    ordered = sorted(gains, reverse=True, key=lambda gain: gain[0])
    points = [(position, gain, change.low, change.high) for position, (gain, _, change) in enumerate(ordered)]
    more = {} if points else {"why": "not measured: no lever was tried"}
    return plot(
        "plot-levers", "Throughput against the base of each lever", "bars", ("", ""), ("change of output tokens/s", "%"),
        [series("change", points)], "measured; pale: the 95 % interval holds 0", labels=[name for _, name, _ in ordered],
        horizontal=True, **more,
    )  # fmt: skip


def _batch_plot(cases: list[Mapping[str, Any]], found: Mapping[str, Derived]) -> dict[str, Any]:
    points = []
    for case in cases:
        one = found.get(case["key"])
        if one is not None and one.tokens_s and one.load["requests"]["e2e_s"]:
            points.append((one.tokens_s.mean, one.load["requests"]["e2e_s"]["p99"] * 1000))
    more = {} if points else {"why": "not measured: no batch size was tried"}
    names = [case["setting"] for case in cases if case["key"] in found]
    return plot(
        "plot-batch", "Throughput against P99, by batch size", "line", ("output", "tokens/s"), ("end to end P99", "ms"),
        [series("batch size", points)], "measured", point_labels=names, **more,
    )  # fmt: skip


# -- section 6


def concurrency_section(data: Mapping[str, Any]) -> dict[str, Any]:
    bound_s = data["settings"]["p99_s"]
    prices = Prices(**data["prices"])
    groups = by_workload(loads_of(data))
    columns = [
        column("ttft", "TTFT P99", "ms", "measured: nearest rank over requests", "p99"),
        column("e2e", "end to end P99", "s", "measured: nearest rank over requests", "p99"),
        column("tokens", "output", "tokens/s", "measured: tokens over wall time", "tokens_s"),
        column("each", "for each user", "tokens/s", "computed: over the users", "tokens_s"),
        column("watts", "power", "W", "measured: energy counter, or entered", "watts"),
        column("per_watt", "output", "tokens/s per W", "computed", "tokens_watt"),
    ]
    tables = []
    for name, group in groups.items():
        rows = [_concurrency_row(one, data, prices) for one in group]
        tables.append(table(f"concurrency-{group[0].load['workload']}", name, "users", columns, rows))
    summary = _summary(groups, bound_s)
    lead = f"P99 below {bound_s:g} s, for the first token and for the whole answer: the studies do not say which they mean."
    plots = [
        _tail_plot(groups, "plot-p99", "TTFT", "ttft_ms", ("TTFT P99", "ms"), 1000 * bound_s, bound_s),
        _tail_plot(groups, "plot-p99-whole", "End to end time", "e2e_s", ("end to end P99", "s"), bound_s, bound_s),
    ]
    return section("concurrency", "Concurrency", lead, [summary, *tables], plots)


def _tail_plot(
    groups: Mapping[str, list[Derived]],
    key: str,
    title: str,
    latency: str,
    axis: tuple[str, str],
    bound: float,
    bound_s: float,
) -> dict[str, Any]:
    lines = []
    for name, group in groups.items():
        points = [(one.users, value) for one in group if (value := _p99(one, latency)) is not None]
        if points:
            lines.append(series(name, points))
    more: dict[str, Any] = {} if lines else {"why": "not measured: no load was run"}
    return plot(
        key, f"{title} of the slowest 1 %", "line", ("users", "count"), axis, lines, "measured: nearest rank over requests",
        log_x=True, log_y=True, bound=[bound, f"{bound_s:g} s"], **more,
    )  # fmt: skip


def _p99(one: Derived, name: str) -> float | None:
    found = one.load["requests"][name]
    return None if found is None else found["p99"]


def _concurrency_row(one: Derived, data: Mapping[str, Any], prices: Prices) -> dict[str, Any]:
    bill = Bill(one, data, prices)
    watts = one.watts.mean if one.watts else bill.wall_watts
    rate = one.tokens_s
    efficiency: Cell = cell(rate.mean / watts if rate and watts else None, one.why_energy)
    cells = {
        "ttft": spread_cell(one.load, "ttft_ms", "p99"),
        "e2e": spread_cell(one.load, "e2e_s", "p99"),
        "tokens": around(rate),
        "each": around(rate, 1 / one.users),
        "watts": cell(watts, one.why_energy),
        "per_watt": efficiency,
    }
    return row(f"{one.users} user{'s' if one.users != 1 else ''}", one.load["window"], cells)


def supported(group: list[Derived], name: str, bound: float) -> int:
    """The most users tried with P99 of `name` below the bound, where all smaller numbers keep it too; 0: none."""
    most = 0
    for one in group:
        value = _p99(one, name)
        if value is None or value >= bound:
            break
        most = one.users
    return most


def _summary(groups: Mapping[str, list[Derived]], bound_s: float) -> dict[str, Any]:
    columns = [
        column("ttft", f"TTFT P99 < {bound_s:g} s", "users", "computed: from the tables below", "concurrency"),
        column("e2e", f"end to end P99 < {bound_s:g} s", "users", "computed: from the tables below", "concurrency"),
    ]
    rows = []
    for name, group in groups.items():
        most = group[-1].users
        cells = {}
        for key, latency, bound in (("ttft", "ttft_ms", 1000 * bound_s), ("e2e", "e2e_s", bound_s)):
            found = supported(group, latency, bound)
            if found == 0:
                cells[key] = cell(f"none: {group[0].users} user{'s are' if group[0].users > 1 else ' is'} above it")
            else:
                cells[key] = cell(f"{found} or more: the most tried" if found == most else found)
        rows.append(row(name, f"tried: {', '.join(str(one.users) for one in group)} users", cells))
    return table("users-summary", "Users supported", "workload", columns, rows)
