"""What requests return, in vLLM's shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple


class Logprob(NamedTuple):
    """Natural log-probability under the model alone, before penalties, masks and temperature; rank 1: the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took, of its n samples together. Requests' figures add up to the engine's (stats()["meter"]).

    Tokens: `cached_tokens` of the prompt came from the prefix cache; computed_prompt_tokens were computed by all samples,
    again ones after a preemption too.
    Bytes (of the device's memory, but host_bytes) and flops are counted: by formula from the layout of weights, cache and
    activations. A step's weights are shared out to its requests by tokens, the head by rows of logits.
    Times in nanoseconds are measured on the device and shared out by bytes: device_ns is prefill (prompt tokens, and
    tokens computed again) and decode.
    Energy in microjoules by source ("gpu0": the whole board, by NVML; "cpu0": the whole processor package, by RAPL) is
    measured; the part that would have been taken without a step is not in it. energy_uj is empty where nothing can be
    measured, and energy_note says why. While energy_provisional is True figures may still grow: the counters are read
    20 times a second.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    computed_prompt_tokens: int = 0
    weight_bytes: int = 0
    head_bytes: int = 0
    embedding_bytes: int = 0
    kv_read_bytes: int = 0
    kv_write_bytes: int = 0
    activation_bytes: int = 0
    host_bytes: int = 0
    flops: int = 0
    device_ns: int = 0
    prefill_device_ns: int = 0
    decode_device_ns: int = 0
    energy_uj: Mapping[str, int] = field(default_factory=dict)
    energy_provisional: bool = False
    energy_note: str = ""

    @property
    def output_tokens(self) -> int:
        return self.completion_tokens

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def total_bytes(self) -> int:
        """Moved in the device's memory; host_bytes, which come over the bus, are apart."""
        layers = self.weight_bytes + self.head_bytes + self.embedding_bytes
        return layers + self.kv_read_bytes + self.kv_write_bytes + self.activation_bytes

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Usage:
        """From the engine's dict."""
        return cls(**{_OWN_NAMES.get(name, name): value for name, value in raw.items()})

    def plus(self, other: Usage, same_prompt: bool = True) -> Usage:
        """Both together. same_prompt: another sample of one prompt, which counts once."""
        names = _ADDED if same_prompt else (*_ADDED, *_PROMPT)
        merged = {name: getattr(self, name) + getattr(other, name) for name in names}
        sources = {**self.energy_uj, **other.energy_uj}
        energy = {name: self.energy_uj.get(name, 0) + other.energy_uj.get(name, 0) for name in sources}
        provisional = self.energy_provisional or other.energy_provisional
        return replace(self, **merged, energy_uj=energy, energy_provisional=provisional)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        names = [one.name for one in fields(self)]
        values = {_PLAIN_NAMES.get(name, name): getattr(self, name) for name in names}
        return {**values, "energy_uj": dict(self.energy_uj), "total_bytes": self.total_bytes}


_OWN_NAMES = {"output_tokens": "completion_tokens"}
_PLAIN_NAMES = {own: plain for plain, own in _OWN_NAMES.items()}
_PROMPT = ("prompt_tokens", "cached_tokens")
_ADDED = [one.name for one in fields(Usage) if one.type == "int" and one.name not in _PROMPT]


@dataclass(slots=True)
class Timings:
    """Moments of one sample in seconds on the engine's clock (0: never came), and what follows from them."""

    arrival_time: float
    first_scheduled_time: float
    first_token_time: float
    last_token_time: float
    finished_time: float
    completion_tokens: int
    num_preemptions: int

    @property
    def queue_s(self) -> float | None:
        """Arrival to the first step, seconds."""
        return self.first_scheduled_time - self.arrival_time if self.first_scheduled_time else None

    @property
    def ttft_s(self) -> float | None:
        """Arrival to the first output token, seconds."""
        return self.first_token_time - self.arrival_time if self.first_token_time else None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per output token after the first."""
        if self.completion_tokens < 2 or not self.first_token_time:
            return None
        return (self.last_token_time - self.first_token_time) / (self.completion_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """Arrival to the end, seconds."""
        return self.finished_time - self.arrival_time if self.finished_time else None


@dataclass(slots=True)
class StreamOutput:
    """What one read of a stream brought: the new text and tokens of sample `index`.

    Text comes when it is certain, so an increment may have tokens without text (half a character, the beginning of
    a stop string) or text without tokens. The last increment of a sample has finish_reason set ("stop", "length" or
    "abort") and with it usage, timings and, where asked for, prompt_logprobs.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    seed: int | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class CompletionOutput:
    """One finished (or growing) sample. logprobs[i] maps token ids to Logprob, the sampled token first."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    seed: int | None = None
    timings: Timings | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its n samples. `prompt` is None where token ids were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    usage: Usage | None = None

    @property
    def num_cached_tokens(self) -> int | None:
        return self.usage.cached_tokens if self.usage else None

    @property
    def timings(self) -> Timings | None:
        """Of the first sample."""
        return self.outputs[0].timings if self.outputs else None

    metrics = timings  # vLLM's name

    def _repr_html_(self) -> str:
        """For notebooks: every sample's text, and one line of figures."""
        from html import escape

        parts = []
        for output in self.outputs:
            facts = [f"{len(output.token_ids)} tokens", output.finish_reason or "unfinished"]
            timings = output.timings
            if timings is not None and timings.ttft_s is not None:
                facts.append(f"first token {timings.ttft_s * 1e3:.0f} ms")
            if timings is not None and timings.tpot_s:
                facts.append(f"{1 / timings.tpot_s:.1f} tokens/s")
            parts.append(
                f'<div style="white-space:pre-wrap">{escape(output.text)}</div>'
                f'<div style="opacity:.6;font-size:85%">{escape(" · ".join(facts))}</div>'
            )
        return '<hr style="opacity:.3">'.join(parts)
