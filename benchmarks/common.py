"""What the benchmarks share (gpu_common.py: those of the GPU alone): the machine's own limits, engines, checks before timing, and dated results.

Every figure stands beside a limit that the same process measured just before and just after it (probe.c), because
virtual machines change speed from minute to minute.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import hashlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "configs"


class Probe:
    """Memory bandwidth and int8 multiply-add rate, by probe.c."""

    def __init__(self, num_threads: int, buffer_bytes: int = 1 << 30) -> None:
        self.num_threads = num_threads
        self.buffer_bytes = buffer_bytes
        with tempfile.TemporaryDirectory() as directory:
            library = Path(directory) / "probe.so"
            compiler = os.environ.get("CC", "cc")
            flags = ["-O2", "-shared", "-fPIC", "-pthread"]
            subprocess.run([*shlex.split(compiler), *flags, str(HERE / "probe.c"), "-o", str(library)], check=True)
            self._library = ctypes.CDLL(str(library))
        self._library.probe_run.restype = ctypes.c_double
        self._library.probe_run.argtypes = (
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32
        )  # fmt: skip
        self._library.probe_alloc.restype = ctypes.c_void_p
        self._library.probe_alloc.argtypes = (ctypes.c_size_t,)
        self._library.probe_free.argtypes = (ctypes.c_void_p,)
        self.read_width = self._library.probe_width(0)
        self.dot_width = self._library.probe_width(1)
        self.best_macs_per_s = 0.0

    def read_bytes_per_s(self, repeats: int = 5) -> list[float]:
        """Each thread streams its share of the buffer once per repeat, with the widest loads."""
        data = self._library.probe_alloc(self.buffer_bytes)
        if not data:
            raise MemoryError(f"no {self.buffer_bytes} bytes for the bandwidth probe")
        try:
            read = self.buffer_bytes // self.num_threads // 512 * 512 * self.num_threads
            return [read / self._run(data, self.buffer_bytes, 1, self.read_width) for _ in range(repeats)]
        finally:
            self._library.probe_free(data)

    def int8_macs_per_s(self, repeats: int = 10, rounds: int = 2_000_000) -> list[float]:
        """Multiply-adds of int8 from registers: vpdpbusd, or what AVX2 or plain C needs for the same. The readings and
        the best one so far: neighbours can only take from this limit, never add to it."""
        macs = self._library.probe_dot_macs(self.dot_width) * rounds * self.num_threads
        readings = [macs / self._run(None, 0, rounds, self.dot_width) for _ in range(repeats)]
        self.best_macs_per_s = max(self.best_macs_per_s, *readings)
        return [*readings, self.best_macs_per_s]

    def _run(self, data: int | None, size: int, rounds: int, width: int) -> float:
        seconds = self._library.probe_run(data, size, rounds, self.num_threads, width)
        if seconds <= 0:
            raise RuntimeError("the probe's threads could not be started")
        return seconds


def finish(request: Any) -> dict[str, Any]:
    """Reads a request to its end."""
    token_ids: list[int] = []
    while True:
        output = request.read()
        token_ids += output["token_ids"]
        if output["finished"]:
            if output["error"] is not None:
                raise output["error"]
            return {**output, "token_ids": token_ids}


def prompt_ids(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Made-up token ids, the same on every machine."""
    return [(7919 * (i + 1) + 104729 * seed) % min(vocab_size, 8000) for i in range(length)]


def logits_hash(engine: Any, length: int = 48) -> str:
    """SHA-256 over the logits of a prompt, computed twice; a difference is an error."""
    ids = prompt_ids(length, engine.info()["vocab_size"])
    hashes = []
    for _ in range(2):
        engine.reset_prefix_cache()
        output = finish(engine.submit(ids, max_tokens=0, logits_start=0, logits_stop=length))
        hashes.append(hashlib.sha256(output["logits"].tobytes()).hexdigest()[:16])
    if hashes[0] != hashes[1]:
        raise RuntimeError(f"two runs gave different logits: {hashes}")
    return hashes[0]


