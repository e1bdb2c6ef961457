"""Fifty bounded JSON schemas, such as people send: what fits them has a largest size."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def text(most: int = 12, **more: Any) -> Schema:
    return {"type": "string", "maxLength": most, **more}


def whole(low: int = 0, high: int = 100) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def listed(items: Schema, most: int = 4, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def closed(required: list[str] | None = None, /, **properties: Any) -> Schema:
    """An object with these properties and no others; all required unless said otherwise."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


COLOR = {"enum": ["red", "green", "blue"]}
FLAG = {"type": "boolean"}
POINT = closed(x=whole(-50, 50), y=whole(-50, 50))
TREE = {
    "$ref": "#/$defs/leaf",
    "$defs": {"leaf": closed(name=text(6), next={"$ref": "#/$defs/end"}), "end": closed(last=FLAG)},
}

SCHEMAS: list[Schema] = [
    whole(),
    whole(-5, 5),
    whole(1000, 99999),
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
    FLAG,
    {"type": "null"},
    COLOR,
    {"const": {"a": [1, 2, {"b": None}]}},
    {"enum": [1, "two", None, [3], {"four": 4}]},
    text(),
    text(0),
    text(40, minLength=10),
    {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
    {"type": "string", "pattern": "^[0-9]{3}-[0-9]{4}$"},
    {"type": "string", "pattern": "^(\\+49|0)[1-9][0-9]{3,9}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    {"type": ["string", "boolean"], "maxLength": 5},
    listed(whole()),
    listed(whole(), most=3, least=3),
    listed(COLOR, most=6),
    listed(text(6), most=3),
    listed(listed(whole(0, 9), most=2), most=2),
    listed(POINT, most=3),
    {"type": "array", "prefixItems": [whole(), text(5), FLAG], "items": False, "minItems": 3},
    closed(),
    closed(name=text()),
    closed(name=text(), age=whole(0, 150)),
    closed(["name"], name=text(), nick=text(6), age=whole(0, 150)),
    closed([], a=FLAG, b=FLAG, c=FLAG),
    closed(name=text(20), age=whole(0, 150), tags=listed({"enum": ["a", "b", "c"]}, most=5)),
    closed(point=POINT, color=COLOR),
    closed(outer=closed(inner=closed(core=whole()))),
    closed(path=listed(POINT, most=4, least=2)),
    closed(city=text(16), country={"enum": ["DE", "FR", "IT"]}, zip={"type": "string", "pattern": "^[0-9]{5}$"}),
    closed(title=text(24), year=whole(1900, 2030), genres=listed(COLOR, most=2), seen=FLAG),
    closed(kind={"const": "circle"}, radius=whole(1, 9)),
    {"anyOf": [closed(kind={"const": "circle"}, r=whole()), closed(kind={"const": "square"}, side=whole())]},
    {"anyOf": [whole(), text(5), {"type": "null"}]},
    listed({"anyOf": [whole(0, 9), FLAG]}, most=5),
    {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "boolean"}]},
    {"allOf": [{"type": "integer", "minimum": 10}, {"type": "integer", "maximum": 20}]},
    TREE,
    closed(items=listed(closed(sku={"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"}, count=whole(1, 20)), most=3)),
    closed(when={"type": "string", "format": "date-time"}, who=text(10)),
    closed(**{"a key": text(4), 'quo"te': whole(0, 9), "schön": FLAG}),
    closed(score={"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25}, note=text(10)),
]
