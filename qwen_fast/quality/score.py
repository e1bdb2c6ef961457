"""One answer against the right one: exact, and what exactly is wrong with it. Counts that add up over rows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..tools import HermesParser
from . import fields
from .schema_check import fits
from .tasks import Row

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_LAST_CHARACTERS = 200  # of an answer, in which its last number is looked for

# Figures over rows: name -> (title, numerator, denominator, what it says). Numerators and denominators are counts of
# score(); a row without the denominator does not count.
METRICS: dict[str, tuple[str, str, str, str]] = {
    "exact": ("exact match", "exact", "rows", "answers equal to the right one, character for character"),
    "json_valid": ("valid JSON", "json_valid", "json_rows", "answers that are one JSON value and nothing else"),
    "json_equal": ("equal JSON", "json_equal", "json_rows", "answers with the right value in every field and no other field"),
    "fields_right": ("fields right", "right", "fields", "fields with the right value, of all fields asked for"),
    "fields_missing": ("missing", "missing", "fields", "fields that are not there (all, where the answer is no JSON)"),
    "fields_extra": ("extra", "extra", "fields", "fields that nobody asked for, per field asked for"),
    "wrong_type": ("wrong type", "wrong_type", "fields", "fields whose value has another JSON type"),
    "other_field": ("of another field", "other_field", "fields", "misplaced: the right value of another field of the same object"),
    "other_record": ("of another record", "other_record", "fields", "misplaced: a value that stands elsewhere in answer or prompt"),
    "invented": ("invented", "invented", "fields", "wrong values that stand nowhere in the prompt"),
    "schema_valid": ("fits its schema", "schema_valid", "schema_rows", "answers that fit the row's JSON Schema"),
    "tool_decision": ("call or no call", "tool_decision", "tool_rows", "a tool is called where one should be, and none where none fits"),
    "tool_count": ("number of calls", "tool_count", "tool_rows", "as many calls as asked for"),
    "tool_name": ("tool's name", "tool_name", "calls", "calls of the right tool, of all calls asked for"),
    "tool_schema": ("arguments fit the schema", "tool_schema", "calls_made", "calls of a tool that exists with arguments that fit its parameters, of all calls made"),
    "tool_arguments": ("arguments exact", "tool_arguments", "calls", "calls of the right tool with exactly the right arguments"),
    "argument_fields": ("argument values right", "argument_right", "argument_fields", "arguments with the right value, of all arguments asked for"),
    "argument_misplaced": ("argument values misplaced", "argument_misplaced", "argument_fields", "arguments with the value of another argument, or one from elsewhere in the prompt"),
    "number": ("final number", "number", "number_rows", "answers whose last number is the right one"),
    "recall": ("recall", "recall", "recall_rows", "values from the prompt, given back exactly"),
    "wrong_from_prompt": ("another value of the prompt", "from_prompt", "text_rows", "wrong answers in text that stand in the prompt: the value of something else"),
}  # fmt: skip


def score(row: Row, prompt: str, answer: str) -> dict[str, int]:
    """Counts of one answer. prompt: the row's messages as text, where misplaced values are looked for."""
    exact = int(answer == row.answer)
    found = {"rows": 1, "exact": exact}
    if row.kind == "json":
        found |= _json(row, prompt, answer)
    elif row.kind == "tools":
        found |= _tools(row, prompt, answer)
    elif row.kind == "number":
        found |= {"number_rows": 1, "number": int(last_number(answer) == last_number(row.answer))}
    else:
        wrong = not exact and fields.stands_in(answer.strip(), prompt)
        found |= {"text_rows": 1, "from_prompt": int(wrong)}
        if row.kind == "recall":
            found |= {"recall_rows": 1, "recall": exact}
    if row.schema is not None:
        valid, value = fields.parse_json(answer)
        found |= {"schema_rows": 1, "schema_valid": int(valid and fits(value, row.schema))}
    return found


def prompt_text(row: Row) -> str:
    """What the messages say, for looking values up in."""
    return "\n".join(str(message.get("content") or "") for message in row.messages)


def last_number(text: str) -> str | None:
    """As written, without leading zeros and commas between thousands; None where there is none."""
    found = _NUMBER.findall(_THOUSANDS.sub("", text[-_LAST_CHARACTERS:]))
    if not found:
        return None
    sign, digits = ("-", found[-1][1:]) if found[-1].startswith("-") else ("", found[-1])
    return sign + (digits.lstrip("0") or "0" if "." not in digits else digits)


def _json(row: Row, prompt: str, answer: str) -> dict[str, int]:
    _, expected = fields.parse_json(row.answer)
    valid, got = fields.parse_json(answer)
    counts = fields.compare(expected, got, prompt) if valid else fields.none_of(expected)
    right = valid and fields.equal(expected, got)
    return {"json_rows": 1, "json_valid": int(valid), "json_equal": int(right), **counts}


def _tools(row: Row, prompt: str, answer: str) -> dict[str, int]:
    expected, got = calls_of(row.answer), calls_of(answer)
    known = {tool["function"]["name"]: tool["function"].get("parameters", True) for tool in row.tools or ()}
    found = {
        "tool_rows": 1,
        "tool_decision": int(bool(expected) == bool(got)),
        "tool_count": int(len(expected) == len(got)),
        "calls": len(expected), "calls_made": len(got),
        "tool_name": 0, "tool_arguments": 0, "argument_fields": 0, "argument_right": 0, "argument_misplaced": 0,
        "tool_schema": sum(1 for name, valid, value in got if valid and name in known and fits(value, known[name])),
    }  # fmt: skip
    for index, (name, _, wanted) in enumerate(expected):
        made = got[index] if index < len(got) and got[index][0] == name else None
        counts = fields.compare(wanted, made[2], prompt) if made and made[1] else fields.none_of(wanted)
        found["tool_name"] += made is not None
        found["tool_arguments"] += bool(made and made[1] and fields.equal(wanted, made[2]))
        found["argument_fields"] += counts["fields"]
        found["argument_right"] += counts["right"]
        found["argument_misplaced"] += counts["other_field"] + counts["other_record"]
    return found


def calls_of(text: str) -> list[tuple[str, bool, Any]]:
    """(name, whether the arguments are a JSON object, the arguments) of each call in an answer, as a server would see it."""
    parser = HermesParser()
    calls: dict[int, list[str]] = {}
    for delta in [*parser.feed(text), *parser.finish()]:
        for one in delta.get("tool_calls", ()):
            call = calls.setdefault(one["index"], ["", ""])
            function: Mapping[str, str] = one["function"]
            call[0] += function.get("name") or ""
            call[1] += function.get("arguments") or ""
    found = []
    for name, arguments in calls.values():
        valid, value = fields.parse_json(arguments)
        valid = valid and isinstance(value, dict)
        found.append((name, valid, value if valid else json.dumps(arguments)))
    return found
