"""A report as one HTML file: style and plots are in it, nothing is asked for from outside, no script runs."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from .machine import device_name
from .svg import draw, legend
from .tables import number

_STYLE = Path(__file__).with_name("style.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SHORT_WHY = 26
LEFT = ' class="left"'  # columns of text have no unit


def page(document: Mapping[str, Any]) -> str:
    """The whole document."""
    model = document["model"]
    where = device_name(document)
    head = (
        f'<header><div class="in"><div class="kicker">qwen_fast cost report</div><h1>What {escape(model["name"])} costs</h1>'
        f"<p>On {escape(where)}: {escape(document['engine']['description'])}. {model['parameters']:,} parameters, "
        f"{escape(_formats(document['engine']))}. Measured {escape(document['began'])} in {document['seconds']:,.0f} s.</p>"
        f"{_cards(document)}{_notes(document)}</div></header>"
    )
    links = [(one["id"], one["title"]) for one in document["sections"]] + [
        ("definitions", "Definitions"),
        ("setting", "Setting"),
    ]
    bar = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title in links)
    body = "".join(_section(number_, one) for number_, one in enumerate(document["sections"], 1))
    return wrap(
        f"What {model['name']} costs",
        f'{head}<nav><div class="in">{bar}</div></nav><main>{body}{_definitions(document)}{_setting(document)}</main>',
    )


def wrap(title: str, body: str) -> str:
    """A page around `body`, with the style."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head><body>{body}</body></html>\n"
    )


def _formats(engine: Mapping[str, Any]) -> str:
    return (
        f"weights {engine['quantization']}, head {engine['lm_head_dtype']}, KV cache {engine['kv_cache_dtype']}, "
        f"activations {engine['activation_dtype']}, blocks of {engine['block_size']} tokens"
    )


def _cards(document: Mapping[str, Any]) -> str:
    from .summary import headline

    parts = []
    for one in headline(document):
        if one["value"] is None:
            value = f'<b class="none">{escape(one["why"].split(":")[0])}</b>'
        else:
            value = f"<b>{escape(one['value'])} <small>{escape(one['unit'])}</small></b>"
        how = one["how"] if one["value"] is not None else one["why"].partition(": ")[2] or one["how"]
        parts.append(
            f'<div class="card"><div class="what">{escape(one["title"])}</div>{value}<div class="how">{escape(how)}</div></div>'
        )
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


def figure(plot: Mapping[str, Any]) -> str:
    """A plot, or the reason why there is none."""
    empty = plot.get("why") or not any(one["points"] for one in plot["series"])
    drawn = (
        f'<div class="nothing">{escape(plot.get("why") or "nothing measured")}</div>'
        if empty
        else legend(plot) + draw(plot)
    )
    wide = ' class="full"' if plot["kind"] == "stacked" and len(plot["labels"]) == 1 else ""
    return f'<figure id="{plot["id"]}"{wide}><h4>{escape(plot["title"])}</h4>{drawn}<figcaption>{escape(plot["method"])}</figcaption></figure>'


def table_html(table: Mapping[str, Any]) -> str:
    """Unit and method stand under each heading, the window at the end of each row; long reasons become footnotes."""
    reasons: dict[str, int] = {}
    heads = "".join(_head(one) for one in table["columns"])
    rows = "".join(_row(one, table["columns"], reasons) for one in table["rows"])
    notes = "".join(f'<p class="tnote"><sup>{index}</sup> {escape(why)}</p>' for why, index in reasons.items())
    if table["note"]:
        notes += f'<p class="tnote">{escape(table["note"])}</p>'
    return (
        f'<h3 id="{table["id"]}">{escape(table["title"])}</h3><div class="wide"><table><thead><tr><th>{escape(table["first"])}</th>'
        f"{heads}<th>window</th></tr></thead><tbody>{rows}</tbody></table></div>{notes}"
    )


def _head(column: Mapping[str, str]) -> str:
    return (
        f'<th{"" if column["unit"] else LEFT}><a href="#def-{column["definition"]}">{escape(column["title"])}</a><span class="unit">{escape(column["unit"])}</span>'
        f'<span class="method">{escape(column["method"])}</span></th>'
    )


def _row(one: Mapping[str, Any], columns: list[Mapping[str, str]], reasons: dict[str, int]) -> str:
    cells = [one["cells"][column["key"]] for column in columns]
    whys = {cell.get("why") for cell in cells}
    if len(cells) > 1 and len(whys) == 1 and None not in whys:
        inner = f'<td class="span" colspan="{len(cells)}"><span class="missing">{escape(whys.pop() or "")}</span></td>'
    else:
        inner = "".join(_cell(cell, reasons) for cell in cells)
    label, bracket, rest = one["label"].partition(" (")
    under = f'<span class="under">{escape(rest.removesuffix(")"))}</span>' if bracket and rest.endswith(")") else ""
    kind = ' class="two"' if under else ""
    if not under:
        label = one["label"]
    return f"<tr><th{kind}>{escape(label)}{under}</th>{inner}<td>{escape(one['window'])}</td></tr>"


def _cell(cell: Mapping[str, Any], reasons: dict[str, int]) -> str:
    value = cell["value"]
    if value is None:
        why = cell["why"]
        short, colon, _ = why.partition(": ")
        if len(why) <= _SHORT_WHY or not colon:
            return f'<td><span class="missing">{escape(why)}</span></td>'
        index = reasons.setdefault(why, len(reasons) + 1)
        return f'<td><span class="missing">{escape(short)}<sup>{index}</sup></span></td>'
    if isinstance(value, str):
        return f'<td class="{"text" if len(value) > 40 else ""}">{escape(value)}</td>'
    around = f' <span class="pm">± {number((cell["high"] - cell["low"]) / 2, 2)}</span>' if "low" in cell else ""
    return f"<td>{number(value)}{around}</td>"


def _definitions(document: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<dt id="def-{key}">{escape(one["title"])}</dt><dd>{escape(one["text"])}</dd>'
        for key, one in document["definitions"].items()
    )
    return f'<section id="definitions"><h2>Definitions</h2><p class="lead">Every heading above links here.</p><dl>{rows}</dl></section>'


def _setting(document: Mapping[str, Any]) -> str:
    """Machine, engine options and settings, as they were."""
    groups = (("Machine", document["machine"]), ("Engine", document["engine"]), ("Settings", document["settings"]))
    parts = []
    for title, values in groups:
        rows = "".join(
            f"<dt>{escape(str(key))}</dt><dd><code>{escape(str(value))}</code></dd>" for key, value in values.items()
        )
        parts.append(f"<h3>{title}</h3><dl>{rows}</dl>")
    made = f"Made by qwen_fast {document['machine']['qwen_fast']}, {document['generated']}. The JSON beside this file holds every window."
    return f'<section id="setting"><h2>Setting</h2>{"".join(parts)}</section><footer>{escape(made)}</footer>'
