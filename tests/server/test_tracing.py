"""Traces, as a collector gets them over OTLP."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from server_helpers import serving

from qwen_fast.server import ServerConfig

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from qwen_fast.server.serve import plug_ins
from qwen_fast.server.tracing import OTLPTracer, traces_url


class Collector(http.server.ThreadingHTTPServer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[Any] = []
        self.paths: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.paths.append(self.path)
        self.server.requests.append(trace_service.ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def collector():
    with Collector() as one:
        thread = threading.Thread(target=one.serve_forever, args=(0.02,))
        thread.start()
        yield one
        one.shutdown()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    def value(one: Any) -> Any:
        kind = one.WhichOneof("value")
        return [value(entry) for entry in one.array_value.values] if kind == "array_value" else getattr(one, kind)

    return {entry.key: value(entry.value) for entry in span.attributes}


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"


def test_spans(demo, collector):
    config = ServerConfig(port=0, log_level="warning", otlp_traces_endpoint=collector.url)
    message = {"role": "user", "content": "What is the secret word?"}
    fields = {"model": "demo", "messages": [message], "max_tokens": 5, "seed": 3, "temperature": 0.5}
    with contextlib.ExitStack() as stack:
        parts = stack.enter_context(plug_ins(demo, config))
        running = stack.enter_context(serving(demo, config, **parts))
        client = stack.enter_context(running.client())
        answer = client.chat.completions.create(
            **fields, extra_body={"ignore_eos": True}, extra_headers={"traceparent": PARENT + "01"}
        )
        client.chat.completions.create(**fields, extra_headers={"traceparent": PARENT + "00"})  # not sampled
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="demo", prompt="a", n=1000, extra_headers={"traceparent": "nonsense"})
        assert running.idle()
    assert set(collector.paths) == {"/v1/traces"}
    resource = {
        entry.key: entry.value.string_value for entry in collector.requests[0].resource_spans[0].resource.attributes
    }
    assert resource["service.name"] == "qwen_fast"
    good, bad = collector.spans
    assert (good.trace_id.hex(), good.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    assert (good.name, good.kind) == ("chat demo", 2)
    told = attributes(good)
    assert answer.usage is not None
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "qwen_fast",
        "gen_ai.request.model": "demo",
        "gen_ai.response.model": "demo",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 1,
        "gen_ai.usage.input_tokens": answer.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"],
        "http.response.status_code": 200,
    }
    assert {name: told.get(name) for name in expected} == expected
    first, whole = told["gen_ai.latency.time_to_first_token"], told["gen_ai.latency.e2e"]
    assert 0 < first < whole
    assert abs((good.end_time_unix_nano - good.start_time_unix_nano) / 1e9 - whole) < 0.05
    (event,) = good.events
    assert event.name == "gen_ai.first_token"
    assert abs((event.time_unix_nano - good.start_time_unix_nano) / 1e9 - first) < 0.05
    assert (bad.parent_span_id, attributes(bad)["error.type"]) == (b"", "400")
    assert "secret" not in str(collector.requests)


def test_a_collector_that_is_not_there_delays_nobody(demo):
    config = ServerConfig(port=0, log_level="warning", otlp_traces_endpoint="http://127.0.0.1:9")
    with plug_ins(demo, config) as parts, serving(demo, config, **parts) as running:
        body = {"prompt": "a", "max_tokens": 1}
        started = time.monotonic()
        assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=30).status_code == 200
        assert time.monotonic() - started < 2
        started = time.monotonic()
    assert time.monotonic() - started < 6


@pytest.mark.parametrize(
    "given, used",
    [
        ("http://a:4318", "http://a:4318/v1/traces"),
        ("https://a/", "https://a/v1/traces"),
        ("https://api.example.com/otel/v1/traces", "https://api.example.com/otel/v1/traces"),
    ],
)
def test_where_spans_go(given, used):
    assert traces_url(given) == used


def test_an_endpoint_that_is_no_url():
    with pytest.raises(ValueError, match="otlp_traces_endpoint must be an http:// or https:// URL, got 'a:4317'"):
        OTLPTracer("a:4317")


def test_without_the_extra():
    """The message says what to install; without traces nothing of it is imported."""
    code = """
import sys
for name in ("opentelemetry.sdk", "opentelemetry.exporter"):
    sys.modules[name] = None
import qwen_fast.server.serve, qwen_fast.server.app
from qwen_fast.server.tracing import OTLPTracer
try:
    OTLPTracer("http://127.0.0.1:4318")
except ModuleNotFoundError as error:
    assert "pip install qwen_fast[tracing]" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
