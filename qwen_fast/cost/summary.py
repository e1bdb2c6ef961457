"""The figures at the head of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .money import format_money
from .tables import number

_WAYS = (("electricity", "electricity"), ("owned", "owned hardware"), ("rent", "hourly rent"))


def headline(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cards: title, value (text, or None with `why`), unit, how."""
    tables = {table["id"]: table for section in document["sections"] for table in section["tables"]}
    return [
        _best(tables["time-main"], "tokens", "Highest throughput", "tokens/s", max),
        _best(tables["time-main"], "ttft", "Shortest time to first token", "ms", min),
        _first(tables["memory-safe"], "mib", "Smallest safe memory", "MiB"),
        _best(tables["power-energy"], "gross", "Least energy", "J per 1,000 output tokens", min),
        _money(tables["power-money-1m"], document["prices"]["currency"]),
        _users(tables["users-summary"], document["settings"]["p99_s"]),
    ]


def _values(table: Mapping[str, Any], key: str) -> Iterator[tuple[float, str]]:
    for row in table["rows"]:
        value = row["cells"][key]["value"]
        if isinstance(value, (int, float)):
            yield value, row["label"]


def _why(table: Mapping[str, Any], key: str) -> str:
    for row in table["rows"]:
        if row["cells"][key]["value"] is None:
            return row["cells"][key]["why"]
    return "not measured: no load was run"


def _card(title: str, value: str | None, unit: str, how: str, why: str = "") -> dict[str, Any]:
    return {"title": title, "value": value, "unit": unit, "how": how, "why": why}


def _best(table: Mapping[str, Any], key: str, title: str, unit: str, choose: Any) -> dict[str, Any]:
    found = list(_values(table, key))
    if not found:
        return _card(title, None, unit, "", _why(table, key))
    value, label = choose(found)
    return _card(title, number(value), unit, label)


def _first(table: Mapping[str, Any], key: str, title: str, unit: str) -> dict[str, Any]:
    cell, label = table["rows"][0]["cells"][key], table["rows"][0]["label"]
    if cell["value"] is None:
        return _card(title, None, unit, "", cell["why"])
    return _card(title, number(cell["value"]), unit, label.partition(": ")[2])


def _money(table: Mapping[str, Any], currency: str) -> dict[str, Any]:
    """By the ways that are priced, the cheapest load of each."""
    lines = []
    for key, way in _WAYS:
        found = list(_values(table, key))
        if found:
            value, label = min(found)
            lines.append((value, way, label))
    title = "Least money"
    if not lines:
        return _card(
            title, None, "", "", f"not given: no price applies ({_why(table, 'rent').partition(': ')[2]}, ...)"
        )
    lines.sort()
    first = lines[0]
    others = "; ".join(f"{way} {format_money(value, currency)}" for value, way, _ in lines[1:])
    how = f"by {first[1]}: {first[2]}" + (f"; {others}" if others else "")
    return _card(title, format_money(first[0], currency), "per million output tokens", how)


def _users(table: Mapping[str, Any], bound: float) -> dict[str, Any]:
    if not table["rows"]:
        return _card("Users supported", None, "", "", "not measured: no load was run")
    row = table["rows"][-1]
    value = row["cells"]["ttft"]["value"]
    text = number(value) if isinstance(value, int) else str(value).split(":")[0]
    return _card("Users supported", text, f"with TTFT P99 < {bound:g} s", row["label"])
