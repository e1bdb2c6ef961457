"""The native engine: a thin binding over csrc/include/qf.h. Use qwen_fast.LLM and AsyncLLM instead."""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypedDict, final, type_check_only

from typing_extensions import Buffer, Self

__version__: Final[str]

class ModelError(ValueError):
    """A checkpoint file is malformed or does not fit; the message names file, tensor or key, value and expectation."""

class EngineError(RuntimeError):
    """The engine is closed or failed, or a device reported a failure."""

@type_check_only
class MemoryReport(TypedDict):
    embedding_bytes: int
    layers_bytes: int
    head_bytes: int
    workspace_bytes: int
    kv_cache_bytes: int
    kv_block_bytes: int
    kv_window_bytes: int  # of kv_cache_bytes: the 16-bit window's
    num_blocks: int
    block_size: int
    max_model_len: int
    available_bytes: int
    device_overhead_bytes: int  # what this process held there before: context, modules; 0: not known, or the CPU
    device_total_bytes: int  # such a device's memory; else 0

@type_check_only
class DeviceInfo(TypedDict):
    name: str
    index: int
    compute_capability: int  # 90 for 9.0
    total_bytes: int
    free_bytes: int
    usable: bool
    reason: str  # why it is not usable; "" if it is

@type_check_only
class Amounts(TypedDict):
    """What a request, or all of them, took. Bytes and FLOPs are counted: by formula from the layout of weights, cache
    and activations, step by step. Times are measured on the device; energy by the sources' counters."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, from the prefix cache
    output_tokens: int
    computed_prompt_tokens: int  # with those computed again after a preemption
    weight_bytes: int
    head_bytes: int
    embedding_bytes: int
    kv_read_bytes: int
    kv_write_bytes: int
    activation_bytes: int
    host_bytes: int  # from host memory to the device: offloaded weights
    flops: int
    device_ns: int  # prefill_device_ns + decode_device_ns
    prefill_device_ns: int
    decode_device_ns: int
    energy_uj: dict[str, int]  # microjoules by source; empty where none is measured

@type_check_only
class Usage(Amounts):
    energy_provisional: bool  # figures may still grow, within a second after the end
    energy_note: str  # why no energy is measured; "" where some is

@type_check_only
class EnergySource(TypedDict):
    name: str  # "gpu0", "cpu0"
    kind: str  # "nvml", "rapl", "none"
    measured: bool
    note: str  # measured: what the figure covers; else why there is none
    idle_watts: float | None  # the mean of the last seconds without a step; None: not known yet

@type_check_only
class IdleAmounts(TypedDict):
    wall_ns: int  # no step ran
    energy_uj: dict[str, int]

@type_check_only
class UnsettledAmounts(TypedDict):
    device_ns: int
    energy_uj: dict[str, int]

@type_check_only
class MeterStats(TypedDict):
    """Since the engine was loaded; requests + idle + unsettled = total, exactly."""

    enabled: bool
    total: Amounts
    requests: Amounts
    idle: IdleAmounts
    unsettled: UnsettledAmounts
    sources: list[EnergySource]
    wall_ns: int
    busy_ns: int  # a step ran on the device
    num_steps: int
    peak_kv_bytes: int  # the most of the KV cache that sequences held at once

@type_check_only
class Output(TypedDict):
    """What is new since the last read. The keys after `finished` are present only when it is True."""

    token_ids: list[int]
    text: str
    logprobs: list[list[tuple[int, float, int]]] | None  # per token: (token_id, logprob, rank), the sampled one first
    mask_position: int  # guided requests: the output position that waits for its mask, else -1
    finished: bool
    finish_reason: str  # "stop" | "length" | "abort" | "error"
    stop_reason: int | str | None  # the stop token id or stop string that ended it; None for end of text
    error: Exception | None  # an instance, not raised
    seed: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    arrival_time: float
    first_scheduled_time: float
    first_token_time: float
    last_token_time: float
    finished_time: float
    prompt_logprobs: list[list[tuple[int, float, int]] | None] | None  # per prompt position; the first is None
    logits: memoryview | None  # float32, shape (rows, vocab_size), C-contiguous
    usage: Usage

@final
class Request:
    """One sequence. Created by Engine.submit; dropping the last reference cancels it."""

    tag: Final[int]
    def read(self, timeout: float | None = None) -> Output | None:
        """Waits up to `timeout` seconds (None: for ever; signals are handled meanwhile, so Ctrl-C raises
        KeyboardInterrupt) and returns what is new, or None if nothing came. After the output with finished=True,
        returns None at once."""
    def cancel(self) -> None: ...
    def usage(self) -> Usage:
        """What the request took up to now; final once it has ended and energy_provisional is False."""
    def set_mask(self, position: int, words: Buffer) -> None:
        """words: uint32, ceil(vocab_size / 32)."""

@final
class Engine:
    """A loaded model with its KV cache and driver thread. Thread-safe. close() is idempotent."""

    def __new__(
        cls,
        model_dir: str,
        *,
        hf_overrides: str | None = None,  # JSON object text
        load_format: str = "auto",
        device: str = "auto",  # "auto", "cpu", "cuda", "cuda:N"
        dtype: str = "auto",
        activation_dtype: str = "auto",
        quantization: str = "auto",
        quantization_group_size: int = 128,
        lm_head_dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        kv_cache_16bit_window: int = 0,  # with a cache of 8 or 4 bits: newest positions that a query reads in 16 bits
        kv_cache_16bit_layers: Sequence[int] | None = (),  # the same: layers whose cache has 16 bits
        block_size: int = 32,
        max_model_len: int = 0,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        tensor_parallel_size: int = 1,
        tensor_parallel_comm: str = "auto",  # of GPUs: "auto", "peer", "nccl"
        nccl_library: str | None = None,  # a file of NCCL, for where the loader finds none
        watchdog_seconds: float = -1.0,  # of several ranks: a longer step fails the engine; < 0: 120 (GPU), 1800; 0: off
        kv_cache_memory: int = 0,
        kv_cache_tokens: int = 0,
        memory_utilization: float = 0.0,  # 0: not given
        memory_bytes: int = 0,  # for weights, workspace and KV cache together; 0: not given
        cpu_offload: str | None = None,  # "embeddings"
        cpu_offload_gb: float = 0.0,  # GiB of layers' weights
        batch_invariant: bool = False,
        enforce_eager: bool = False,
        enable_prefix_caching: bool = True,
        num_threads: int = 0,
        isa: str = "auto",
        max_steps_in_flight: int = 0,
        max_waiting_requests: int = 0,
        dummy_seed: int = 0,
        meter: bool = True,  # False: tokens only, to measure what metering costs
        progress: Callable[[int, int], None] | None = None,  # (done_bytes, total_bytes); an exception stops the load
    ) -> Self: ...
    def set_vocabulary(self, tokens: Sequence[bytes], special: Sequence[int] | bytes) -> None:
        """tokens[i]: the bytes of token i; special: ids of special tokens. Ids >= len(tokens) are never sampled."""
    def submit(
        self,
        prompt_token_ids: Sequence[int],
        *,
        max_tokens: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int | None = None,
        sample_index: int = 0,
        min_tokens: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        logit_bias: dict[int, float] | None = None,
        allowed_token_ids: Sequence[int] | None = None,
        bad_words: Sequence[Sequence[int]] | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        eos_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        logits_start: int = 0,
        logits_stop: int = 0,
        priority: int = 0,
        cache_salt: int = 0,
        leader: Request | None = None,
        guided: bool = False,
        mask_timeout: float = 60.0,
        max_unread_tokens: int = 0,
        notify: bool = False,
        tag: int = 0,
    ) -> Request: ...
    def info(self) -> dict[str, Any]:
        """The fields of qf_engine_info."""
    def stats(self) -> dict[str, Any]:
        """The fields of qf_engine_stats; "memory" is a MemoryReport, "meter" a MeterStats."""
    def event_fd(self) -> int: ...
    def take_ready(self) -> list[int]:
        """Tags of requests submitted with notify=True that have something to read."""
    def reset_prefix_cache(self) -> None: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...

@final
class Layers:
    """The layers of a checkpoint without the machinery of requests, for calibration. One call at a time."""

    def __new__(
        cls,
        model_dir: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_tokens: int = 2048,  # in one call of forward()
        num_threads: int = 0,
        isa: str = "auto",
        tensor_parallel_size: int = 1,  # more is refused: a rank has only its part of a linear's input
    ) -> Self: ...
    def forward(
        self,
        first: int,
        last: int,
        hidden: Buffer,  # float32 (tokens, hidden_size), C-contiguous, changed in place
        seq_lens: Sequence[int],
        tap: Callable[[int, str, memoryview], object] | None = None,  # (layer, "q_proj", x): x float32 (rows, inputs), valid in the call
        linears: Sequence[str] | None = None,  # whose inputs the tap sees; None: all
    ) -> None: ...
    def info(self) -> dict[str, Any]:
        """The fields of qf_layers_info."""
    def close(self) -> None: ...

def estimate(model_dir: str, **options: Any) -> MemoryReport:
    """What Engine(model_dir, **options) would allocate; reads headers only."""

def build_info() -> dict[str, Any]:
    """version, compiler, cuda (built with), cuda_archs ("80,90"; "" without), isa (best supported), isas (all
    supported here), cpu_count."""

def device_info() -> list[DeviceInfo]:
    """The GPUs that the driver shows; empty where there are none, no driver, or no CUDA in this build."""

def dequantize(model_dir: str, module: str) -> memoryview:
    """float32 (n, k): a linear layer's weights by the checkpoint format's formula."""

def quantize_rtn(weights: Buffer, bits: int, group_size: int) -> tuple[bytes, bytes, bytes]:
    """weights: float32 (n, k), C-contiguous. Returns codes (n, k) uint8, scales (n, groups) float32,
    zeros (n, groups) uint8."""
