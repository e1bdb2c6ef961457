"""Chat templates: messages to the prompt text, in jinja2's sandbox."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from .errors import ModelError

MAX_RENDERED_CHARS = 64 * 2**20
MAX_RENDER_SECONDS = 10.0

_ROLES = {"system", "user", "assistant", "tool"}


class ChatTemplate:
    """A compiled template. Thread-safe.

    source: the jinja text; variables: what the tokenizer gives to every rendering (eos_token, ...).
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None) -> None:
        from jinja2 import TemplateSyntaxError

        self.source = source
        self._variables = dict(variables or {})
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ModelError(f"chat template, line {error.lineno}: {error.message}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        quote: re.Pattern[str] | None = None,
    ) -> tuple[str, dict[str, str]]:
        """The prompt text, and what stands for quoted text in it.

        continue_final_message: end the text inside the last message, so that the model goes on with it.
        quote: every match of it in a message's content is replaced by a mark; the second value maps the marks
        back (see Tokenizer.encode_rendered). Without it the second value is empty.
        Raises ValueError where messages or tools are malformed or the template refuses them.
        """
        from jinja2 import TemplateError

        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt cannot both be True")
        checked = [self._message(i, message) for i, message in enumerate(_listed("messages", messages))]
        if not checked:
            raise ValueError("messages is empty")
        quoted: dict[str, str] = {}
        # Private-use characters and 64 random bits: not in anybody's text.
        nonce = os.urandom(8).hex()
        if quote is not None:
            for message in checked:
                if isinstance(message["content"], str):
                    message["content"] = quote.sub(
                        lambda match: _mark(nonce, quoted, match.group()), message["content"]
                    )
        end_mark = f"\ue000{nonce}\ue001"
        if continue_final_message:
            checked[-1]["content"] += end_mark
        context = {
            **self._variables,
            "messages": checked,
            "tools": _tools(tools),
            "add_generation_prompt": add_generation_prompt,
            **(chat_template_kwargs or {}),
        }
        try:
            text = self._run(context)
        except TemplateError as error:
            raise ValueError(
                f"the chat template refused the messages: {error.message or type(error).__name__}"
            ) from None
        except (TypeError, ArithmeticError, AttributeError, LookupError, RecursionError, OverflowError) as error:
            raise ValueError(f"the chat template failed: {type(error).__name__}: {error}") from None
        if continue_final_message:
            if end_mark not in text:
                raise ValueError("the chat template leaves the last message out; it cannot be continued")
            text = text[: text.rindex(end_mark)]
        return text, quoted

    def _run(self, context: dict[str, Any]) -> str:
        deadline = time.monotonic() + MAX_RENDER_SECONDS
        pieces: list[str] = []
        length = 0
        for piece in self._template.generate(context):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_RENDERED_CHARS:
                raise ValueError(f"the chat template renders more than {MAX_RENDERED_CHARS} characters")
            if time.monotonic() > deadline:
                raise ValueError(f"the chat template ran for more than {MAX_RENDER_SECONDS:g} s")
        return "".join(pieces)

    def _message(self, position: int, message: Any) -> dict[str, Any]:
        where = f"messages[{position}]"
        if not isinstance(message, Mapping):
            raise TypeError(f"{where} must be a dict with 'role' and 'content', got {type(message).__name__}")
        checked = dict(message)
        role = checked.get("role")
        if not isinstance(role, str):
            raise ValueError(f"{where}: 'role' must be a text, got {role!r}")
        if role == "developer":
            role = checked["role"] = "system"
        if role not in _ROLES and role not in self.source:
            raise ValueError(f"{where}: unknown role {role!r}; expected one of {', '.join(sorted(_ROLES))}")
        checked["content"] = _content(where, checked.get("content"))
        calls = checked.get("tool_calls")
        if calls is None:
            checked.pop("tool_calls", None)
        else:
            checked["tool_calls"] = [
                _tool_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(_listed(where, calls))
            ]
        return checked


def load_chat_template(
    directory: str | Path, tokenizer: Any, override: str | os.PathLike[str] | None = None
) -> dict[str, ChatTemplate]:
    """The templates of a checkpoint by name ("default", "tool_use"); empty where it has none.

    override: a template's text, or the path of a file with it. Otherwise chat_template.jinja, then
    tokenizer_config.json.
    """
    variables = dict(tokenizer.special_tokens)
    source: Any = None
    file = Path(directory) / "chat_template.jinja"
    if override is not None:
        source = _override(override)
    elif file.is_file():
        source = file.read_text(encoding="utf-8")
    else:
        source = tokenizer.config.get("chat_template")
    if source is None:
        return {}
    if isinstance(source, str):
        return {"default": ChatTemplate(source, variables)}
    try:
        return {str(entry["name"]): ChatTemplate(str(entry["template"]), variables) for entry in source}
    except (TypeError, KeyError):
        raise ModelError(
            "tokenizer_config.json: chat_template: expected a text, or a list of {name, template}"
        ) from None


def _override(value: str | os.PathLike[str]) -> str:
    text = os.fspath(value)
    if "{%" in text or "{{" in text:
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(
            f"chat_template: neither a jinja text nor a file that can be read: {text!r} ({error.strerror})"
        ) from None


def is_conversation(value: Any) -> bool:
    """A list of messages: dicts with a role."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def _mark(nonce: str, quoted: dict[str, str], text: str) -> str:
    for mark, known in quoted.items():
        if known == text:
            return mark
    mark = f"\ue000{nonce}.{len(quoted)}\ue001"
    quoted[mark] = text
    return mark


def _listed(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be a list, got {type(value).__name__}")
    return list(value)


def _content(where: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(_listed(f"{where}.content", content)):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text":
            raise ValueError(f"{where}.content[{i}]: only text parts are supported, got {kind!r}")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}.content[{i}]: 'text' must be a text, got {part.get('text')!r}")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    """A copy whose arguments are an object: OpenAI's messages carry them as JSON text."""
    if not isinstance(call, Mapping):
        raise TypeError(f"{where} must be a dict, got {type(call).__name__}")
    call = dict(call)
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: expected a function with a 'name'")
    function = dict(function) if "function" in call else call
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: arguments are not valid JSON: {error}") from None
    if not arguments and not isinstance(arguments, (list, bool, int)):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: arguments must be a JSON object, got {arguments!r}")
    function["arguments"] = arguments
    if "function" in call:
        call["function"] = function
    return call


def _tools(tools: Any) -> list[Any] | None:
    if tools is None:
        return None
    checked = _listed("tools", tools)
    for i, tool in enumerate(checked):
        if not isinstance(tool, Mapping):
            raise TypeError(f"tools[{i}] must be a dict, got {type(tool).__name__}")
    return checked or None


def _environment() -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """Multiplication is bounded: 'x' * 10**10 would take the machine's memory before any limit is looked at."""

        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
            if operator == "**" and not (numbers and abs(left) <= 10**6 and abs(right) <= 64):
                raise TemplateError("** is limited to small numbers")
            if operator == "*" and not numbers:
                size = len(left) * right if isinstance(right, int) else len(right) * left
                if size > MAX_RENDERED_CHARS:
                    raise TemplateError(f"* makes more than {MAX_RENDERED_CHARS} items")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
        # jinja2's own filter escapes <, > and & and sorts the keys, which the models were not trained on.
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment
