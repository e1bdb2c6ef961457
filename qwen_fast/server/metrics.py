"""Prometheus metrics, each as qwen_fast:NAME, and under vLLM's name where vLLM has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .http_io import CONTEXT, Message, Receive, Send
from .state import RequestRecord

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM

PREFIX, VLLM_PREFIX = "qwen_fast:", "vllm:"
_OURS_ALONE = frozenset(  # vLLM has nothing of this name
    PREFIX + name
    for name in (
        "num_requests_paused",
        "engine_steps",
        "engine_busy_seconds",
        "memory_bytes",
        "responses",
        "key_tokens",
        "energy_joules",
        "device_seconds",
        "bytes",
        "tokens",
    )
)
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)  # fmt: skip
_TPOT_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_SAMPLES = (1, 2, 5, 10, 20)

_GAUGES = {  # name: (field of the engine's stats, help)
    "num_requests_running": ("num_running", "Sequences that take part in steps"),
    "num_requests_waiting": ("num_waiting", "Sequences that wait for their first step"),
    "num_requests_paused": ("num_paused", "Sequences whose client does not read"),
}
_COUNTERS = {
    "prefix_cache_queries": ("prefix_queried_tokens", "Prompt tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_hit_tokens", "Prompt tokens found in the prefix cache"),
    "num_preemptions": ("num_preemptions", "Sequences put back because the KV cache was full"),
    "generation_tokens": ("num_generated_tokens", "Tokens generated"),
    "engine_steps": ("num_steps", "Steps of the engine"),
}
_METERED = {  # name: (label, {its value: field of the meter's account}, scale, help)
    "device_seconds": (
        "phase",
        {"prefill": "prefill_device_ns", "decode": "decode_device_ns"},
        1e-9,
        "Device time of steps, measured; prefill: prompt tokens, and tokens computed again",
    ),
    "bytes": (
        "kind",
        {
            kind: f"{kind}_bytes"
            for kind in ("weight", "head", "embedding", "kv_read", "kv_write", "activation", "host")
        },
        1,
        "Bytes moved in the device's memory, and over its bus (host), counted by formula",
    ),
    "tokens": (
        "phase",
        {"prefill": "computed_prompt_tokens", "decode": "output_tokens"},
        1,
        "Tokens computed for prompts, and tokens generated",
    ),
}
_MEMORY = ("embedding", "layers", "head", "workspace", "kv_cache")


def counts_up_to(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    found = []
    power = 1
    while power <= most:
        found += [step * power for step in (1, 2, 5) if step * power <= most]
        power *= 10
    return tuple(found)


class PrometheusMetrics:
    """Counts requests, and reads the engine's counters when it is asked for its page. It has a registry of its own.

    Labels of every metric: model_name, and engine, which is "0".
    """

    def __init__(self, llm: AsyncLLM, model_name: str) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._requests = CollectorRegistry(auto_describe=False)
        lengths = counts_up_to(llm.max_model_len)
        self._prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request", lengths)
        self._output_tokens = self._histogram("request_generation_tokens", "Tokens of a finished sequence", lengths)
        self._longest = self._histogram("request_max_num_generation_tokens", "Tokens of its longest sequence", lengths)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens, where it was given", lengths)
        self._n = self._histogram("request_params_n", "Samples asked for", _SAMPLES)
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to the first token", _TTFT_S)
        self._tpot = self._histogram("time_per_output_token_seconds", "Mean time of a token after the first", _TPOT_S)
        self._tpot_newer = self._histogram(
            "request_time_per_output_token_seconds", "The same, by its newer name", _TPOT_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to the end of the answer", _LATENCY_S)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival at the engine to its step", _LATENCY_S)
        self._inference = self._histogram("request_inference_time_seconds", "First step to last token", _LATENCY_S)
        self._prefill = self._histogram("request_prefill_time_seconds", "First step to first token", _LATENCY_S)
        self._decode = self._histogram("request_decode_time_seconds", "First token to last token", _LATENCY_S)
        self._finished = self._counter(
            "request_success", "Sequences by how they ended: stop, length, abort, error", "finished_reason"
        )
        self._responses = self._counter("responses", "Generation requests by status; 499: the client went", "status")
        self._key_tokens = self._counter("key_tokens", "Tokens by API key; kind: prompt, completion", "key", "kind")
        for reason in ("stop", "length", "abort", "error"):  # rates need a zero to begin with
            self._finished.labels(*self._labels.values(), reason)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_BothNames([self._requests, _EngineCollector(llm, self._labels)]))

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Any:
        whole = Histogram(PREFIX + name, text, tuple(self._labels), registry=self._requests, buckets=buckets)
        return whole.labels(*self._labels.values())

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, (*self._labels, *labels), registry=self._requests)

    # -- the server's Metrics

    def request_started(self, record: RequestRecord) -> None:
        return None

    def first_token(self, record: RequestRecord) -> None:
        if record.first_token is not None:
            self._ttft.observe(record.first_token - record.arrived)

    def finished(self, record: RequestRecord) -> None:
        labels = self._labels.values()
        status = "499" if record.outcome == "cancelled" else str(record.status)
        self._responses.labels(*labels, status).inc()
        for reason in record.finish_reasons:
            self._finished.labels(*labels, reason).inc()
        missing = max(record.num_sequences, 1) - len(record.finish_reasons)
        if missing > 0 and (record.outcome == "cancelled" or (record.outcome == "error" and record.status >= 500)):
            self._finished.labels(*labels, "abort" if record.outcome == "cancelled" else "error").inc(missing)
        if record.prompt_tokens:
            key = record.principal.name
            self._key_tokens.labels(*labels, key, "prompt").inc(record.prompt_tokens)
            self._key_tokens.labels(*labels, key, "completion").inc(record.completion_tokens)
        if record.outcome == "ok":
            self._succeeded(record)

    def _succeeded(self, record: RequestRecord) -> None:
        if record.finished is not None:
            self._e2e.observe(record.finished - record.arrived)
        self._prompt_tokens.observe(record.prompt_tokens)
        params = record.params
        if params is not None:
            self._n.observe(params.n)
            if params.max_tokens is not None:
                self._max_tokens.observe(params.max_tokens)
        self._longest.observe(max((one.completion_tokens for one in record.timings), default=0))
        for one in record.timings:
            self._output_tokens.observe(one.completion_tokens)
            if one.queue_s is not None:
                self._queue.observe(one.queue_s)
            if one.tpot_s is not None:
                self._tpot.observe(one.tpot_s)
                self._tpot_newer.observe(one.tpot_s)
            if one.first_scheduled_time and one.first_token_time:
                self._prefill.observe(one.first_token_time - one.first_scheduled_time)
                self._decode.observe(one.last_token_time - one.first_token_time)
                self._inference.observe(one.last_token_time - one.first_scheduled_time)

    # -- the page

    def page(self, accept: str) -> tuple[str, bytes]:
        """Content type and text of /metrics, in the format that an Accept header prefers."""
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self.registry)


class MetricsPage:
    """GET /metrics, as an ASGI application."""

    def __init__(self, page: Callable[[str], tuple[str, bytes]]) -> None:
        self._page = page

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        content_type, body = self._page(scope[CONTEXT].headers.get("accept", ""))
        headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _BothNames(Collector):
    """What its sources collect, once more under vLLM's prefix, and without the moments of creation, which graphs take
    for series."""

    def __init__(self, sources: Sequence[Any]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            for family in source.collect():
                family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
                yield family
                if family.name not in _OURS_ALONE:
                    yield _renamed(family)


def _renamed(family: Metric) -> Metric:
    other = copy(family)
    other.name = VLLM_PREFIX + family.name.removeprefix(PREFIX)
    other.samples = [sample._replace(name=VLLM_PREFIX + sample.name.removeprefix(PREFIX)) for sample in family.samples]
    return other


class _EngineCollector(Collector):
    """The engine's counters as they are at this moment; nothing once it is closed."""

    def __init__(self, llm: AsyncLLM, labels: dict[str, str]) -> None:
        self._llm = llm
        self._names, self._values = tuple(labels), tuple(labels.values())

    def collect(self) -> Iterable[Metric]:
        if self._llm.closed:
            return
        stats = self._llm.stats()
        memory = stats["memory"]
        for name, (field, text) in _GAUGES.items():
            yield self._one(GaugeMetricFamily, name, text, stats[field])
        used = 1 - stats["num_free_blocks"] / max(memory["num_blocks"], 1)
        yield self._one(GaugeMetricFamily, "kv_cache_usage_perc", "Share of the KV cache that is in use, 0 to 1", used)
        for name, (field, text) in _COUNTERS.items():
            yield self._one(CounterMetricFamily, name, text, stats[field])
        prompt = stats["num_prompt_tokens"] + stats["prefix_hit_tokens"]
        yield self._one(CounterMetricFamily, "prompt_tokens", "Prompt tokens, computed or found in the cache", prompt)
        busy = stats["busy_ns"] / 1e9
        yield self._one(CounterMetricFamily, "engine_busy_seconds", "Time with a step on the device", busy)
        yield self._memory(memory)
        yield self._cache_config()
        if stats["meter"]["enabled"]:
            yield from self._metered(stats["meter"]["total"])

    def _one(self, kind: Any, name: str, text: str, value: float) -> Metric:
        family = kind(PREFIX + name, text, labels=self._names)
        family.add_metric(self._values, value)
        return family

    def _memory(self, memory: dict[str, Any]) -> Metric:
        parts = {part: memory[f"{part}_bytes"] for part in _MEMORY}
        return self._labelled(GaugeMetricFamily, "memory_bytes", "Memory of the engine by part", "part", parts)

    def _metered(self, total: Mapping[str, Any]) -> Iterator[Metric]:
        """What the meter has counted since the engine was loaded; energy only of the devices that it can measure."""
        for name, (label, fields, scale, text) in _METERED.items():
            values = {value: total[field] * scale for value, field in fields.items()}
            yield self._labelled(CounterMetricFamily, name, text, label, values)
        joules = {device: microjoules / 1e6 for device, microjoules in total["energy_uj"].items()}
        if joules:
            text = "Energy of a whole device, measured, with and without steps"
            yield self._labelled(CounterMetricFamily, "energy_joules", text, "device", joules)

    def _labelled(self, kind: Any, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = kind(PREFIX + name, text, labels=(*self._names, label))
        for value, number in values.items():
            family.add_metric((*self._values, value), number)
        return family

    def _cache_config(self) -> Metric:
        info = self._llm.info()
        config = {
            "block_size": str(info["block_size"]),
            "num_gpu_blocks": str(info["num_blocks"]),  # vLLM's name, on every device
            "cache_dtype": str(info["kv_cache_dtype"]),
        }
        family = GaugeMetricFamily(PREFIX + "cache_config_info", "The KV cache", labels=(*self._names, *config))
        family.add_metric((*self._values, *config.values()), 1)
        return family
