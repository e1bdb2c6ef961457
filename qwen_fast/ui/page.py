"""The page in Gradio: its components. What they do is in events.py."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .chats import Chats
from .config import UiConfig
from .events import Events
from .panel import greeting, panel
from .settings import FIELDS, NUMBERS
from .texts import text

_LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
_QUICK = 32  # short events handled at once


class Page:
    """Builds the Blocks for one Chats; `blocks` is the result."""

    def __init__(self, chats: Chats, config: UiConfig) -> None:
        self.chats, self.config = chats, config
        with gr.Blocks(analytics_enabled=False, title="qwen_fast", fill_height=True) as self.blocks:
            self.lang = gr.State("en")
            self.current = gr.State(None)
            self._left()
            self._right()
            self._middle()
            Events(self, chats, config).connect()
        self.blocks.queue(default_concurrency_limit=_QUICK, api_open=False, max_size=4 * config.connections)

    # -- components

    def _left(self) -> None:
        with gr.Sidebar(width=270, elem_id="qf-left"):
            gr.Markdown("## qwen_fast", elem_id="qf-brand")
            self.new = gr.Button(_en("new_chat"), variant="primary", elem_id="qf-new")
            self.listed = gr.Radio([], label=_en("conversations"), elem_id="qf-list", interactive=True)
            with gr.Row(elem_id="qf-title-row"):
                self.title = gr.Textbox(show_label=False, container=False, max_lines=1, max_length=300, min_width=90)
                self.rename = gr.Button(_en("rename"), size="sm", min_width=60, scale=0, elem_id="qf-rename")
            self.delete = gr.Button(_en("delete"), size="sm", elem_id="qf-delete")
            with gr.Row(visible=False, elem_id="qf-sure") as self.sure:
                self.really = gr.Button(
                    _en("really_delete"), variant="stop", size="sm", min_width=60, elem_id="qf-really"
                )
                self.keep = gr.Button(_en("keep"), size="sm", min_width=60, elem_id="qf-keep")
            self.language = gr.Radio(
                [("English", "en"), ("中文", "zh")], value="en", label=_en("language"), elem_id="qf-lang"
            )

    def _right(self) -> None:
        with gr.Sidebar(width=320, position="right", elem_id="qf-right"):
            self.panel = gr.Markdown(panel({}, "en"), elem_id="qf-numbers")
            self.fields: dict[str, Any] = {}
            one = self.fields
            one["model"] = gr.Dropdown([], label=_en("model"), allow_custom_value=True, elem_id="qf-model")
            self.api_key = gr.Textbox(
                label=_en("api_key"),
                info=_en("api_key_info"),
                type="password",
                visible=self.config.api_key is None,
                elem_id="qf-key",
            )
            one["system"] = gr.Textbox(label=_en("system"), lines=2, max_lines=8, elem_id="qf-system")
            with gr.Accordion(_en("sampling"), open=True, elem_id="qf-sampling") as self.sampling:
                self.sampling_info = gr.Markdown(_en("sampling_info"), elem_classes="qf-info")
                with gr.Row(elem_classes="qf-form-row"):
                    for number in NUMBERS:
                        one[number.name] = gr.Number(
                            None, label=_en(number.name), placeholder="–", step=number.step, min_width=110,
                            elem_id=f"qf-{number.name}",
                        )  # fmt: skip
                one["stop_strings"] = gr.Textbox(label=_en("stop_strings"), lines=1, max_lines=6, elem_id="qf-stops")
            with gr.Accordion(_en("form"), open=False, elem_id="qf-form") as self.form:
                one["schema"] = gr.Textbox(
                    label=_en("schema"),
                    lines=3,
                    max_lines=12,
                    elem_id="qf-schema",
                    placeholder='{"type": "object", ...}',
                )
                one["tools"] = gr.Textbox(
                    label=_en("tools"),
                    lines=3,
                    max_lines=12,
                    elem_id="qf-tools",
                    placeholder='[{"name": ..., "parameters": ...}]',
                )
                one["tool_choice"] = gr.Textbox(label=_en("tool_choice"), max_lines=1, elem_id="qf-choice")
                one["extra"] = gr.Textbox(
                    label=_en("extra"), lines=2, max_lines=8, elem_id="qf-extra", placeholder='{"min_tokens": 16}'
                )

    def _middle(self) -> None:
        self.chat = gr.Chatbot(
            show_label=False,
            elem_id="qf-chat",
            scale=1,
            height="100%",
            min_height=240,
            layout="bubble",
            editable="user",
            buttons=["copy"],
            sanitize_html=True,
            allow_tags=False,
            allow_file_downloads=False,
            latex_delimiters=_LATEX,
            reasoning_tags=[],
            feedback_options=None,
            placeholder=greeting("en"),
        )
        self.notice = gr.Markdown("", elem_id="qf-notice")
        self.box = gr.Textbox(
            show_label=False,
            container=False,
            lines=1,
            max_lines=10,
            autofocus=True,
            submit_btn=True,
            stop_btn=False,
            placeholder=_en("ask"),
            elem_id="qf-box",
        )

    def worded(self, lang: str) -> dict[Any, Any]:
        """Every component that has words of its own, in that language."""
        labels = {self.fields[name]: name for name in FIELDS}
        labels |= {self.fields["stop_strings"]: "stop_strings", self.listed: "conversations", self.api_key: "api_key"}
        labels |= {self.sampling: "sampling", self.form: "form", self.language: "language"}
        buttons = {self.new: "new_chat", self.rename: "rename", self.delete: "delete"}
        buttons |= {self.really: "really_delete", self.keep: "keep"}
        found: dict[Any, Any] = {one: gr.update(label=text(name, lang)) for one, name in labels.items()}
        found |= {one: gr.update(value=text(name, lang)) for one, name in buttons.items()}
        found[self.sampling_info] = text("sampling_info", lang)
        found[self.api_key] = gr.update(label=text("api_key", lang), info=text("api_key_info", lang))
        return found


def _en(name: str) -> str:
    return text(name, "en")
