"""/v1/completions, /v1/models, /tokenize, /detokenize and the small routes."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from server_helpers import serving

from qwen_fast import SamplingParams, __version__
from qwen_fast.server import ServerConfig
from qwen_fast.server.state import Unlimited

PROMPT = "Nora the fox lived in"


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    return client.completions.create(**{"model": "demo", "prompt": prompt, "max_tokens": 8, "seed": 7, **options})


def text_of(stream: Any, index: int = 0) -> str:
    return "".join(choice.text for chunk in stream for choice in chunk.choices if choice.index == index)


# -- completions


def test_a_completion(client, demo):
    answer = complete(client)
    assert answer.object == "text_completion" and answer.model == "demo" and answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert choice.index == 0 and choice.finish_reason == "length" and choice.logprobs is None
    (whole,) = asyncio.run(demo.generate([PROMPT], SamplingParams(max_tokens=8, seed=7)))
    assert choice.text == whole.outputs[0].text
    assert answer.usage.prompt_tokens == len(demo.encode(PROMPT)) and answer.usage.completion_tokens == 8


def test_sixteen_tokens_by_default(client):
    answer = client.completions.create(model="demo", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_every_form_of_prompt(client, demo):
    ids = demo.encode(PROMPT)
    texts = {complete(client, prompt).choices[0].text for prompt in (PROMPT, [PROMPT], ids, [ids])}
    assert len(texts) == 1
    mixed = complete(client, ["The owl", ids, "The owl"]).choices
    assert [choice.index for choice in mixed] == [0, 1, 2]
    assert mixed[0].text == mixed[2].text and mixed[1].text in texts


def test_prompts_times_n(client):
    answer = complete(client, [PROMPT, "The owl"], n=3, temperature=1.0)
    assert [choice.index for choice in answer.choices] == list(range(6))
    owl = complete(client, "The owl", n=3, temperature=1.0)
    assert [choice.text for choice in answer.choices[3:]] == [choice.text for choice in owl.choices]
    assert answer.usage.completion_tokens == 48
    streamed = list(complete(client, [PROMPT, "The owl"], n=3, temperature=1.0, stream=True))
    for choice in answer.choices:
        assert text_of(streamed, choice.index) == choice.text


def test_a_stream(client):
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == complete(client).choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"


def test_echo(client):
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == PROMPT + plain
    assert text_of(complete(client, echo=True, stream=True)) == PROMPT + plain
    ids = complete(client, [5, 6, 7], echo=True).choices[0].text
    assert ids.endswith(complete(client, [5, 6, 7]).choices[0].text)


def test_no_tokens_but_the_prompts(client, demo):
    answer = complete(client, echo=True, max_tokens=0, logprobs=1)
    assert answer.choices[0].text == PROMPT and answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.tokens) == len(demo.encode(PROMPT))
    empty = complete(client, max_tokens=0)
    assert empty.choices[0].text == "" and empty.choices[0].finish_reason == "length"


def check_legacy(logprobs: Any, text: str, count: int) -> None:
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == count
    assert "".join(logprobs.tokens) == text
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert text[offset : offset + len(token)] == token


def test_logprobs(client):
    answer = complete(client, logprobs=3, temperature=0, extra_body={"repetition_penalty": 1.0})
    logprobs = answer.choices[0].logprobs
    check_legacy(logprobs, answer.choices[0].text, 8)
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value <= 0 and len(top) == 3 and top[token] == value == max(top.values())
        assert sum(map(math.exp, top.values())) <= 1.0001


def test_logprobs_with_echo(client, demo):
    answer = complete(client, logprobs=2, echo=True)
    logprobs = answer.choices[0].logprobs
    check_legacy(logprobs, answer.choices[0].text, len(demo.encode(PROMPT)) + 8)
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    plain = complete(client, logprobs=2).choices[0].logprobs
    assert logprobs.tokens[-8:] == plain.tokens and logprobs.token_logprobs[-8:] == plain.token_logprobs


def test_streamed_logprobs(client):
    whole = complete(client, logprobs=2).choices[0].logprobs
    parts = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=2, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [entry for part in parts if part for entry in getattr(part, name)]
        assert joined == getattr(whole, name)


def test_prompt_logprobs_and_token_ids(http, demo):
    body = {"prompt": PROMPT, "max_tokens": 2, "n": 2, "prompt_logprobs": 0, "return_token_ids": True}
    choices = http.post("/v1/completions", json=body).json()["choices"]
    ids = demo.encode(PROMPT)
    for choice in choices:
        assert choice["prompt_token_ids"] == ids and len(choice["token_ids"]) == 2
        rows = choice["prompt_logprobs"]
        assert rows[0] is None and [list(row) for row in rows[1:]] == [[str(one)] for one in ids[1:]]


def test_stop_and_finish_reasons(client):
    whole = complete(client, temperature=0, max_tokens=30).choices[0].text
    word = whole.split()[3]
    cut = complete(client, temperature=0, max_tokens=30, stop=word).choices[0]
    assert cut.finish_reason == "stop" and cut.stop_reason == word and cut.text == whole[: whole.index(word)]


# -- models


def test_models(client, http):
    cards = client.models.list().data
    assert [card.id for card in cards] == ["demo", "demo-too"]
    assert cards[0].owned_by == "qwen_fast" and cards[0].max_model_len == 4096 and cards[0].root == "demo"
    assert client.models.retrieve("demo-too").id == "demo-too"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("demo-three")


def test_names_with_a_slash(demo):
    with serving(demo, ServerConfig(port=0, log_level="warning", served_model_name=("Qwen/Some-Model",))) as running:
        assert running.client().models.retrieve("Qwen/Some-Model").id == "Qwen/Some-Model"
        with pytest.raises(openai.NotFoundError):
            complete(running.client())


# -- tokenize and detokenize


def test_tokenize_a_prompt(http, demo):
    text = "Nora the fox, and 狐狸."
    answer = http.post("/tokenize", json={"model": "demo", "prompt": text}).json()
    assert answer == {"count": len(demo.encode(text)), "max_model_len": 4096, "tokens": demo.encode(text)}
    back = http.post("/detokenize", json={"model": "demo", "tokens": answer["tokens"]})
    assert back.json() == {"prompt": text}


def test_tokenize_messages(http, demo):
    messages = [{"role": "user", "content": "Hi"}]
    tokens = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert tokens == demo.apply_chat_template(messages)[1]
    bare = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()["tokens"]
    assert bare == demo.apply_chat_template(messages, add_generation_prompt=False)[1] != tokens


def test_token_strings_and_long_texts(http, demo):
    text = "The quick brown fox. " * 1000
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == demo.encode(text) and "".join(answer["token_strs"]) == text
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json()["prompt"] == text


def test_empty_lists(http):
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


# -- small routes


def test_health_ready_version_load(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/ping").status_code == http.post("/ping").status_code == 200
    assert http.get("/version").json() == {"version": __version__}
    assert http.get("/load").json() == {"server_load": 0}
    assert http.head("/health").status_code == 200


def test_a_server_that_is_not_ready(demo):
    with serving(demo) as running, httpx.Client(base_url=running.url) as http:
        running.server.ready, running.server.not_ready_reason = False, "draining"
        assert http.get("/health").status_code == 200
        for refused in (http.get("/ready"), http.post("/v1/completions", json={"prompt": "x"})):
            assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
            assert refused.json()["error"]["message"] == "draining"


def test_the_documentation(http):
    document = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/health"} <= set(document["paths"])
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "top_k", "min_p", "repetition_penalty", "cache_salt", "tools"} <= set(fields)


def test_no_documentation_where_it_is_off(demo):
    with serving(demo, ServerConfig(port=0, log_level="warning", disable_fastapi_docs=True)) as running:
        assert httpx.get(f"{running.url}/openapi.json").status_code == 404
        assert httpx.get(f"{running.url}/docs").status_code == 404


def test_cors_is_off_unless_asked(demo, http):
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in http.get("/health", headers=asked).headers
    assert http.options("/v1/completions", headers=asked).status_code == 405
    with serving(demo, ServerConfig(port=0, log_level="warning", allowed_origins=("https://page.example",))) as running:
        preflight = httpx.options(f"{running.url}/v1/completions", headers=asked)
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        other = httpx.options(f"{running.url}/v1/completions", headers={**asked, "origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


class Door(Unlimited):
    """Admission that notes who comes and goes."""

    def __init__(self, told: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self._told = told

    @contextlib.asynccontextmanager
    async def slot(self, principal: Any, n: int) -> AsyncIterator[None]:
        self._told.append(("in", principal.name, n))
        yield
        self._told.append(("out", principal.name, n))


class Books:
    """Metrics and an audit log that note what they were told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.entries: list[dict[str, Any]] = []

    def request_started(self, record: Any) -> None:
        self.told.append(("started", record.route))

    def first_token(self, record: Any) -> None:
        self.told.append(("first token", record.prompt_tokens))

    def finished(self, record: Any) -> None:
        self.told.append(("finished", record.outcome))

    def write(self, record: dict[str, Any]) -> None:
        self.entries.append(record)


