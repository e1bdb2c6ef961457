"""A report as CSV: one line for each figure, with its unit, window and method."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

HEADER = ("section", "table", "row", "figure", "value", "low", "high", "unit", "window", "method", "why_not")


def as_csv(document: Mapping[str, Any]) -> str:
    """RFC 4180 with a header line. Cells that a spreadsheet would take for a formula begin with an apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    for section in document["sections"]:
        for table in section["tables"]:
            for row in table["rows"]:
                for column in table["columns"]:
                    cell = row["cells"][column["key"]]
                    values = (
                        section["id"], table["id"], row["label"], column["title"], cell["value"], cell.get("low"),
                        cell.get("high"), column["unit"], row["window"], column["method"], cell.get("why"),
                    )  # fmt: skip
                    writer.writerow([_safe(value) for value in values])
    return out.getvalue()


def _safe(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return "" if value is None else value
