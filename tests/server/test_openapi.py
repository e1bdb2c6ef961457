"""Requests made up from /openapi.json: none may hang, crash the server, or be answered in a shape that it does not say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import hypothesis
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case, GenerationMode
from server_helpers import Serving, serving

from qwen_fast import AsyncLLM
from qwen_fast.server import ServerConfig
from qwen_fast.server.config import Limits


@pytest.fixture(scope="module")
def small() -> Iterator[Serving]:
    """A context of 64 tokens: nothing generates for long."""
    llm = AsyncLLM("demo", device="cpu", num_threads=1, max_model_len=64)
    config = ServerConfig(port=0, log_level="critical", limits=Limits(request_seconds=20))
    with serving(llm, config) as running:
        yield running
    llm.close()


def try_operations(small: Serving, cases: int, mode: GenerationMode, mend: bool = False) -> Counter[int]:
    """Sends so many cases to each operation; returns how often each status came. mend: see mended()."""
    document = httpx.get(f"{small.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=small.url)
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=small.url, timeout=30) as http:
        for result in schema.get_all_operations():
            operation = result.ok()
            responses = document["paths"][operation.path][operation.method.lower()]["responses"]
            if mode is GenerationMode.NEGATIVE and operation.method == "get":
                continue  # without a body nothing of it can be wrong

            strategy = operation.as_strategy(generation_mode=mode)
            if mend:
                strategy = strategy.map(mended)
            run_cases(strategy, cases, lambda case, said=responses: check(http, case, said, document), statuses)
    return statuses


def mended(case: Case) -> Case:
    """What a schema cannot say: names that are served, counts that the server bounds, fields that exclude each other."""
    body = case.body
    if not isinstance(body, dict):
        if "model" in case.path_parameters:
            case.path_parameters["model"] = "demo"
        return case
    body["model"] = "demo"
    for name in ("best_of", "use_beam_search", "suffix", "priority", "tools", "tool_choice", "chat_template"):
        body.pop(name, None)
    for name in ("response_format", "chat_template_kwargs", "prompt_logprobs", "stream_options", "top_logprobs"):
        body.pop(name, None)
    for name in [name for name in body if name.startswith(("guided_", "structured_"))]:
        del body[name]
    most = {"n": 3, "max_tokens": 5, "max_completion_tokens": 5, "min_tokens": 1, "truncate_prompt_tokens": 9}
    for name, limit in most.items():
        if isinstance(body.get(name), int):
            body[name] = min(body[name], limit)
    for message in body.get("messages") or ():
        message.pop("tool_calls", None)
        message["role"], message["content"] = "user", str(message.get("content") or "")[:20]
    return case


def run_cases(strategy: Any, cases: int, send: Callable[[Case], int], statuses: Counter[int]) -> None:
    @hypothesis.given(case=strategy)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def one(case: Case) -> None:
        statuses[send(case)] += 1

    one()


def check(http: httpx.Client, case: Case, responses: dict[str, Any], document: dict[str, Any]) -> int:
    prepared = case.as_transport_kwargs()
    sent = {key: prepared[key] for key in ("json", "headers", "params", "cookies") if prepared.get(key) is not None}
    if prepared.get("data") is not None:
        sent["content"] = prepared["data"]
    try:
        request = http.build_request(prepared["method"], prepared["url"], **sent)
    except (httpx.InvalidURL, UnicodeEncodeError, ValueError, TypeError):
        hypothesis.reject()  # the client cannot send it
    response = http.send(request)
    status = response.status_code
    assert status < 500, response.text
    assert str(status) in responses or status == 405, response.text
    content = responses.get(str(status), responses["400"])["content"]
    kind = response.headers["content-type"].partition(";")[0]
    assert kind in content, kind
    if kind == "application/json":
        schema = {**content[kind]["schema"], "components": document["components"]}
        jsonschema.validate(response.json(), schema)
    else:
        assert response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text
    return status


def test_made_up_requests(small: Serving):
    statuses = try_operations(small, 8, GenerationMode.POSITIVE, mend=True)
    statuses += try_operations(small, 4, GenerationMode.POSITIVE)
    statuses += try_operations(small, 6, GenerationMode.NEGATIVE)
    assert statuses[200] > 20 and statuses[400] > 20, statuses
    assert small.idle()


@pytest.mark.long
def test_thousands_of_made_up_requests(small: Serving):
    statuses = try_operations(small, 240, GenerationMode.POSITIVE, mend=True)
    statuses += try_operations(small, 120, GenerationMode.POSITIVE)
    statuses += try_operations(small, 200, GenerationMode.NEGATIVE)
    print(dict(statuses))
    assert sum(statuses.values()) >= 2000 and statuses[200] > 500 and statuses[400] > 500
    assert small.idle() and small.llm.stats()["num_free_blocks"] == small.llm.info()["num_blocks"]
