"""A conversation as it is kept, sent and shown."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from qwen_fast.ui.messages import (
    AnswerParts,
    escaped,
    fenced,
    for_page,
    for_request,
    indented,
    pending_call,
    turn_start,
    typed,
)
from qwen_fast.ui.panel import notice, panel
from qwen_fast.ui.stats import TurnStats, measured_cost, server_numbers

CALLS = [{"id": f"c{i}", "type": "function", "function": {"name": f"f{i}", "arguments": '{"a": 1}'}} for i in range(2)]
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "meta": {"end": "stopped"}},
    {"role": "user", "content": "call"},
    {"role": "assistant", "content": "", "tool_calls": CALLS, "meta": {"end": "", "stats": {}}},
    {"role": "tool", "content": "one", "tool_call_id": "c0"},
]


def test_requests_carry_openai_s_fields_only():
    sent = for_request(TALK, " Be kind. ")
    assert [message["role"] for message in sent] == ["system", "user", "user", "assistant", "tool"]
    assert sent[0]["content"] == " Be kind. " and not any("meta" in message for message in sent)
    assert for_request(TALK[:1], "  ") == [{"role": "user", "content": "hi"}]


def test_results_of_tools_are_typed_in_order():
    assert pending_call(TALK[:3]) is None
    assert pending_call(TALK[:4])[:2] == (1, 2) and pending_call(TALK)[2]["id"] == "c1"
    assert typed(TALK, "two") == {"role": "tool", "content": "two", "tool_call_id": "c1"}
    assert pending_call([*TALK, typed(TALK, "two")]) is None
    assert typed(TALK[:1], "x") == {"role": "user", "content": "x"}


def test_bubbles_know_their_message():
    shown, origin = for_page(TALK, "en")
    assert origin == [0, 1, 2, 3, 3, 4]
    assert shown[1]["content"].endswith("*[stopped]*")
    assert shown[3]["metadata"] == {"title": "Tool call: f0"} and '"a": 1' in shown[3]["content"]
    assert shown[5]["metadata"] == {"title": "Result of f0"}
    assert for_page(TALK, "zh")[0][3]["metadata"] == {"title": "工具调用：f0"}
    assert [turn_start(TALK, index) for index in range(5)] == [0, 0, 2, 2, 4]


def test_answers_are_joined_from_their_deltas():
    parts = AnswerParts(1000)
    for delta in (
        {"content": "狐"},
        {"content": "s"},
        {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        {"tool_calls": [{"index": 1, "function": {"name": "g"}}]},
    ):
        assert parts.add(delta)
    message = parts.message()
    assert message["content"] == "狐s" and message == parts.message()
    assert [(call["id"], call["function"]) for call in message["tool_calls"]] == [
        ("a", {"name": "f", "arguments": '{"x": 1}'}),
        ("call_1", {"name": "g", "arguments": ""}),
    ]
    small = AnswerParts(4)
    assert small.add({"content": "狐"}) and not small.add({"content": "狐"}) and small.message()["content"] == "狐"


# -- nothing of a model becomes HTML

MARKDOWN = MarkdownIt("commonmark")  # with HTML passed on, as far as its input has any
ATTACKS = [
    "<script>alert(1)</script>",
    "a\n<img src=x onerror=alert(1)>\nb",
    "```\n<b>code</b>\n```\n<b>prose</b>",
    "`<b>` and <b> and ``<b>` <b>`` <b>",
    "> ~~~\n<svg onload=alert(1)>",
    "```js `x`\n<i>\n",
    "    <u>indented\n\n<u>",
    "&lt;b&gt; <https://x.y> &#60;script>",
    "`a\n\nb <b> `",
]


def html_tokens(markdown: str) -> list[str]:
    """Pieces that would go into a page as HTML."""
    found = []
    for token in MARKDOWN.parse(markdown):
        found += [one.content for one in [token, *(token.children or [])] if one.type in ("html_block", "html_inline")]
    return found


@pytest.mark.parametrize("attack", ATTACKS)
def test_html_is_shown_as_text(attack):
    assert html_tokens(attack) or "&lt;" in attack or "    <u>" in attack or "~~~" in attack
    shown = html_tokens(escaped(attack))
    assert not [piece for piece in shown if "~~~" not in attack], shown


def test_code_is_left_as_it_is():
    code = "```cpp\nstd::vector<int> a; // a & b\n```"
    assert escaped(code) == code
    assert escaped("use `a<b>&c` here & <there>") == "use `a<b>&c` here &amp; &lt;there>"
    assert escaped("```\n<open") == "```\n<open"
    assert escaped("a ` b < c") == "a ` b &lt; c"


PIECES = st.lists(
    st.sampled_from(["`", "``", "```", "~~~", "\n", "\n\n", "<b>", "<!-- ", "-->", "a", "&", " ", "    ", "\\", "#", "- "]),
    max_size=24,
).map("".join)  # fmt: skip


@given(PIECES)
@settings(max_examples=300, deadline=None)
def test_prose_without_code_never_holds_html(content):
    """Where a reader of Markdown finds no code, nothing is HTML; and text comes out whole."""
    result = escaped(content)
    assert result.replace("&lt;", "<").replace("&amp;", "&") == content
    if "`" not in content and "~" not in content:
        assert html_tokens(result) == []


@given(st.text(alphabet="`~a\n", max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_content_ends_its_fence(content):
    tokens = MARKDOWN.parse(fenced(content, "json"))
    assert [token.type for token in tokens] == ["fence"]
    assert tokens[0].content == content + "\n"


def test_arguments_are_indented_where_they_are_json():
    assert indented('{"城": 1}') == '{\n  "城": 1\n}'
    assert indented('{"half') == '{"half' and indented("[" * 100000) == "[" * 100000


# -- the panel's numbers


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def chunk(content: str = "", **more: object) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": content}}], **more}


def test_numbers_of_an_answer():
    clock = Clock()
    stats = TurnStats(clock)
    assert stats.numbers() == {"tokens_out": 0, "exact": False}
    clock.now = 0.5
    stats.chunk(chunk("a", usage={"prompt_tokens": 7, "completion_tokens": 1}))
    assert stats.numbers() == {"tokens_out": 1, "exact": True, "tokens_in": 7, "ttft_s": 0.5}
    clock.now = 1.5
    stats.chunk(chunk("bcd", usage={"prompt_tokens": 7, "completion_tokens": 11}))
    clock.now = 9.0  # the end has no token, and takes no part in the speed
    stats.chunk({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 11, "cost": {"joules": 2.5}}})
    assert stats.numbers() == {
        "tokens_out": 11, "exact": True, "tokens_in": 7, "ttft_s": 0.5, "tokens_per_s": 10.0, "joules": 2.5
    }  # fmt: skip


def test_without_usage_chunks_are_counted_and_said_to_be_a_bound():
    clock = Clock()
    stats = TurnStats(clock)
    for moment in (1.0, 2.0, 3.0):
        clock.now = moment
        stats.chunk(chunk("x"))
    numbers = stats.numbers()
    assert (numbers["tokens_out"], numbers["exact"], numbers["tokens_per_s"]) == (3, False, 1.0)
    assert "≥ 3" in panel(numbers, "en")
    stats.chunk({"choices": ["bad", {"index": 1, "delta": {"content": "other"}}, {"finish_reason": "length"}]})
    assert stats.numbers()["tokens_out"] == 3 and stats.finish_reason == "length"


def test_cost_is_shown_only_where_it_was_measured():
    assert measured_cost({}) == measured_cost({"cost": "?"}) == measured_cost({"cost": {"joules": float("nan")}}) == {}
    assert measured_cost({"cost": {"energy_uj": {"gpu0": 1_500_000, "cpu0": 500_000}}}) == {"joules": 2.0}
    assert measured_cost({"cost": {"energy_uj": {}}}) == measured_cost({"cost": {"energy_uj": {"gpu0": "?"}}}) == {}
    assert measured_cost({"cost": 0.25}) == {"cost": "0.25"}
    assert measured_cost({"cost": {"amount": 1e-6, "currency": "EUR"}}) == {"cost": "1e-06 EUR"}
    counted = {"energy_uj": {"gpu0": 3}, "energy_provisional": True, "total_bytes": 73_584_128}
    assert measured_cost({"cost": counted}) == {"joules": 3e-6, "provisional": True, "moved_bytes": 73_584_128}
    shown = panel(measured_cost({"cost": counted}), "en")
    assert "≥ 3e-06 J" in shown and "0.07358 GB" in shown and "GB" not in panel({"joules": 1}, "en")
    unmeasured = {"energy_uj": {}, "energy_note": "no counter", "total_bytes": 5}
    assert measured_cost({"cost": unmeasured}) == {"moved_bytes": 5}
    assert measured_cost({"cost": {"total_bytes": -1}}) == measured_cost({"cost": {"total_bytes": "9"}}) == {}
    empty = panel({}, "en")
    assert empty.count("not measured") == 6
    assert "2.5 J" in panel({"joules": 2.5}, "en") and "未测量" in panel({}, "zh")


def test_metrics_of_both_names_are_read():
    ours = (
        '# HELP x\nqwen_fast:kv_cache_usage_perc{model_name="a b{c} d",engine="0"} 0.25\n'
        'qwen_fast:memory_bytes{part="layers"} 100\nqwen_fast:memory_bytes{part="head"} 24\n'
        'vllm:kv_cache_usage_perc{x="y"} 0.9\nvllm:num_requests_waiting 3\nqwen_fast:num_requests_running NaN\nbroken\n{\n'
    )
    assert server_numbers(ours) == {"kv_use": 0.25, "memory_bytes": 124.0, "waiting": 3.0}
    assert server_numbers("") == {}
    assert "124 B" in panel(server_numbers(ours), "en") and "25.0 %" in panel(server_numbers(ours), "en")


def test_nothing_in_panel_or_notice_is_html():
    assert "<b>" not in panel({"cost": "<b>1</b>"}, "en") and "&lt;b&gt;" in panel({"cost": "<b>1</b>"}, "en")
    said = notice("<img src=x>\n\n# [x](javascript:1)")
    assert "<img" not in said and "\n" not in said and notice("") == ""
    assert json.dumps(said)
