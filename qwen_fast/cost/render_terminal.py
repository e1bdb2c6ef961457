"""A report on the terminal: rich's tables where rich is installed, plain columns otherwise."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from .summary import headline
from .tables import shown

_ODD = ("power-arithmetic",)


def as_text(document: Mapping[str, Any], width: int = 160) -> str:
    """Plain text, no colours; needs nothing installed."""
    out = [f"What {document['model']['name']} costs: {document['engine']['description']}", ""]
    for one in headline(document):
        value = f"{one['value']} {one['unit']}" if one["value"] is not None else one["why"]
        out.append(f"  {one['title']:<30} {value}" + (f"  ({one['how']})" if one["how"] else ""))
    out += ["", *(f"  note: {note}" for note in document["notes"])]
    for section in document["sections"]:
        out += ["", f"== {section['title']}: {section['lead']}"]
        for table in section["tables"]:
            out += ["", f"-- {table['title']}"]
            out += _plain(table, width)
    return "\n".join(out) + "\n"


def _plain(table: Mapping[str, Any], width: int) -> list[str]:
    """Long tables of few columns stay tables; each cell that is not there says so once a row."""
    head = [table["first"], *(f"{one['title']} [{one['unit']}]" for one in table["columns"]), "window"]
    rows = []
    notes = [f"   {one['title']}: {one['method']}" for one in table["columns"]]
    for row in table["rows"]:
        cells = [row["cells"][one["key"]] for one in table["columns"]]
        whys = {cell.get("why") for cell in cells}
        if len(whys) == 1 and None not in whys and len(cells) > 1:
            rows.append([row["label"], str(whys.pop())])
        else:
            rows.append([row["label"], *map(shown, cells), row["window"]])
    full = [one for one in rows if len(one) == len(head)]
    limit = max(12, width // max(1, len(head)))
    widths = [min(limit if i else 46, max([len(text), *(len(one[i]) for one in full)])) for i, text in enumerate(head)]
    lines = []
    for one in [head, *rows]:
        fitted = one if len(one) < len(head) else [_fit(text, widths[i]) for i, text in enumerate(one)]
        lines.append("   " + "  ".join(fitted).rstrip())
    return [*lines, *notes] if table["id"] not in _ODD else ["   " + " | ".join(one) for one in rows]


def _fit(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 3] + "..."


def show(document: Mapping[str, Any], stream: Any = None) -> None:
    """Prints the report, with rich where it is there."""
    try:
        from rich.console import Console
    except ImportError:
        print(as_text(document), end="", file=stream)
        return
    console = Console(file=stream, highlight=False)
    if console.width < 100 and not console.is_terminal:
        console = Console(file=stream, highlight=False, width=160)
    _rich(document, console)


def rich_text(document: Mapping[str, Any], width: int = 160) -> str:
    """What `show` prints, without colours. ImportError without rich."""
    from rich.console import Console

    out = io.StringIO()
    _rich(document, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def _rich(document: Mapping[str, Any], console: Any) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    lines = Text()
    for one in headline(document):
        lines.append(f"{one['title']:<30}")
        lines.append(
            f"{one['value']} {one['unit']}" if one["value"] is not None else one["why"],
            "bold" if one["value"] else "dim",
        )
        lines.append(f"  {one['how']}\n" if one["value"] is not None else "\n", "dim")
    console.print(
        Panel(lines, title=f"What {document['model']['name']} costs", subtitle=document["engine"]["description"])
    )
    for note in document["notes"]:
        console.print(Text(f"note: {note}", "yellow"))
    for section in document["sections"]:
        console.print()
        console.rule(Text(section["title"], "bold cyan"))
        console.print(Text(section["lead"]))
        for table in section["tables"]:
            made = Table(
                title=Text(table["title"], "bold"), title_justify="left", header_style="bold", caption_justify="left"
            )
            made.caption = Text(_methods(table), "dim")
            made.add_column(table["first"], overflow="fold", min_width=18)
            for one in table["columns"]:
                made.add_column(Text(f"{one['title']}\n{one['unit']}"), justify="right", overflow="fold")
            made.add_column("window", style="dim", overflow="fold", min_width=14)
            reasons = _reasons(table)
            for row in table["rows"]:
                cells = [row["cells"][one["key"]] for one in table["columns"]]
                made.add_row(Text(row["label"]), *(_rich_cell(cell, reasons) for cell in cells), Text(row["window"]))
            console.print(made)


def _methods(table: Mapping[str, Any]) -> str:
    said = "; ".join(f"{one['title']}: {one['method']}" for one in table["columns"])
    marks = "".join(f"\n[{index}] {why}" for why, index in _reasons(table).items())
    return said + marks + (f"\n{table['note']}" if table["note"] else "")


def _reasons(table: Mapping[str, Any]) -> dict[str, int]:
    """Why cells are empty, numbered."""
    cells = [row["cells"][one["key"]] for row in table["rows"] for one in table["columns"]]
    return {why: index for index, why in enumerate(dict.fromkeys(cell["why"] for cell in cells if "why" in cell), 1)}


def _rich_cell(cell: Mapping[str, Any], reasons: Mapping[str, int]) -> Any:
    from rich.text import Text

    return Text(shown(cell)) if cell["value"] is not None else Text(f"[{reasons[cell['why']]}]", "dim")
