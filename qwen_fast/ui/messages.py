"""A conversation's messages: as they are kept, as a request carries them, and as the page shows them.

They are kept in OpenAI's shape, {"role", "content", "tool_calls", "tool_call_id"}, without the system prompt; an answer
also has "meta", which stays here: {"end": how it ended, "stats": its numbers}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .texts import text

Message = dict[str, Any]
_SENT = ("role", "content", "tool_calls", "tool_call_id")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_RUN = re.compile(r"`+")
_BACKTICKS = re.compile(r"`{3,}")


def for_request(messages: Sequence[Mapping[str, Any]], system: str) -> list[Message]:
    """What goes into a request: with the system prompt, without answers that have nothing in them."""
    sent: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    for message in messages:
        if message["role"] == "assistant" and not message.get("content") and not message.get("tool_calls"):
            continue
        sent.append({name: message[name] for name in _SENT if name in message})
    return sent


def pending_call(messages: Sequence[Mapping[str, Any]]) -> tuple[int, int, Mapping[str, Any]] | None:
    """Where the last answer called tools and not every result is there: number of the next call, from 1, how many there
    are, and the call."""
    results = 0
    for message in reversed(messages):
        if message["role"] == "tool":
            results += 1
            continue
        calls = message.get("tool_calls") or ()
        return (results + 1, len(calls), calls[results]) if results < len(calls) else None
    return None


def typed(messages: Sequence[Mapping[str, Any]], content: str) -> Message:
    """What was typed as a message: the result of a tool where one is awaited, else the user's."""
    call = pending_call(messages)
    if call is None:
        return {"role": "user", "content": content}
    return {"role": "tool", "content": content, "tool_call_id": call[2]["id"]}


def turn_start(messages: Sequence[Mapping[str, Any]], index: int) -> int:
    """The index of what was typed, which the turn of message `index` begins with."""
    while index > 0 and messages[index]["role"] == "assistant":
        index -= 1
    return index


def name_of_result(messages: Sequence[Mapping[str, Any]], index: int) -> str:
    """The function whose result is message `index`."""
    wanted = messages[index].get("tool_call_id")
    for message in reversed(messages[:index]):
        for call in message.get("tool_calls") or ():
            if call["id"] == wanted:
                return str(call["function"]["name"])
    return "?"


def for_page(messages: Sequence[Mapping[str, Any]], lang: str) -> tuple[list[Message], list[int]]:
    """Bubbles for the chat component, and for each the index of its message."""
    shown: list[Message] = []
    origin: list[int] = []
    for index, message in enumerate(messages):
        for bubble in _bubbles(messages, index, message, lang):
            shown.append(bubble)
            origin.append(index)
    return shown, origin


def _bubbles(messages: Sequence[Mapping[str, Any]], index: int, message: Mapping[str, Any], lang: str) -> list[Message]:
    content = message.get("content") or ""
    if message["role"] == "tool":
        name = name_of_result(messages, index)
        title = {"title": text("tool_answer", lang, name=name)}
        return [{"role": "assistant", "content": fenced(content, ""), "metadata": title}]
    if message["role"] == "user":
        return [{"role": "user", "content": escaped(content)}]
    calls = message.get("tool_calls") or ()
    end = (message.get("meta") or {}).get("end", "")
    note = text(end, lang) if end in ("stopped", "length", "failed") else ""
    bubbles: list[Message] = []
    if content or not calls:
        noted = f"{escaped(content)}\n\n*[{note}]*" if note else escaped(content)
        bubbles.append({"role": "assistant", "content": noted})
    for call in calls:
        function = call["function"]
        title = {"title": text("tool_call", lang, name=function["name"])}
        bubbles.append(
            {"role": "assistant", "content": fenced(indented(function["arguments"]), "json"), "metadata": title}
        )
    return bubbles


