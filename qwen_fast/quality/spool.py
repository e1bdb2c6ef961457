"""Where the reference's rows of logits come from: the loaded reference itself, or a file that was filled from it.

A file lets the reference go before the next model is loaded, and lets many models be measured against one run of it.
float32 keeps the logits bit for bit. float16 keeps log-probabilities, rounded to 11 significant bits (an error of at most
one part in 2048 of each, which moves a mean divergence by about 1e-6 nats): half the space.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from .scorer import Scorer
from .text import log_softmax, pieces

EXACT_BYTES = 8 << 30  # a file that would be larger is written in float16, where nobody decided
_LOWEST = -65504.0  # of float16


class LiveRows:
    """From a scorer that stays loaded."""

    how = "both models loaded at once; logits compared as computed, float32"

    def __init__(self, scorer: Scorer, windows: Sequence[Sequence[int]]) -> None:
        self._scorer, self._windows = scorer, windows

    def __call__(self, window: int, start: int, stop: int) -> np.ndarray:
        return self._scorer.logits(self._windows[window][:stop], start, stop)

    def close(self) -> None:
        """Nothing of its own."""


class SpooledRows:
    """From a temporary file, filled at construction and gone with close().

    half: float16 log-probabilities in place of float32 logits. folder: where the file lies; None: the system's choice.
    """

    def __init__(
        self, scorer: Scorer, windows: Sequence[Sequence[int]], half: bool = False, folder: str | None = None
    ) -> None:
        self._starts = np.cumsum([0, *(len(window) - 1 for window in windows)])
        self._vocab_size = scorer.vocab_size
        dtype = np.dtype(np.float16 if half else np.float32)
        size = file_bytes(windows, scorer.vocab_size, half)
        folder = folder or tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if size > free:
            raise OSError(
                f"the reference's distributions take {size:,} bytes in a temporary file, and {folder} has {free:,} free; "
                "measure fewer tokens, or give another folder"
            )
        kind = "float16 log-probabilities (rounded to 11 bits)" if half else "float32 logits (exact)"
        self.how = f"one model after the other; the reference kept in a temporary file as {kind}"
        self._file: Any = tempfile.TemporaryFile(dir=folder, prefix="qwen-fast-quality-")  # noqa: SIM115
        try:
            os.posix_fallocate(self._file.fileno(), 0, max(size, 1))
            shape = (int(self._starts[-1]), scorer.vocab_size)
            self._rows: Any = np.memmap(self._file, dtype=dtype, mode="r+", shape=shape)
            source = LiveRows(scorer, windows)
            for index, window in enumerate(windows):
                for start, stop in pieces(len(window), scorer.vocab_size):
                    rows = source(index, start, stop)
                    if half:
                        rows = np.maximum(log_softmax(rows), _LOWEST)
                    at = int(self._starts[index]) + start
                    self._rows[at : at + stop - start] = rows
        except BaseException:
            self.close()
            raise

    def __call__(self, window: int, start: int, stop: int) -> np.ndarray:
        at = int(self._starts[window]) + start
        return np.asarray(self._rows[at : at + stop - start], dtype=np.float32)

    def close(self) -> None:
        self._rows = None
        self._file.close()


def file_bytes(windows: Sequence[Sequence[int]], vocab_size: int, half: bool) -> int:
    return sum(len(window) - 1 for window in windows) * vocab_size * (2 if half else 4)
