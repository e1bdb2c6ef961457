"""The live panel and the notices, as HTML of one line in which every value is escaped. (Markdown components show it:
Gradio's HTML component would need a policy that allows eval.)"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from .texts import text


def panel(numbers: Mapping[str, Any], lang: str) -> str:
    """numbers: of TurnStats.numbers() and server_numbers(), together."""
    cells = "".join(_cell(name, _shown(name, numbers, lang), lang) for name in _ROWS)
    return f'<dl class="qf-panel">{cells}</dl>'


def _cell(name: str, value: str, lang: str) -> str:
    missing = text("not_measured" if name in _MEASURED else "none_yet", lang)
    kind = "" if value else ' class="qf-missing"'
    shown = html.escape(value or missing)
    return f'<div class="qf-cell qf-{name}"><dt>{html.escape(text(name, lang))}</dt><dd{kind}>{shown}</dd></div>'


_MEASURED = ("kv_use", "memory", "requests", "energy", "moved", "cost")  # by the server, or not at all
_ROWS = ("speed", "first_token", "tokens_in", "tokens_out", "kv_use", "memory", "requests", "energy", "moved", "cost")


def _shown(name: str, numbers: Mapping[str, Any], lang: str) -> str:
    """The value of a row; "" where it is not known."""

    def has(*names: str) -> bool:
        return all(numbers.get(one) is not None for one in names)

    if name == "speed" and has("tokens_per_s"):
        return f"{numbers['tokens_per_s']:,.1f}"
    if name == "first_token" and has("ttft_s"):
        return f"{numbers['ttft_s']:.3f} {text('seconds', lang)}"
    if name == "tokens_in" and has("tokens_in"):
        return f"{numbers['tokens_in']:,}"
    if name == "tokens_out" and has("tokens_out"):
        return f"{numbers['tokens_out']:,}" if numbers.get("exact") else f"≥ {numbers['tokens_out']:,}"
    if name == "kv_use" and has("kv_use"):
        return f"{100 * numbers['kv_use']:.1f} %"
    if name == "memory" and has("memory_bytes"):
        return binary(numbers["memory_bytes"])
    if name == "requests" and has("running", "waiting"):
        return f"{numbers['running']:.0f}, {numbers['waiting']:.0f}"
    if name == "energy" and has("joules"):
        return f"{'≥ ' if numbers.get('provisional') else ''}{numbers['joules']:.4g} J"
    if name == "moved" and has("moved_bytes"):
        return f"{numbers['moved_bytes'] / 1e9:.4g} GB"
    if name == "cost" and has("cost"):
        return str(numbers["cost"])
    return ""


def binary(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def notice(said: str) -> str:
    """A message to the user; "" for none."""
    return f'<div class="qf-notice" role="alert">{html.escape(" ".join(said.split()))}</div>' if said else ""


def greeting(lang: str) -> str:
    """What stands in an empty conversation, as Markdown."""
    return f"### {text('empty_title', lang)}\n{text('empty_text', lang)}"
