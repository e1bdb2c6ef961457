"""JSON answers, tool calls, numbers: cases by hand."""

from __future__ import annotations

import json

import pytest
from quality_helpers import row

from qwen_fast.quality import fields
from qwen_fast.quality.schema_check import check_schema, fits
from qwen_fast.quality.score import METRICS, calls_of, last_number, prompt_text, score
from qwen_fast.quality.tasks import read_rows

PROMPT = "Ada, 31, lives in Oslo. Bo, 27, lives in Riga. Ticket 318 costs 4.5."
RIGHT = {"name": "Ada", "age": 31, "city": "Oslo"}


def counts(expected, got, prompt=PROMPT):
    found = fields.compare(expected, got, prompt)
    parts = ("right", "missing", "wrong_type", "other_field", "other_record", "invented")
    assert sum(found[name] for name in parts) == found["fields"]
    return {name: value for name, value in found.items() if value and name != "fields"}


@pytest.mark.parametrize(
    ("expected", "got", "found"),
    [
        (RIGHT, {"city": "Oslo", "age": 31.0, "name": "Ada"}, {"right": 3}),
        (RIGHT, {"name": "Oslo", "age": 31, "city": "Ada"}, {"right": 1, "other_field": 2}),  # swapped
        (RIGHT, {"name": "Bo", "age": 27, "city": "Riga"}, {"other_record": 3}),  # the other person
        (RIGHT, {"name": "Ann", "age": 8, "city": "Oslo"}, {"right": 1, "invented": 2}),
        (RIGHT, {"name": "Ada", "age": 3, "city": "Oslo"}, {"right": 2, "invented": 1}),  # 3 is only inside 31 and 318
        (RIGHT, {"name": "Ada", "city": "Oslo"}, {"right": 2, "missing": 1}),
        (RIGHT, RIGHT | {"country": "Norway"}, {"right": 3, "extra": 1}),
        (RIGHT, {"name": "Ada", "age": "31", "city": None}, {"right": 1, "wrong_type": 2}),
        (
            RIGHT,
            {"name": "Ada", "age": True, "city": ["Oslo"]},
            {"right": 1, "wrong_type": 1, "missing": 1, "extra": 1},
        ),
        (RIGHT, [], {"missing": 3}),
        (RIGHT, "Ada", {"missing": 3, "extra": 1}),
        ({"a": None}, {"a": None}, {"right": 1}),
        ({"a": None}, {}, {"missing": 1}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 1}}, {"right": 1, "other_field": 1}),
        ({"a": {"b": 1}, "c": 2}, {"a": {"b": 2}, "c": 2}, {"right": 1, "other_record": 1}),  # from outside the object
        ({"a": {"b": 1}}, {"a": {}}, {"missing": 1}),
        (RIGHT, RIGHT | {"more": {}}, {"right": 3, "extra": 1}),
        ({"a": []}, {"a": []}, {"right": 1}),
        ({"a": {}}, {"a": []}, {"wrong_type": 1}),
        ([{"n": "x"}, {"n": "y"}], [{"n": "y"}, {"n": "x"}], {"other_record": 2}),  # records exchanged
        ([{"n": "x"}, {"n": "y"}], [{"n": "x"}], {"right": 1, "missing": 1}),
        ([1, 2], [1, 2, 3], {"right": 2, "extra": 1}),
        ([1, 2], [2, 1], {"other_field": 2}),
        ({"v": 4.5}, {"v": 318}, {"other_record": 1}),
        (7, 7.0, {"right": 1}),
    ],
)
def test_fields(expected, got, found):
    assert counts(expected, got) == found


def test_no_json_misses_every_field():
    assert fields.none_of({"a": {"b": 1, "c": []}, "d": None})["missing"] == 3


@pytest.mark.parametrize("text", ["", "{", '{"a": 1} and more', '{"a": 1, "a": 2}', "NaN", '{"a": Infinity}', "[1,]", "```json\n{}\n```",
                                  "[" * 100_000, "9" * 5000])  # fmt: skip
