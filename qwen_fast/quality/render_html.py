"""A quality report as one HTML file, in the style of the cost report; nothing is asked for from outside."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from ..cost.render_html import figure, table_html, wrap
from .summary import headline, title_of


def page(document: Mapping[str, Any]) -> str:
    """The whole document."""
    from .sections import described

    head = (
        f'<header><div class="in"><div class="kicker">qwen_fast quality report</div><h1>{escape(title_of(document))}</h1>'
        f"<p>Against {escape(described(document['reference']))}. Measured {escape(document['began'])} in "
        f"{document['seconds']:,.0f} s on {escape(_where(document['machine']))}.</p>{_cards(document)}{_notes(document)}</div></header>"
    )
    links = [(one["id"], one["title"]) for one in document["sections"]]
    links += [("definitions", "Definitions"), ("setting", "Setting")]
    bar = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title in links)
    body = "".join(_section(number, one) for number, one in enumerate(document["sections"], 1))
    changed = _differences(document)
    return wrap(
        title_of(document),
        f'{head}<nav><div class="in">{bar}</div></nav><main>{body}{changed}{_definitions(document)}{_setting(document)}</main>',
    )


def _where(machine: Mapping[str, Any]) -> str:
    gpus = machine.get("gpus")
    return gpus[0]["name"] if gpus else f"{machine['cpu']}, {machine['cpus']} CPUs"


def _cards(document: Mapping[str, Any]) -> str:
    parts = [
        f'<div class="card"><div class="what">{escape(title)}</div><b>{escape(value)} <small>{escape(unit)}</small></b>'
        f'<div class="how">{escape(how)}</div></div>'
        for title, value, unit, how in headline(document)
    ]
    return f'<div class="cards">{"".join(parts)}</div>'


def _notes(document: Mapping[str, Any]) -> str:
    if not document["notes"]:
        return ""
    return f'<div class="notes"><ul>{"".join(f"<li>{escape(note)}</li>" for note in document["notes"])}</ul></div>'


def _section(position: int, one: Mapping[str, Any]) -> str:
    plots = "".join(figure(plot) for plot in one["plots"])
    tables = "".join(table_html(table) for table in one["tables"])
    return (
        f'<section id="{one["id"]}"><h2><span>{position}</span>{escape(one["title"])}</h2><p class="lead">{escape(one["lead"])}</p>'
        f'<div class="plots">{plots}</div>{tables}</section>'
    )


def _differences(document: Mapping[str, Any]) -> str:
    """The texts of rows that were broken or fixed, folded away."""
    parts = []
    for one in document["cells"]:
        rows = [
            found
            for found in one.get("tasks", {}).get("differences", ())
            if "measured" in found and found["change"] != "changed"
        ]
        if not rows:
            continue
        lines = "".join(
            f"<dt>{escape(found['task'])}, row {found['row']}: {found['change']}</dt><dd>"
            + "<br>".join(
                f"{name}: <code>{escape(found[name][:400])}</code>" for name in ("answer", "reference", "measured")
            )
            + "</dd>"
            for found in rows[:20]
        )
        parts.append(f"<details><summary>{escape(one['label'])}: {len(rows)} rows</summary><dl>{lines}</dl></details>")
    if not parts:
        return ""
    lead = "The first 20 rows of each cell that one model answers exactly and the other does not. The JSON lists every row that differs."
    return (
        f'<section id="differences"><h2>Rows broken and fixed</h2><p class="lead">{lead}</p>{"".join(parts)}</section>'
    )


def _definitions(document: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<dt id="def-{key}">{escape(one["title"])}</dt><dd>{escape(one["text"])}</dd>'
        for key, one in document["definitions"].items()
    )
    return f'<section id="definitions"><h2>Definitions</h2><p class="lead">Every heading above links here.</p><dl>{rows}</dl></section>'


def _setting(document: Mapping[str, Any]) -> str:
    reference = {key: value for key, value in document["reference"].items() if key != "outcomes"}
    parts = []
    for title, values in (
        ("Machine", document["machine"]),
        ("Settings", document["settings"]),
        ("Reference", reference),
    ):
        rows = "".join(
            f"<dt>{escape(str(key))}</dt><dd><code>{escape(str(value))}</code></dd>" for key, value in values.items()
        )
        parts.append(f"<h3>{title}</h3><dl>{rows}</dl>")
    made = f"Made by qwen_fast {document['machine']['qwen_fast']}, {document['generated']}. The JSON beside this file holds every figure."
    return f'<section id="setting"><h2>Setting</h2>{"".join(parts)}</section><footer>{escape(made)}</footer>'
