"""Quantisers: from a 16-bit checkpoint to one of 4 (or 8) bits that transformers, vLLM and qwen_fast load alike.

    from qwen_fast.quantize import quantize

    report = quantize("Qwen/Qwen2.5-7B-Instruct", "qwen-7b-awq", method="awq")

On the command line: qwen-fast quantize MODEL OUT --method awq. The package runs layer by layer on the engine's own forward
pass; a GPU needs torch (the extra [quantize]) for the linear algebra, the CPU numpy alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import quantize

__all__ = ["quantize"]


def __getattr__(name: str) -> Any:
    if name != "quantize":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .run import quantize

    return quantize
