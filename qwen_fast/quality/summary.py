"""The few figures of a quality report that everybody asks for first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..cost.tables import number


def title_of(document: Mapping[str, Any]) -> str:
    cells = document["cells"]
    if len(cells) == 1:
        return f"What fewer bits cost: {cells[0]['label']}"
    return f"What fewer bits cost: {len(cells)} cells"


def headline(document: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(title, value, unit, how) of each; of several cells the worst."""
    done = [one for one in document["cells"] if one["status"] == "measured"]
    found = []
    texted = [one for one in done if "text" in one]
    if texted:
        one = max(texted, key=lambda one: one["text"]["kl_mean"]["value"])
        text, of = one["text"], _of(one, done)
        found += [
            ("Mean KL divergence", number(text["kl_mean"]["value"]), "nats", _ends(text["kl_mean"]) + of),
            ("Same most likely token", number(100 * text["same_top"]["value"]), "%", _ends(text["same_top"], 100) + of),
            ("Perplexity", number(text["perplexity"]["value"], 4), "",
             f"reference {number(text['perplexity_reference']['value'], 4)}, ratio {number(text['perplexity_ratio']['value'], 4)}{of}"),
        ]  # fmt: skip
    tasked = [one for one in done if "tasks" in one]
    if tasked:
        one = min(tasked, key=lambda one: one["tasks"]["all"]["metrics"]["exact"]["measured"]["value"])
        group, of = one["tasks"]["all"], _of(one, done)
        exact = group["metrics"]["exact"]
        gap = exact["difference"]
        found += [
            ("Exact match", number(100 * exact["measured"]["value"]), "%", f"reference {number(100 * exact['reference']['value'])} %{of}"),
            ("Difference", number(100 * gap["value"]), "points", _ends(gap, 100) + of),
            ("Rows broken, fixed", f"{group['broken']}, {group['fixed']}", f"of {group['rows']}", f"p = {number(group['p'], 2)}{of}"),
        ]  # fmt: skip
    return found


def _of(one: Mapping[str, Any], done: list[Any]) -> str:
    return f"; the worst: {one['label']}" if len(done) > 1 else ""


def _ends(found: Mapping[str, Any], factor: float = 1.0) -> str:
    if found["low"] is None:
        return "no interval"
    return f"{number(factor * found['low'])} to {number(factor * found['high'])} (95 %)"