def test_what_is_no_json(text):
    assert fields.parse_json(text) == (False, None)


def test_what_is_json():
    assert fields.parse_json(' {"a": [1, null]}\n') == (True, {"a": [1, None]})
    assert not fields.equal(True, 1) and not fields.equal([1], [1, 2]) and fields.equal({"a": [1]}, {"a": [1.0]})


@pytest.mark.parametrize(
    ("value", "prompt", "stands"),
    [("31", "x31", False), ("31", "(31)", True), ("31", "310 31", True), ("-5", "is -5.", True), ("5", "15 25", False),
     ("Oslo", "Oslos", False), ("北京", "在北京市", True), ("", "x", False), ("904", "号码是904。", True), ("a b", "a b", True)],
)  # fmt: skip
def test_values_stand_whole(value, prompt, stands):
    assert fields.stands_in(value, prompt) is stands


def test_a_json_row():
    one = row("extract", PROMPT, json.dumps(RIGHT), kind="json", schema={"type": "object", "required": ["age"]})
    found = score(one, prompt_text(one), json.dumps(RIGHT))
    assert found["exact"] == found["json_equal"] == found["schema_valid"] == 1 and found["right"] == 3
    found = score(one, prompt_text(one), '{"city": "Oslo", "name": "Ada"}')
    assert (found["exact"], found["json_valid"], found["json_equal"], found["missing"], found["schema_valid"]) == (
        0,
        1,
        0,
        1,
        0,
    )
    found = score(one, prompt_text(one), "Ada")
    assert (found["json_valid"], found["missing"], found["schema_valid"]) == (0, 3, 0)
    # The same value, written otherwise, is equal but not exact.
    found = score(one, prompt_text(one), json.dumps(RIGHT, indent=2))
    assert (found["exact"], found["json_equal"]) == (0, 1)


