"""What one request may hold at most: log-probabilities, bytes of bodies, work for each of its sequences."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest
from server_helpers import serving
from stalls import ask, message_of
from test_admission import ALICE, Clock
from test_hostile_traffic import CHAT, HI, TEXT, answer, body_of, quiet

from qwen_fast import AsyncLLM
from qwen_fast.server import create_app
from qwen_fast.server.auth import keys_of
from qwen_fast.server.bodies import Bodies
from qwen_fast.server.config import Limits
from qwen_fast.server.errors import ApiError
from qwen_fast.server.protocol import ChatRequest
from qwen_fast.server.state import Unlimited


@pytest.fixture(scope="module")
def app(demo: AsyncLLM) -> Any:
    return create_app(demo, quiet())


# -- log-probabilities of a whole request


@pytest.mark.parametrize(
    ("fields", "entries"),
    [
        ({"prompt": [[5] * 100] * 10, "prompt_logprobs": 9, "max_tokens": 0}, 10 * 100 * 10),
        ({"prompt": [5] * 100, "n": 4, "logprobs": 4, "max_tokens": 500}, 4 * 500 * 5),
        ({"prompt": [5] * 1000, "echo": True, "logprobs": 9, "max_tokens": 0}, 1000 * 10),
        ({"prompt": [5] * 96, "logprobs": 0, "max_tokens": None, "n": 8}, 8 * 16),
        ({"messages": HI, "logprobs": True, "top_logprobs": 4, "n": 2}, None),
    ],
)
def test_logprobs_of_a_whole_request(demo: AsyncLLM, fields: dict[str, Any], entries: int | None):
    path = CHAT if "messages" in fields else TEXT
    if entries is None:  # without max_tokens: what is left of the context
        length = len(demo.apply_chat_template(HI)[1])
        entries = 2 * (demo.max_model_len - length) * 5
    small = create_app(demo, quiet(limits=Limits(logprob_entries=entries - 1)))
    status, said = answer(small, path, body_of(**fields))
    assert status == 400
    assert f"{entries} log-probabilities" in message_of(said) and f"the limit is {entries - 1}" in message_of(said)
    if entries < 20_000:
        enough = create_app(demo, quiet(limits=Limits(logprob_entries=entries)))
        assert answer(enough, path, body_of(**fields, ignore_eos=True))[0] == 200


def test_streamed_logprobs_are_not_kept(demo: AsyncLLM):
    small = create_app(demo, quiet(limits=Limits(logprob_entries=10)))
    fields = {"messages": HI, "logprobs": True, "top_logprobs": 4, "max_tokens": 20}
    assert answer(small, CHAT, body_of(**fields))[0] == 400
    assert answer(small, CHAT, body_of(**fields, stream=True))[0] == 200


# -- bodies


class NoMore(Unlimited):
    def arrive(self, principal: Any) -> None:
        raise ApiError(429, "too often", headers={"retry-after": "7"})


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_the_rate_counts_before_the_body(demo: AsyncLLM, path: str):
    """What is refused there is answered though the body never comes."""
    refusing = create_app(demo, quiet(), admission=NoMore())

    async def run() -> tuple[int, bytes]:
        return await asyncio.wait_for(ask(refusing, path, b"", **{"content-length": "0"}), 5)

    with serving(demo, quiet(), admission=NoMore()) as running:
        response = httpx.post(f"{running.url}{path}", content=b"{}", headers={"content-type": "application/json"})
        assert response.status_code == 429 and response.headers["retry-after"] == "7"
    status, said = asyncio.run(run())
    assert status == 429 and message_of(said) == "too often"


def test_bytes_of_bodies():
    clock = Clock()
    bodies = Bodies(1000, (), clock)
    with bodies.account("anonymous") as charge, bodies.account("anonymous") as other:
        charge(600)
        other(400)
        with pytest.raises(ApiError) as caught:
            other(1)
        assert caught.value.status == 503 and caught.value.headers["retry-after"] == "1"
        assert "1000 bytes; the limit is 1000" in caught.value.message
    assert bodies.bytes_held == 0


def test_bytes_of_bodies_by_key():
    bodies = Bodies(1000, ("alice", "bob"), Clock())
    with bodies.account("alice") as alice, bodies.account("bob") as bob:
        alice(750)
        with pytest.raises(ApiError) as caught:
            alice(1)  # 250 are kept for bob
        assert caught.value.status == 429 and "alice take 750 bytes" in caught.value.message
        bob(250)
        with pytest.raises(ApiError) as caught:
            bob(1)
        assert caught.value.status == 503
    assert bodies.bytes_held == 0


def test_bodies_together_are_bounded(demo: AsyncLLM):
    """A request that runs holds the bytes of its body; the next ones get them when it has ended."""
    text = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True, "stream": True, "user": "x" * 1500}
    with serving(demo, quiet(limits=Limits(pending_body_bytes=2000))) as running:
        url = f"{running.url}{TEXT}"
        with httpx.stream("POST", url, json=text) as first:
            lines = first.iter_lines()
            next(lines)
            assert running.server.bodies.bytes_held > 1500
            refused = httpx.post(url, json={"prompt": "x" * 1000})
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "too_many_bytes"
        assert running.idle()
        assert httpx.post(url, json={"prompt": "Once " * 200, "max_tokens": 1}).status_code == 200
        assert running.idle() and running.server.bodies.bytes_held == 0


def test_a_key_that_holds_bytes_leaves_some_to_others(demo: AsyncLLM):
    config = quiet(limits=Limits(pending_body_bytes=4000), api_key=("sk-a", "sk-b"))
    text = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True, "stream": True, "user": "x" * 2500}
    with serving(demo, config, auth=keys_of(config)) as running:
        a, b = ({"authorization": f"Bearer sk-{name}"} for name in "ab")
        url = f"{running.url}{TEXT}"
        with httpx.stream("POST", url, json=text, headers=a) as first:
            lines = first.iter_lines()
            next(lines)
            assert httpx.post(url, json={"prompt": "x" * 600}, headers=a).status_code == 429
            assert httpx.post(url, json={"prompt": "Once " * 100, "max_tokens": 1}, headers=b).status_code == 200
        assert running.idle()


# -- tools, /tokenize, bad_words, allowed_token_ids


def test_tools_count_as_text(demo: AsyncLLM):
    """So a short message with long tools is rendered in a thread, and is counted as waiting."""
    from qwen_fast.server.chat import ChatAnswer
    from qwen_fast.server.state import RequestRecord

    server = create_app(demo, quiet()).state.server
    tool = {"type": "function", "function": {"name": "f", "description": "d" * 9000, "parameters": {"type": "object"}}}
    call = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": json.dumps({"x": "y" * 5000})}}],
    }

    def length(**fields: Any) -> int:
        request = ChatRequest.model_validate({"messages": HI, **fields})
        return ChatAnswer(server, request, RequestRecord("1", CHAT, ALICE, model="demo")).text_length

    assert length() < 100
    assert length(tools=[tool]) > 9000
    assert length(tools=[tool], tool_choice="none") < 100  # the template does not get them
    assert length(messages=[*HI, call]) > 5000


def test_token_strs_are_decoded_elsewhere_and_bounded(demo: AsyncLLM, monkeypatch: pytest.MonkeyPatch):
    threads: set[str] = set()
    decode = demo.decode

    def noting(ids: Any) -> str:
        threads.add(threading.current_thread().name)
        return decode(ids)

    monkeypatch.setattr(demo, "decode", noting)
    small = create_app(demo, quiet(limits=Limits(token_strs=3000)))
    fields = {"prompt": "word " * 1200, "return_token_strs": True}
    status, said = answer(small, "/tokenize", body_of(**fields))
    told = json.loads(said)
    assert status == 200 and "".join(told["token_strs"]) == fields["prompt"] and len(told["tokens"]) == told["count"]
    assert all(name.startswith("qwen_fast-worker") for name in threads) and threads
    status, said = answer(small, "/tokenize", body_of(prompt="word " * 4000, return_token_strs=True))
    assert status == 400 and "the limit is 3000" in message_of(said)
    status, said = answer(small, "/tokenize", body_of(prompt="word " * 4000))
    assert status == 200 and json.loads(said)["count"] > 3000


def test_bad_words_are_encoded_once(demo: AsyncLLM, monkeypatch: pytest.MonkeyPatch, app: Any):
    encoded: list[str] = []
    encode = demo.encode
    fields = {"prompt": ["Once upon"] * 6, "max_tokens": 4, "temperature": 0}
    plain = json.loads(answer(app, TEXT, body_of(**fields))[1])["choices"][0]["text"]
    word = plain.split()[0]
    monkeypatch.setattr(demo, "encode", lambda text, *more: (encoded.append(text), encode(text, *more))[1])
    status, said = answer(app, TEXT, body_of(**fields, bad_words=[word]))
    assert status == 200 and all(word not in choice["text"].split() for choice in json.loads(said)["choices"])
    assert encoded.count(word) == 1 and encoded.count(f" {word}") == 1


def test_allowed_token_ids_are_an_array(demo: AsyncLLM, app: Any, monkeypatch: pytest.MonkeyPatch):
    """The engine copies it for each sequence as it is; a list it would convert each time."""
    seen: list[Any] = []
    stream = demo.stream

    def noting(prompt: Any, params: Any, **more: Any) -> Any:
        seen.append(params.allowed_token_ids)
        return stream(prompt, params, **more)

    monkeypatch.setattr(demo, "stream", noting)
    fields = {
        "prompt": ["Once"] * 3,
        "max_tokens": 5,
        "n": 2,
        "allowed_token_ids": [100, 200],
        "return_token_ids": True,
    }
    status, said = answer(app, TEXT, body_of(**fields))
    assert status == 200
    assert {one for choice in json.loads(said)["choices"] for one in choice["token_ids"]} <= {100, 200}
    assert len(seen) == 3 and all(memoryview(one).format == "i" and one is seen[0] for one in seen)
