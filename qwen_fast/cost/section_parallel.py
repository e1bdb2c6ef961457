"""Of section 6: one device against several, under the same load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .derive import Derived
from .parallel import key, load_of
from .section_levers import supported
from .section_memory import MIB
from .section_time import spread_cell
from .tables import Cell, around, cell, column, number, plot, row, series, table

NAME = "gpus-loads"
SUMMARY = "gpus-summary"


def with_comparison(found: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """A section, with the tables and the plot of the comparison where there is one."""
    if not data.get("gpus"):
        return dict(found)
    groups = _groups(data)
    return {
        **found,
        "lead": found["lead"] + " Then the same load on one device and on several.",
        "tables": [*found["tables"], _summary(data, groups), _loads(data, groups)],
        "plots": [*found["plots"], _plot(data, groups)],
    }


def _plot(data: Mapping[str, Any], groups: Mapping[int, Mapping[int, Derived]]) -> dict[str, Any]:
    lines = []
    for count, group in groups.items():
        points = [(one.users, one.tokens_s.mean) for one in group.values() if one.tokens_s is not None]
        if points:
            lines.append(series(named(data, count), points))
    more: dict[str, Any] = {} if lines else {"why": "not measured: no load was run"}
    return plot(
        "plot-gpus", "Output tokens/s on one device and on several", "line", ("users", "count"), ("output", "tokens/s"), lines,
        "measured: tokens over wall time", log_x=True, log_y=True, **more,
    )  # fmt: skip


def named(data: Mapping[str, Any], count: int) -> str:
    if data["gpus"]["unit"] == "GPU":
        return f"{count} GPU{'s' if count > 1 else ''}"
    return f"{count} rank{'s' if count > 1 else ''} of CPU threads"


def _groups(data: Mapping[str, Any]) -> dict[int, dict[int, Derived]]:
    """Loads by number of devices and users, each with the idle power of its own devices."""
    found: dict[int, dict[int, Derived]] = {}
    for one in data["gpus"]["counts"]:
        count, stages = one["count"], data["stages"]
        idle = stages.get(key(count, "idle")) or (stages.get("idle") if count == data["gpus"]["own"] else None)
        own = {**data, "stages": {"idle": idle}}
        loads = ((users, load_of(data, count, users)) for users in data["gpus"]["users"])
        found[count] = {users: Derived(load, own) for users, load in loads if load is not None}
    return found


def _why(data: Mapping[str, Any], count: int, what: str | int) -> str:
    own = data["skipped"].get(f"load:{data['gpus']['workload']}:{what}")
    return data["skipped"].get(key(count, what)) or own or "not measured"


def _loads(data: Mapping[str, Any], groups: Mapping[int, Mapping[int, Derived]]) -> dict[str, Any]:
    counter = "measured: energy counters of all of them over wall time"
    columns = [
        column("ttft", "TTFT", "ms", "measured: mean over requests", "ttft"),
        column("ttft-p99", "TTFT P99", "ms", "measured: nearest rank over requests", "p99"),
        column("tpot", "TPOT", "ms", "measured: mean over requests", "tpot"),
        column("e2e", "end to end P99", "s", "measured: nearest rank over requests", "p99"),
        column("tokens", "output", "tokens/s", "measured: tokens over wall time", "tokens_s"),
        column("times", "against the fewest", "times", "computed: of tokens/s with as many users", "tensor_parallel"),
        column("watts", "power", "W", counter, "watts"),
        column("per_watt", "output", "tokens/s per W", "computed", "tokens_watt"),
        column("joules", "gross", "J per 1,000 output tokens", counter, "joules"),
    ]
    base = groups[min(groups)]
    rows = []
    for count, group in groups.items():
        for users in data["gpus"]["users"]:
            label = f"{named(data, count)}, {users} user{'s' if users > 1 else ''}"
            if users in group:
                rows.append(row(label, group[users].load["window"], _cells(group[users], base.get(users))))
            else:
                why = _why(data, count, users)
                rows.append(row(label, "none", {one["key"]: cell(None, why) for one in columns}))
    note = "Power is that of the devices in use, all of them together; host and idle neighbours are not in it."
    return table(NAME, f"One device against several: {data['gpus']['label']}", "devices and users", columns, rows, note)


def _cells(one: Derived, base: Derived | None) -> dict[str, Cell]:
    rate, first = one.tokens_s, base.tokens_s if base is not None else None
    watts = one.watts
    return {
        "ttft": spread_cell(one.load, "ttft_ms"),
        "ttft-p99": spread_cell(one.load, "ttft_ms", "p99"),
        "tpot": spread_cell(one.load, "tpot_ms"),
        "e2e": spread_cell(one.load, "e2e_s", "p99"),
        "tokens": around(rate),
        "times": cell(rate.mean / first.mean if rate and first and first.mean else None, "not measured on the fewest"),
        "watts": around(watts, 1, one.why_energy),
        "per_watt": cell(rate.mean / watts.mean if rate and watts and watts.mean else None, one.why_energy),
        "joules": around(one.joules_per_1k(), 1, one.why_energy),
    }


def _summary(data: Mapping[str, Any], groups: Mapping[int, Mapping[int, Derived]]) -> dict[str, Any]:
    bound = data["settings"]["p99_s"]
    columns = [
        column("ttft", f"TTFT P99 < {bound:g} s", "users", "computed: from the table below", "concurrency"),
        column("e2e", f"end to end P99 < {bound:g} s", "users", "computed: from the table below", "concurrency"),
        column("tokens", "most output", "tokens/s", "measured: tokens over wall time", "tokens_s"),
        column("per_watt", "most for each watt", "tokens/s per W", "computed", "tokens_watt"),
        column("plan", "planned for the fullest device", "MiB", "counted: the engine's plan", "plan"),
        column("in_use", "in use on each", "MiB", "measured: NVML, after loading, all processes", "in_use"),
        column("load", "loading", "s", "measured: one load", "load_time"),
        column("idle", "idle power", "W", "measured: before the loads, all devices together", "watts"),
    ]
    rows = []
    for one in data["gpus"]["counts"]:
        group = list(groups[one["count"]].values())
        engine = data["stages"].get(key(one["count"], "engine"))
        cells = _users(data, one["count"], group, bound) | _best(data, one["count"], group)
        cells |= _engine(engine, _why(data, one["count"], "engine"), data["gpus"]["unit"])
        tried = ", ".join(str(load.users) for load in group)
        rows.append(row(named(data, one["count"]), f"tried: {tried} users" if tried else "none", cells))
    return table(SUMMARY, "One device against several: what each can do", "devices", columns, rows)


def _users(data: Mapping[str, Any], count: int, group: list[Derived], bound: float) -> dict[str, Cell]:
    cells = {}
    for name, latency, limit in (("ttft", "ttft_ms", 1000 * bound), ("e2e", "e2e_s", bound)):
        most = supported(group, latency, limit)
        if not group:
            cells[name] = cell(None, _why(data, count, data["gpus"]["users"][0]))
        elif most == 0:
            cells[name] = cell(f"none: {group[0].users} user{'s are' if group[0].users > 1 else ' is'} above it")
        else:
            cells[name] = cell(f"{most} or more: the most tried" if most == group[-1].users else most)
    return cells


def _best(data: Mapping[str, Any], count: int, group: list[Derived]) -> dict[str, Cell]:
    why = _why(data, count, data["gpus"]["users"][0]) if not group else group[0].why_energy
    rates = [one.tokens_s.mean for one in group if one.tokens_s]
    shares = [one.tokens_s.mean / one.watts.mean for one in group if one.tokens_s and one.watts and one.watts.mean]
    idle = next((one.idle_watts for one in group), None)
    return {
        "tokens": cell(max(rates, default=None), why),
        "per_watt": cell(max(shares, default=None), why),
        "idle": cell(idle, why or "not measured: no idle baseline"),
    }


def _engine(engine: Mapping[str, Any] | None, why: str, unit: str) -> dict[str, Cell]:
    if engine is None:
        return {name: cell(None, why) for name in ("plan", "in_use", "load")}
    used = engine["in_use_bytes"]
    no_device = "not measured: NVML cannot be read" if unit == "GPU" else "not measured: the CPU backend has one memory"
    return {
        "plan": cell((sum(engine["plan_bytes"].values()) + engine["overhead_bytes"]) / MIB),
        "in_use": cell(None if used is None else "; ".join(number(one / MIB) for one in used), no_device),
        "load": cell(engine["load_seconds"]),
    }