TOOLS = [
    {"type": "function", "function": {"name": "mail", "parameters": {
        "type": "object", "required": ["to"], "properties": {"to": {"type": "string"}, "n": {"type": "integer"}}}}},
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


MAIL = call("mail", {"to": "Ada", "n": 31})


def tools(answer, right=MAIL):
    one = row("tools", PROMPT, right, kind="tools", tools=TOOLS)
    found = score(one, prompt_text(one), answer)
    return {key: value for key, value in found.items() if key not in ("rows", "tool_rows") and value}


def test_tool_calls():
    full = {"exact": 1, "tool_decision": 1, "tool_count": 1, "calls": 1, "calls_made": 1, "tool_name": 1, "tool_arguments": 1,
            "argument_fields": 2, "argument_right": 2, "tool_schema": 1}  # fmt: skip
    assert tools(call("mail", {"to": "Ada", "n": 31})) == full
    wrong = tools(call("mail", {"to": "Bo", "n": 31}))
    assert "tool_arguments" not in wrong and "exact" not in wrong and wrong["argument_misplaced"] == 1
    assert wrong["tool_schema"] == wrong["tool_name"] == 1 and wrong["argument_right"] == 1
    unfit = tools(call("mail", {"to": "Ada", "n": "31"}))
    assert "tool_schema" not in unfit and unfit["tool_name"] == 1 and unfit["argument_right"] == 1
    other = tools(call("time", {}))
    assert "tool_name" not in other and other["tool_schema"] == 1 and "argument_right" not in other
    assert "tool_schema" not in tools(call("nobody", {}))
    none = tools("I cannot do that.")
    assert none == {"calls": 1, "argument_fields": 2}
    twice = tools(call("mail", {"to": "Ada", "n": 31}) + "\n" + call("time", {}))
    assert "tool_count" not in twice and twice["tool_arguments"] == 1 and twice["calls_made"] == 2
    assert tools("Sorry.", right="No tool fits.") == {"tool_decision": 1, "tool_count": 1}
    assert tools(call("time", {}), right="No tool fits.") == {"calls_made": 1, "tool_schema": 1}


def test_malformed_calls():
    assert calls_of("<tool_call>\nnothing\n</tool_call>") == []
    assert calls_of(call("mail", {"to": "A"})) == [("mail", True, {"to": "A"})]
    ((name, valid, _),) = calls_of('<tool_call>\n{"name": "mail", "arguments": {"to": "A"\n</tool_call>')
    assert (name, valid) == ("mail", False)


@pytest.mark.parametrize(
    ("text", "number"),
    [("2001 - 513 = 1488", "1488"), ("Answer: 007", "7"), ("1,204 of them", "1204"), ("1, 204", "204"), ("-3.50", "-3.50"),
     ("none", None), ("0", "0"), ("a" * 500 + " 12", "12")],
)  # fmt: skip
def test_last_numbers(text, number):
    assert last_number(text) == number


def test_text_and_recall_rows():
    one = row("needle", PROMPT, "Riga", kind="recall")
    assert score(one, prompt_text(one), "Oslo") == {
        "rows": 1,
        "exact": 0,
        "text_rows": 1,
        "from_prompt": 1,
        "recall_rows": 1,
        "recall": 0,
    }
    assert score(one, prompt_text(one), "Rome")["from_prompt"] == 0
    assert score(one, prompt_text(one), "Riga")["recall"] == 1
    number = row("arith", "2 + 2", "2 + 2 = 4", kind="number")
    assert score(number, "", "it is 4") == {"rows": 1, "exact": 0, "number_rows": 1, "number": 1}


SCHEMA = {
    "type": "object", "required": ["a"], "additionalProperties": False,
    "properties": {
        "a": {"type": ["integer", "null"], "minimum": 1, "maximum": 9}, "b": {"enum": ["x", 2]}, "c": {"const": True},
        "d": {"type": "array", "items": {"type": "string", "pattern": "^k", "maxLength": 3}, "minItems": 1, "maxItems": 2},
        "e": {"anyOf": [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}]},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [{"a": 1}, {"a": None}, {"a": 9.0}, {"a": 0}, {"a": 1.5}, {"a": True}, {}, {"a": 1, "z": 1}, {"a": 1, "b": "x"}, {"a": 1, "b": "2"},
     {"a": 1, "c": 1}, {"a": 1, "c": True}, {"a": 1, "d": []}, {"a": 1, "d": ["kk"]}, {"a": 1, "d": ["k", "k", "k"]}, {"a": 1, "d": ["x"]},
     {"a": 1, "d": ["kkkk"]}, {"a": 1, "e": 0.5}, {"a": 1, "e": 1}, {"a": 1, "e": 0}, {"a": 1, "e": "x"}, {"a": 1, "e": None}, [], "x"],
)  # fmt: skip
def test_schemas_against_jsonschema(value):
    import jsonschema

    check_schema(SCHEMA, "here")
    assert fits(value, SCHEMA) == jsonschema.Draft202012Validator(SCHEMA).is_valid(value)


def test_a_schema_that_is_not_understood_is_refused():
    for schema, said in (({"oneOf": []}, "'oneOf' is not supported"), ({"type": "text"}, "unknown type 'text'"),
                         ({"properties": {"a": {"$ref": "#"}}}, r"here\.a: the schema keyword"), ({"pattern": "("}, "pattern")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            check_schema(schema, "here")
    with pytest.raises(TypeError, match="a schema is an object, got int"):
        check_schema({"items": 3}, "here")


def test_the_right_answers_of_the_package_score_full():
    rows = read_rows()
    assert len(rows) == 600
    seen: set[str] = set()
    for one in rows:
        found = score(one, prompt_text(one), one.answer)
        seen |= set(found)
        for name, (_, top, bottom, _) in METRICS.items():
            if bottom in found:
                wrong = name in ("fields_missing", "fields_extra", "wrong_type", "other_field", "other_record", "invented",
                                 "argument_misplaced", "wrong_from_prompt")  # fmt: skip
                assert found[top] == (0 if wrong else found[bottom]), (one.task, one.number, name)
    assert {"json_rows", "tool_rows", "number_rows", "recall_rows", "text_rows", "calls"} <= seen
