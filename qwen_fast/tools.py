"""Tool calls in Qwen2.5's format (known as hermes): text around blocks of

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

HermesParser reads them from a stream of text; tool_grammar() forces them."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .structured import MAX_SCHEMA_BYTES, StructuredOutputsParams, checked_schema
from .tokenizer import Tokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALLS = 64  # of one forced answer
MAX_NAME_CHARS = 256

_SPACE = " \t\r\n"
_TAG = re.compile("</?tool_call>")
_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'["\\]')
_CLOSER = {"{": "}", "[": "]"}
# The beginning of a call whose arguments can be passed on as they come: these marks, s a string, whitespace between.
_HEADER = "{s:s,s:{"
_ARGUMENT_KEYS = ("arguments", "parameters")


class HermesParser:
    """The text of one answer, in pieces of any size, to deltas in OpenAI's shape: {"content": text} and {"tool_calls":
    [{"index", "id", "type", "function": {"name", "arguments"}}]}. A call's first delta has index, id, type and name, the
    others index and a piece of the arguments, exactly as generated.

    How the text was cut makes no difference to the joined deltas. A block becomes a call when its name and the beginning
    of its arguments are there (where the keys come in another order, at its end); before that, what is malformed comes
    out as content, whole. Whitespace before and after calls is left out. Each character is looked at a bounded number of
    times.

    parallel: False leaves out every call but the first. make_id: makes the calls' ids.
    """

    def __init__(self, *, parallel: bool = True, make_id: Callable[[], str] | None = None) -> None:
        self._parallel = parallel
        self._make_id = make_id or (lambda: f"call_{secrets.token_hex(12)}")
        self._state = self._text
        self._deltas: list[dict[str, Any]] = []
        self._partial = ""  # what may be the beginning of a tag: goes before the next text
        self._space: list[str] = []  # whitespace that may precede a call
        self._raw: list[str] = []  # of a block that is not yet a call
        self._num_calls = 0
        self._after_call = False
        self._expected = 0  # position in _HEADER
        self._string: list[str] | None = None  # a string of the header, while inside it
        self._strings: list[str] = []
        self._escaped = False
        self._in_string = False
        self._closers: list[str] = []
        self._tail: list[str] = []
        self._brace_closed = False

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._num_calls if self._parallel else min(self._num_calls, 1)

    def feed(self, text: str) -> list[dict[str, Any]]:
        """What `text` adds; maybe nothing."""
        text, self._partial = self._partial + text, ""
        position = 0
        while position < len(text):
            position = self._state(text, position)
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> list[dict[str, Any]]:
        """What was held back; after the last feed."""
        if self._state == self._text:
            held = "".join(self._space) + self._partial
            if held.strip(_SPACE) or not self._after_call:
                self._content(held)
        elif self._state == self._header:
            self._content("".join(self._raw) + self._partial)
        elif self._state == self._block:
            self._raw.append(self._partial)
            self._end_block("")
        self._partial, self._space, self._raw, self._state = "", [], [], self._text
        deltas, self._deltas = self._deltas, []
        return deltas

    # -- states: each takes text from `position` on and returns where the next goes on

    def _text(self, text: str, position: int) -> int:
        start = text.find(OPEN, position)
        end = start if start >= 0 else len(text) - _begun(text, position, OPEN)
        bare = text[position:end]
        visible = bare.rstrip(_SPACE)
        if visible:
            self._content("".join(self._space) + visible)
            self._space = []
            self._after_call = False
        self._space.append(bare[len(visible) :])
        if start < 0:
            self._partial = text[end:]
            return len(text)
        self._open("".join(self._space))
        return start + len(OPEN)

    def _header(self, text: str, position: int) -> int:
        start = position
        while position < len(text):
            char = text[position]
            if not self._header_char(char):
                self._raw.append(text[start:position])
                self._state = self._block
                return position
            position += 1
            if self._expected == len(_HEADER):
                self._begin_call(self._strings[1])
                self._arguments_piece("{")
                self._closers, self._in_string, self._escaped = ["}"], False, False
                self._state = self._arguments
                return position
        self._raw.append(text[start:position])
        return position

    def _header_char(self, char: str) -> bool:
        """False if the block does not begin as _HEADER says."""
        if self._string is not None:
            if char == '"' and not self._escaped:
                return self._header_string()
            self._string.append(char)
            self._escaped = char == "\\" and not self._escaped
            # No name has these, and a tag in an unfinished string must stay a tag.
            return char >= " " and char != "<" and len(self._string) <= MAX_NAME_CHARS
        if char in _SPACE:
            return True
        if _HEADER[self._expected] == "s":
            self._string, self._escaped = [], False
            return char == '"'
        self._expected += 1
        return char == _HEADER[self._expected - 1]

    def _header_string(self) -> bool:
        written, self._string = "".join(self._string or ()), None
        try:
            value = json.loads(f'"{written}"')
            value.encode()
        except ValueError:
            return False
        self._strings.append(value)
        self._expected += 1
        count = len(self._strings)
        return value == "name" if count == 1 else bool(value) if count == 2 else value in _ARGUMENT_KEYS

    def _arguments(self, text: str, position: int) -> int:
        start = position
        while position < len(text) and self._closers:
            if self._escaped:
                self._escaped = False
                position += 1
                continue
            found = (_STRING_END if self._in_string else _STRUCTURE).search(text, position)
            if found is None:
                position = len(text)
                break
            position = found.end()
            self._argument_mark(found.group())
        self._arguments_piece(text[start:position])
        if not self._closers:
            self._tail, self._brace_closed, self._state = [], False, self._after_arguments
        return position

    def _argument_mark(self, char: str) -> None:
        if self._in_string:
            self._in_string = char == "\\"
            self._escaped = char == "\\"
        elif char == '"':
            self._in_string = True
        elif char in _CLOSER:
            self._closers.append(_CLOSER[char])
        elif self._closers[-1] == char:
            self._closers.pop()
        else:
            self._closers = []  # brackets that do not match: no JSON, and nobody can say where it ends

    def _after_arguments(self, text: str, position: int) -> int:
        """`}` and the closing tag; where the tag is missing, the next opening one."""
        start = position
        while position < len(text):
            char = text[position]
            if char == "}" and not self._brace_closed:
                self._brace_closed = True
            elif char == "<" and self._brace_closed:
                break
            elif char not in _SPACE:
                return self._not_closed(text[start:position], position)
            position += 1
        self._tail.append(text[start:position])
        if position == len(text):
            return position
        for tag in (CLOSE, OPEN):
            if text.startswith(tag, position):
                self._tail = []
                self._state, self._after_call = self._text, True
                return position + (len(CLOSE) if tag == CLOSE else 0)
            if tag.startswith(text[position:]):
                self._partial = text[position:]
                return len(text)
        return self._not_closed("", position)

    def _not_closed(self, more: str, position: int) -> int:
        self._content("".join(self._tail) + more)
        self._tail = []
        self._state, self._after_call = self._text, False
        return position

    def _block(self, text: str, position: int) -> int:
        """A block that is not written in the usual order, up to its end."""
        found = _TAG.search(text, position)
        if found is None:
            end = len(text) - max(_begun(text, position, OPEN), _begun(text, position, CLOSE))
            self._raw.append(text[position:end])
            self._partial = text[end:]
            return len(text)
        self._raw.append(text[position : found.start()])
        if found.group() == OPEN:
            self._content("".join(self._raw))
            self._open("")
        else:
            self._end_block(CLOSE)
        return found.end()

    # -- parts

    def _open(self, space: str) -> None:
        self._raw = [space, OPEN]
        self._space = []
        self._expected, self._string, self._strings, self._escaped = 0, None, [], False
        self._state = self._header

    def _end_block(self, tag: str) -> None:
        raw = "".join(self._raw)
        self._raw = []
        self._state = self._text
        call = _whole_call(raw[raw.index(OPEN) + len(OPEN) :])
        self._after_call = call is not None
        if call is None:
            self._content(raw + tag)
            return
        self._begin_call(call[0])
        self._arguments_piece(call[1])

    def _content(self, text: str) -> None:
        if not text:
            return
        if self._deltas and "content" in self._deltas[-1]:
            self._deltas[-1]["content"] += text
        else:
            self._deltas.append({"content": text})

    def _begin_call(self, name: str) -> None:
        self._raw = []
        self._num_calls += 1
        if self._parallel or self._num_calls == 1:
            call = {"index": self._num_calls - 1, "id": self._make_id(), "type": "function"}
            self._deltas.append({"tool_calls": [{**call, "function": {"name": name, "arguments": ""}}]})

    def _arguments_piece(self, text: str) -> None:
        if not text or not (self._parallel or self._num_calls == 1):
            return
        index = self._num_calls - 1
        if self._deltas and "tool_calls" in self._deltas[-1] and self._deltas[-1]["tool_calls"][0]["index"] == index:
            self._deltas[-1]["tool_calls"][0]["function"]["arguments"] += text
        else:
            self._deltas.append({"tool_calls": [{"index": index, "function": {"arguments": text}}]})


def _begun(text: str, position: int, tag: str) -> int:
    """How many characters at the end of text[position:] are a beginning of the tag."""
    start = text.rfind("<", max(position, len(text) - len(tag) + 1))
    return len(text) - start if start >= 0 and tag.startswith(text[start:]) else 0


def _whole_call(body: str) -> tuple[str, str] | None:
    """Name and arguments of a whole block; None if it is no call."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return None
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):  # as OpenAI's messages have them
        try:
            return (call["name"], arguments) if isinstance(json.loads(arguments), dict) else None
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict) and arguments is not None:
        return None
    return call["name"], json.dumps(arguments or {}, ensure_ascii=False)


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    function: str | None = None,
    parallel: bool = True,
) -> StructuredOutputsParams:
    """The form of an answer that calls tools and does nothing else: with arguments that fit the tools' schemas.

    tools: OpenAI's function descriptions. function: this one alone is called; None: any. parallel: up to 64 calls; False:
    one. ValueError names the tool whose parameters are wrong.
    """
    from ._grammars import control_tokens, json_options, lark_text

    control = control_tokens(tokenizer)
    marks = [f"<[{control[tag]}]>" if tag in control else lark_text(tag) for tag in (OPEN, CLOSE)]
    rules = []
    size = 0
    for i, tool in enumerate(tools):
        described = tool.get("function", tool)
        name = described.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"tools[{i}]: expected a function with a 'name', got {name!r}")
        if function is not None and name != function:
            continue
        schema = _parameters(f"tools[{i}] ({name[:64]})", described.get("parameters"))
        size += len(schema)
        body = json.dumps({**json.loads(schema), "x-guidance": json_options()}, ensure_ascii=False)
        before = lark_text(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ')
        rules.append(f"call_{i}: {before} %json {body} {lark_text('}')}")
    if not rules:
        raise ValueError(f"no tool is named {function!r}" if function is not None else "tools is empty")
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"the tools' parameters have {size} bytes together, the limit is {MAX_SCHEMA_BYTES}")
    more = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    names = " | ".join(rule.partition(":")[0] for rule in rules)
    head = f'start: call{more}\ncall: {marks[0]} "\\n" body "\\n" {marks[1]}\nbody: {names}\n'
    return StructuredOutputsParams(grammar=head + "\n".join(rules) + "\n")


def _parameters(where: str, schema: Any) -> str:
    """A schema of objects, as JSON text."""
    if schema is None:
        schema = {}
    if not isinstance(schema, Mapping):
        raise TypeError(f"{where}: parameters must be a JSON schema of an object, got {type(schema).__name__}")
    if schema.get("type", "object") != "object":
        raise ValueError(f"{where}: the type of parameters must be 'object', got {str(schema['type'])[:64]!r}")
    return checked_schema(f"{where}: parameters", {"type": "object", **schema})
