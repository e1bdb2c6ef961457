"""Tables of a report as Markdown, for a repository."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tables import number


def markdown(one: Mapping[str, Any]) -> list[str]:
    """Lines: a heading, and the table with unit and method of each column; missing figures say why."""
    columns = [f"{', '.join(filter(None, (key['title'], key['unit'])))} ({key['method']})" for key in one["columns"]]
    heads = [one["first"], *columns, "window"]
    lines = ["", f"### {one['title']}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for entry in one["rows"]:
        texts = [_text(entry["cells"][key["key"]]) for key in one["columns"]]
        lines.append(f"| {' | '.join([entry['label'], *texts, entry['window']])} |")
    return lines


def _text(entry: Mapping[str, Any]) -> str:
    return str(entry["why"]) if entry["value"] is None else number(entry["value"])
