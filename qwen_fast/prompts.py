"""What callers may write for one or several prompts, conversations and parameters, as lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .chat import is_conversation
from .params import SamplingParams


def prompt_list(prompts: Any) -> list[Any]:
    """One prompt or several, as a list of prompts."""
    refuse_bytes(prompts)
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not hasattr(prompts, "__iter__"):
        raise TypeError(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}")
    prompts = list(prompts)
    if prompts and isinstance(prompts[0], int):
        return [prompts]
    if is_conversation(prompts):
        raise TypeError("generate() takes texts and token ids; use chat() for messages")
    return prompts


def refuse_bytes(prompt: Any) -> None:
    """bytes are a sequence of small ints: without this they would pass for token ids."""
    if isinstance(prompt, (bytes, bytearray)):
        raise TypeError(f"a prompt must be a text or token ids, got {type(prompt).__name__}; use .decode()")


def conversation_list(messages: Any) -> list[Any]:
    """One conversation or several, as a list of conversations."""
    if is_conversation(messages):
        return [messages]
    if isinstance(messages, (str, bytes, bytearray, Mapping)) or not hasattr(messages, "__iter__"):
        raise TypeError(f"messages must be a list of {{'role', 'content'}}, got {type(messages).__name__}")
    conversations = list(messages)
    if not conversations:
        raise ValueError("messages is empty")
    return conversations


def one_conversation(messages: Any) -> Any:
    """The conversation of a stream."""
    conversations = conversation_list(messages)
    if len(conversations) != 1:
        raise ValueError(f"stream=True takes one conversation, got {len(conversations)}")
    return conversations[0]


def params_list(params: Any, count: int) -> list[SamplingParams]:
    """One SamplingParams for each of `count` prompts."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    params = list(params) if isinstance(params, (list, tuple)) else [params]
    for one in params:
        if not isinstance(one, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {type(one).__name__}")
    if len(params) != count:
        raise ValueError(f"{count} prompts but {len(params)} sampling_params")
    return params
