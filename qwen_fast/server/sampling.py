"""From a request to SamplingParams. What the request leaves out is left None: then generation_config.json decides, and
after it OpenAI's defaults (see SamplingParams)."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

from ..params import SamplingParams
from .errors import ApiError
from .protocol import ChatRequest, CompletionRequest, GenerationRequest, NamedTool
from .state import OutputWish, Principal

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions

# Fields of both under one name, passed on where the request gives them.
_PASSED = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
)


def sampling_params(request: GenerationRequest, structured_outputs: Any, vocab_size: int) -> SamplingParams:
    """structured_outputs: what OutputForms made of the request's wish. Values out of range raise ValueError or ApiError
    naming the field."""
    if request.priority:
        raise ApiError(400, f"priority is {request.priority}; this server takes requests in order", param="priority")
    values = {name: getattr(request, name) for name in _PASSED if getattr(request, name) is not None}
    if isinstance(request, ChatRequest):
        most = request.max_completion_tokens
        values["max_tokens"] = request.max_tokens if most is None else most
        if request.logprobs:
            values["logprobs"] = request.top_logprobs or 0
    elif isinstance(request, CompletionRequest):
        values["max_tokens"] = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        values["logprobs"] = request.logprobs
        if request.echo and request.logprobs is not None:
            values["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
    if structured_outputs is not None:
        values["structured_outputs"] = structured_outputs
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        highest = max(map(int, values.get(name) or (0,)))
        if highest >= vocab_size:
            raise ApiError(400, f"{name}: token id {highest} is not below the vocabulary's {vocab_size}", param=name)
    allowed = values.pop("allowed_token_ids", None)
    params = SamplingParams(**values)
    if allowed is not None:  # checked here and in the protocol; the engine copies an array at once, for each sequence
        params.allowed_token_ids = array("i", allowed)
    return params


def output_wish(request: GenerationRequest) -> OutputWish:
    """Structured output and tools of a request."""
    forms = request.forms()
    if not isinstance(request, ChatRequest) or not request.tools or request.tool_choice == "none":
        return OutputWish(forms)
    choice = request.tool_choice or "auto"
    named = choice.function.name if isinstance(choice, NamedTool) else None
    return OutputWish(
        forms,
        tuple(tool.model_dump(exclude_unset=True) for tool in request.tools),
        "function" if named else str(choice),
        named,
        request.parallel_tool_calls is not False,
    )


def cache_salt(request: GenerationRequest, principal: Principal) -> int:
    """The engine's prefix-cache salt: of the principal alone, or of it and the request's own."""
    if request.cache_salt is None:
        return principal.cache_salt
    digest = hashlib.blake2b(digest_size=8, key=principal.cache_salt.to_bytes(8, "little"))
    digest.update(request.cache_salt.encode())
    return int.from_bytes(digest.digest(), "little")