def indented(arguments: str) -> str:
    """JSON with line breaks; the text as it is where it is none, or not yet."""
    try:
        return json.dumps(json.loads(arguments), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return arguments


def fenced(content: str, kind: str) -> str:
    """A block of code in Markdown whose end the content cannot forge."""
    longest = max((len(run) for run in _BACKTICKS.findall(content)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{kind}\n{content}\n{fence}"


def escaped(content: str) -> str:
    """Markdown in which HTML is text: "<" and "&" outside code are written as entities, so that <script>, and the
    <int> of a C++ type, are seen as they are. The page's sanitiser and its Content-Security-Policy stand behind this."""
    parts: list[str] = []
    prose: list[str] = []
    fence = ""
    for line in content.split("\n"):
        found = _FENCE.fullmatch(line)
        if fence:
            parts.append(line)
            if found and found[1].startswith(fence) and not found[2].strip():
                fence = ""
        elif found and not (found[1][0] == "`" and "`" in found[2]):
            parts += _flushed(prose)
            fence = found[1]
            parts.append(line.replace("<", "&lt;"))
        else:
            prose.append(line)
    return "\n".join([*parts, *_flushed(prose)])


def _flushed(prose: list[str]) -> list[str]:
    lines = [] if not prose else [_escaped_prose("\n".join(prose))]
    prose.clear()
    return lines


def _escaped_prose(content: str) -> str:
    """Leaves what stands between two runs of as many backticks, in one paragraph."""
    return "\n\n".join(_escaped_paragraph(one) for one in content.split("\n\n"))


def _escaped_paragraph(content: str) -> str:
    runs = [(found.start(), found.end()) for found in _RUN.finditer(content)]
    last_of: dict[int, int] = {end - start: index for index, (start, end) in enumerate(runs)}
    parts = []
    position = index = 0
    while index < len(runs):
        start, end = runs[index]
        if last_of[end - start] > index:
            closing = index + 1
            while runs[closing][1] - runs[closing][0] != end - start:
                closing += 1
            parts += [_entities(content[position:start]), content[start : runs[closing][1]]]
            position, index = runs[closing][1], closing
        index += 1
    return "".join([*parts, _entities(content[position:])])


def _entities(content: str) -> str:
    return content.replace("&", "&amp;").replace("<", "&lt;")


class AnswerParts:
    """Joins the deltas of one streamed answer into a message. limit: UTF-8 bytes it may have."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._texts: list[str] = []
        self._calls: dict[int, Message] = {}
        self.size = 0

    def add(self, delta: Mapping[str, Any]) -> bool:
        """False, and nothing is added, where the answer would grow over its limit. TypeError where a call is not
        OpenAI's."""
        content = delta.get("content")
        size = len(content.encode("utf-8", "surrogatepass")) if isinstance(content, str) else 0
        calls = delta.get("tool_calls") or ()
        size += sum(len(str(call)) for call in calls)
        if self.size + size > self._limit:
            return False
        self.size += size
        if isinstance(content, str):
            self._texts.append(content)
        for call in calls:
            self._add_call(call)
        return True

    def _add_call(self, part: Mapping[str, Any]) -> None:
        index, id, name, arguments = _call_parts(part)
        call = self._calls.setdefault(
            index, {"id": f"call_{index}", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = id or call["id"]
        call["function"]["name"] += name
        call["function"]["arguments"] += arguments

    def message(self) -> Message:
        content = "".join(self._texts)
        self._texts = [content]
        whole: Message = {"role": "assistant", "content": content}
        if self._calls:
            whole["tool_calls"] = [json.loads(json.dumps(self._calls[index])) for index in sorted(self._calls)]
        return whole


def _call_parts(part: Any) -> tuple[int, str, str, str]:
    """Index, id, name and arguments of what a delta says of a call."""
    function = (part.get("function") or {}) if isinstance(part, dict) else None
    if isinstance(function, dict):
        index = part.get("index", 0)
        texts = [part.get("id") or "", function.get("name") or "", function.get("arguments") or ""]
        if isinstance(index, int) and all(isinstance(one, str) for one in texts):
            return index, texts[0], texts[1], texts[2]
    raise TypeError(f"a tool call in the answer is not OpenAI's: {str(part)[:80]!a}")
