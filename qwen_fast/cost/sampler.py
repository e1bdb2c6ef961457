"""Memory over the run: a thread that looks every few milliseconds."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from .nvml import GpuMemory

_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """The process's resident set, from /proc/self/statm."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE


METHODS = {
    "rss": "resident set of this process, /proc/self/statm",
    "gpu": "memory in use on the GPU (of several: together), by all processes, by NVML",
    "host": "resident set of the host's process, /proc/self/statm; the GPU's memory: not measured, NVML cannot be read",
}


class MemorySampler:
    """`with MemorySampler(llm, gpus) as sampler:` fills sampler.samples with (seconds since the start, bytes of the
    process's resident set or of the GPUs in use, KV cache bytes held by requests).

    gpus: indices; empty: the process's memory.
    """

    def __init__(self, llm: Any, gpus: list[int], interval_s: float = 0.02) -> None:
        self._gpu: GpuMemory | None = None
        self.kind = "rss"
        if gpus:
            try:
                self._gpu, self.kind = GpuMemory(gpus), "gpu"
            except (OSError, AttributeError):
                self.kind = "host"
        self.samples: list[tuple[float, int, int]] = []
        self._llm = llm
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._began = time.monotonic()
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        self._take()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._take()

    def _take(self) -> None:
        used = resident_bytes() if self._gpu is None else self._gpu.used_bytes()
        stats = self._llm.stats()
        memory = stats["memory"]
        held = (memory["num_blocks"] - stats["num_free_blocks"]) * memory["kv_block_bytes"]
        self.samples.append((time.monotonic() - self._began, used, held))

    def between(self, start: float, stop: float) -> list[tuple[float, int, int]]:
        """Samples of a span of time.monotonic()."""
        return [sample for sample in self.samples if start <= sample[0] + self._began <= stop]


def thinned(samples: list[tuple[float, int, int]], most: int = 200) -> list[list[float]]:
    """At most about `most` samples, evenly, the highest of each group kept: a curve that does not lose its peaks."""
    group = max(1, -(-len(samples) // most))
    found = []
    for at in range(0, len(samples), group):
        part = samples[at : at + group]
        found.append([round(part[0][0], 3), max(used for _, used, _ in part), max(held for _, _, held in part)])
    return found
