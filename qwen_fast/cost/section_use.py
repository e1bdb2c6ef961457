"""Section 3: how much of the machine the work uses, and the bytes that it moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .derive import BYTE_KINDS, Derived, loads_of
from .section_time import label
from .tables import around, cell, column, plot, row, section, series, table

KIND_TITLES = {
    "weight_bytes": "weights",
    "head_bytes": "head",
    "embedding_bytes": "embedding",
    "kv_read_bytes": "KV read",
    "kv_write_bytes": "KV write",
    "activation_bytes": "activations",
    "host_bytes": "over the host's bus",
}


def use_section(data: Mapping[str, Any]) -> dict[str, Any]:
    loads = loads_of(data)
    peaks = best_peaks(data["stages"])
    lead = _lead(loads)
    tables = [_shares(loads, peaks, data), _bytes(loads), _peaks(peaks, data)]
    return section("utilisation", "Utilisation", lead, tables, [_busy_plot(loads), _bytes_plot(loads)])


def best_peaks(stages: Mapping[str, Any]) -> dict[str, Any] | None:
    """The better of what was measured before and after the loads: neighbours can only take from a peak."""
    found = [stages[key] for key in ("peaks", "peaks-after") if key in stages]
    if not found:
        return None
    best = dict(found[0])
    for other in found[1:]:
        for key in ("bytes_per_s", "flops_per_s"):
            best[key] = max(filter(None, (best[key], other[key])), default=None)
    return best


def _lead(loads: Mapping[str, Derived]) -> str:
    busy = [(one.busy.mean, one) for one in loads.values() if one.busy]
    if not busy:
        return "No load was measured."
    most, one = max(busy, key=lambda pair: pair[0])
    said = f"The device is busy for {most:.0f} % of the time at most: {label(one)}."
    per = one.bytes_per_1k()
    if per is not None:
        said += f" That load moves {per / 1e9:,.3g} GB per 1,000 output tokens."
    return said + " A busy device is not yet a well-used one: that is what the shares of bandwidth and arithmetic say."


def _shares(loads: Mapping[str, Derived], peaks: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    columns = [
        column("busy", "device busy", "%", "measured: time with a step in flight", "busy"),
        column("bandwidth", "memory bandwidth", "% of peak", "counted bytes over measured peak", "bandwidth"),
        column("compute", "arithmetic (tensor)", "% of peak", "counted operations over measured peak", "compute"),
        column("gbs", "moved", "GB/s", "counted bytes over wall time", "bandwidth"),
        column("tflops", "computed", "TFLOP/s", "counted operations over wall time", "compute"),
    ]
    rows = []
    for one in loads.values():
        bytes_s, flops_s = one.bytes_per_s, one.flops_per_s
        best_bytes = peaks["bytes_per_s"] if peaks else None
        best_flops = peaks["flops_per_s"] if peaks else None
        skipped = data["skipped"].get("peaks", "not measured")
        why_bytes = one.why or (peaks["bandwidth_method"] if peaks else skipped)
        why_flops = one.why or (peaks["flops_method"] if peaks else skipped)
        cells = {
            "busy": around(one.busy),
            "bandwidth": around(bytes_s if best_bytes else None, 100 / best_bytes if best_bytes else 1, why_bytes),
            "compute": around(flops_s if best_flops else None, 100 / best_flops if best_flops else 1, why_flops),
            "gbs": around(bytes_s, 1e-9, one.why),
            "tflops": around(flops_s, 1e-12, one.why),
        }
        rows.append(row(label(one), one.load["window"], cells))
    return table("use-shares", "Shares of the machine", "load", columns, rows)


def _bytes(loads: Mapping[str, Derived]) -> dict[str, Any]:
    columns = [column("all", "together", "GB per 1,000 output tokens", "counted by the meter", "bytes_1k")]
    kinds = [kind for kind in BYTE_KINDS if kind != "host_bytes" or any(one.total(kind) for one in loads.values())]
    columns += [column(kind, KIND_TITLES[kind], "GB", "counted by the meter", "bytes_1k") for kind in kinds]
    rows = []
    for one in loads.values():
        cells = {"all": _gigabytes(one, None)} | {kind: _gigabytes(one, kind) for kind in kinds}
        rows.append(row(label(one), one.load["window"], cells))
    return table("use-bytes", "Bytes moved for 1,000 output tokens", "load", columns, rows)


def _gigabytes(one: Derived, kind: str | None) -> dict[str, Any]:
    found = one.bytes_per_1k(kind)
    return cell(None if found is None else found / 1e9, one.why)


def _peaks(peaks: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    why = data["skipped"].get("peaks", "not measured")
    columns, cells = [], {}
    for key, title, unit, factor, method in (
        ("bytes_per_s", "memory read", "GB/s", 1e-9, "bandwidth_method"),
        ("flops_per_s", "matrix product", "TFLOP/s", 1e-12, "flops_method"),
    ):
        value = peaks[key] if peaks else None
        said = peaks[method] if value else "not measured"
        columns.append(column(key, title, unit, said, "bandwidth" if key == "bytes_per_s" else "compute"))
        cells[key] = cell(value * factor if value else None, peaks[method] if peaks else why)
    rows = [row("this machine", "before and after the loads, the best", cells)]
    note = (
        "A share above 100 % says that the run went beyond this peak: small weights stay in the processor's caches, int8 instructions "
        "do more than the float32 product of the probe, or others used the machine while the peak was measured."
    )
    return table("use-peaks", "The peaks that the shares are of", "limit", columns, rows, note)


def _busy_plot(loads: Mapping[str, Derived]) -> dict[str, Any]:
    points = [(position, one.busy.mean) for position, one in enumerate(loads.values()) if one.busy]
    more = {} if points else {"why": "not measured: no load was run"}
    return plot(
        "plot-busy", "Device busy", "bars", ("", ""), ("device busy", "%"), [series("device busy", points)],
        "measured: time with a step in flight over wall time", labels=[_short(one) for one in loads.values()], **more,
    )  # fmt: skip


def _short(one: Derived) -> str:
    return f"{one.load['workload']} x{one.users}"


def _bytes_plot(loads: Mapping[str, Derived]) -> dict[str, Any]:
    metered = [one for one in loads.values() if one.metered]
    lines = []
    for kind in BYTE_KINDS:
        points = [(position, (one.bytes_per_1k(kind) or 0.0) / 1e9) for position, one in enumerate(metered)]
        if any(value for _, value in points):
            lines.append(series(KIND_TITLES[kind], points))
    why = next((one.why for one in loads.values() if one.why), "not measured: no load was run")
    more = {} if lines else {"why": why}
    return plot(
        "plot-bytes", "Bytes moved for 1,000 output tokens", "stacked", ("", ""), ("moved", "GB per 1,000 output tokens"), lines,
        "counted by the meter", labels=[_short(one) for one in metered], **more,
    )  # fmt: skip
