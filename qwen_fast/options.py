"""From LLM's options to the engine's: names checked, units read, what is not built yet refused before any load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .params import MAX_LOGPROBS
from .utils import parse_bytes

# vLLM's options that LLM() does not name: name -> (the values that are accepted, what the message says about others).
# None is always accepted. ANY: no value has an effect, because what the option steers does not exist here (custom
# all-reduce, swap, a choice of graph sizes) or is always so (chunked prefill).
ANY = object()
_LEAVE = "leave it out"
VLLM_OPTIONS: dict[str, tuple[Any, str]] = {
    "async_scheduling": (ANY, ""),
    "compilation_config": (ANY, ""),
    "cudagraph_capture_sizes": (ANY, ""),
    "disable_async_output_proc": (ANY, ""),
    "disable_custom_all_reduce": (ANY, ""),
    "disable_log_requests": (ANY, ""),
    "disable_log_stats": (ANY, ""),
    "enable_log_requests": (ANY, ""),
    "max_num_partial_prefills": (ANY, ""),
    "max_parallel_loading_workers": (ANY, ""),
    "max_seq_len_to_capture": (ANY, ""),
    "ray_workers_use_nsight": (ANY, ""),
    "swap_space": (ANY, ""),  # a preempted request is computed again
    "use_v2_block_manager": (ANY, ""),
    "config_format": (("auto", "hf"), "only config.json is read"),
    "data_parallel_size": ((1,), "leave it 1"),
    "disable_sliding_window": ((False,), "hf_overrides={'use_sliding_window': False} switches it off"),
    "distributed_executor_backend": (("mp", "uni"), "the engine is one process"),
    "enable_chunked_prefill": ((True,), "prompts are always cut into chunks of max_num_batched_tokens"),
    "enable_expert_parallel": ((False,), _LEAVE),
    "enable_lora": ((False,), _LEAVE),
    "enable_prompt_embeds": ((False,), _LEAVE),
    "enable_sleep_mode": ((False,), _LEAVE),
    "guided_decoding_backend": (("auto",), _LEAVE),
    "kv_transfer_config": ((), _LEAVE),
    "logits_processors": (([],), _LEAVE),
    "max_logprobs": (range(MAX_LOGPROBS + 1), f"the limit is {MAX_LOGPROBS} for every request"),
    "model_impl": (("auto", "vllm"), _LEAVE),
    "num_gpu_blocks_override": ((), "use kv_cache_tokens (blocks times block_size) in its place"),
    "num_speculative_tokens": ((0,), _LEAVE),
    "pipeline_parallel_size": ((1,), "leave it 1"),
    "runner": (("auto", "generate"), "the engine generates text"),
    "scheduling_policy": (("fcfs", "priority"), "SamplingParams(priority=...) orders requests, then arrival does"),
    "skip_tokenizer_init": ((False,), "prompts may be token ids, and detokenize=False leaves out the text"),
    "speculative_config": (({},), _LEAVE),
    "speculative_model": ((), _LEAVE),
    "task": (("auto", "generate"), "the engine generates text"),
    "tokenizer_mode": (("auto",), "tokenizer.json is read by the package tokenizers"),
    "tokenizer_revision": ((), "revision holds for both; or give tokenizer= a directory"),
}
_UNBUILT_KV = ("fp8_e5m2",)


def refuse_unknown(options: Mapping[str, Any], caller: str = "LLM") -> None:
    """For keywords that LLM does not name: NotImplementedError where VLLM_OPTIONS knows them and the value asks for
    what is not there, TypeError where it does not know them."""
    for name, value in options.items():
        if name not in VLLM_OPTIONS:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}")
        accepted, advice = VLLM_OPTIONS[name]
        if accepted is not ANY and value is not None and value not in accepted:
            raise NotImplementedError(f"{name}={value!r} is not built: {advice}")


def engine_options(
    *,
    quantization: str | None = None,
    max_model_len: int | None = None,
    num_threads: int | None = None,
    kv_cache_memory: int | str | None = None,
    kv_cache_tokens: int | None = None,
    memory_utilization: float | None = None,
    gpu_memory_utilization: float | None = None,
    memory: int | str | None = None,
    cpu_offload: str | None = None,
    cpu_offload_gb: float | None = None,
    watchdog_seconds: float | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
    **passed: Any,
) -> dict[str, Any]:
    """Keyword arguments for _engine.Engine and _engine.estimate."""
    if passed.get("kv_cache_dtype") in _UNBUILT_KV:
        raise NotImplementedError(
            f"kv_cache_dtype={passed['kv_cache_dtype']!r} is not built yet; use 'fp8_e4m3' or 'int8'"
        )
    options = {name: value for name, value in passed.items() if value is not None}
    if "kv_cache_16bit_window" in options:
        _positive("kv_cache_16bit_window", options["kv_cache_16bit_window"], allow_zero=True)
    if "kv_cache_16bit_layers" in options:
        options["kv_cache_16bit_layers"] = _layers(options["kv_cache_16bit_layers"])
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
        if not 0 < _number("memory_utilization", share) <= 1:
            raise ValueError(f"memory_utilization must be above 0 and at most 1, got {share}")
        options["memory_utilization"] = float(share)
    if memory is not None:
        if share is not None:
            raise ValueError(
                f"memory={memory!r} and memory_utilization={share} both say how much memory to take; give one of them"
            )
        options["memory_bytes"] = parse_bytes(memory, "memory")
        if options["memory_bytes"] == 0:
            raise ValueError("memory must be above 0 bytes, got 0")
    if cpu_offload not in (None, "embeddings"):
        raise ValueError(f"cpu_offload must be 'embeddings' or None, got {cpu_offload!r}")
    if cpu_offload is not None:
        options["cpu_offload"] = cpu_offload
    if cpu_offload_gb is not None:
        if not 0 <= _number("cpu_offload_gb", cpu_offload_gb) <= 2**20:
            raise ValueError(f"cpu_offload_gb must be from 0 to {2**20} GiB, got {cpu_offload_gb}")
        options["cpu_offload_gb"] = float(cpu_offload_gb)
    if watchdog_seconds is not None:
        if not 0 <= _number("watchdog_seconds", watchdog_seconds) <= 86400:
            raise ValueError(f"watchdog_seconds must be from 0 (off) to 86400, got {watchdog_seconds}")
        options["watchdog_seconds"] = float(watchdog_seconds)
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


def _layers(value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"kv_cache_16bit_layers must be a sequence of layer indices, got {value!r}")
    return tuple(_positive(f"kv_cache_16bit_layers[{i}]", one, allow_zero=True) for i, one in enumerate(value))


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def _positive(name: str, value: Any, allow_zero: bool = False) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    low = 0 if allow_zero else 1
    if not low <= value < 2**31:
        raise ValueError(f"{name} must be from {low} to {2**31 - 1}, got {value}")
    return value
