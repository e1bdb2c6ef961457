"""/metrics: the names, and numbers that are what happened."""

from __future__ import annotations

import contextlib
import math

import httpx
import openai
import prometheus_client
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from server_helpers import serving
from test_deployment import METRICS

from qwen_fast.server import ServerConfig
from qwen_fast.server.metrics import counts_up_to
from qwen_fast.server.serve import plug_ins
from qwen_fast.server.state import Principal, RequestRecord

LABELS = {"model_name": "small", "engine": "0"}


@pytest.fixture(scope="module")
def running(demo):
    config = ServerConfig(port=0, log_level="warning", served_model_name=("small", "other"))
    with plug_ins(demo, config) as parts, serving(demo, config, **parts) as one:
        yield one


class Page:
    """A parsed /metrics."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = {family.name: family for family in parse_text(text)}

    def value(self, name: str, **labels: str) -> float:
        for family in self.families.values():
            for sample in family.samples:
                if sample.name == name and sample.labels == {**LABELS, **labels}:
                    return sample.value
        raise KeyError(name)


def page(running) -> Page:
    answer = httpx.get(f"{running.url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return Page(answer.text)


def complete(client: openai.OpenAI, **more):
    fields = {"model": "small", "prompt": "Once upon a time", "max_tokens": 6, "seed": 5, **more}
    return client.completions.create(**fields, extra_body={"ignore_eos": True})


@contextlib.contextmanager
def counted(running):
    """A function that tells how much a counter grew inside."""
    assert running.idle()
    before = page(running)
    after: list[Page] = []

    def grown(name: str, **labels: str) -> float:
        if not after:
            assert running.idle()
            after.append(page(running))
        try:
            start = before.value(name, **labels)
        except KeyError:
            start = 0.0
        return after[0].value(name, **labels) - start

    yield grown


def test_every_metric_under_both_names(running):
    shown = page(running)
    for kind, names in METRICS.items():
        for name in names:
            for prefix in ("qwen_fast:", "vllm:"):
                family = shown.families[prefix + name]
                assert (family.type, bool(family.documentation)) == (kind, True)
                assert {**family.samples[0].labels, **LABELS} == family.samples[0].labels
    more = ["request_params_n", "request_params_max_tokens", "request_max_num_generation_tokens"]
    assert {f"vllm:{name}" for name in [*more, "request_inference_time_seconds", "cache_config_info"]} <= set(
        shown.families
    )
    assert "_created" not in shown.text
    ours = {name.partition(":")[2] for name in shown.families if name.startswith("qwen_fast:")}
    vllms = {name.partition(":")[2] for name in shown.families if name.startswith("vllm:")}
    assert ours - vllms == {
        "num_requests_paused",
        "engine_steps",
        "engine_busy_seconds",
        "memory_bytes",
        "responses",
        "key_tokens",
        "device_seconds",
        "bytes",
        "tokens",
        *(["energy_joules"] if running.llm.stats()["meter"]["total"]["energy_uj"] else []),
    }
    assert vllms <= ours


def test_openmetrics_where_the_client_wants_it(running):
    answer = httpx.get(f"{running.url}/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(answer.text)}
    assert {"qwen_fast:request_success", "vllm:request_success"} <= names


def test_the_global_registry_is_left_alone(running):
    assert b"qwen_fast" not in prometheus_client.generate_latest()


def test_buckets(running):
    shown = page(running)

    def buckets(name: str) -> list[str]:
        return [sample.labels["le"] for sample in shown.families[name].samples if sample.name.endswith("_bucket")]

    assert buckets("vllm:time_to_first_token_seconds")[:3] == ["0.001", "0.005", "0.01"]
    assert buckets("vllm:time_to_first_token_seconds")[-3:] == ["640.0", "2560.0", "+Inf"]
    assert buckets("vllm:e2e_request_latency_seconds")[-2:] == ["7680.0", "+Inf"]
    assert buckets("vllm:request_prompt_tokens") == [
        *[f"{count}.0" for count in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)],
        "+Inf",
    ]
    assert counts_up_to(5000)[-2:] == (2000, 5000)


def test_a_request_is_counted(running):
    with counted(running) as grown, running.client() as client:
        usage = complete(client, n=2).usage
        for prefix in ("qwen_fast:", "vllm:"):
            assert grown(f"{prefix}request_success_total", finished_reason="length") == 2
            assert grown(f"{prefix}request_success_total", finished_reason="error") == 0
            assert grown(f"{prefix}generation_tokens_total") == usage.completion_tokens == 12
            assert grown(f"{prefix}prompt_tokens_total") >= usage.prompt_tokens
            assert grown(f"{prefix}request_prompt_tokens_sum") == usage.prompt_tokens
            assert grown(f"{prefix}request_generation_tokens_count") == 2
            assert grown(f"{prefix}request_generation_tokens_sum") == 12
            assert grown(f"{prefix}request_max_num_generation_tokens_sum") == 6
            assert grown(f"{prefix}request_params_n_sum") == 2
            assert grown(f"{prefix}request_params_max_tokens_sum") == 6
        for name, count in {
            "time_to_first_token": 1,
            "e2e_request_latency": 1,
            "time_per_output_token": 2,
            "request_queue_time": 2,
            "request_prefill_time": 2,
            "request_decode_time": 2,
            "request_inference_time": 2,
        }.items():
            assert grown(f"vllm:{name}_seconds_count") == count
            assert 0 <= grown(f"vllm:{name}_seconds_sum") < 60
        inside = grown("vllm:request_prefill_time_seconds_sum") + grown("vllm:request_decode_time_seconds_sum")
        assert math.isclose(inside, grown("vllm:request_inference_time_seconds_sum"), abs_tol=1e-6)
        assert grown("qwen_fast:responses_total", status="200") == 1
        assert grown("qwen_fast:key_tokens_total", key="anonymous", kind="completion") == 12
        assert grown("qwen_fast:engine_steps_total") >= 6
        assert grown("qwen_fast:engine_busy_seconds_total") > 0


def test_cache_hits_and_gauges(running):
    with counted(running) as grown, running.client() as client:
        prompt = [7] * 100
        for _ in range(2):
            complete(client, prompt=prompt)
        assert grown("vllm:prefix_cache_queries_total") == 200
        assert grown("vllm:prefix_cache_hits_total") >= 64
    with counted(running) as grown, running.client() as client:
        stream = complete(client, max_tokens=3000, stream=True)
        next(iter(stream))
        shown = page(running)
        assert shown.value("vllm:num_requests_running") + shown.value("qwen_fast:num_requests_paused") == 1
        assert 0 < shown.value("vllm:kv_cache_usage_perc") < 1
        stream.close()
        assert running.idle()
        assert page(running).value("vllm:num_requests_running") == 0
        assert grown("vllm:request_success_total", finished_reason="abort") == 1
        assert grown("qwen_fast:responses_total", status="499") == 1


def test_refusals_are_no_errors(running):
    with counted(running) as grown, running.client() as client:
        with pytest.raises(openai.BadRequestError):
            complete(client, temperature=-1)
        assert grown("qwen_fast:responses_total", status="400") == 1
        assert grown("vllm:request_success_total", finished_reason="error") == 0


def test_failures_are_counted_by_sequence(running):
    with counted(running) as grown:
        record = RequestRecord("1", "/v1/completions", Principal(), num_sequences=3, status=503, outcome="error")
        record.finish_reasons = ["stop"]
        running.server.metrics.finished(record)
        assert grown("vllm:request_success_total", finished_reason="error") == 2
        assert grown("vllm:request_success_total", finished_reason="stop") == 1


def test_without_metrics_there_is_no_page(served):
    assert httpx.get(f"{served.url}/metrics").status_code == 404


def test_cache_config(running):
    (sample,) = page(running).families["vllm:cache_config_info"].samples
    info = running.llm.info()
    assert sample.labels["block_size"] == str(info["block_size"])
    assert (sample.labels["num_gpu_blocks"], sample.value) == (str(info["num_blocks"]), 1)
    memory = running.llm.stats()["memory"]
    assert page(running).value("qwen_fast:memory_bytes", part="kv_cache") == memory["kv_cache_bytes"]
