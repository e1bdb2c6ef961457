"""Structured output of LLM and AsyncLLM: forms, limits, masks, slow readers, failures."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import time

import jsonschema
import numpy
import pytest
from schemas import SCHEMAS, closed, text, whole

from qwen_fast import LLM, EngineError, SamplingParams, StructuredOutputsParams
from qwen_fast.structured import MAX_CHOICES, MAX_GRAMMAR_BYTES, MAX_REGEX_BYTES, MAX_SCHEMA_BYTES, checked_schema

PERSON = closed(name=text(12), age=whole(0, 150))


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", kv_cache_tokens=16384) as loaded:
        yield loaded


def hot(form, **more) -> SamplingParams:
    values = {"temperature": 1.5, "top_p": 1.0, "top_k": 0, "max_tokens": 400, "structured_outputs": form}
    return SamplingParams(**{**values, **more})


def only(llm, form, **more):
    """The one output for a form."""
    (result,) = llm.generate("Once upon a time", hot(form, **more))
    return result.outputs[0]


# -- what comes out


def check_acceptance(llm, schemas, samples):
    outputs = llm.generate(
        ["Write something."] * len(schemas), [hot({"json": schema}, n=samples, seed=7) for schema in schemas]
    )
    finished = 0
    for schema, output in zip(schemas, outputs):
        for sample in output.outputs:
            if sample.finish_reason == "stop":
                finished += 1
                jsonschema.validate(json.loads(sample.text), schema, jsonschema.Draft202012Validator)
    assert finished >= 0.95 * samples * len(schemas), f"{finished} of {samples * len(schemas)} finished with stop"


def test_schemas(llm):
    check_acceptance(llm, SCHEMAS[::2], 1)
    check_acceptance(llm, SCHEMAS[1::2], 1)


@pytest.mark.long
def test_five_hundred_generations_over_fifty_schemas(llm):
    assert len(SCHEMAS) == 50
    check_acceptance(llm, SCHEMAS, 10)


@pytest.mark.long
def test_masks_of_the_real_vocabulary_take_less_than_100_us(shared_dir):
    tokenizer = shared_dir / "qwen2.5" / "tokenizer"
    if not tokenizer.is_dir():
        pytest.skip("the real tokenizer is not here")
    script = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "masks.py"
    command = [sys.executable, str(script), "--tokenizer", str(tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    found = re.search(r"texts: ([\d.]+) us a mask", done.stdout)
    assert found is not None and float(found[1]) < 100, done.stdout


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"regex": "(ä|日本|🙂){2,4}"}, "(ä|日本|🙂){2,4}"),
        ({"choice": ["red", "green", 'a "quoted"\n\x01 one']}, 'red|green|a "quoted"\n\x01 one'),
        ({"choice": ["only"]}, "only"),
        ({"grammar": 'start: "x" /[a-f]{2,4}/ ("," start)?'}, "x[a-f]{2,4}(,x[a-f]{2,4})*"),
        ({"grammar": 'root ::= "yes" | "no" [0-9]{2}'}, "yes|no[0-9]{2}"),
        ({"json": json.dumps(whole(7, 9))}, "[789]"),
        ({"json": {"const": [1, {"a": 2}]}}, r'\[1, ?\{"a": ?2\}\]'),
        ({"json": {"const": [1, {"a": 2}]}, "disable_any_whitespace": True}, r'\[1,\{"a":2\}\]'),
        ({"json": closed(a={"const": 1}), "whitespace_pattern": r"\n"}, r'\n?\{\n?"a"\n?:\n?1\n?\}\n?'),
    ],
)
def test_forms(llm, form, pattern):
    for seed in range(3):
        output = only(llm, form, seed=seed)
        assert output.finish_reason == "stop"
        assert output.stop_reason is None
        assert re.fullmatch(pattern, output.text), output.text


@pytest.mark.parametrize("form", ["choice", "enum"])
def test_thousands_of_choices(llm, form):
    texts = [f"choice number {i}" for i in range(2500)]
    output = only(llm, {"choice": texts} if form == "choice" else {"json": {"enum": texts}}, max_tokens=20)
    assert (output.text if form == "choice" else json.loads(output.text)) in texts


def test_json_object(llm):
    outputs = llm.generate(["Once"] * 6, hot({"json_object": True}, max_tokens=150))
    for output in (result.outputs[0] for result in outputs):
        assert output.text.startswith("{")
        if output.finish_reason == "stop":
            assert isinstance(json.loads(output.text), dict)


def test_samples_are_the_same_as_one_by_one(llm):
    """Matchers are not shared, and what runs beside a request changes nothing."""
    form = {"json": PERSON}
    (together,) = llm.generate("Hello", hot(form, n=4, seed=3))
    texts = [output.text for output in together.outputs]
    assert len(set(texts)) > 1
    assert [output.text for output in llm.generate("Hello", hot(form, n=4, seed=3))[0].outputs] == texts
    streamed = ["", "", "", ""]
    for increment in llm.stream("Hello", hot(form, n=4, seed=3)):
        streamed[increment.index] += increment.text
    assert streamed == texts


def test_greedy_and_the_same_with_logprobs(llm):
    plain = only(llm, {"json": PERSON}, temperature=0)
    output = only(llm, {"json": PERSON}, temperature=0, logprobs=1)
    assert output.text == plain.text
    assert len(output.logprobs) == len(output.token_ids)
    jsonschema.validate(json.loads(output.text), PERSON)


def test_older_name_and_dict():
    params = SamplingParams(guided_decoding=StructuredOutputsParams(regex="a"))
    assert params.structured_outputs == StructuredOutputsParams(regex="a")
    assert SamplingParams(structured_outputs={"regex": "a"}) == params
    with pytest.raises(ValueError, match="cannot both be given"):
        SamplingParams(structured_outputs={"regex": "a"}, guided_decoding={"regex": "a"})
    with pytest.raises(ValueError, match="ignore_eos"):
        SamplingParams(structured_outputs={"regex": "a"}, ignore_eos=True)
    with pytest.raises(TypeError, match="structured_outputs must be StructuredOutputsParams or a dict, got str"):
        SamplingParams(structured_outputs="{}")
    with pytest.raises(NotImplementedError, match="structural_tag"):
        StructuredOutputsParams(regex="a", structural_tag={"x": 1})


# -- what is refused


def nested(depth):
    schema = {"type": "null"}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


REFUSED = [
    ({}, ValueError, "exactly one of json, regex, choice, grammar, json_object; none is given"),
    ({"json_object": False}, ValueError, "none is given"),
    ({"json": {}, "regex": "a"}, ValueError, "json, regex are given"),
    ({"jsn": {}}, ValueError, "no field 'jsn'"),
    ({"json": 3}, TypeError, "json must be a JSON schema"),
    ({"json": "{"}, ValueError, "json is not valid JSON"),
    ({"json": '{"minimum": NaN}'}, ValueError, "NaN is no JSON number"),
    ({"json": {"minimum": float("nan")}}, ValueError, "json cannot be written as JSON"),
    ({"json": {"const": "\ud800"}}, ValueError, "json cannot be written as JSON"),
    ({"json": {"x": "y" * MAX_SCHEMA_BYTES}}, ValueError, rf"json has \d+ bytes, the limit is {MAX_SCHEMA_BYTES}"),
    ({"json": "[" * 60000}, ValueError, "json is not valid JSON"),
    ({"json": nested(33)}, ValueError, "nested more than 32 levels deep"),
    ({"json": {"enum": list(range(9000))}}, ValueError, "json has more than 8192 values"),
    (
        {"json": {"multipleOf": 999983}},
        ValueError,
        "multipleOf is 999983; without decimal points the limit is 10000",
    ),
    ({"json": {"multipleOf": 1e300}}, ValueError, "multipleOf is 1e\\+300"),
    ({"json": {"multipleOf": 10**400}}, ValueError, "multipleOf is 10000.*; its limits are 1e-9 and 1e9"),
    ({"json": {"multipleOf": float("inf")}}, ValueError, "multipleOf is inf; its limits are"),
    ({"json": {"multipleOf": 0.000012345}}, ValueError, "multipleOf is 1.2345e-05"),
    ({"json": {"anyOf": [{"multipleOf": 6000}, {"multipleOf": 0.5001}]}}, ValueError, "with those before it 11001"),
    ({"regex": "a" * (MAX_REGEX_BYTES + 1)}, ValueError, f"regex has 8193 bytes, the limit is {MAX_REGEX_BYTES}"),
    ({"regex": ""}, ValueError, "regex is empty"),
    ({"regex": b"a"}, TypeError, "regex must be a text, got bytes"),
    ({"regex": "a\0"}, ValueError, "NUL character at position 1"),
    ({"choice": []}, ValueError, "choice is empty"),
    ({"choice": ["a"] * (MAX_CHOICES + 1)}, ValueError, f"choice has 4097 texts, the limit is {MAX_CHOICES}"),
    ({"choice": ["a", 1]}, TypeError, r"choice\[1\] must be a text, got int"),
    ({"choice": "ab"}, TypeError, "choice must be a list of texts"),
    ({"choice": ["a" * 40000, "b" * 40000]}, ValueError, "choice has 8000[0-9] bytes"),
    ({"grammar": "a" * (MAX_GRAMMAR_BYTES + 1)}, ValueError, "grammar has 131073 bytes"),
    ({"grammar": 'r ::= "a"\n' * 501}, ValueError, "grammar has 501 rules with '::=', the limit is 500"),
    ({"grammar": 'start: %json {"multipleOf": 999983}'}, ValueError, "grammar: multipleOf is 999983"),
    ({"grammar": 'start: %json {"\\u006dultipleOf" : 1e9}'}, ValueError, "grammar: multipleOf is"),
    ({"json": {}, "whitespace_pattern": " " * 300}, ValueError, "whitespace_pattern has 300 bytes, the limit is 256"),
    ({"json": {}, "disable_any_whitespace": 1}, TypeError, "disable_any_whitespace must be True or False"),
]


@pytest.mark.parametrize(("form", "error", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refused_at_once(form, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(structured_outputs=form)


HOSTILE = [
    ({"json": {"$ref": "http://example.com/schema"}}, "json"),
    ({"json": {"not": {}}}, "json: Unimplemented keys"),
    ({"json": {"type": "string", "format": "no-such-format"}}, "json: Unknown format: no-such-format"),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 4}}, "json: Unsatisfiable schema"),
    ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "json"),
    ({"json": {"type": "string", "pattern": "(?=a)b"}}, "json"),
    ({"json": {"type": "no-such-type"}}, "json"),
    ({"regex": "(a"}, "regex: .*unclosed group"),
    ({"regex": r"(a)\1"}, "regex: .*backreferences"),
    ({"regex": "(" * 4000 + "a" + ")" * 4000}, "regex"),
    ({"grammar": 'foo: "a"'}, "grammar"),
    ({"grammar": "start: ("}, "grammar"),
    ({"grammar": 'root ::= "a" foo'}, "grammar: .*foo"),
    ({"grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000}, "grammar"),
    ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "grammar: .*too deeply nested"),
]


@pytest.mark.parametrize(("form", "message"), HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])
def test_refused_by_the_compiler(llm, form, message):
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"structured_outputs.{message}"):
        only(llm, form)
    assert time.monotonic() - began < 5
    assert only(llm, {"regex": "ok"}).text == "ok"


LARGE = [
    {"regex": "(a{1000}){1000}"},
    {"regex": "(x+x+)+y"},
    {"regex": "(.*a){30}b"},
    {"json": {"type": "string", "maxLength": 10**6}},
    {"json": {"type": "array", "minItems": 10**9}},
    {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}},
    {"grammar": 'start: a\na: a a | "x" | ""'},
    {"grammar": "start: /(?s:.*)/ & ~/(?s:.*)AAA(?s:.*)/"},
]


@pytest.mark.parametrize("form", LARGE, ids=[str(i) for i in range(len(LARGE))])
def test_large_forms_cost_little(llm, form):
    """Whether it is refused or runs: soon, and the engine goes on."""
    began = time.monotonic()
    try:
        only(llm, form, max_tokens=20)
    except ValueError as error:
        assert "structured_outputs" in str(error)
    assert time.monotonic() - began < 5
    assert only(llm, {"regex": "ok"}).text == "ok"


def test_a_stuck_request_fails_alone(llm):
    """Banned words leave nothing that the grammar allows."""
    stuck = hot({"choice": ["no"]}, logit_bias=None, allowed_token_ids=llm.encode("x"))
    with pytest.raises((ValueError, EngineError, RuntimeError), match="every token is masked"):
        llm.generate("Hello", stuck)
    beside = llm.generate("Hello", hot({"json": PERSON}))
    jsonschema.validate(json.loads(beside[0].outputs[0].text), PERSON)


def test_min_tokens_that_the_grammar_cannot_give(llm):
    with pytest.raises(RuntimeError, match="every token is masked"):
        only(llm, {"choice": ["a"]}, min_tokens=50)


def test_a_grammar_that_fails_midway_fails_its_request_alone(llm, monkeypatch):
    from qwen_fast import _guided

    real = _guided.GuidedRequest.set_mask
    count = iter(range(100))

    def sometimes_empty(self, words):
        real(self, numpy.zeros_like(words) if next(count) == 3 else words)

    monkeypatch.setattr(_guided.GuidedRequest, "set_mask", sometimes_empty)
    with pytest.raises(ValueError, match="structured_outputs: the grammar cannot go on"):
        only(llm, {"json": PERSON})
    monkeypatch.undo()
    assert only(llm, {"regex": "ok"}).text == "ok"


def test_schema_text_keeps_the_order_of_keys():
    assert checked_schema("json", {"b": 1, "a": [True, None, "ä"]}) == '{"b":1,"a":[true,null,"ä"]}'
    assert json.loads(checked_schema("json", True)) is True