def test_plug_ins_hear_of_every_request(demo):
    books = Books()
    with serving(demo, admission=Door(books.told), metrics=books, audit=books) as running:
        complete(running.client(), [PROMPT, PROMPT], n=2)
        assert running.idle()
        count = 2 * len(demo.encode(PROMPT))
        assert books.told == [
            ("started", "/v1/completions"),
            ("in", "anonymous", 4),
            ("first token", count),
            ("out", "anonymous", 4),
            ("finished", "ok"),
        ]
        (entry,) = books.entries
        assert entry["outcome"] == "ok" and entry["status"] == 200 and entry["sequences"] == 4
        assert entry["prompt_tokens"] == count and entry["completion_tokens"] == 32
        assert entry["finish_reasons"] == ["length"] * 4 and 0 < entry["ttft_s"] <= entry["seconds"]
        assert "prompt" not in entry and "output" not in entry
        with pytest.raises(openai.BadRequestError):
            complete(running.client(), n=9)
        assert books.entries[-1]["outcome"] == "refused" and books.entries[-1]["status"] == 400


def test_the_audit_log_has_text_where_asked(demo):
    books = Books()
    with serving(demo, ServerConfig(port=0, log_level="warning", audit_log_text=True), audit=books) as running:
        text = complete(running.client()).choices[0].text
        assert running.idle()
        assert books.entries[0]["prompt"] == [PROMPT] and books.entries[0]["output"] == [text]
