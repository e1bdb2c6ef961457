"""From the fields of the form to the fields of a request."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .history import utf8_bytes
from .texts import Refusal, text

MAX_TEXT_BYTES = 64 * 1024  # of the system prompt, the schema, the tools
_MAX_LINE_BYTES = 256  # of a stop string, a tool choice, a model's name
_MAX_STOPS = 16
_MAX_TOOLS = 128
_MAX_DEPTH = 24
_OURS = frozenset({"model", "messages", "stream", "stream_options", "n", "echo", "continue_final_message"})
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Number:
    """A field of the request that is a number, with its inclusive range."""

    name: str
    low: float
    high: float
    whole: bool = False
    step: float = 0.1


NUMBERS = (
    Number("temperature", 0, 2),
    Number("top_p", 0, 1, step=0.05),
    Number("top_k", 0, 1_000_000, whole=True, step=1),
    Number("min_p", 0, 1, step=0.05),
    Number("repetition_penalty", 0.01, 10),
    Number("presence_penalty", -2, 2),
    Number("frequency_penalty", -2, 2),
    Number("max_tokens", 1, 10_000_000, whole=True, step=1),
    Number("seed", 0, 2**53 - 1, whole=True, step=1),  # what a browser can hold exactly
)
TEXTS = ("model", "system", "stop_strings", "schema", "tools", "tool_choice", "extra")
FIELDS = (*TEXTS, *(number.name for number in NUMBERS))


@dataclass(frozen=True)
class Settings:
    """A form that was found right. model: "" for the server's first. request: fields for the body of a chat request.
    form: what the fields held, to show it again."""

    model: str = ""
    system: str = ""
    request: dict[str, Any] = field(default_factory=dict)
    form: dict[str, Any] = field(default_factory=dict)


def checked(form: Mapping[str, Any]) -> Settings:
    """form: by names of FIELDS; numbers None where empty. Refusal names the first field that is wrong, its value and the
    limit."""
    kept = {name: value for name in FIELDS if (value := form.get(name)) not in (None, "")}
    texts = {name: _text_of(name, kept.get(name, "")) for name in TEXTS}
    request: dict[str, Any] = {}
    for number in NUMBERS:
        if number.name in kept:
            request[number.name] = kept[number.name] = _number(number, kept[number.name])
    stops = [line for line in texts["stop_strings"].split("\n") if line]
    if len(stops) > _MAX_STOPS:
        raise Refusal("too_many_stops", count=len(stops), limit=_MAX_STOPS)
    for line in stops:
        _at_most(line, "stop_strings", _MAX_LINE_BYTES)
    if stops:
        request["stop"] = stops
    if texts["schema"].strip():
        request["response_format"] = response_format(texts["schema"])
    tools = tools_of(texts["tools"]) if texts["tools"].strip() else []
    choice = texts["tool_choice"].strip()
    if tools:
        request["tools"] = tools
    if choice:
        request["tool_choice"] = _tool_choice(choice, tools)
    request |= extra_of(texts["extra"], request) if texts["extra"].strip() else {}
    return Settings(texts["model"].strip(), texts["system"], request, kept)


def _text_of(name: str, value: object) -> str:
    line = name in ("model", "tool_choice")
    return _at_most(value if isinstance(value, str) else str(value), name, _MAX_LINE_BYTES if line else MAX_TEXT_BYTES)


def _at_most(value: str, name: str, limit: int) -> str:
    size = utf8_bytes(value)
    if size > limit:
        raise Refusal("too_long", name=text(name, "en"), size=size, limit=limit)
    return value


def _number(number: Number, value: object) -> float | int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Refusal("not_a_number", name=number.name, value=ascii(value)[:80])
    if number.whole and value != int(value):
        raise Refusal("not_whole", name=number.name, value=value)
    if not number.low <= value <= number.high:
        raise Refusal("out_of_range", name=number.name, low=f"{number.low:g}", high=f"{number.high:.16g}", value=value)
    return int(value) if number.whole else value


def _json(name: str, source: str) -> Any:
    shown = text(name, "en")
    try:
        value = json.loads(source, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = {"line": error.lineno, "column": error.colno}
        raise Refusal("bad_json", name=shown, reason=error.msg, **where) from None
    except RecursionError:
        raise Refusal("too_deep", name=shown, limit=_MAX_DEPTH) from None
    except ValueError as error:  # NaN, Infinity, an integer of thousands of digits
        raise Refusal("bad_json", name=shown, reason=str(error)[:80], line=1, column=1) from None
    if _depth_over(value, _MAX_DEPTH):
        raise Refusal("too_deep", name=shown, limit=_MAX_DEPTH)
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _depth_over(value: Any, limit: int) -> bool:
    layer = [value]
    for _ in range(limit + 1):
        layer = [
            inner
            for one in layer
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not layer:
            return False
    return True


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def response_format(source: str) -> dict[str, Any]:
    """The field response_format for the text of a JSON schema."""
    schema = _json("schema", source)
    if not isinstance(schema, dict):
        raise Refusal("schema_not_object", kind=_kind(schema))
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def tools_of(source: str) -> list[dict[str, Any]]:
    """The field tools for its JSON text. A function may stand there alone, without {"type": "function"} around it."""
    listed = _json("tools", source)
    if not isinstance(listed, list) or not 1 <= len(listed) <= _MAX_TOOLS:
        kind = f"a list of {len(listed)}" if isinstance(listed, list) else _kind(listed)
        raise Refusal("tools_not_list", limit=_MAX_TOOLS, kind=kind)
    tools = []
    names: set[str] = set()
    for index, one in enumerate(listed):
        function = one.get("function", one) if isinstance(one, dict) else one
        reason = _wrong_with(function, names)
        if reason:
            raise Refusal("bad_tool", number=index + 1, reason=reason)
        assert isinstance(function, dict)
        names.add(function["name"])
        tools.append({"type": "function", "function": function})
    return tools


def _wrong_with(function: Any, names: set[str]) -> str:
    if not isinstance(function, dict):
        return f"must be an object with a function, got {_kind(function)}"
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"name must be 1 to 64 letters, digits, - and _, got {ascii(name)[:80]}"
    if name in names:
        return f"the name {name} is there twice"
    if not isinstance(function.get("description", ""), str):
        return f"description must be a text, got {_kind(function['description'])}"
    if not isinstance(function.get("parameters", {}), dict):
        return f"parameters must be a JSON schema, got {_kind(function['parameters'])}"
    return ""


def extra_of(source: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Further fields of the request from their JSON text: none that the page or the form sets itself."""
    extra = _json("extra", source)
    if not isinstance(extra, dict):
        raise Refusal("extra_not_object", kind=_kind(extra))
    for name in extra:
        if name in _OURS or name in request:
            raise Refusal("extra_taken", name=ascii(name)[:80])
    return extra


def _tool_choice(choice: str, tools: list[dict[str, Any]]) -> Any:
    if not tools:
        raise Refusal("choice_without_tools", value=ascii(choice)[:80])
    if choice in ("auto", "none", "required"):
        return choice
    names = [tool["function"]["name"] for tool in tools]
    if choice not in names:
        raise Refusal("unknown_choice", names=", ".join(names)[:200], value=ascii(choice)[:80])
    return {"type": "function", "function": {"name": choice}}
