"""The parser of tool calls, and the grammars that force them."""

from __future__ import annotations

import gc
import itertools
import json
import re
import time

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_fast import LLM, SamplingParams
from qwen_fast.structured import MAX_SCHEMA_BYTES
from qwen_fast.tools import HermesParser, tool_grammar


def parse(pieces, **options):
    """Content, and the calls as [name, arguments] in order, from a text in pieces."""
    numbers = itertools.count()
    parser = HermesParser(make_id=lambda: f"id{next(numbers)}", **options)
    content, calls, ids = "", [], []
    for delta in [*itertools.chain.from_iterable(map(parser.feed, pieces)), *parser.finish()]:
        assert delta.keys() in ({"content"}, {"tool_calls"})
        content += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            function = part["function"]
            if "id" in part:
                assert part.keys() == {"index", "id", "type", "function"}
                assert part["index"] == len(calls)
                assert part["type"] == "function"
                ids.append(part["id"])
                calls.append([function["name"], ""])
            else:
                assert "name" not in function
                assert part["index"] == len(calls) - 1, "a call goes on after the next has begun"
            calls[-1][1] += function["arguments"]
    assert ids == [f"id{i}" for i in range(len(calls))]
    assert parser.finish() == []
    return content, calls


def call(name, arguments, close="\n</tool_call>"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}{close}'


CASES = {
    "": ("", []),
    "plain text\n": ("plain text\n", []),
    "  ": ("  ", []),
    call("f", "{}"): ("", [["f", "{}"]]),
    call("f", '{"a": [1, {"b": "}"}], "c": "\\"}"}'): ("", [["f", '{"a": [1, {"b": "}"}], "c": "\\"}"}']]),
    "Let me look.\n" + call("f", "{}") + "\n" + call("g", "{ }") + "\n": ("Let me look.", [["f", "{}"], ["g", "{ }"]]),
    call("f", "{}") + "\n\nDone.": ("\n\nDone.", [["f", "{}"]]),
    call("f", '{"x": "</tool_call>"}'): ("", [["f", '{"x": "</tool_call>"}']]),
    call("f", '{"x": "<tool_call>"}') + "!": ("!", [["f", '{"x": "<tool_call>"}']]),
    '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>': ("", [["f", '{"a":1}']]),
    '<tool_call>{"name": "f", "parameters": {"a":1}}</tool_call>': ("", [["f", '{"a":1}']]),
    '<tool_call>{"arguments": {"a": "ä"}, "name": "f"}</tool_call>': ("", [["f", '{"a": "ä"}']]),
    '<tool_call>{"name": "f"}</tool_call>': ("", [["f", "{}"]]),
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>': ("", [["f", '{"a": 1}']]),
    '<tool_call>{"name": "f\\u00e4\\"", "arguments": {}}</tool_call>': ("", [['fä"', "{}"]]),
    # the closing tag is missing
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}': ("", [["f", '{"a": 1}']]),
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_': ("", [["f", '{"a": 1}']]),
    call("f", "{}", "\n") + call("g", "{}"): ("", [["f", "{}"], ["g", "{}"]]),
    '<tool_call>{"name": "f"}': ("", [["f", "{}"]]),
    # cut off inside the arguments, and inside the name
    '<tool_call>\n{"name": "f", "arguments": {"a": "x': ("", [["f", '{"a": "x']]),
    ' <tool_call>\n{"name": "get_w': (' <tool_call>\n{"name": "get_w', []),
    "a <tool_ca": ("a <tool_ca", []),
    # malformed: content, whole
    "<tool_call>": ("<tool_call>", []),
    "<tool_call></tool_call>": ("<tool_call></tool_call>", []),
    "a\n<tool_call>not JSON</tool_call>\nb": ("a\n<tool_call>not JSON</tool_call>\nb", []),
    '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>': ('<tool_call>[{"name": "f", "arguments": {}}]</tool_call>', []),
    '<tool_call>{"name": 3, "arguments": {}}</tool_call>': ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', []),
    '<tool_call>{"name": "", "arguments": {}}</tool_call>': ('<tool_call>{"name": "", "arguments": {}}</tool_call>', []),
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>': ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', []),
    '<tool_call>{"name": "f<", "arguments": 1}</tool_call>': ('<tool_call>{"name": "f<", "arguments": 1}</tool_call>', []),
    "</tool_call> <tool_call": ("</tool_call> <tool_call", []),
    "<tool_call>oops " + call("f", "{}"): ("<tool_call>oops ", [["f", "{}"]]),
    "<tool_call> <tool_call><tool_call>" + call("f", "{}"): ("<tool_call> <tool_call><tool_call>", [["f", "{}"]]),
    # after the arguments something else than the end
    '<tool_call>{"name": "f", "arguments": {"a": 1}, "x": 2}</tool_call>': (', "x": 2}</tool_call>', [["f", '{"a": 1}']]),
    '<tool_call>{"name": "f", "arguments": {"a": 1}} </tool_x>': ("} </tool_x>", [["f", '{"a": 1}']]),
    '<tool_call>{"name": "f", "arguments": {"a": ]} x': ("} x", [["f", '{"a": ]']]),
}  # fmt: skip


