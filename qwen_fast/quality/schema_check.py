"""Whether a JSON value fits a JSON Schema, for the keywords that tools' parameters are written in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .fields import equal, json_type

_SAID = {"title", "description", "default", "examples", "example", "deprecated", "format", "$schema", "$id", "$comment",
         "strict", "nullable"}  # fmt: skip
_TYPES = {"null", "boolean", "number", "integer", "string", "object", "array"}
_CHECKED = {
    "type", "enum", "const", "properties", "required", "additionalProperties", "items", "minItems", "maxItems",
    "minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "anyOf",
}  # fmt: skip

_NUMBERS = {
    "minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
}  # fmt: skip


def check_schema(schema: Any, where: str) -> None:
    """ValueError or TypeError where a schema says something that is not checked here: better than a score that passes
    over it."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise TypeError(f"{where}: a schema is an object, got {type(schema).__name__}")
    unknown = sorted(set(schema) - _SAID - _CHECKED)
    if unknown:
        raise ValueError(
            f"{where}: the schema keyword {unknown[0]!r} is not supported; known: {', '.join(sorted(_CHECKED))}"
        )
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in _TYPES:
            raise ValueError(f"{where}: unknown type {kind!r}")
    if "pattern" in schema:
        try:
            re.compile(schema["pattern"])
        except (re.error, TypeError) as error:
            raise ValueError(f"{where}: pattern {schema['pattern']!r}: {error}") from None
    _check_values(schema, where)
    for name in ("items", "additionalProperties"):
        if name in schema:
            check_schema(schema[name], f"{where}.{name}")
    for key, inner in dict(schema.get("properties", {})).items():
        check_schema(inner, f"{where}.{key}")
    for index, inner in enumerate(schema.get("anyOf", [])):
        check_schema(inner, f"{where}.anyOf[{index}]")


def _check_values(schema: Mapping[str, Any], where: str) -> None:
    for name, value in schema.items():
        if name == "properties":
            right, kind = isinstance(value, Mapping), "an object"
        elif name in ("enum", "anyOf"):
            right, kind = isinstance(value, list), "a list"
        elif name == "required":
            right, kind = isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of names"
        elif name in _NUMBERS:
            right, kind = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
        else:
            continue
        if not right:
            raise ValueError(f"{where}: {name} must be {kind}, got {value!r}")


def fits(value: Any, schema: Any) -> bool:
    """Of a schema that check_schema passed."""
    if isinstance(schema, bool):
        return schema
    kinds = schema.get("type")
    if kinds is not None and not any(_is(value, kind) for kind in (kinds if isinstance(kinds, list) else [kinds])):
        return False
    if "enum" in schema and not any(equal(value, one) for one in schema["enum"]):
        return False
    if "const" in schema and not equal(value, schema["const"]):
        return False
    if "anyOf" in schema and not any(fits(value, one) for one in schema["anyOf"]):
        return False
    checks = {"object": _object, "array": _array, "string": _string, "number": _number}
    check = checks.get(json_type(value))
    return check is None or check(value, schema)


def _is(value: Any, kind: str) -> bool:
    found = json_type(value)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return found == kind or (kind == "integer" and found == "number" and whole)


def _object(value: Any, schema: Mapping[str, Any]) -> bool:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    return all(name in value for name in schema.get("required", ())) and all(
        fits(inner, known.get(name, others)) for name, inner in value.items()
    )


def _array(value: Any, schema: Mapping[str, Any]) -> bool:
    enough = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
    return enough and all(fits(inner, schema.get("items", True)) for inner in value)


def _string(value: Any, schema: Mapping[str, Any]) -> bool:
    enough = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
    return enough and ("pattern" not in schema or re.search(schema["pattern"], value) is not None)


def _number(value: Any, schema: Mapping[str, Any]) -> bool:
    return not (
        value < schema.get("minimum", value)
        or value > schema.get("maximum", value)
        or ("exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"])
        or ("exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"])
    )
