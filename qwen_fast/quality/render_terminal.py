"""A quality report on the terminal: rich's tables where rich is installed, plain columns otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..cost.tables import shown
from .sections import described
from .summary import headline, title_of


def as_text(document: Mapping[str, Any]) -> str:
    """Plain text, no colours; needs nothing installed."""
    out = [title_of(document), f"against {described(document['reference'])}", ""]
    out += [f"  {title:<26} {value} {unit}  ({how})" for title, value, unit, how in headline(document)]
    out += [f"  note: {note}" for note in document["notes"]]
    for section in document["sections"]:
        out += ["", f"== {section['title']}: {section['lead']}"]
        for table in section["tables"]:
            out += ["", f"-- {table['title']}", *_plain(table)]
    return "\n".join(out) + "\n"


def _plain(table: Mapping[str, Any]) -> list[str]:
    head = [table["first"], *(_heading(one, " ") for one in table["columns"])]
    rows = [[one["label"], *_texts(one, table)] for one in table["rows"]]
    full = [one for one in rows if len(one) == len(head)]
    widths = [max(len(text), *(len(one[i]) for one in full)) if full else len(text) for i, text in enumerate(head)]
    lines = ["   " + "  ".join(text.ljust(width) for text, width in zip(one, widths)).rstrip()
             if len(one) == len(head) else "   " + "  ".join(one) for one in [head, *rows]]  # fmt: skip
    return [*lines, f"   {table['note']}"] if table["note"] else lines


def _heading(column: Mapping[str, str], between: str) -> str:
    return f"{column['title']}{between}[{column['unit']}]" if column["unit"] else column["title"]


def _texts(row: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """The cells of a row; one text where all have the same reason to be empty."""
    cells = [row["cells"][one["key"]] for one in table["columns"]]
    whys = {one.get("why") for one in cells}
    if len(cells) > 1 and len(whys) == 1 and None not in whys:
        return [str(whys.pop())]
    return [shown(one) if one["value"] is not None else "-" for one in cells]


def show(document: Mapping[str, Any], stream: Any = None) -> None:
    """Prints the report, with rich where it is there."""
    try:
        from rich.console import Console
    except ImportError:
        print(as_text(document), end="", file=stream)
        return
    console = Console(file=stream, highlight=False)
    if console.width < 100 and not console.is_terminal:
        console = Console(file=stream, highlight=False, width=180)
    _rich(document, console)


def _rich(document: Mapping[str, Any], console: Any) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    lines = Text()
    for title, value, unit, how in headline(document):
        lines.append(f"{title:<26}")
        lines.append(f"{value} {unit}", "bold")
        lines.append(f"  {how}\n", "dim")
    console.print(
        Panel(lines, title=Text(title_of(document)), subtitle=Text(f"against {described(document['reference'])}"))
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
            made.caption = Text(table["note"], "dim") if table["note"] else None
            made.add_column(table["first"], overflow="fold", min_width=14)
            for one in table["columns"]:
                made.add_column(Text(_heading(one, "\n")), justify="right", overflow="fold")
            apart = []
            for row in table["rows"]:
                texts = _texts(row, table)
                if len(texts) == len(table["columns"]):
                    made.add_row(Text(row["label"]), *map(Text, texts))
                else:
                    apart.append(f"{row['label']}: {texts[0]}")
            console.print(made)
            for text in apart:
                console.print(Text(text, "dim"))
