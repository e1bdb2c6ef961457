"""The peaks that utilisation is a share of, measured on the CPU with numpy; a GPU's are given, see `gpu_peaks`."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Peaks:
    """bytes_per_s, flops_per_s: None where not measured, and then the method says why."""

    bytes_per_s: float | None
    bandwidth_method: str
    flops_per_s: float | None
    flops_method: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def gpu_peaks(
    bandwidth_gbs: float | None, tflops: float | None, source: str = "given on the command line", count: int = 1
) -> Peaks:
    """What was measured elsewhere (benchmarks/probe.cu; a large matrix product) on one GPU, times so many GPUs, or why there
    is nothing."""
    if count > 1:
        source = f"{count} times one GPU's: {source}"
    why = "not measured: this package has no probe for a GPU; give --peak-bandwidth (GB/s) and --peak-flops (TFLOP/s)"
    return Peaks(
        None if bandwidth_gbs is None else count * bandwidth_gbs * 1e9,
        why if bandwidth_gbs is None else source,
        None if tflops is None else count * tflops * 1e12,
        why if tflops is None else source,
    )


def cpu_peaks(num_threads: int | None = None, seconds: float = 1.0) -> Peaks:
    """Memory: threads stream a buffer far beyond the caches, each its share, as dot products of it with itself (one read
    of each byte). Arithmetic: a float32 matrix product. The best of the repeats within `seconds` each."""
    try:
        import numpy
    except ImportError:
        return Peaks(None, "not measured: numpy is missing", None, "not measured: numpy is missing")
    threads = num_threads or len(os.sched_getaffinity(0))
    megabytes = 256
    data = numpy.ones(megabytes << 18, numpy.float32)
    shares = [part for part in numpy.array_split(data, threads * 32)]

    def read(first: int) -> None:
        for part in shares[first::threads]:
            numpy.dot(part, part)

    best_bytes = data.nbytes / _best(lambda: _together(read, threads), seconds)
    size = 1024
    a, b = (numpy.full((size, size), 0.5, numpy.float32) for _ in range(2))
    best_flops = 2 * size**3 / _best(lambda: a @ b, seconds)
    return Peaks(
        best_bytes,
        f"measured: {threads} threads read {megabytes} MiB as float32 dot products by numpy, best of {seconds:g} s",
        best_flops,
        f"measured: float32 matrix product of {size} x {size} by numpy's BLAS, best of {seconds:g} s; int8 instructions can "
        "exceed it",
    )


def _together(work: Any, threads: int) -> None:
    started = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()


def _best(run: Any, seconds: float) -> float:
    best, until = float("inf"), time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - began)
        if now >= until:
            return best
