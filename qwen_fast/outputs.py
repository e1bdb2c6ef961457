"""What requests return, in vLLM's shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Logprob(NamedTuple):
    """Natural log-probability under the model alone, before penalties, masks and temperature; rank 1: the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class Usage:
    """Tokens: `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


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
