"""SamplingParams: how one request is sampled and when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, fields
from typing import Any

from .structured import StructuredOutputsParams, structured_outputs

MAX_LOGPROBS = 64  # top logprobs per position
MAX_SAMPLES = 1024  # n
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256  # of one stop string in UTF-8
_INT32_MAX = 2**31 - 1

# vLLM's fields that are not built -> the values that ask for nothing, beside None. In the order of the fields below.
_UNBUILT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "logits_processors": ([], ()),
    "truncate_prompt_tokens": (),
    "output_kind": (0,),  # RequestOutputKind.CUMULATIVE; stream() yields increments, generate() whole outputs
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "flat_logprobs": (False,),
    "extra_args": ({},),
}


@dataclass(slots=True)
class SamplingParams:
    """Names are vLLM's. A field that is left None takes the value of the checkpoint's generation_config.json
    (temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens; `do_sample: false` there means
    temperature 0), and where that has none the default given below. A value given here always wins.

    Values are checked when the object is made: ValueError or TypeError name the field, the value and the limit.

    n: samples of the prompt, 1 .. 1024. Sample i has the same seed and its own stream of random numbers.
    temperature: 0 .. 100; 0 is greedy; values between 0 and 0.01 act as 0.01. Default 1.
    top_p: (0, 1]. Default 1.
    top_k: 0 or -1: all. Default 0.
    min_p: [0, 1], relative to the most likely token. Default 0.
    repetition_penalty: (0, 100], over prompt and output. Default 1.
    presence_penalty, frequency_penalty: -2 .. 2, over the output only.
    logit_bias: token id -> -100 .. 100, added to the logit. Keys may be texts of digits, as in JSON.
    allowed_token_ids: only these can be sampled. None: all.
    bad_words: words that never appear, with or without a leading space.
    stop: a text or texts (at most 16 of 256 bytes); the output ends before the first of them that appears, or after
        it with include_stop_str_in_output.
    stop_token_ids: tokens that end the output, beside the checkpoint's end-of-text tokens.
    min_tokens: no end token before so many output tokens.
    max_tokens: most output tokens; 0 computes the prompt only (for prompt_logprobs). None: max_new_tokens of
        generation_config.json, and without it until the model ends or the context is full. (vLLM's default is 16.)
    ignore_eos: go on after end-of-text tokens.
    seed: -2**63 .. 2**64 - 1, taken modulo 2**64. None: a fresh one, reported in the output.
    logprobs: 0 .. 64: the sampled token's log-probability and so many of the most likely. None: none.
    prompt_logprobs: the same for the tokens of the prompt.
    skip_special_tokens: leave special tokens out of the text.
    include_stop_str_in_output: see stop.
    detokenize: False leaves the text empty; stop strings then are refused.
    priority: lower runs first.
    structured_outputs: a StructuredOutputsParams (a JSON schema, a regex, a choice, a grammar), or a dict of its fields.
        The output ends with "stop" where the form is complete. guided_decoding is an older name.

    spaces_between_special_tokens is accepted and has no effect: no spaces are ever put between tokens. The fields after
    it are vLLM's too, and not built: a value that asks for something raises NotImplementedError. None of them is kept.
    """

    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    priority: int = 0
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    guided_decoding: InitVar[Any] = None
    spaces_between_special_tokens: InitVar[bool] = True
    best_of: InitVar[Any] = None
    logits_processors: InitVar[Any] = None
    truncate_prompt_tokens: InitVar[Any] = None
    output_kind: InitVar[Any] = None
    use_beam_search: InitVar[Any] = None
    length_penalty: InitVar[Any] = None
    early_stopping: InitVar[Any] = None
    flat_logprobs: InitVar[Any] = None
    extra_args: InitVar[Any] = None

    def __post_init__(self, guided_decoding: Any, spaces_between_special_tokens: bool, *unbuilt: Any) -> None:
        if not isinstance(spaces_between_special_tokens, bool):
            raise TypeError(f"spaces_between_special_tokens must be a bool, got {spaces_between_special_tokens!r}")
        for (name, accepted), value in zip(_UNBUILT.items(), unbuilt):
            if value is not None and value not in accepted:
                raise NotImplementedError(f"SamplingParams({name}={value!r}) is not built; leave {name} out")
        self.n = _integer("n", self.n, 1, MAX_SAMPLES)
        if self.temperature is not None:
            self.temperature = _number("temperature", self.temperature, 0, 100)
        if self.top_p is not None:
            self.top_p = _number("top_p", self.top_p, 0, 1, above=True)
        if self.top_k is not None:
            self.top_k = _integer("top_k", self.top_k, -1, _INT32_MAX)
        if self.min_p is not None:
            self.min_p = _number("min_p", self.min_p, 0, 1)
        if self.repetition_penalty is not None:
            self.repetition_penalty = _number("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        self.presence_penalty = _number("presence_penalty", self.presence_penalty, -2, 2)
        self.frequency_penalty = _number("frequency_penalty", self.frequency_penalty, -2, 2)
        self.logit_bias = _logit_bias(self.logit_bias)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids is empty; leave it None to allow every token")
        self.bad_words = _texts("bad_words", self.bad_words)
        self.stop = _texts("stop", self.stop)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop has {len(self.stop)} texts, the limit is {MAX_STOP_STRINGS}")
        for i, text in enumerate(self.stop):
            if len(text.encode()) > MAX_STOP_BYTES:
                raise ValueError(f"stop[{i}] has {len(text.encode())} bytes, the limit is {MAX_STOP_BYTES}")
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids or ())
        if self.max_tokens is not None:
            self.max_tokens = _integer("max_tokens", self.max_tokens, 0, _INT32_MAX)
        self.min_tokens = _integer("min_tokens", self.min_tokens, 0, _INT32_MAX)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}")
        if self.seed is not None:
            self.seed = _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            self.logprobs = _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")
        self.priority = _integer("priority", self.priority, -(2**31), _INT32_MAX)
        if guided_decoding is not None and self.structured_outputs is not None:
            raise ValueError("structured_outputs and guided_decoding, its older name, cannot both be given")
        self.structured_outputs = structured_outputs(guided_decoding or self.structured_outputs)
        if self.structured_outputs is not None and self.ignore_eos:
            raise ValueError("structured_outputs and ignore_eos cannot both be given: a grammar ends with an end token")

    def resolved(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The fields as a dict in which no sampling field is None: `defaults` (see generation_defaults), then 1.0, 1.0,
        0, 0.0, 1.0. max_tokens becomes -1 where nothing limits it."""
        values = {name: getattr(self, name) for name in _FIELDS}
        for name, default in _DEFAULTS.items():
            if values[name] is None:
                values[name] = defaults.get(name, default)
        if self.max_tokens is None and values["max_tokens"] >= 0:  # a default must not refuse the request
            values["max_tokens"] = max(values["max_tokens"], values["min_tokens"])
        if values["seed"] is not None:
            values["seed"] %= 2**64
        return values


_FIELDS = tuple(field.name for field in fields(SamplingParams))
_DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "max_tokens": -1,
}


