"""Raw logits: the request behind LLM.logits and AsyncLLM.logits, and its result as an array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import EngineError
from .params import SamplingParams

if TYPE_CHECKING:
    import numpy

    from ._group import Group
    from .base import BaseLLM


def start_logits(llm: BaseLLM, ids: list[int], start: int, stop: int | None, **extra: Any) -> Group:
    """Submits a request that computes rows start .. stop - 1 and generates nothing. extra: as of BaseLLM._start."""
    start, stop, _ = slice(start, stop).indices(len(ids))
    if start >= stop:
        raise ValueError(f"no positions from {start} to {stop} in {len(ids)} tokens")
    params = SamplingParams(max_tokens=0, seed=0)
    return llm._start((None, ids), params, logits_start=start, logits_stop=stop, **extra)


def logits_array(output: Mapping[str, Any], vocab_size: int) -> numpy.ndarray:
    """From the request's last read: float32, shape (rows, vocab_size)."""
    import numpy

    if output["error"] is not None:
        raise output["error"]
    if output["logits"] is None:
        raise EngineError(f"the request ended without logits (finish_reason {output['finish_reason']!r})")
    return numpy.asarray(output["logits"], dtype=numpy.float32).reshape(-1, vocab_size)
