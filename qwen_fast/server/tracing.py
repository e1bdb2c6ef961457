"""OpenTelemetry traces over OTLP, with the GenAI attribute names. Needs the extra: pip install qwen_fast[tracing]."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from .. import __version__
from .state import RequestRecord

_EXPORT_S = 3  # for one batch of spans to reach the collector
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_PARAMS = {  # gen_ai.request.NAME: the field of SamplingParams
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "seed": "seed",
    "choice.count": "n",
}


class OTLPTracer:
    """One span for each generation request: a child of the caller's where it sent `traceparent`, sampled as that says.

    endpoint: URL of a collector that takes OTLP over HTTP; /v1/traces is added where it has no path. exporter: any
    other span exporter in its place. OpenTelemetry's own environment variables hold for the rest: headers of the
    export (OTEL_EXPORTER_OTLP_HEADERS), the service's name, the sampler. Spans hold no text of prompts or answers.

    ModuleNotFoundError without the extra; ValueError for an endpoint that is no URL.
    """

    def __init__(self, endpoint: str, exporter: Any = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ModuleNotFoundError(f"traces need `pip install qwen_fast[tracing]`: {error}") from None
        exporter = exporter or OTLPSpanExporter(endpoint=traces_url(endpoint), timeout=_EXPORT_S)
        own = Resource({"service.name": "qwen_fast", "service.version": __version__})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("qwen_fast", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    @contextlib.contextmanager
    def request(self, record: RequestRecord) -> Iterator[None]:
        operation = _OPERATIONS.get(record.route, record.route)
        span = self._tracer.start_span(
            operation,
            context=self._propagator.extract(record.headers),
            kind=self._trace.SpanKind.SERVER,
            attributes={"http.route": record.route, "gen_ai.operation.name": operation},
        )
        try:
            yield
        finally:
            if span.is_recording():
                self._fill(span, record, operation)
            span.end()

    def close(self) -> None:
        """Sends what is left, for a few seconds at most."""
        sender = threading.Thread(target=self._provider.shutdown, daemon=True)
        sender.start()
        sender.join(_EXPORT_S)

    def _fill(self, span: Any, record: RequestRecord, operation: str) -> None:
        span.update_name(f"{operation} {record.model}")
        span.set_attributes({**_attributes(record), **_latencies(record)})
        if record.first_token is not None:
            behind = time.perf_counter() - record.first_token
            span.add_event("gen_ai.first_token", timestamp=time.time_ns() - round(behind * 1e9))
        if record.outcome in ("error", "refused"):
            span.set_attribute("error.type", str(record.status))
        if record.outcome == "error":
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, f"status {record.status}"))


def traces_url(endpoint: str) -> str:
    """Where spans go: the endpoint, with OTLP's path where it has none."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"otlp_traces_endpoint must be an http:// or https:// URL, got {endpoint!r}")
    return parts._replace(path="/v1/traces").geturl() if parts.path in ("", "/") else endpoint


def _attributes(record: RequestRecord) -> dict[str, Any]:
    """OpenTelemetry's names for generative AI, and ours for what it has none for."""
    values: dict[str, Any] = {
        "gen_ai.provider.name": "qwen_fast",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.response.id": record.request_id,
        "gen_ai.request.stream": record.stream,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.response.finish_reasons": tuple(record.finish_reasons),
        "http.response.status_code": record.status,
        "qwen_fast.principal": record.principal.name,
        "qwen_fast.outcome": record.outcome,
        "qwen_fast.sequences": record.num_sequences,
    }
    for name, field in _PARAMS.items():
        value = getattr(record.params, field, None)
        if value is not None:
            values[f"gen_ai.request.{name}"] = value
    return values


def _latencies(record: RequestRecord) -> dict[str, float]:
    """Seconds, under vLLM's names; those inside the engine are the first finished sequence's."""
    values: dict[str, float | None] = {}
    if record.finished is not None:
        values["e2e"] = record.finished - record.arrived
    if record.first_token is not None:
        values["time_to_first_token"] = record.first_token - record.arrived
    if record.timings:
        first = record.timings[0]
        values["time_in_queue"] = first.queue_s
        if first.first_scheduled_time and first.first_token_time:
            values["time_in_model_prefill"] = first.first_token_time - first.first_scheduled_time
            values["time_in_model_decode"] = first.last_token_time - first.first_token_time
    return {f"gen_ai.latency.{name}": value for name, value in values.items() if value is not None}
