"""Section 1: memory, as a breakdown, over the run, and against batch and context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .run import PARTS
from .tables import cell, column, plot, row, section, series, table

MIB = 1 << 20
PART_TITLES = {
    "embedding": "embedding",
    "layers": "layers' weights",
    "head": "output head",
    "workspace": "workspace (intermediate state)",
    "kv_cache": "KV cache",
}


def memory_section(data: Mapping[str, Any]) -> dict[str, Any]:
    plan = data["plan"]
    sizes = {part: plan[f"{part}_bytes"] for part in PARTS}
    total = sum(sizes.values())
    per_1k = 1000 * plan["kv_block_bytes"] / plan["block_size"] / MIB
    lead = (
        f"The engine plans {total / MIB:,.0f} MiB, of which the KV cache for {plan['num_blocks'] * plan['block_size']:,} tokens is "
        f"{sizes['kv_cache'] / MIB:,.0f} MiB. Every 1,000 tokens of context hold {per_1k:.3g} MiB of it."
    )
    tables = [_breakdown(data, sizes, total), _safe(data), _over_run(data), _against(data)]
    return section("memory", "Memory", lead, tables, [_parts_plot(sizes), _curve(data), _need_plot(data)])


def _breakdown(data: Mapping[str, Any], sizes: Mapping[str, int], total: int) -> dict[str, Any]:
    counted = "counted: the engine's plan, allocated at load"
    columns = [
        column("mib", "size", "MiB", counted, "plan"),
        column("share", "share", "%", "computed: of the total", "share"),
    ]
    rows = []
    for part, size in sizes.items():
        shared = part == "head" and size == 0
        title = PART_TITLES[part] + (" (shares the embedding)" if shared else "")
        rows.append(row(title, "whole run", {"mib": cell(size / MIB), "share": cell(100 * size / total)}))
    rows.append(row("total planned", "whole run", {"mib": cell(total / MIB), "share": cell(100.0)}))
    overhead = data["plan"]["device_overhead_bytes"]
    why = "not measured: on the CPU there is no device context" if not overhead else None
    outside = cell(overhead / MIB if overhead else None, why)
    rows.append(
        row(
            "context and modules of the driver",
            "at load",
            {"mib": outside, "share": cell(None, "not part of the plan")},
        )
    )
    return table("memory-breakdown", "What the memory is for", "part", columns, rows)


def _safe(data: Mapping[str, Any]) -> dict[str, Any]:
    """The smallest memory that runs one user of short prompts, and what a token adds."""
    plan, estimates = data["plan"], data["stages"].get("estimates")
    why = data["skipped"].get("estimates", "not measured")
    counted = "counted: the engine's plan for this case; nothing allocated"
    columns = [column("mib", "memory", "MiB", counted, "plan")]
    rows = []
    overhead = plan["device_overhead_bytes"]
    known = [one for one in estimates["rows"] if "why" not in one] if estimates else []
    if known:
        least = min(known, key=lambda one: (one["batch"], one["context"]))
        size = sum(least[f"{part}_bytes"] for part in PARTS) + overhead
        with_context = ", with the driver's context" if overhead else ""
        rows.append(
            row(
                f"smallest safe memory: 1 user, {least['context']} tokens{with_context}",
                "plan",
                {"mib": cell(size / MIB)},
            )
        )
        most = max(known, key=lambda one: (one["batch"], one["context"]))
        size = sum(most[f"{part}_bytes"] for part in PARTS) + overhead
        rows.append(
            row(
                f"{most['batch']} users of {most['context']:,} tokens each{with_context}",
                "plan",
                {"mib": cell(size / MIB)},
            )
        )
    else:
        rows.append(row("smallest safe memory", "plan", {"mib": cell(None, why)}))
    per_token = plan["kv_block_bytes"] / plan["block_size"]
    rows.append(row("each 1,000 output tokens of one request", "plan", {"mib": cell(1000 * per_token / MIB)}))
    return table("memory-safe", "The smallest safe memory, and what a token adds", "case", columns, rows)


def _over_run(data: Mapping[str, Any]) -> dict[str, Any]:
    first = next((load for key, load in data["stages"].items() if key.startswith("load:")), None)
    method = "measured: " + (first["memory"]["method"] if first else "nothing")
    columns = [
        column("peak", "highest in use", "MiB", method, "in_use"),
        column("jitter", "jitter", "± MiB", "computed: half of highest less lowest", "jitter"),
        column("held", "KV cache held, highest", "MiB", "measured: the block pool's counts", "kv_held"),
        column("held_jitter", "its jitter", "± MiB", "computed: half of highest less lowest", "jitter"),
    ]
    rows = []
    for key, load in data["stages"].items():
        if not key.startswith("load:"):
            continue
        memory = load["memory"]
        low, high = memory["low_bytes"], memory["high_bytes"]
        held_low, held = memory["kv_low_bytes"], memory["kv_high_bytes"]
        why = "not measured: no sample fell into the windows"
        cells = {
            "peak": cell(None if high is None else high / MIB, why),
            "jitter": cell(None if high is None else (high - low) / 2 / MIB, why),
            "held": cell(None if held is None else held / MIB, why),
            "held_jitter": cell(None if held is None else (held - held_low) / 2 / MIB, why),
        }
        title, _, lengths = load["label"].rpartition(", ")
        rows.append(row(f"{title}, {_users(load['users'])} ({lengths})", load["window"], cells))
    return table("memory-run", "Memory during the loads", "load", columns, rows)


def _users(count: int) -> str:
    return f"{count} user{'s' if count != 1 else ''}"


def _against(data: Mapping[str, Any]) -> dict[str, Any]:
    estimates = data["stages"].get("estimates") or {"rows": [], "contexts": []}
    batches = sorted({one["batch"] for one in estimates["rows"]})
    counted = "counted: the engine's plan"
    columns = [column(str(batch), _users(batch), "MiB", counted, "plan") for batch in batches]
    rows = []
    for context in estimates["contexts"]:
        cells = {}
        for one in estimates["rows"]:
            if one["context"] == context and "why" in one:
                cells[str(one["batch"])] = cell(None, one["why"])
            elif one["context"] == context:
                size = sum(one[f"{part}_bytes"] for part in PARTS)
                cells[str(one["batch"])] = cell(size / MIB)
        rows.append(row(f"{context:,} tokens", "plan", cells))
    return table("memory-against", "Memory needed, against users and context", "context of each user", columns, rows)


# -- plots


def _parts_plot(sizes: Mapping[str, int]) -> dict[str, Any]:
    lines = [series(PART_TITLES[part], [(0, size / MIB)]) for part, size in sizes.items() if size]
    return plot(
        "plot-memory-parts", "Breakdown of the plan", "stacked", ("", ""), ("memory", "MiB"), lines,
        "counted: the engine's plan", labels=["plan"],
    )  # fmt: skip


def _curve(data: Mapping[str, Any]) -> dict[str, Any]:
    used, held, at = [], [], 0.0
    kind = "in use"
    for key, load in data["stages"].items():
        if not key.startswith("load:"):
            continue
        curve = load["memory"]["curve"]
        kind = "GPU in use" if load["memory"]["kind"] == "gpu" else "process (resident)"
        step = max(1, len(curve) // 60)
        for seconds, use, hold in curve[::step]:
            used.append((at + seconds, use / MIB))
            held.append((at + seconds, hold / MIB))
        at += curve[-1][0] if curve else 0.0
    more = {} if used else {"why": "not measured: no load was run"}
    return plot(
        "plot-memory-curve", "Memory over the run, load after load", "line", ("time, loads in the order of the table", "s"),
        ("memory", "MiB"), [series(kind, used), series("KV cache held by requests", held)],
        "measured: sampled every 20 ms; thinned to the peaks", **more,
    )  # fmt: skip


def _need_plot(data: Mapping[str, Any]) -> dict[str, Any]:
    estimates = data["stages"].get("estimates") or {"rows": []}
    lines = []
    for batch in sorted({one["batch"] for one in estimates["rows"]}):
        points = [
            (one["context"], sum(one[f"{part}_bytes"] for part in PARTS) / MIB)
            for one in estimates["rows"]
            if one["batch"] == batch and "why" not in one
        ]
        lines.append(series(_users(batch), points))
    more = {} if lines else {"why": data["skipped"].get("estimates", "not measured")}
    return plot(
        "plot-memory-need", "Memory needed against context", "line", ("context of each user", "tokens"), ("memory", "MiB"), lines,
        "counted: the engine's plan", log_x=True, **more,
    )  # fmt: skip
