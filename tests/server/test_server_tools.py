"""Structured output and tools over HTTP, with the official client."""

from __future__ import annotations

import json
import re

import jsonschema
import openai
import pytest

MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city"],
    "additionalProperties": False,
}
TIME = {
    "type": "object",
    "properties": {"zone": {"type": "string", "maxLength": 8}},
    "required": ["zone"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "parameters": TIME}},
]
PARAMETERS = {"get_weather": WEATHER, "get_time": TIME}


def create(client, **options):
    values = {"model": "demo", "messages": MESSAGES, "max_tokens": 300, "temperature": 1.2, "seed": 3}
    return client.chat.completions.create(**{**values, **options})


def streamed(client, **options):
    """Content, tool calls and finish reason of choice 0, put together from a stream."""
    content, calls, reason = "", {}, None
    for chunk in create(client, stream=True, **options):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for part in choice.delta.tool_calls or ():
                one = calls.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
                one["id"] += part.id or ""
                one["name"] += part.function.name or ""
                one["arguments"] += part.function.arguments or ""
    return content, [calls[index] for index in sorted(calls)], reason


# -- structured output

FORMATS = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}}, PERSON),
    ({"extra_body": {"structured_outputs": {"json": PERSON}}}, PERSON),
    ({"extra_body": {"guided_json": PERSON}}, PERSON),
    ({"extra_body": {"guided_json": json.dumps(PERSON)}}, PERSON),
    ({"extra_body": {"structured_outputs": {"regex": "[0-9]{3}"}}}, "[0-9]{3}"),
    ({"extra_body": {"guided_regex": "[a-f]{2}[0-9]"}}, "[a-f]{2}[0-9]"),
    ({"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}, "yes|no"),
    ({"extra_body": {"guided_choice": ["yes", "no"]}}, "yes|no"),
    ({"extra_body": {"structured_outputs": {"grammar": 'start: "x" /[0-9]/'}}}, "x[0-9]"),
    ({"extra_body": {"guided_grammar": 'root ::= "a" | "b"'}}, "a|b"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), FORMATS, ids=[str(i) for i in range(len(FORMATS))])
def test_forms(client, options, expected):
    choice = create(client, **options).choices[0]
    assert choice.finish_reason == "stop"
    if isinstance(expected, str):
        assert re.fullmatch(expected, choice.message.content)
    else:
        jsonschema.validate(json.loads(choice.message.content), expected)
    assert streamed(client, **options) == (choice.message.content, [], "stop")


def test_json_object(client):
    choice = create(client, response_format={"type": "json_object"}).choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert create(client, response_format={"type": "text"}).choices[0].message.content


def test_the_client_parses_into_its_own_type(client):
    from pydantic import BaseModel, Field

    class Person(BaseModel):
        name: str = Field(max_length=10)
        age: int = Field(ge=0, le=99)

    answer = client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=Person, max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_completions_and_samples(client):
    answer = client.completions.create(
        model="demo", prompt=["One", "Two"], n=2, max_tokens=50, extra_body={"guided_regex": "[0-9]{4}"}
    )
    assert len(answer.choices) == 4
    assert all(re.fullmatch("[0-9]{4}", choice.text) for choice in answer.choices)
    assert all(choice.finish_reason == "stop" for choice in answer.choices)


REFUSED = [
    ({"extra_body": {"guided_regex": "(a"}}, "unclosed group"),
    ({"extra_body": {"guided_regex": "a" * 10_000}}, "regex has 10000 bytes, the limit is 8192"),
    ({"extra_body": {"guided_json": {"type": "nothing"}}}, "json"),
    ({"extra_body": {"guided_json": "{"}}, "json is not valid JSON"),
    ({"extra_body": {"guided_json": {"multipleOf": 123457}}}, "multipleOf is 123457"),
    ({"extra_body": {"guided_choice": []}}, "guided_choice"),
    ({"extra_body": {"guided_choice": ["a"], "guided_regex": "a"}}, "only one form"),
    ({"extra_body": {"guided_grammar": "start: ("}}, "grammar"),
    ({"extra_body": {"guided_regex": "a", "ignore_eos": True}}, "ignore_eos"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, "Unimplemented"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
      "tool_choice": "required"}, "the type of parameters must be 'object', got 'array'"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
      "tool_choice": "required"}, "Unimplemented"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "nope"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
@pytest.mark.parametrize("stream", [False, True])
def test_refused(client, options, message, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, stream=stream, **options)
    assert message in caught.value.message
    assert create(client, extra_body={"guided_regex": "ok"}).choices[0].message.content == "ok"


# -- tools


def check_calls(calls, names):
    for one in calls:
        assert one["name"] in names
        assert one["id"].startswith("call_")
        jsonschema.validate(json.loads(one["arguments"]), PARAMETERS[one["name"]])
    assert len({one["id"] for one in calls}) == len(calls)


def whole_calls(message):
    return [
        {"id": one.id, "name": one.function.name, "arguments": one.function.arguments}
        for one in message.tool_calls or ()
    ]


@pytest.mark.parametrize("parallel", [None, True, False])
def test_required(client, parallel):
    options = {"tools": TOOLS, "tool_choice": "required"}
    if parallel is not None:
        options["parallel_tool_calls"] = parallel
    choice = create(client, **options).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    calls = whole_calls(choice.message)
    check_calls(calls, PARAMETERS)
    assert len(calls) == 1 if parallel is False else calls
    content, again, reason = streamed(client, **options)
    assert content == ""
    assert reason == "tool_calls"
    assert [(one["name"], one["arguments"]) for one in again] == [(one["name"], one["arguments"]) for one in calls]


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_named(client, name):
    options = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": name}}, "n": 2}
    for choice in create(client, **options).choices:
        calls = whole_calls(choice.message)
        assert calls
        check_calls(calls, [name])
        assert choice.message.content is None
    _, calls, _ = streamed(client, **{**options, "n": 1})
    check_calls(calls, [name])
    assert calls


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_auto_and_none(client, choice):
    """The demo model was not taught to call tools: what it says comes as content, whatever it is."""
    found = create(client, tools=TOOLS, tool_choice=choice, max_tokens=60).choices[0]
    assert found.finish_reason in ("stop", "length", "tool_calls")
    if choice == "none":
        assert found.message.tool_calls is None
        assert found.message.content
    content, calls, _ = streamed(client, tools=TOOLS, tool_choice=choice, max_tokens=60)
    assert content == (found.message.content or "")
    assert len(calls) == len(found.message.tool_calls or ())


def test_auto_parses_what_the_model_writes(client):
    """A grammar in the place of a model that calls a tool by itself."""
    said = 'I will look.\n<tool_call>\n{"name": "get_time", "arguments": {"zone": "CET"}}\n</tool_call>'
    options = {"tools": TOOLS, "tool_choice": "auto", "extra_body": {"structured_outputs": {"choice": [said]}}}
    choice = create(client, **options).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I will look."
    (one,) = whole_calls(choice.message)
    assert (one["name"], one["arguments"]) == ("get_time", '{"zone": "CET"}')
    content, (again,), reason = streamed(client, **options)
    assert (content, again["name"], again["arguments"]) == ("I will look.", "get_time", '{"zone": "CET"}')
    assert reason == "tool_calls"


def test_a_conversation_with_a_tools_answer(client):
    first = create(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0].message
    answer = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": '{"temperature": 21}'}
    messages = [*MESSAGES, first.model_dump(exclude_none=True), answer]
    followed = create(client, messages=messages, tools=TOOLS, max_tokens=20)
    assert followed.usage.prompt_tokens > 60
    assert followed.choices[0].message.content
