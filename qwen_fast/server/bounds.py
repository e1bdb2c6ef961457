"""The counts and sizes of a request that the server's options bound."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..params import SamplingParams
from .config import Limits
from .errors import ApiError
from .json_body import Shape, check_shape, shape_of
from .protocol import ChatRequest, CompletionRequest, GenerationRequest

_BAD_WORD_BYTES = 1024
_TEMPLATE_VARIABLES = 64
_FIELDS = 256
_VALUES = ("n", "top_logprobs", "logprobs", "prompt_logprobs")  # these are numbers, not lists

# -- before validation: pydantic validates lists whole, and lets no other thread run meanwhile


def check_counts(body: Mapping[str, Any], limits: Limits, max_model_len: int) -> None:
    """ApiError 400 where a list of a decoded body has more entries than `limits` allows, or a prompt more token ids than
    the context holds. What is of another type than expected is left to the validation."""
    if len(body) > _FIELDS:
        raise ApiError(400, f"the body has {len(body)} fields; the limit is {_FIELDS}")
    structured = body.get("structured_outputs")
    for name, value, limit in (
        ("messages", body.get("messages"), limits.messages),
        ("tools", body.get("tools"), limits.tools),
        ("stop", body.get("stop"), limits.stop),
        ("stop_token_ids", body.get("stop_token_ids"), limits.stop_token_ids),
        ("bad_words", body.get("bad_words"), limits.bad_words),
        ("logit_bias", body.get("logit_bias"), limits.logit_bias),
        ("allowed_token_ids", body.get("allowed_token_ids"), limits.allowed_token_ids),
        ("guided_choice", body.get("guided_choice"), limits.choices),
        (
            "structured_outputs.choice",
            structured.get("choice") if isinstance(structured, dict) else None,
            limits.choices,
        ),
        ("chat_template_kwargs", body.get("chat_template_kwargs"), _TEMPLATE_VARIABLES),
        ("tokens", body.get("tokens"), limits.token_strs),
    ):
        if isinstance(value, (list, dict)) and len(value) > limit:
            raise ApiError(400, f"{name} has {len(value)} entries; the limit is {limit}", param=name)
    _check_messages(body.get("messages"), limits)
    _check_tools(body.get("tools"), limits)
    _check_prompt(body, limits, max_model_len)


def _check_messages(messages: Any, limits: Limits) -> None:
    """The parts of all contents, and what the arguments of tool calls hold, which are JSON once more."""
    if not isinstance(messages, list):
        return
    parts = 0
    held = Shape()
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        content, calls = message.get("content"), message.get("tool_calls")
        parts += len(content) if isinstance(content, list) else 0
        for j, call in enumerate(calls if isinstance(calls, list) else ()):
            function = call.get("function", call) if isinstance(call, dict) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str):
                where = f"messages.{i}.tool_calls.{j}.function.arguments"
                _add(held, shape_of(arguments.encode("utf-8", "replace")))
                check_shape(held, limits, where, where)
    if json_bytes(messages, limits.text_bytes) > limits.text_bytes:
        raise ApiError(400, f"messages has more than {limits.text_bytes} bytes as JSON, the limit", param="messages")
    if parts > limits.content_parts:
        message = f"the messages have {parts} content parts; the limit is {limits.content_parts}"
        raise ApiError(400, message, param="messages")


def _add(held: Shape, more: Shape) -> None:
    held.depth = max(held.depth, more.depth)
    for name in ("containers", "texts", "commas", "escapes"):
        setattr(held, name, getattr(held, name) + getattr(more, name))


def _check_tools(tools: Any, limits: Limits) -> None:
    if isinstance(tools, list) and json_bytes(tools, limits.tools_bytes) > limits.tools_bytes:
        raise ApiError(400, f"tools has more than {limits.tools_bytes} bytes as JSON, the limit", param="tools")


def _check_prompt(body: Mapping[str, Any], limits: Limits, max_model_len: int) -> None:
    prompt = body.get("prompt")
    entries = prompt[: limits.prompts] if isinstance(prompt, list) else [prompt]
    for i, text in enumerate(entries if str in map(type, entries) else ()):
        size = json_bytes(text, limits.text_bytes) if isinstance(text, str) else 0
        if size - 2 > limits.text_bytes:
            message = f"prompt {i} has {size - 2} bytes; the limit is {limits.text_bytes}"
            raise ApiError(400, message, param="prompt")
    if not isinstance(prompt, list) or not prompt:
        return
    ids = prompt[0].__class__ in (int, bool, float, type(None))  # whether or not they are right
    if not ids and len(prompt) > limits.prompts:
        raise ApiError(400, f"prompt has {len(prompt)} entries; the limit is {limits.prompts}", param="prompt")
    lengths = [len(prompt)] if ids else [len(one) for one in prompt if isinstance(one, list)]
    if sum(lengths) > limits.prompt_token_ids:
        message = f"prompt has {sum(lengths)} token ids; the limit is {limits.prompt_token_ids}"
        raise ApiError(400, message, param="prompt")
    if body.get("truncate_prompt_tokens") in (None, -1):
        for length in lengths:
            if length > max_model_len:
                raise too_long(f"{length} tokens in the prompt", max_model_len)


def too_long(requested: str, max_model_len: int) -> ApiError:
    return ApiError(
        400,
        f"this model's maximum context length is {max_model_len} tokens (max_model_len); requested: {requested}",
        code="context_length_exceeded",
    )


def json_bytes(value: Any, most: int) -> int:
    """UTF-8 bytes of a value as JSON, about: without what escapes add. Ends as soon as it is more than `most`. Not by
    writing it out: json lets no other thread run until it is done."""
    size = 0
    left = [value]
    while left and size <= most:
        one = left.pop()
        if isinstance(one, str):
            size += 2 + (len(one) if one.isascii() else len(one.encode("utf-8", "replace")))
        elif isinstance(one, dict):
            size += 2 + 3 * len(one)
            left += one
            left += one.values()
        elif isinstance(one, list):
            size += 2 + len(one)
            left += one
        else:
            size += len(str(one))
    return size


# -- after it


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
    """What is no list, or is one only after validation."""
    counts = [
        ("n", request.samples, limits.n),
        ("stop", len(request.stop or ()), limits.stop),
        ("prompt_logprobs", request.prompt_logprobs or 0, limits.logprobs),
    ]
    if isinstance(request, ChatRequest):
        counts.append(("top_logprobs", request.top_logprobs or 0, limits.logprobs))
    if isinstance(request, CompletionRequest):
        counts.append(("logprobs", request.logprobs or 0, limits.logprobs))
        counts.append(("prompt", len(request.prompt), limits.prompts))
        counts.append(("prompt", len(request.prompt) * request.samples, limits.sequences))
    return counts


def check_logprobs(
    params: SamplingParams, lengths: list[int], max_model_len: int, stream: bool, limits: Limits
) -> None:
    """ApiError 400 where an answer would hold more log-probabilities than limits.logprob_entries.

    lengths: tokens of each prompt. stream: those of the completion are not kept.
    """
    per_prompt = 0 if params.prompt_logprobs is None else params.prompt_logprobs + 1
    per_token = 0 if params.logprobs is None or stream else params.logprobs + 1
    entries = 0
    for length in lengths:
        room = max_model_len - length
        entries += length * per_prompt + (room if params.max_tokens is None else params.max_tokens) * per_token
    entries *= params.n
    if entries > limits.logprob_entries:
        counted = f"{sum(lengths)} prompt tokens times {per_prompt}, and the completions' tokens times {per_token}"
        message = f"the answer could hold {entries} log-probabilities ({counted}, times n)"
        raise ApiError(
            400,
            f"{message}; the limit is {limits.logprob_entries}: ask for fewer, or give max_tokens",
            param="prompt_logprobs" if per_prompt else "logprobs",
        )


def check_form(name: str, form: Any, limits: Limits) -> None:
    """Size and depth of a schema, regex, grammar or choice list."""
    if not isinstance(form, str) and json_bytes(form, limits.schema_bytes) > limits.schema_bytes:
        raise ApiError(400, f"{name} has more than {limits.schema_bytes} bytes as JSON, the limit", param=name)
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
