"""The shapes of a report: cells, columns, tables, plots. Plain dicts, as they stand in the JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .definitions import DEFINITIONS
from .statistics import Interval

Cell = dict[str, Any]


def cell(
    value: float | str | None, why: str | None = None, low: float | None = None, high: float | None = None
) -> Cell:
    """A figure, with the ends of its confidence interval where there is one; value None: `why` says why not."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return {"value": None, "why": why or "not measured"}
    found: Cell = {"value": value}
    if low is not None and high is not None:
        found |= {"low": low, "high": high}
    return found


def around(found: Interval | None, factor: float = 1.0, why: str | None = None) -> Cell:
    if found is None:
        return cell(None, why)
    low, high = (None, None) if found.low is None or found.high is None else (found.low * factor, found.high * factor)
    return cell(found.mean * factor, None, low, high)


def column(key: str, title: str, unit: str, method: str, definition: str) -> dict[str, str]:
    """method: how the figure comes about: "measured: ...", "counted: ...", "computed: ..."."""
    if definition not in DEFINITIONS:
        raise KeyError(f"no definition {definition!r}")
    return {"key": key, "title": title, "unit": unit, "method": method, "definition": definition}


def row(label: str, window: str, cells: Mapping[str, Cell]) -> dict[str, Any]:
    return {"label": label, "window": window, "cells": dict(cells)}


def table(
    name: str, title: str, first: str, columns: Sequence[dict[str, str]], rows: Sequence[dict[str, Any]], note: str = ""
) -> dict[str, Any]:
    """first: the title of the column of row labels. Every row has a cell for every column."""
    for one in rows:
        missing = {entry["key"] for entry in columns} ^ set(one["cells"])
        if missing:
            raise KeyError(f"table {name}, row {one['label']}: cells and columns differ in {sorted(missing)}")
    return {"id": name, "title": title, "first": first, "columns": list(columns), "rows": list(rows), "note": note}


def series(name: str, points: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """points: (x, y) or (x, y, low, high)."""
    return {"name": name, "points": [list(point) for point in points]}


def plot(
    name: str,
    title: str,
    kind: str,
    x: tuple[str, str],
    y: tuple[str, str],
    lines: Sequence[dict[str, Any]],
    method: str,
    **more: Any,
) -> dict[str, Any]:
    """kind: "line", "bars" (x are labels), "stacked" (one bar for each label). x, y: title and unit. more: log_x, labels,
    bound (y, text), mark (x, text), why (where there is nothing to draw)."""
    if kind not in ("line", "bars", "stacked"):
        raise ValueError(f"kind must be line, bars or stacked, got {kind!r}")
    found = {
        "id": name, "title": title, "kind": kind, "x": {"title": x[0], "unit": x[1]}, "y": {"title": y[0], "unit": y[1]},
        "series": list(lines), "method": method,
    }  # fmt: skip
    return found | more


def section(name: str, title: str, lead: str, tables: Sequence[Any], plots: Sequence[Any]) -> dict[str, Any]:
    return {"id": name, "title": title, "lead": lead, "tables": list(tables), "plots": list(plots)}


def number(value: Any, digits: int = 3) -> str:
    """For readers: three significant digits at least, thousands with commas."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    if decimals > 9:
        return f"{value:.2e}"
    return f"{value:,.{decimals}f}"


def shown(entry: Mapping[str, Any]) -> str:
    """A cell as text: value ± half its interval, or why it is not there."""
    value = entry["value"]
    if value is None:
        return entry["why"]
    text = number(value)
    if "low" in entry:
        text += f" ± {number((entry['high'] - entry['low']) / 2, 2)}"
    return text
