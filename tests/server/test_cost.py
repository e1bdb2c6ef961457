"""usage.cost, the audit log's cost and the meter's counters of /metrics: one account of the same bytes, times and joules."""

from __future__ import annotations

import contextlib
import json
import time
from types import SimpleNamespace
from typing import Any

import httpx
import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_helpers import serving
from test_serve import parsed

from qwen_fast import AsyncLLM, SamplingParams
from qwen_fast.outputs import StreamOutput, Usage
from qwen_fast.server import ServerConfig, generate
from qwen_fast.server.arguments import server_config
from qwen_fast.server.metrics import PrometheusMetrics
from qwen_fast.server.openapi import document
from qwen_fast.server.serve import plug_ins
from qwen_fast.server.state import Principal, RequestRecord

COMPLETION = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 6, "seed": 3, "ignore_eos": True}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 7}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("completions", COMPLETION),
    ("completions", {**COMPLETION, "n": 3, "prompt": "A fox"}),
    ("completions", {**COMPLETION, "n": 2, "prompt": ["Two of them", "and two more of them"]}),
    ("completions", {**COMPLETION, **STREAM, "max_tokens": 300, "prompt": "On and on"}),
    ("chat/completions", {**CHAT, "max_tokens": None, "temperature": 0}),  # until the model ends
    ("chat/completions", {**CHAT, **STREAM, "n": 2, "seed": 5, "ignore_eos": True}),
]
ONCE = ("prompt_tokens", "cached_tokens")  # of each prompt; the engine's total has them of each sample
AMOUNTS = [name for name, value in Usage(0, 0, 0).as_dict().items() if type(value) is int and name not in ONCE]


@contextlib.contextmanager
def started(llm, path, **options):
    config = ServerConfig(port=0, log_level="warning", audit_log=str(path), served_model_name=("demo",), **options)
    with plug_ins(llm, config) as parts, serving(llm, config, **parts) as one:
        one.audit = path
        yield one


@pytest.fixture(scope="module")
def running(demo, tmp_path_factory):
    with started(demo, tmp_path_factory.mktemp("cost") / "audit.log") as one:
        yield one


def answer_of(running, route: str, body: dict[str, Any]) -> dict[str, Any]:
    """The whole answer, or of a stream the last event, which has the usage."""
    answer = httpx.post(f"{running.url}/v1/{route}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()
    *_, last, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert done == "[DONE]"
    return json.loads(last)


def written(running, count: int) -> list[dict[str, Any]]:
    """The audit log, once it has so many lines: each is written after its answer was sent."""
    deadline = time.monotonic() + 10
    while (text := running.audit.read_text()).count("\n") < count:
        assert time.monotonic() < deadline, text
        time.sleep(0.005)
    entries = [json.loads(line) for line in text.splitlines()]
    assert len(entries) == count
    return entries


def counters(running) -> dict[tuple[str, str], float]:
    """{(name, value of the one label of its own): value} of the meter's counters."""
    page = httpx.get(f"{running.url}/metrics").text
    found = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            own = {name: value for name, value in sample.labels.items() if name not in ("model_name", "engine")}
            if {*own} & {"phase", "device"} or family.name == "qwen_fast:bytes":
                assert family.type == "counter" and family.documentation
                (label,) = own.values()
                found[sample.name.removeprefix("qwen_fast:"), label] = sample.value
    return found


def test_the_costs_of_requests_add_up_to_the_counters_and_the_statistics(running):
    assert running.idle()
    before, counted = running.llm.stats()["meter"]["total"], counters(running)
    usages = [answer_of(running, route, body)["usage"] for route, body in REQUESTS]
    assert running.idle()
    after, counted_after = running.llm.stats()["meter"]["total"], counters(running)
    costs = [usage["cost"] for usage in usages]
    total = {name: sum(cost[name] for cost in costs) for name in AMOUNTS}
    assert set(AMOUNTS) - {"total_bytes"} == {name for name in after if name not in (*ONCE, "energy_uj")}
    for name in set(AMOUNTS) - {"total_bytes"}:
        assert after[name] - before[name] == total[name], name
    grown = {key: counted_after[key] - counted[key] for key in counted_after}
    for phase, tokens in {"prefill": "computed_prompt_tokens", "decode": "output_tokens"}.items():
        assert grown["tokens_total", phase] == total[tokens] > 0
        seconds = total[f"{phase}_device_ns"] / 1e9
        assert grown["device_seconds_total", phase] == pytest.approx(seconds, abs=1e-8) and seconds > 0
    kinds = {kind for name, kind in grown if name == "bytes_total"}
    assert kinds == {"weight", "head", "embedding", "kv_read", "kv_write", "activation", "host"}
    for kind in kinds:
        assert grown["bytes_total", kind] == total[f"{kind}_bytes"]
    assert sum(grown["bytes_total", kind] for kind in kinds - {"host"}) == total["total_bytes"] > 0
    measured = {source["name"] for source in running.llm.stats()["meter"]["sources"] if source["measured"]}
    assert {device for name, device in grown if name == "energy_joules_total"} == measured
    for usage, cost in zip(usages, costs):
        assert cost["prompt_tokens"] == usage["prompt_tokens"]
        assert cost["output_tokens"] == usage["completion_tokens"]
        assert cost["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
        assert set(cost["energy_uj"]) == measured and bool(cost["energy_note"]) == (not measured)


def test_only_the_last_event_of_a_stream_has_the_cost(running):
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    text = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).text
    *others, last, _ = [line for line in text.split("\n\n") if line]
    assert '"cost":{' in last and not any('"cost"' in event for event in others)
    plain = httpx.post(f"{running.url}/v1/chat/completions", json={**CHAT, "stream": True}, timeout=60).text
    assert '"usage"' not in plain


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 2, 0]])
def test_each_prompt_counts_once_in_whatever_order_its_samples_end(order):
    """Two prompts of two samples; the second sample of each finds the prompt of the first in the cache."""
    record = RequestRecord("1", "/v1/completions", Principal(), num_sequences=4, params=SamplingParams(n=2))
    record.prompt_tokens = 30
    for index in order:
        assert record.cost is None  # not the whole yet
        usage = Usage(15, 5, 14 if index % 2 else 2, flops=1, weight_bytes=10 + index, energy_uj={"gpu0": 3})
        generate._note_finish(record, StreamOutput("1", index, "", [], finish_reason="length", usage=usage))
    cost = record.cost
    assert (cost.prompt_tokens, cost.cached_tokens, cost.completion_tokens) == (30, 4, 20)
    assert (cost.weight_bytes, cost.energy_uj, cost.energy_provisional) == (46, {"gpu0": 12}, False)


