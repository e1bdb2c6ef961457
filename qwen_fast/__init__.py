"""qwen_fast: a native engine for the dense Qwen2.5 models.

    from qwen_fast import LLM, SamplingParams

    llm = LLM("demo")
    for out in llm.stream([{"role": "user", "content": "Tell me a story."}], SamplingParams(max_tokens=200)):
        print(out.text, end="", flush=True)

Names are imported when they are first used, so that `import qwen_fast` costs a few milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .async_llm import AsyncLLM
    from .errors import EngineError, ModelError
    from .llm import LLM
    from .outputs import CompletionOutput, Logprob, RequestOutput, StreamOutput
    from .params import SamplingParams
    from .structured import StructuredOutputsParams

_HOME = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "SamplingParams": "params",
    "StructuredOutputsParams": "structured",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "StreamOutput": "outputs",
    "Logprob": "outputs",
    "ModelError": "errors",
    "EngineError": "errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineError",
    "Logprob",
    "ModelError",
    "RequestOutput",
    "SamplingParams",
    "StreamOutput",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
