"""From LLM's options to the engine's: names checked, units read, what is not built yet refused before any load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .utils import parse_bytes

# Options of other engines and of later versions: name -> the value that means "off".
_UNBUILT: dict[str, Any] = {
    "cpu_offload": None,
    "cpu_offload_gb": 0,
    "swap_space": 0,
    "batch_invariant": False,
    "speculative_model": None,
    "speculative_config": None,
    "num_speculative_tokens": None,
    "enable_lora": False,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
}
_UNBUILT_KV = ("fp8", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "nf4")


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """For keywords that LLM does not name: NotImplementedError where they are known and switched on, TypeError where
    they are not known."""
    for name, value in options.items():
        if name not in _UNBUILT:
            raise TypeError(f"LLM() got an unexpected keyword argument {name!r}")
        if value != _UNBUILT[name] and value:
            raise NotImplementedError(f"{name}={value!r} is not built yet; leave it {_UNBUILT[name]!r}")


def engine_options(
    *,
    quantization: str | None,
    max_model_len: int | None,
    num_threads: int | None,
    kv_cache_memory: int | str | None,
    kv_cache_tokens: int | None,
    memory_utilization: float | None,
    gpu_memory_utilization: float | None,
    rope_scaling: Mapping[str, Any] | None,
    hf_overrides: Mapping[str, Any] | None,
    **passed: Any,
) -> dict[str, Any]:
    """Keyword arguments for _engine.Engine and _engine.estimate."""
    if str(passed.get("device")).split(":")[0] in ("cuda", "gpu"):
        raise NotImplementedError(f"device={passed['device']!r} is not built yet; use 'auto' or 'cpu'")
    if passed.get("tensor_parallel_size", 1) not in (1, None):
        raise NotImplementedError(
            f"tensor_parallel_size={passed['tensor_parallel_size']!r} is not built yet; leave it 1"
        )
    if passed.get("kv_cache_dtype") in _UNBUILT_KV:
        raise NotImplementedError(
            f"kv_cache_dtype={passed['kv_cache_dtype']!r} is not built yet; use 'auto', 'bfloat16' or 'float32'"
        )
    options = {name: value for name, value in passed.items() if value is not None}
    options["quantization"] = "auto" if quantization is None else quantization
    if max_model_len is not None:
        options["max_model_len"] = _positive("max_model_len", max_model_len)
    if num_threads is not None:
        options["num_threads"] = _positive("num_threads", num_threads, allow_zero=True)
    for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
        if name in options:
            _positive(name, options[name])
    if kv_cache_memory is not None:
        options["kv_cache_memory"] = parse_bytes(kv_cache_memory, "kv_cache_memory")
    if kv_cache_tokens is not None:
        options["kv_cache_tokens"] = _positive("kv_cache_tokens", kv_cache_tokens)
    if memory_utilization is not None and gpu_memory_utilization is not None:
        raise ValueError("memory_utilization and gpu_memory_utilization are two names of one option; give one of them")
    share = memory_utilization if memory_utilization is not None else gpu_memory_utilization
    if share is not None:
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise TypeError(f"memory_utilization must be a number, got {share!r}")
        if not 0 < share <= 1:
            raise ValueError(f"memory_utilization must be above 0 and at most 1, got {share}")
        options["memory_utilization"] = float(share)
    overrides = merged_overrides(rope_scaling, hf_overrides)
    if overrides:
        try:
            options["hf_overrides"] = json.dumps(overrides, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"hf_overrides must hold JSON values: {error}") from None
    return options


def merged_overrides(rope_scaling: Mapping[str, Any] | None, hf_overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is laid over config.json."""
    for name, value in (("rope_scaling", rope_scaling), ("hf_overrides", hf_overrides)):
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict, got {type(value).__name__}")
    overrides = dict(hf_overrides or {})
    if rope_scaling is not None:
        if "rope_scaling" in overrides and overrides["rope_scaling"] != rope_scaling:
            raise ValueError("rope_scaling is given twice: as an option and in hf_overrides")
        overrides["rope_scaling"] = dict(rope_scaling)
    return overrides


def _positive(name: str, value: Any, allow_zero: bool = False) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    low = 0 if allow_zero else 1
    if not low <= value < 2**31:
        raise ValueError(f"{name} must be from {low} to {2**31 - 1}, got {value}")
    return value
