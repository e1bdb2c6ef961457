"""The form's fields, and the requests that they become."""

from __future__ import annotations

import pytest

from qwen_fast.ui.settings import FIELDS, NUMBERS, checked
from qwen_fast.ui.texts import WORDS, Refusal, language, text

TOOL = '{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}'


def test_an_empty_form_asks_for_nothing():
    settings = checked({name: None for name in FIELDS} | {"system": "", "stop_strings": ""})
    assert (settings.request, settings.form, settings.model, settings.system) == ({}, {}, "", "")


def test_every_field_becomes_its_field_of_the_request():
    numbers = {number.name: (1 if number.whole else 0.5) for number in NUMBERS}
    form = {
        **numbers,
        "model": " demo ",
        "system": "Be brief.",
        "stop_strings": "\nEND\n\n 狐 \n",
        "schema": '{"type": "object"}',
        "tools": f'[{TOOL}, {{"type": "function", "function": {{"name": "f"}}}}]',
        "tool_choice": "f",
        "extra": '{"min_tokens": 3}',
    }
    settings = checked(form)
    request = dict(settings.request)
    assert {name: request.pop(name) for name in numbers} == numbers
    assert request.pop("stop") == ["END", " 狐 "]
    assert request.pop("response_format") == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
    }
    assert [tool["function"]["name"] for tool in request.pop("tools")] == ["get_weather", "f"]
    assert request.pop("tool_choice") == {"type": "function", "function": {"name": "f"}}
    assert request == {"min_tokens": 3}
    assert (settings.model, settings.system) == ("demo", "Be brief.")
    assert settings.form == form
    assert checked(settings.form) == settings


def test_whole_numbers_are_sent_as_such():
    request = checked({"seed": 2.0**53 - 1, "max_tokens": 16.0, "temperature": 0}).request
    assert request == {"seed": 2**53 - 1, "max_tokens": 16, "temperature": 0}
    assert all(isinstance(request[name], int) for name in ("seed", "max_tokens"))


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"temperature": 2.1}, r"temperature must be from 0 to 2, got 2.1"),
        ({"temperature": float("nan")}, "temperature must be a number, got nan"),
        ({"top_p": "x"}, "top_p must be a number, got 'x'"),
        ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"top_k": True}, "top_k must be a number, got True"),
        ({"seed": 2**53}, "seed must be from 0 to 9007199254740991, got 9007199254740992"),
        ({"max_tokens": 0}, "max_tokens must be from 1 to"),
        ({"presence_penalty": -3}, "presence_penalty must be from -2 to 2, got -3"),
        ({"system": "x" * 65537}, "System prompt has 65537 bytes; the limit is 65536"),
        ({"stop_strings": "\n".join("abcdefghijklmnopq")}, "17 stop strings; the limit is 16"),
        ({"stop_strings": "狐" * 86}, "Stop strings, one a line has 258 bytes; the limit is 256"),
        ({"schema": '{"type": }'}, "JSON schema of the answer is not JSON: Expecting value, line 1, column 10"),
        ({"schema": "[1]"}, "must be an object, got a list"),
        ({"schema": "NaN"}, "not JSON: NaN"),
        ({"schema": "9" * 5000}, "not JSON: Exceeds the limit"),
        ({"schema": '{"a":' * 30 + "1" + "}" * 30}, "nested deeper than 24 levels"),
        ({"schema": "[" * 60000}, "nested deeper|not JSON"),
        ({"tools": "{}"}, "must be a list of 1 to 128 objects, got an object"),
        ({"tools": "[]"}, "got a list of 0"),
        ({"tools": "[3]"}, "Tool 1: must be an object with a function, got a number"),
        ({"tools": '[{"name": "a b"}]'}, "Tool 1: name must be 1 to 64 letters, digits, - and _, got 'a b'"),
        ({"tools": '[{"name": "a"}, {"name": "a"}]'}, "Tool 2: the name a is there twice"),
        ({"tools": '[{"name": "a", "parameters": []}]'}, "parameters must be a JSON schema, got a list"),
        ({"tools": '[{"name": "a", "description": 1}]'}, "description must be a text, got a number"),
        ({"tool_choice": "auto"}, "Tool choice is 'auto', and there are no tools"),
        ({"tools": f"[{TOOL}]", "tool_choice": "nobody"}, "one of get_weather, got 'nobody'"),
        ({"extra": "[]"}, "Other fields must be a JSON object, got a list"),
        ({"extra": '{"messages": []}'}, "cannot set 'messages'"),
        ({"extra": '{"seed": 1}', "seed": 2}, "cannot set 'seed'"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_value_and_limit(form, said):
    with pytest.raises(Refusal, match=said) as raised:
        checked(form)
    assert raised.value.said("zh") != raised.value.said("en")


def test_words_are_complete():
    for name, words in WORDS.items():
        assert len(words) == 2 and all(words), name
        fields = [sorted(part.split("}")[0] for part in one.split("{")[1:]) for one in words]
        assert fields[0] == fields[1], name
    for name in FIELDS:
        assert text(name, "en") and text(name, "zh")


@pytest.mark.parametrize(
    ("choice", "header", "expected"),
    [
        ("auto", "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("auto", "en-GB,zh;q=0.9", "en"),
        ("auto", "fr,zh;q=0.5", "zh"),
        ("auto", "en;q=bad,zh;q=0.1", "zh"),
        ("auto", "", "en"),
        ("en", "zh", "en"),
        ("zh", "en", "zh"),
    ],
)
def test_language(choice, header, expected):
    assert language(choice, header) == expected
