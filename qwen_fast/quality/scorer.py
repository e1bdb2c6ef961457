"""What is measured: anything that gives logits for token ids and greedy answers. The engine is one such."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy

# Options whose value is a path or names a place: reports show the last part only.
_PLACES = ("tokenizer", "chat_template", "download_dir")


class Answer(NamedTuple):
    """A greedy answer. finish_reason: "stop" (the model ended it) or "length"."""

    text: str
    num_tokens: int
    finish_reason: str


class Scorer(Protocol):
    """A model to measure."""

    vocab_size: int
    max_model_len: int
    tokens: Sequence[bytes]  # by token id

    def describe(self) -> dict[str, Any]:
        """Plain JSON for the report; without paths."""

    def encode(self, text: str) -> list[int]: ...

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[str, list[int]]:
        """The prompt of a conversation, as text and as token ids."""

    def logits(self, ids: Sequence[int], start: int, stop: int) -> numpy.ndarray:
        """float32 (stop - start, vocab_size): after positions start .. stop - 1 of ids. Rows of one window are asked for in
        order, each time with the ids up to `stop`."""

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]) -> list[Answer]:
        """Greedy answers, without penalties, until the model ends them or they have max_tokens tokens."""

    def close(self) -> None: ...


class EngineScorer:
    """This package's engine. options: as of LLM."""

    def __init__(self, model: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
        from ..llm import LLM

        self.llm = LLM(model, progress=False, **options)
        self._options = dict(options)
        if self.llm.tokenizer is None:
            self.llm.close()
            raise ValueError(f"{model}: quality needs a tokenizer, and the checkpoint has no tokenizer.json")
        self.vocab_size, self.max_model_len = self.llm.vocab_size, self.llm.max_model_len
        self.tokens = self.llm.tokenizer.tokens

    def describe(self) -> dict[str, Any]:
        info = self.llm.info()
        names = ("backend", "description", "dtype", "quantization", "activation_dtype", "lm_head_dtype", "kv_cache_dtype",
                 "block_size", "max_model_len", "num_layers", "hidden_size", "vocab_size")  # fmt: skip
        memory = self.llm.stats()["memory"]
        weights = memory["embedding_bytes"] + memory["layers_bytes"] + memory["head_bytes"]
        token_bytes = memory["kv_block_bytes"] / memory["block_size"]
        return {
            "model": model_name(self.llm.model),
            "options": shown_options(self._options),
            **{name: info[name] for name in names},
            "weights_bytes": weights,
            "kv_token_bytes": token_bytes,
        }

    def encode(self, text: str) -> list[int]:
        return self.llm.encode(text)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[str, list[int]]:
        return self.llm.apply_chat_template(messages, tools)

    def logits(self, ids: Sequence[int], start: int, stop: int) -> numpy.ndarray:
        # The prefix cache holds the positions before `start`, so a window is computed about once however it is cut.
        return self.llm.logits(ids, start, stop)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]) -> list[Answer]:
        from ..params import SamplingParams

        params = [
            SamplingParams(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
                           frequency_penalty=0.0, max_tokens=most, seed=0)
            for most in max_tokens
        ]  # fmt: skip
        outputs = self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, progress=False)
        firsts = [output.outputs[0] for output in outputs]
        return [Answer(one.text, len(one.token_ids), str(one.finish_reason)) for one in firsts]

    def close(self) -> None:
        self.llm.close()


def model_name(model: str | os.PathLike[str]) -> str:
    """A hub id or "demo" as it is, of a path the last part."""
    text = os.fspath(model)
    return Path(text).resolve().name if os.path.isdir(os.path.expanduser(text)) or os.path.isabs(text) else text


def shown_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for a report: without paths."""
    return {name: Path(str(value)).name if name in _PLACES else value for name, value in sorted(options.items())}


def check_same_vocabulary(reference: Sequence[bytes], measured: Sequence[bytes]) -> None:
    """ValueError where token ids do not stand for the same bytes: distributions over them cannot be compared."""
    if len(reference) != len(measured):
        raise ValueError(
            f"the tokenizers differ: the reference's has {len(reference)} token ids, the measured model's {len(measured)}; "
            "only models of one vocabulary can be compared"
        )
    for index, (theirs, ours) in enumerate(zip(reference, measured)):
        if theirs != ours:
            raise ValueError(
                f"the tokenizers differ: token id {index} is {theirs!r} in the reference and {ours!r} in the measured model; "
                "only models of one vocabulary can be compared"
            )


def check_same_ids(reference: Sequence[int], measured: Sequence[int]) -> None:
    """ValueError where one text has other token ids under the measured model's tokenizer."""
    if list(reference) == list(measured):
        return
    pairs = enumerate(zip(reference, measured))
    at = next((i for i, (theirs, ours) in pairs if theirs != ours), min(len(reference), len(measured)))
    raise ValueError(
        f"the tokenizers differ: the text has {len(reference)} tokens for the reference and {len(measured)} for the measured "
        f"model, and they part at token {at}; only models of one tokenizer can be compared"
    )