def dummy_0_5b(directory: Path) -> Path:
    """A directory with the shape of Qwen2.5-0.5B and no weights, for load_format="dummy"."""
    return dummy(directory, "qwen2.5-0.5b")


def dummy(directory: Path, shape: str, **changes: Any) -> Path:
    """A directory with the shape of configs/<shape>.json, changed, and no weights, for load_format="dummy"."""
    config = {**json.loads((CONFIGS / f"{shape}.json").read_text()), **changes}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def demo_dir() -> Path:
    """The packaged demo checkpoint: 4 bits, groups of 32."""
    import qwen_fast

    return Path(qwen_fast.__file__).parent / "demo"


def kv_bytes_per_token(info: dict[str, Any]) -> int:
    """Of a cache of 16 or 32 bits; others by their memory plan (gpu_kv.py)."""
    width = 4 if info["kv_cache_dtype"] == "float32" else 2
    return 2 * info["num_layers"] * info["num_kv_heads"] * info["head_dim"] * width


def linear_macs_per_token(info: dict[str, Any]) -> int:
    """Multiply-adds of one token through the linear layers, the head not counted."""
    hidden, q = info["hidden_size"], info["num_heads"] * info["head_dim"]
    kv = info["num_kv_heads"] * info["head_dim"]
    return info["num_layers"] * (2 * hidden * q + 2 * hidden * kv + 3 * hidden * info["intermediate_size"])


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Where and how a result was taken. What measures the kernels' own programs needs no built package."""
    try:
        from qwen_fast import _engine
    except ImportError:
        build = None
    else:
        build = _engine.build_info()

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip()

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", str(Path(sys.argv[0]).name), *sys.argv[1:]]),
        "commit": git("rev-parse", "--short", "HEAD") or "none",
        "modified": bool(git("status", "--porcelain", "--", "../csrc", "../kernels", "../qwen_fast", ".")),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "kernel": platform.release(),
        "build": build,
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all CPUs of this process"
    )
    result.add_argument("--repeats", type=int, default=5, help="runs of each case, with a probe before and after each")
    result.add_argument("--isa", default="auto")
    result.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-<what>.json")
    return result


def measure_between(
    run: Callable[[], float], probes: Sequence[Callable[[], list[float]]], repeats: int
) -> tuple[list[float], list[list[float]]]:
    """Probes, run, probes, run, ..., probes. Returns what the runs gave and, for each probe, the limit that held for
    each run: the best reading just before or just after it."""
    values: list[float] = []
    limits: list[list[float]] = [[] for _ in probes]
    before = [max(probe()) for probe in probes]
    for _ in range(repeats):
        values.append(run())
        after = [max(probe()) for probe in probes]
        for limit, first, second in zip(limits, before, after):
            limit.append(max(first, second))
        before = after
    return values, limits


def efficiency(factor: float, values: list[float], limits: list[float]) -> dict[str, float]:
    """Spread of factor * value / limit, each run against its own limit."""
    return spread([factor * value / limit for value, limit in zip(values, limits)])


def spread(values: list[float]) -> dict[str, float]:
    """The median is the figure to quote; the others say how noisy the machine was."""
    return {"best": max(values), "median": statistics.median(values), "worst": min(values), "runs": len(values)}


def save(
    what: str, rows: list[dict[str, Any]], wanted: bool, results: Path = HERE / "results", say: bool = True, **more: Any
) -> None:
    """Writes <date>-<what>.json: the environment, with `more` laid over it, and the rows. A file of that name is
    replaced whole or not at all."""
    if not wanted:
        return
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{time.strftime('%Y-%m-%d')}-{what}.json"
    found = {"environment": {**environment(), **more}, "rows": rows}
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    beside.replace(path)
    if say:
        print(f"saved {path}")