@pytest.mark.parametrize("text", CASES, ids=[str(i) for i in range(len(CASES))])
def test_cases(text):
    assert parse([text]) == CASES[text]
    assert parse(text) == CASES[text]
    for cut in range(len(text)):
        assert parse([text[:cut], "", text[cut:]]) == CASES[text]


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<tool_call", "</tool", "<", ">", "\n", " ", "{", "}", "[", "]", '"', "\\", ",", ":",
    '{"name": "f", "arguments": {', '"name"', '"arguments"', '"a": 1', "text", "ä", "}}\n</tool_call>",
    call("f", '{"a": "b"}'), call("g", "{}", ""), '<tool_call>{"arguments": {}, "name": "h"}</tool_call>',
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join), st.data())
@example("<tool_call>" * 3, None)
def test_any_split_gives_the_same_deltas(text, data):
    whole = parse([text])
    assert parse(text) == whole
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
        assert parse([text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]) == whole
    content, calls = whole
    assert parse([text], parallel=False) == (content, calls[:1])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join))
def test_nothing_is_lost(text):
    """All but whitespace and the frames of calls comes out, in order, as content, name or arguments."""
    content, calls = parse([text])
    if not calls:
        assert content == text
    wanted = iter(text)
    assert all(char in wanted for char in content), "content is not in the text's order"
    for name, arguments in calls:
        assert name in text
        if arguments not in ("{}", '{"a": "b"}'):
            assert arguments in text
    frames = 40 * text.count("<tool_call>")  # the tags, the keys' names and punctuation of one call are fewer
    kept = len(re.sub(r"\s", "", content)) + sum(len(re.sub(r"\s", "", "".join(one))) for one in calls)
    assert kept >= len(re.sub(r"\s", "", text)) - frames - len("</tool_call>") * text.count("</tool_call>")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
            st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.text(), st.lists), max_size=3),
        ),
        max_size=4,
    )
)
def test_what_the_chat_template_writes_comes_back(calls):
    text = "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls
    )
    content, found = parse([text])
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize(
    "unit",
    ["<tool_call>", "<", "<tool_call>{", '<tool_call>{"name": "', call("f", "{}"), " ", "\n<tool_call>x", "</tool_call>",
     '<tool_call>{"name": "f", "arguments": {"a":', "{" * 10, '<tool_call>{"x": '],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "<tool_call>", '<tool_call>{"name": "f", "arguments": {"x": "'])
def test_linear_time(unit, prefix):
    def seconds(size, step):
        text = prefix + unit * (size // len(unit))
        parser = HermesParser()
        gc.collect(0)
        began = time.thread_time()  # of this thread alone: servers of other tests may still be there
        for start in range(0, len(text), step):
            parser.feed(text[start : start + step])
        parser.finish()
        return time.thread_time() - began

    for step in (7, 10**9):
        seconds(2000, step)
        small = min(seconds(10_000, step) for _ in range(2))
        large = min(seconds(80_000, step) for _ in range(2))  # a full collection would be all of one
        assert large < 8 * 4 * small + 0.05, (
            f"{small * 1e3:.2f} ms for 10,000 characters, {large * 1e3:.2f} ms for 80,000"
        )


def test_ids_are_fresh_and_calls_are_counted():
    parser = HermesParser()
    parser.feed(call("f", "{}") + call("g", "{}"))
    assert parser.num_calls == 2
    found = [HermesParser().feed(call("f", "{}"))[0]["tool_calls"][0]["id"] for _ in range(20)]
    assert len(set(found)) == 20
    assert all(re.fullmatch("call_[0-9a-f]{24}", one) for one in found)


# -- grammars

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"$ref": "#/$defs/city"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 7},
                },
                "required": ["city"],
                "additionalProperties": False,
                "$defs": {"city": {"type": "string", "maxLength": 12}},
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": 'odd "name" ä',
            "parameters": {
                "properties": {"on": {"type": "boolean"}},
                "required": ["on"],
                "additionalProperties": False,
            },
        },
    },
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", kv_cache_tokens=8192) as loaded:
        yield loaded


@pytest.mark.parametrize("function", [None, "get_weather", 'odd "name" ä'])
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls(llm, function, parallel):
    form = tool_grammar(TOOLS, llm.tokenizer, function=function, parallel=parallel)
    params = SamplingParams(n=8, temperature=1.5, top_p=1, top_k=0, max_tokens=600, structured_outputs=form, seed=5)
    (output,) = llm.generate("Hello", params)
    names = set()
    for sample in output.outputs:
        assert sample.finish_reason == "stop"
        assert sample.token_ids[0] == llm.tokenizer.token_id("<tool_call>")
        content, calls = parse([sample.text])
        assert content == ""
        assert len(calls) == 1 or (parallel and calls)
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), {"type": "object", **SCHEMAS[name]})
            names.add(name)
    assert names <= ({function} if function else set(SCHEMAS))
    assert names


@pytest.mark.parametrize(
    ("tools", "options", "error", "message"),
    [
        ([], {}, ValueError, "tools is empty"),
        (TOOLS, {"function": "no_such"}, ValueError, "no tool is named 'no_such'"),
        ([{"type": "function", "function": {}}], {}, ValueError, r"tools\[0\]: expected a function with a 'name', got None"),
        ([{"name": "f", "parameters": [1]}], {}, TypeError, r"tools\[0\] \(f\): parameters must be a JSON schema"),
        ([{"name": "f", "parameters": {"type": "string"}}], {}, ValueError, r"tools\[0\] \(f\): the type of parameters"),
        ([{"name": "f", "parameters": {"x": {"multipleOf": 99999}}}], {}, ValueError, r"tools\[0\] \(f\): parameters: multi"),
        (
            [{"name": f"f{i}", "parameters": {"description": "x" * 30000}} for i in range(3)],
            {},
            ValueError,
            f"the limit is {MAX_SCHEMA_BYTES}",
        ),
    ],
)  # fmt: skip
def test_tools_that_are_wrong(llm, tools, options, error, message):
    with pytest.raises(error, match=message):
        tool_grammar(tools, llm.tokenizer, **options)
