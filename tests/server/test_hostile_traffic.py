"""What a hostile but well-formed request may cost: counts before validation, bytes held, time of the event loop."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stalls import ask, message_of, ticking

from qwen_fast import AsyncLLM
from qwen_fast.server import ServerConfig, create_app, json_body
from qwen_fast.server.bounds import check_counts, json_bytes
from qwen_fast.server.config import Limits
from qwen_fast.server.errors import ApiError
from qwen_fast.server.json_body import Shape, parse_json, shape_of
from qwen_fast.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]


def body_of(**fields: Any) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def quiet(**options: Any) -> ServerConfig:
    return ServerConfig(port=0, log_level="critical", **options)


@pytest.fixture(scope="module")
def app(demo: AsyncLLM) -> Any:
    return create_app(demo, quiet())


def answer(app: Any, path: str, body: bytes) -> tuple[int, bytes]:
    return asyncio.run(ask(app, path, body))


# -- bytes are counted before they are parsed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


def walked(value: Any, shape: Shape, depth: int = 0) -> Shape:
    shape.depth = max(shape.depth, depth)
    if isinstance(value, str):
        shape.texts += 1
    if isinstance(value, (list, dict)):
        shape.depth = max(shape.depth, depth + 1)
        shape.containers += 1
        shape.commas += max(len(value) - 1, 0)
        for entry in value if isinstance(value, list) else [*value, *value.values()]:
            walked(entry, shape, depth + 1)
    return shape


@settings(max_examples=150, deadline=None)
@given(VALUES, st.booleans(), st.integers(1, 9))
def test_shape_of_any_value(value: Any, ascii_only: bool, chunk: int):
    text = json.dumps(value, ensure_ascii=ascii_only)
    before, json_body._CHUNK = json_body._CHUNK, chunk  # every escape is cut somewhere
    try:
        shape = shape_of(text.encode())
    finally:
        json_body._CHUNK = before
    wanted = walked(value, Shape(depth=0))
    strings = json.dumps(value, ensure_ascii=ascii_only).replace("\\\\", "x")
    wanted.escapes = strings.count("\\") + (text.count("\\\\"))
    assert (shape.depth, shape.containers, shape.texts, shape.commas) == (
        wanted.depth,
        wanted.containers,
        wanted.texts,
        wanted.commas,
    )
    assert shape.escapes == wanted.escapes


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), VALUES))
def test_the_patient_decoder_reads_what_json_reads(value: dict[str, Any]):
    assert json_body._PatientDecoder().decode(json.dumps(value)) == value


@pytest.mark.parametrize("text", ['{"a":1,}', '{"a" 1}', '{"a":tru}', '{"a":[1 2]}', '{"a":1\u0662}', '{"a":"\x01"}'])
def test_the_patient_decoder_refuses_what_json_refuses(monkeypatch: pytest.MonkeyPatch, text: str):
    for quick in (8192, -1):
        monkeypatch.setattr(json_body, "_QUICK", quick)
        with pytest.raises(ApiError, match="not valid JSON"):
            parse_json(text.encode(), Limits())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"x":[' + b"1," * 1_048_577 + b"1]}", "1048577 commas between values; the limit is 1048576"),
        (b'{"x":[' + b'"",' * 65_536 + b'""]}', "65538 texts and keys; the limit is 65536"),
        (b'{"x":[' + b"{}," * 32_767 + b"{}]}", "32770 arrays and objects; the limit is 32768"),
        (b'{"x":"' + b"\\n" * 524_289 + b'"}', "524289 escape sequences; the limit is 524288"),
    ],
)
def test_bodies_are_counted_before_they_are_parsed(monkeypatch: pytest.MonkeyPatch, body: bytes, says: str):
    monkeypatch.setattr(json_body, "_Decoder", lambda: pytest.fail("parsed"))
    monkeypatch.setattr(json_body, "_PatientDecoder", lambda: pytest.fail("parsed"))
    with pytest.raises(ApiError, match=says):
        parse_json(body, Limits())


# -- lists are counted before pydantic sees them

LONG = [5] * 5000
COUNTED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": HI * 2049}, "messages has 2049 entries; the limit is 2048"),
    (CHAT, {"messages": [{"role": "user", "content": [5] * 3000}] * 2}, "6000 content parts; the limit is 4096"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 2_100_000}]}, "messages has more than 2097152 bytes"),
    (CHAT, {"messages": HI, "stop": [5] * 17}, "stop has 17 entries; the limit is 16"),
    (CHAT, {"messages": HI, "stop_token_ids": LONG}, "stop_token_ids has 5000 entries; the limit is 256"),
    (CHAT, {"messages": HI, "bad_words": LONG}, "bad_words has 5000 entries; the limit is 256"),
    (CHAT, {"messages": HI, "allowed_token_ids": [-1] * 200_001}, "allowed_token_ids has 200001 entries"),
    (CHAT, {"messages": HI, "logit_bias": {str(i): "x" for i in range(1025)}}, "logit_bias has 1025 entries"),
    (CHAT, {"messages": HI, "tools": [5] * 129}, "tools has 129 entries; the limit is 128"),
    (CHAT, {"messages": HI, "tools": [{"x": "y" * 600_000}]}, "tools has more than 524288 bytes"),
    (CHAT, {"messages": HI, "guided_choice": LONG}, "guided_choice has 5000 entries; the limit is 4096"),
    (CHAT, {"messages": HI, "structured_outputs": {"choice": LONG}}, "structured_outputs.choice has 5000 entries"),
    (CHAT, {"messages": HI, "chat_template_kwargs": {str(i): 1 for i in range(65)}}, "chat_template_kwargs has 65"),
    (CHAT, {"messages": HI, **{f"x{i}": 1 for i in range(300)}}, "the body has 301 fields; the limit is 256"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "[" * 40}}]}]},
        "messages.0.tool_calls.0.function.arguments is nested 40 levels deep; the limit is 32",
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}," * 40_000}}]}]},
        "function.arguments holds 40000 arrays and objects; the limit is 32768",
    ),
    (TEXT, {"prompt": [5] * 4097}, "maximum context length is 4096 tokens (max_model_len); requested: 4097 tokens"),
    (TEXT, {"prompt": [[5], [5] * 4097]}, "requested: 4097 tokens in the prompt"),
    (TEXT, {"prompt": [[5]] * 257}, "prompt has 257 entries; the limit is 256"),
    (TEXT, {"prompt": [[5] * 4000] * 251}, "prompt has 1004000 token ids; the limit is 1000000"),
    (TEXT, {"prompt": ["a", "é" * 1_048_577]}, "prompt 1 has 2097154 bytes; the limit is 2097152"),
    ("/tokenize", {"prompt": "x" * 2_097_153}, "prompt 0 has 2097153 bytes; the limit is 2097152"),
    ("/tokenize", {"messages": HI * 2049}, "messages has 2049 entries"),
    ("/detokenize", {"tokens": [-1] * 131_073}, "tokens has 131073 entries; the limit is 131072"),
]


@pytest.mark.parametrize(
    ("path", "fields", "says"), COUNTED, ids=lambda value: value[:30] if value.__class__ is str else ""
)
def test_lists_are_counted_before_validation(
    app: Any, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any], says: str
):
    for kind in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest):
        monkeypatch.setattr(kind, "model_validate", lambda value: pytest.fail("validated"))
    status, said = answer(app, path, body_of(**fields))
    assert status == 400 and says in message_of(said)
    assert len(said) < 2000


def test_a_prompt_that_is_cut_may_be_longer_than_the_context(app: Any):
    fields = {"prompt": [5] * 5000, "truncate_prompt_tokens": 3, "max_tokens": 1}
    status, said = answer(app, TEXT, body_of(**fields))
    assert status == 200 and json.loads(said)["usage"]["prompt_tokens"] == 3


def test_validation_ends_at_the_first_wrong_entry(app: Any):
    """Without that, 2,048 wrong messages make tens of thousands of errors."""
    wrong = {"messages": [{"role": 5, "content": [5, 5], "name": 5}] * 2048}
    with pytest.raises(ValueError) as caught:
        ChatRequest.model_validate(wrong)
    assert caught.value.error_count() < 10
    status, said = answer(app, CHAT, body_of(**wrong))
    assert status == 400 and message_of(said).startswith("messages.0.role: ")
    with pytest.raises(ValueError) as caught:
        CompletionRequest.model_validate({"prompt": "x", "allowed_token_ids": [-1] * 1000, "bad_words": [5] * 1000})
    assert caught.value.error_count() == 2


def test_the_error_text_is_bounded(app: Any):
    for fields in ({"logit_bias": {"x" * 1_000_000: 1}}, {"logit_bias": {"1": 1, "9" * 100_000: "y"}}):
        status, said = answer(app, CHAT, body_of(messages=HI, **fields))
        assert status == 400 and len(said) < 2000


def test_json_bytes():
    for value in ({"a": [1, 2.5, None, True, "é" * 50, {"b": "c"}], "d": {}}, [], "x" * 100, [["y"] * 100] * 3):
        exact = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
        assert exact <= json_bytes(value, 10**9) <= 1.5 * exact + 10
    assert json_bytes([["x" * 10] * 10] * 1000, 1100) < 3000  # ends early


def test_check_counts_leaves_types_to_the_validation():
    for odd in (5, None, "x", {}, [5], [None], [[]]):
        for name in ("messages", "tools", "prompt", "stop", "structured_outputs", "logit_bias", "tokens"):
            check_counts({name: odd}, Limits(), 4096)
    check_counts({"messages": [{"tool_calls": [{"function": 5}, 5, {}]}, {"tool_calls": 5}]}, Limits(), 4096)


# -- the event loop

SLOW = {
    "3,400,000 objects": (CHAT, b'{"messages":[' + b"{}," * 3_400_000 + b"{}]}"),
    "3,400,000 texts": (CHAT, b'{"messages":[' + b'"",' * 3_400_000 + b"5]}"),
    "1,000,000 token ids": (TEXT, b'{"prompt":[' + b"50000," * 999_999 + b"5]}"),
    "60,000 keys": (CHAT, body_of(**{f"k{i}": 1 for i in range(60_000)})),
    "allowed_token_ids": (TEXT, body_of(prompt=["a"] * 8, max_tokens=1, allowed_token_ids=list(range(8000)) * 25)),
    "a long text": (TEXT, body_of(prompt="word " * 400_000)),
    "long tool arguments": (
        CHAT,
        body_of(messages=[{"role": "assistant", "tool_calls": [{"function": {"arguments": "[]," * 3_000_000}}]}]),
    ),
    "token_strs": ("/tokenize", body_of(prompt="word " * 60_000, return_token_strs=True)),
}


@pytest.mark.parametrize("name", SLOW)
def test_the_event_loop_goes_on(app: Any, demo: AsyncLLM, name: str):
    """20 ms is the aim on an idle machine; here others may be computing. Collections of garbage are not the request's."""
    path, body = SLOW[name]
    demo.encode("a")

    async def worst() -> float:
        async with ticking() as ticker:
            await ask(app, path, body)
        return ticker.worst

    gc.collect()
    gc.disable()
    try:
        assert min(asyncio.run(worst()) for _ in range(2)) < 0.12
    finally:
        gc.enable()
