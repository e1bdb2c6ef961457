"""JSON answers, field by field: what is right, missing, extra, of a wrong type, misplaced, invented.

A field is a leaf: a text, number, true, false, null, or an empty object or array; its path is the keys and array positions
that lead to it. A wrong value is *misplaced* where it is the right value of another field of the same object
(`other_field`), or stands in another record: of the answer, or of the prompt (`other_record`); a wrong value that stands
nowhere is `invented`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Path = tuple[Any, ...]
COUNTS = ("fields", "right", "missing", "extra", "wrong_type", "other_field", "other_record", "invented")


def parse_json(text: str) -> tuple[bool, Any]:
    """(whether the text is one JSON value and nothing else, the value). NaN, Infinity and a key given twice are not JSON
    that a program should be handed."""
    try:
        return True, json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return False, None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every field and its path."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path, value


def json_type(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), ((int, float), "number"), (str, "string"), (dict, "object")):
        if isinstance(value, kind):
            return name
    return "array"


def equal(a: Any, b: Any) -> bool:
    """As JSON values: 1 and 1.0 are one number, true and 1 are not, an object's order does not matter."""
    if json_type(a) != json_type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(one, other) for one, other in zip(a, b))
    return bool(a == b)


def as_text(value: Any) -> str:
    """A leaf as it would stand in a prompt."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def stands_in(value: str, prompt: str) -> bool:
    """Whether `value` occurs in the prompt as a whole word or number, not inside a longer one."""
    return next(occurrences(value, prompt), None) is not None


def occurrences(value: str, prompt: str) -> Iterator[int]:
    """Where `value` stands in the prompt as a whole. A letter or digit beside it makes it part of another word; in
    scripts without spaces (from U+2E80 on) words have no such ends, and any place counts."""
    at = prompt.find(value) if value else -1
    while at >= 0:
        end = at + len(value)
        if not (_joined(prompt[at - 1 : at], value[0]) or _joined(value[-1], prompt[end : end + 1])):
            yield at
        at = prompt.find(value, at + 1)


def _joined(left: str, right: str) -> bool:
    """Whether two neighbouring characters belong to one word or number."""
    spaced = [one.isalnum() and ord(one) < 0x2E80 for one in (left, right) if one]
    return len(spaced) == 2 and all(spaced)


def compare(expected: Any, got: Any, prompt: str) -> dict[str, int]:
    """Counts over the fields of `expected` (COUNTS; `extra`: fields of `got` that are not asked for).

    right + missing + wrong_type + other_field + other_record + invented = fields.
    """
    right, ours = dict(leaves(expected)), dict(leaves(got))
    found = dict.fromkeys(COUNTS, 0)
    found["fields"] = len(right)
    holders = {path[:size] for path in right for size in range(len(path))}  # an empty one lacks fields, and adds none
    found["extra"] = sum(
        path not in right and not (value in ({}, []) and path in holders) for path, value in ours.items()
    )
    for path, value in right.items():
        if path not in ours:
            found["missing"] += 1
        else:
            found[_judge(path, value, ours[path], right, prompt)] += 1
    return found


def _judge(path: Path, expected: Any, got: Any, right: dict[Path, Any], prompt: str) -> str:
    if equal(expected, got):
        return "right"
    if json_type(expected) != json_type(got):
        return "wrong_type"
    elsewhere = [other for other, value in right.items() if other != path and equal(value, got)]
    if any(other[:-1] == path[:-1] for other in elsewhere):
        return "other_field"
    if elsewhere or stands_in(as_text(got), prompt):
        return "other_record"
    return "invented"


def none_of(expected: Any) -> dict[str, int]:
    """compare() for an answer that is no JSON: every field is missing."""
    count = sum(1 for _ in leaves(expected))
    return dict.fromkeys(COUNTS, 0) | {"fields": count, "missing": count}
