"""Task rows: questions with one right answer each, from a JSONL file.

A line is an object:

    task      text: the row's group in the tables
    messages  the conversation, as for LLM.chat; the last message asks
    answer    text: the right answer, compared character for character
    tools     optional: OpenAI's function descriptions; `answer` is then Qwen2.5's text of the calls
              (<tool_call>...</tool_call>), or plain text where no tool is to be called
    schema    optional: a JSON Schema that the answer has to fit
    kind      optional: how a wrong answer is looked into: "json", "tools", "number" (the last number counts), "recall" (a
              value from the prompt, at a distance), "text". Left out: "tools" where there are tools, "json" where the answer
              is a JSON object or array, else "text"
    distance  optional, for "recall": tokens between the value and the end of the prompt. Left out: counted from the one
              place where the answer stands in the prompt
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..utils import DEMO_DIR
from .fields import parse_json
from .schema_check import check_schema

KINDS = ("json", "tools", "number", "recall", "text")
TASKS_FILE, TEXT_FILE = DEMO_DIR / "eval.jsonl", DEMO_DIR / "heldout.txt"
_KEYS = {"task", "messages", "answer", "tools", "schema", "kind", "distance"}
# The built-in rows do not say their kind: they are a published set.
_BUILT_IN_KINDS = {"arith": "number", "arith_steps": "number", "needle": "recall", "needle_long": "recall"}


@dataclass(frozen=True)
class Row:
    """One question. number: its line in the file, from 1."""

    task: str
    number: int
    messages: list[dict[str, Any]]
    answer: str
    kind: str
    tools: list[dict[str, Any]] | None = None
    schema: Any = None
    distance: int | None = None


def read_rows(path: str | Path | None = None) -> list[Row]:
    """The rows of a file; None: those in the package. ValueError or TypeError with file and line where one is wrong."""
    file = TASKS_FILE if path is None else Path(path)
    rows = []
    with file.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_row(line, f"{file.name}, line {number}", number))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.name}: not UTF-8: {error}") from None
    if not rows:
        raise ValueError(f"{file.name}: no rows")
    if path is None:
        rows = [replace(row, kind=_BUILT_IN_KINDS.get(row.task, row.kind)) for row in rows]
    return rows


def _row(line: str, where: str, number: int) -> Row:
    try:
        value = json.loads(line, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: it holds a lone surrogate, which is no text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TypeError(f"{where}: expected an object, got {type(value).__name__}")
    unknown = sorted(set(value) - _KEYS)
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}")
    task, answer = (_text(value, name, where) for name in ("task", "answer"))
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, Mapping) for one in messages):
        raise ValueError(f"{where}: 'messages' must be a list of objects with role and content")
    tools, distance = value.get("tools"), value.get("distance")
    if tools is not None:
        _check_tools(tools, where)
    if "schema" in value:
        check_schema(value["schema"], f"{where}: schema")
    if distance is not None and (isinstance(distance, bool) or not isinstance(distance, int) or distance < 0):
        raise ValueError(f"{where}: 'distance' must be a number of tokens, got {distance!r}")
    kind = value.get("kind", _kind(answer, tools))
    if kind not in KINDS:
        raise ValueError(f"{where}: 'kind' must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "json" and not parse_json(answer)[0]:
        raise ValueError(f"{where}: kind 'json', but the answer is not JSON")
    return Row(task, number, messages, answer, kind, tools, value.get("schema"), distance)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _text(value: Mapping[str, Any], name: str, where: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found:
        raise ValueError(f"{where}: {name!r} must be a text, got {found!r}")
    return found


def _check_tools(tools: Any, where: str) -> None:
    if not isinstance(tools, list) or not tools:
        raise ValueError(f"{where}: 'tools' must be a list of function descriptions")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: tools[{index}] has no function with a name")  # noqa: TRY004 - as every other message about a row
        check_schema(function.get("parameters", True), f"{where}: tools[{index}]")


def _kind(answer: str, tools: Any) -> str:
    if tools is not None:
        return "tools"
    valid, value = parse_json(answer)
    return "json" if valid and isinstance(value, (dict, list)) else "text"


def select(rows: Iterable[Row], limit: int | None = None, only: Sequence[str] | None = None) -> list[Row]:
    """The rows of the tasks `only` names, at most `limit` of each task, spread over its rows; in the file's order, task
    by task."""
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    for name in only or ():
        if name not in by_task:
            raise ValueError(f"no task {name!r}; there are {', '.join(by_task)}")
    chosen = []
    for task, found in by_task.items():
        if only is not None and task not in only:
            continue
        count = len(found) if limit is None else min(limit, len(found))
        chosen += [found[i * len(found) // count] for i in range(count)]
    return chosen
