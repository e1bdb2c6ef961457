"""What the tests of this folder share: scorers without an engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from qwen_fast.quality import Answer, Cell, Runner, Settings
from qwen_fast.quality.report import Report
from qwen_fast.quality.tasks import Row

MACHINE = {
    "cpu": "a processor", "cpus": 2, "gpus": [], "kernel": "6", "python": "3.11", "qwen_fast": "0", "compiler": "cc",
    "load_average": 0.0, "command": "qwen-fast quality",
}  # fmt: skip
VOCABULARY = [bytes([i]) for i in range(97)]


class TableScorer:
    """Logits are a fixed random function of the last two ids, plus `noise` times another; answers come from a dict."""

    vocab_size, max_model_len, tokens = 97, 512, VOCABULARY

    def __init__(self, noise: float = 0.0, answers: dict[str, str] | None = None, vocab_size: int = 97) -> None:
        self.noise, self.answers, self.vocab_size = noise, answers or {}, vocab_size
        self.closed, self.asked = False, []

    def describe(self):
        return {"model": f"table {self.noise}"}

    def encode(self, text):
        return [ord(one) % 97 for one in text]

    def render(self, messages, tools):
        text = messages[-1]["content"]
        return text, self.encode(text)

    def _row(self, ids: Sequence[int], salt: int) -> np.ndarray:
        seed = int.from_bytes(hashlib.blake2b(repr((salt, list(ids[-2:]))).encode(), digest_size=4).digest(), "little")
        return np.random.default_rng(seed).normal(0, 3, self.vocab_size)

    def logits(self, ids, start, stop):
        assert not self.closed and len(ids) == stop
        self.asked.append((start, stop))
        rows = [self._row(ids[: at + 1], 0) + self.noise * self._row(ids[: at + 1], 1) for at in range(start, stop)]
        return np.array(rows, dtype=np.float32)

    def generate(self, prompts, max_tokens):
        asked = {tuple(self.encode(question)): text for question, text in self.answers.items()}
        texts = [asked[tuple(ids)] for ids in prompts]
        return [Answer(text, len(text), "stop") for text in texts]

    def close(self):
        self.closed = True


def row(task, question, answer, number=1, kind="text", **more):
    return Row(task, number, [{"role": "user", "content": question}], answer, kind, **more)


def measured(reference, cells, text=None, rows=(), alone=False, **settings):
    """The document of a run of scorers: {label: scorer or a function that loads one}."""
    settings = {"window": 64, "draws": 300, **settings}
    listed = [
        Cell(label, {"noise": label}, one if callable(one) else (lambda one=one: one)) for label, one in cells.items()
    ]
    runner = Runner(lambda: reference, listed, Settings(**settings), text, rows, alone=alone)
    data = runner.run()
    data["settings"] |= {"text": "a text", "tasks": "rows"}
    return Report.from_measurements(data | {"machine": MACHINE})


def write_rows(path, rows):
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    return path
