"""Every option of the server with its default and range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..params import MAX_LOGPROBS, MAX_SAMPLES, MAX_STOP_BYTES, MAX_STOP_STRINGS
from .fastcgi_address import parse_address

_INT32_MAX = 2**31 - 1


def _option(default: Any, low: float | None = None, high: float | None = None) -> Any:
    """A field with its inclusive range; without one the type alone is checked."""
    return field(default=default, metadata={"range": None if low is None else (low, high)})


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. Values outside the ranges given here raise ValueError.

    body_bytes: of a request body; more is status 413.
    pending_body_bytes: of all bodies that are being read or answered, together; 429 or 503 beyond (see Bodies).
    json_depth: levels of arrays and objects in a body.
    json_values, json_texts, json_containers, json_escapes: values (by their commas), strings and keys, arrays and
        objects, and backslash escapes of a body.
    text_bytes: of one prompt, or of all messages of a conversation together, in UTF-8.
    messages, content_parts: of one conversation.
    prompts: of one completion request; times n at most `sequences`.
    prompt_token_ids: token ids that one request gives, all prompts together, and that /tokenize answers with.
    n: samples of one prompt.
    sequences: prompts times n of one request.
    stop, stop_bytes: stop strings of a request, UTF-8 bytes of each.
    stop_token_ids, bad_words, logit_bias, allowed_token_ids: entries.
    choices: texts of a choice list.
    tools: entries. tools_bytes: of all of them together, as JSON text.
    schema_bytes: of one JSON schema, regex, grammar or choice list, as JSON text.
    schema_depth: levels of one JSON schema.
    logprobs: of one position (top_logprobs, logprobs, prompt_logprobs).
    logprob_entries: of a whole answer: n times the sum, over its prompts, of prompt_tokens * (prompt_logprobs + 1)
        + max_tokens * (logprobs + 1). Completion tokens that are streamed are not counted: nothing keeps them.
    token_strs: tokens of a /tokenize request with return_token_strs, and of a /detokenize request.
    request_seconds: from the first byte of a request to the last of its answer; 504 after it.
    header_seconds: from connecting, TLS included, or from the answer before, to the end of a request's headers; 408
        after it, or the connection is closed.
    body_seconds: for the body to arrive; 408 after it. body_bytes_per_second: what it has to bring on average after the
        first seconds; 408 below.
    write_seconds: for a client that does not read to go on reading; its connection is cut after it.
    connections: requests with a valid key open at once; 503 beyond. waiting_connections: connections without one (no
        request yet, none any more, or refused); beyond, the one that has waited longest is closed.
    address_connections: the same for one address (of IPv6, the first 64 bits; a Unix socket has none); put the number
        up for a proxy that keeps more of them open.
    header_bytes, header_count: of one request; 431 beyond.
    coalesce_ms: under load the increments of one stream are at most so far apart (0: every increment at once).
    """

    body_bytes: int = _option(10 * 2**20, 1024, 2**31)
    pending_body_bytes: int = _option(256 * 2**20, 1024, 2**40)
    json_depth: int = _option(32, 4, 256)
    json_values: int = _option(2**20, 16, _INT32_MAX)
    json_texts: int = _option(2**16, 16, _INT32_MAX)
    json_containers: int = _option(2**15, 16, _INT32_MAX)
    json_escapes: int = _option(2**19, 16, _INT32_MAX)
    text_bytes: int = _option(2 * 2**20, 16, 2**31)
    messages: int = _option(2048, 1, _INT32_MAX)
    content_parts: int = _option(4096, 1, _INT32_MAX)
    prompts: int = _option(256, 1, _INT32_MAX)
    prompt_token_ids: int = _option(1_000_000, 1, _INT32_MAX)
    n: int = _option(8, 1, MAX_SAMPLES)
    sequences: int = _option(256, 1, _INT32_MAX)
    stop: int = _option(MAX_STOP_STRINGS, 0, MAX_STOP_STRINGS)
    stop_bytes: int = _option(MAX_STOP_BYTES, 1, MAX_STOP_BYTES)
    stop_token_ids: int = _option(256, 0, _INT32_MAX)
    bad_words: int = _option(256, 0, _INT32_MAX)
    logit_bias: int = _option(1024, 0, _INT32_MAX)
    allowed_token_ids: int = _option(200_000, 0, _INT32_MAX)
    choices: int = _option(4096, 1, _INT32_MAX)
    tools: int = _option(128, 0, _INT32_MAX)
    tools_bytes: int = _option(512 * 1024, 64, 2**24)
    schema_bytes: int = _option(64 * 1024, 64, 2**24)
    schema_depth: int = _option(24, 1, 256)
    logprobs: int = _option(MAX_LOGPROBS, 0, MAX_LOGPROBS)
    logprob_entries: int = _option(2_000_000, 0, 2**40)
    token_strs: int = _option(131_072, 0, _INT32_MAX)
    request_seconds: float = _option(600.0, 0.01, 86400.0)
    header_seconds: float = _option(20.0, 0.01, 86400.0)
    body_seconds: float = _option(60.0, 0.01, 86400.0)
    body_bytes_per_second: int = _option(1024, 0, _INT32_MAX)
    write_seconds: float = _option(30.0, 0.01, 86400.0)
    connections: int = _option(4096, 1, 2**20)
    waiting_connections: int = _option(4096, 1, 2**20)
    address_connections: int = _option(1024, 1, 2**20)
    header_bytes: int = _option(64 * 1024, 1024, 2**20)
    header_count: int = _option(100, 8, 10_000)
    coalesce_ms: float = _option(20.0, 0.0, 1000.0)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class ServerConfig:
    """Options of `qwen-fast serve` beside the engine's. Names are vLLM's where it has the option.

    model: as the engine was given it; it is the served name where served_model_name is empty.
    served_model_name: names that requests may give in "model"; answers carry the first.
    host, port: TCP address (port 0: any free one); uds: path of a Unix socket in its place.
    fastcgi: "unix:/path" or "127.0.0.1:port" to speak FastCGI on, beside HTTP. fastcgi_mode: permissions of its Unix
        socket. fastcgi_only: no HTTP.
    root_path: the path prefix that a proxy strips.
    api_key: keys; api_key_file: a file of them with their limits. None and empty: no authentication.
    allowed_origins, allowed_methods, allowed_headers, allow_credentials: CORS, off while allowed_origins is empty.
    ssl_keyfile, ssl_certfile, ssl_ca_certs, ssl_cert_reqs: TLS, as uvicorn takes them.
    enable_auto_tool_choice, tool_call_parser: "hermes", or None for no tool calls at all. Tool calls need no switch:
        the first is accepted and changes nothing.
    trust_request_chat_template: accept "chat_template" in requests (a template runs in a sandbox, and costs time).
    parse_special_tokens: control tokens written out in a message's content act as such. Off: they are text, so that
        nobody's content can end a turn.
    max_num_queued_reqs: running and waiting sequences together beyond which requests get 429.
    max_num_queued_tokens: prompt tokens that wait to be computed, beyond which requests get 429; 0: no limit. With
        several keys, a key below its share of them still gets in.
    audit_log: path of the JSON-lines log; audit_log_text: prompts and answers go into it too.
    metrics_public: /metrics needs no key.
    shutdown_timeout: seconds that requests may take to finish after SIGTERM.
    watchdog_seconds: longest time without a step while requests run; then the process ends. 0: off; None: 120 on a
        GPU, 1800 on the CPU.
    otlp_traces_endpoint: URL of an OTLP collector; None: no traces.
    disable_fastapi_docs: leave out /docs, /redoc and /openapi.json.
    enable_force_include_usage: every stream ends with usage.
    usage_cost: usage has `cost`: bytes, FLOPs, device time and energy of the request, as the engine's meter has them.
        The audit log and /metrics have them in any case.
    return_tokens_as_token_ids: logprobs name tokens as "token_id:N".
    response_role: role of answers.
    log_level: uvicorn's. access_log: a line for each request.
    """

    model: str = "demo"
    served_model_name: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = _option(8000, 0, 65535)
    uds: str | None = None
    fastcgi: str | None = None
    fastcgi_mode: int = _option(0o660, 0, 0o777)
    fastcgi_only: bool = False
    root_path: str = ""
    api_key: tuple[str, ...] = ()
    api_key_file: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("GET", "POST")
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = _option(0, 0, 2)
    enable_auto_tool_choice: bool = False
    tool_call_parser: str | None = "hermes"
    trust_request_chat_template: bool = False
    parse_special_tokens: bool = False
    max_num_queued_reqs: int = _option(1024, 1, _INT32_MAX)
    max_num_queued_tokens: int = _option(0, 0, _INT32_MAX)
    audit_log: str | None = None
    audit_log_text: bool = False
    metrics_public: bool = False
    shutdown_timeout: float = _option(30.0, 0.0, 86400.0)
    watchdog_seconds: float | None = _option(None, 0.0, 86400.0)
    otlp_traces_endpoint: str | None = None
    disable_fastapi_docs: bool = False
    enable_force_include_usage: bool = False
    usage_cost: bool = True
    return_tokens_as_token_ids: bool = False
    response_role: str = "assistant"
    log_level: str = "info"
    access_log: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        _check(self)
        if not isinstance(self.limits, Limits):
            raise TypeError(f"limits must be Limits, got {type(self.limits).__name__}")
        for name in ("served_model_name", "api_key"):
            if not all(getattr(self, name)):
                raise ValueError(f"{name} holds an empty text")
        if self.tool_call_parser not in (None, "hermes"):
            raise ValueError(f"tool_call_parser must be 'hermes', got {self.tool_call_parser!r}")
        if self.log_level not in ("critical", "error", "warning", "info", "debug", "trace"):
            raise ValueError(
                f"log_level must be critical, error, warning, info, debug or trace, got {self.log_level!r}"
            )
        if self.fastcgi is not None:
            parse_address(self.fastcgi)
        elif self.fastcgi_only:
            raise ValueError("fastcgi_only needs fastcgi")
        if bool(self.ssl_keyfile) and not self.ssl_certfile:
            raise ValueError("ssl_keyfile needs ssl_certfile")

    @property
    def model_names(self) -> tuple[str, ...]:
        """What requests may give as "model"; the first is what answers carry."""
        return self.served_model_name or (self.model,)


def _check(config: Any) -> None:
    """Type and range of every field by its default and metadata."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        annotation = str(entry.type)
        if value is None and "None" in annotation:
            continue
        annotation = annotation.removesuffix(" | None")
        if annotation.startswith("tuple"):
            _check_texts(entry.name, value)
        elif annotation.startswith("str") and not isinstance(value, str):
            raise TypeError(f"{entry.name} must be a text, got {value!r}")
        elif annotation == "bool" and not isinstance(value, bool):
            raise TypeError(f"{entry.name} must be True or False, got {value!r}")
        elif annotation in ("int", "float"):
            _check_number(entry.name, value, annotation == "int", entry.metadata)


def _check_texts(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(one, str) for one in value):
        raise TypeError(f"{name} must be a tuple of texts, got {value!r}")


def _check_number(name: str, value: Any, whole: bool, metadata: Mapping[str, Any]) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {'an integer' if whole else 'a number'}, got {value!r}")
    low, high = metadata["range"]
    if math.isnan(value) or not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value}")
