"""The page's colours and CSS. Fonts are the system's: nothing is fetched."""

from __future__ import annotations

from typing import Any

CSS = """
.gradio-container { padding: 0 !important; }
footer { display: none !important; }
#qf-brand h2 { margin: 0; font-weight: 650; letter-spacing: -0.02em; }
#qf-list .wrap { display: flex; flex-direction: column; flex-wrap: nowrap; gap: 2px; max-height: 46vh; overflow-y: auto; }
#qf-list label { border: none; background: transparent; box-shadow: none; padding: 6px 8px; width: 100%; }
#qf-list label:hover, #qf-list label.selected { background: var(--background-fill-secondary); }
#qf-list label input { position: absolute; opacity: 0; }
#qf-list label:focus-within { outline: 2px solid var(--color-accent); }
#qf-list label span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; margin: 0; }
#qf-title-row, #qf-sure { flex-wrap: nowrap; gap: 6px; align-items: center; }
#qf-chat { border-width: 0 !important; box-shadow: none; }
#qf-chat, #qf-chat .wrapper, #qf-chat .bubble-wrap, #qf-chat .message-wrap { background: transparent !important; }
#qf-chat .top-panel, #qf-chat [aria-label="Clear"] { display: none; } /* its one button empties the view and keeps the conversation */
#qf-chat .placeholder { text-align: center; margin: auto; }
#qf-box { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 4px; }
#qf-box textarea { border: none; box-shadow: none; }
#qf-numbers { position: sticky; top: -16px; z-index: 50; padding: 12px 0 10px; margin-top: -12px;
    background: var(--background-fill-secondary); }
.qf-form-row .form { display: grid !important; grid-template-columns: 1fr 1fr; align-items: end; border: none;
    box-shadow: none; }
.qf-form-row .block { padding: 4px 6px !important; min-width: 0 !important; border: none; }
.qf-panel { display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px 8px; margin: 0; }
.qf-cell dt { font-size: 11px; color: var(--body-text-color); opacity: 0.7; }
.qf-cell dd { margin: 0; font-variant-numeric: tabular-nums; font-weight: 600; font-size: 14px; }
.qf-cell dd.qf-missing { font-weight: 400; font-size: 12px; color: var(--body-text-color); opacity: 0.7; }
.qf-notice { border-left: 3px solid #d97706; background: var(--background-fill-secondary); color: var(--body-text-color);
    padding: 8px 12px; border-radius: 4px; overflow-wrap: anywhere; }
.qf-info, .qf-info p { font-size: 12px !important; color: var(--body-text-color); opacity: 0.85; }
"""

_ICON = (
    "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect width='16' height='16' rx='4' "
    "fill='%230d9488'/%3E%3Cpath d='M4 8h8M9 5l3 3-3 3' stroke='white' stroke-width='1.6' fill='none'/%3E%3C/svg%3E"
)
HEAD = f'<link rel="icon" href="data:image/svg+xml,{_ICON}">'


def theme() -> Any:
    """Gradio's with the fonts of the system."""
    import gradio

    sans = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"]
    return gradio.themes.Default(primary_hue="teal", neutral_hue="zinc", font=sans, font_mono=mono)