def generation_defaults(config: Mapping[str, Any], source: str = "generation_config.json") -> dict[str, Any]:
    """The defaults that generation_config.json gives. A value that is no valid parameter is a ValueError naming
    `source`."""
    named = {name: config[name] for name in _DEFAULTS if name != "max_tokens" and config.get(name) is not None}
    if config.get("max_new_tokens") is not None:
        named["max_tokens"] = config["max_new_tokens"]
    if config.get("do_sample") is False:
        named["temperature"] = 0.0
    try:
        checked = SamplingParams(**named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None
    return {name: getattr(checked, name) for name in named}


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    value = value.__index__()
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")
    return value


def _number(name: str, value: Any, low: float, high: float, above: bool = False) -> float:
    if isinstance(value, (bool, str, bytes)) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if math.isnan(value) or not low <= value <= high or (above and value == low):
        limits = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        raise ValueError(f"{name} must be {limits}, got {value}")
    return value


def _token_ids(name: str, values: Any) -> list[int]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a list of token ids, got {values!r}")
    return [_integer(f"{name}[{i}]", value, 0, _INT32_MAX) for i, value in enumerate(values)]


def _texts(name: str, values: Any) -> list[str]:
    if values is None:
        return []
    if isinstance(values, str):
        values = [values]
    if isinstance(values, bytes) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a text or a list of texts, got {values!r}")
    values = list(values)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{i}] must be a text, got {value!r}")
        if not value:
            raise ValueError(f"{name}[{i}] is empty")
        if not _encodable(value):
            raise ValueError(f"{name}[{i}] holds a lone surrogate, which is no text: {value!r}")
    return values


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _logit_bias(bias: Any) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias must be a dict of token id to number, got {bias!r}")
    checked: dict[int, float] = {}
    for key, value in bias.items():
        if isinstance(key, str) and key.isascii() and key.isdigit():
            key = int(key)
        token_id = _integer("logit_bias: a token id", key, 0, _INT32_MAX)
        checked[token_id] = _number(f"logit_bias[{token_id}]", value, -100, 100)
    return checked