def test_the_audit_log_has_the_cost_of_what_ended_whole(demo, tmp_path):
    with started(demo, tmp_path / "audit.log") as one:
        said = answer_of(one, *REQUESTS[1])["usage"]["cost"]
        written(one, 1)
        assert httpx.post(f"{one.url}/v1/completions", json={**COMPLETION, "temperature": -1}).status_code == 400
        written(one, 2)
        body = {**COMPLETION, "stream": True, "max_tokens": 3000}
        with httpx.stream("POST", f"{one.url}/v1/completions", json=body):
            pass
        good, refused, cut = written(one, 3)
    assert good["cost"] == said and good["cost"]["weight_bytes"] > 0
    assert (refused["outcome"], refused["cost"]) == ("refused", None)
    assert (cut["outcome"], cut["cost"]) == ("cancelled", None)


def test_without_usage_cost(demo, tmp_path):
    assert server_config(parsed()).usage_cost and not server_config(parsed("--no-usage-cost")).usage_cost
    with started(demo, tmp_path / "audit.log", usage_cost=False) as one:
        for route, body in (REQUESTS[0], REQUESTS[5]):
            usage = answer_of(one, route, body)["usage"]
            assert set(usage) == {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"}
        entries = written(one, 2)
    assert [entry["cost"]["output_tokens"] for entry in entries] == [6, 14]


def test_a_meter_that_is_off_says_nothing(tmp_path):
    llm = AsyncLLM("demo", device="cpu", num_threads=1, meter=False, max_model_len=64)
    try:
        with started(llm, tmp_path / "audit.log") as one:
            assert "cost" not in answer_of(one, *REQUESTS[0])["usage"]
            assert one.idle() and counters(one) == {}
            assert written(one, 1)[0]["cost"] is None
    finally:
        llm.close()


@pytest.mark.parametrize(("route", "body"), [REQUESTS[0], REQUESTS[5]])
def test_energy_that_may_still_grow_is_marked(running, monkeypatch, route, body):
    """The engine's usage as it comes from a device whose counter has not moved yet."""
    of = Usage.of

    def measured(raw):
        return of({**raw, "energy_uj": {"gpu0": 1500, "cpu0": 20}, "energy_provisional": True, "energy_note": ""})

    monkeypatch.setattr(Usage, "of", measured)
    cost = answer_of(running, route, body)["usage"]["cost"]
    n = body.get("n", 1)
    assert cost["energy_uj"] == {"gpu0": 1500 * n, "cpu0": 20 * n}
    assert cost["energy_provisional"] is True and cost["energy_note"] == ""


def test_joules_by_device(demo):
    def stats():
        known = demo.stats()
        total = {**known["meter"]["total"], "energy_uj": {"gpu0": 2_500_000, "cpu0": 7}}
        return {**known, "meter": {**known["meter"], "total": total}}

    llm = SimpleNamespace(closed=False, stats=stats, info=demo.info, max_model_len=64)
    page = PrometheusMetrics(llm, "demo").page("")[1].decode()
    assert 'qwen_fast:energy_joules_total{device="gpu0",engine="0",model_name="demo"} 2.5\n' in page
    assert 'qwen_fast:energy_joules_total{device="cpu0",engine="0",model_name="demo"} 7e-06\n' in page
    assert "vllm:energy_joules" not in page and "vllm:tokens_total" not in page


def test_the_document_describes_the_cost(running):
    for route, body in (REQUESTS[2], REQUESTS[4]):
        content = document()["paths"][f"/v1/{route}"]["post"]["responses"]["200"]["content"]
        usage = content["application/json"]["schema"]["properties"]["usage"]
        given = answer_of(running, route, body)["usage"]
        jsonschema.validate(given, {**usage, "additionalProperties": False})
        assert set(given["cost"]) == set(usage["properties"]["cost"]["properties"])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**given, "cost": {**given["cost"], "flops": "many"}}, usage)
