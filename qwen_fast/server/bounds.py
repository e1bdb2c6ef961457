"""The counts and sizes of a request that the server's options bound."""

from __future__ import annotations

import json
from typing import Any

from .config import Limits
from .errors import ApiError
from .protocol import ChatRequest, CompletionRequest, GenerationRequest

_BAD_WORD_BYTES = 1024
_VALUES = ("n", "top_logprobs", "logprobs", "prompt_logprobs")  # these are numbers, not lists


def check_limits(request: GenerationRequest, limits: Limits) -> None:
    """ApiError 400 names field, count or size, and limit."""
    for name, count, limit in _counts(request, limits):
        if count > limit:
            what = f"{name} is {count}" if name in _VALUES else f"{name} has {count} entries"
            raise ApiError(400, f"{what}; the limit is {limit}", param=name)
    lists = (("stop", request.stop, limits.stop_bytes), ("bad_words", request.bad_words, _BAD_WORD_BYTES))
    for name, texts, most in lists:
        for i, text in enumerate(texts or ()):
            size = len(text.encode())
            if size > most:
                raise ApiError(400, f"{name}.{i} has {size} bytes; the limit is {most}", param=f"{name}.{i}")
    for name, form in request.forms().items():
        check_form(name, form, limits)
    if isinstance(request, ChatRequest):
        for i, tool in enumerate(request.tools or ()):
            if tool.function.parameters is not None:
                check_form(f"tools.{i}.function.parameters", tool.function.parameters, limits)


def _counts(request: GenerationRequest, limits: Limits) -> list[tuple[str, int, int]]:
    counts = [
        ("n", request.samples, limits.n),
        ("stop", len(request.stop or ()), limits.stop),
        ("stop_token_ids", len(request.stop_token_ids or ()), limits.stop_token_ids),
        ("bad_words", len(request.bad_words or ()), limits.bad_words),
        ("logit_bias", len(request.logit_bias or ()), limits.logit_bias),
        ("allowed_token_ids", len(request.allowed_token_ids or ()), limits.allowed_token_ids),
        ("prompt_logprobs", request.prompt_logprobs or 0, limits.logprobs),
    ]
    if isinstance(request, ChatRequest):
        counts.append(("messages", len(request.messages), limits.messages))
        counts.append(("tools", len(request.tools or ()), limits.tools))
        counts.append(("top_logprobs", request.top_logprobs or 0, limits.logprobs))
    if isinstance(request, CompletionRequest):
        counts.append(("logprobs", request.logprobs or 0, limits.logprobs))
        counts.append(("prompt", len(request.prompt), limits.prompts))
        counts.append(("prompt", len(request.prompt) * request.samples, limits.sequences))
    return counts


def check_form(name: str, form: Any, limits: Limits) -> None:
    """Size and depth of a schema, regex, grammar or choice list."""
    size = len((form if isinstance(form, str) else json.dumps(form, ensure_ascii=False)).encode())
    if size > limits.schema_bytes:
        raise ApiError(400, f"{name} has {size} bytes; the limit is {limits.schema_bytes}", param=name)
    depth = _depth(form)
    if depth > limits.schema_depth:
        raise ApiError(400, f"{name} is nested {depth} levels deep; the limit is {limits.schema_depth}", param=name)


def _depth(value: Any) -> int:
    """Levels of arrays and objects; http_io bounded them, so recursion is safe."""
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0
