"""Is what the meter says true, and what does metering cost?

Random weights in the real shapes, 4 bits in groups of 128, 16-bit head. Four questions; a wrong answer makes the exit status 1.

bytes: decode steps of 1 and of 16 sequences and prefill steps of 512 and 2,048 tokens of the 7B shape, once more under ncu: bytes
  counted by the meter beside the sum of dram__bytes_read and dram__bytes_write over all kernels of the same steps (caches left
  as they are between kernels). Limit: 10 %.
time: 64 sequences of each shape decode; device time beside wall time in a window in which all run. Limit: 3 %.
energy: the same of the 7B shape for 30 s after a warm-up: the joules of the meter's gpu0, requests, idle and unsettled together,
  beside the integral of NVML's power, sampled every 20 ms. Limit: 5 %. And the idle watts beside NVML's mean power without a step.
pairs: the time of a 0.5B decode step with the meter and without it, taken by turns in one process, of 1 and 64 sequences. The median
  of the pairs' ratios must be below 1.01.

Needs ncu for the first (--ncu, or PATH, or where NVIDIA's packages put it) and libnvidia-ml.so.1 for the third.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import dummy, finish, prompt_ids, save
from gpu_common import SHAPES, check_logits, decode_run, gpu_environment, parser

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
PREFILL_TOKENS, CACHED_TOKENS, DECODE_STEPS = 2048, 1024, 8
CASES = ("decode 1", "decode 16", "prefill 512", f"prefill {PREFILL_TOKENS}")
KINDS = ("weight", "head", "embedding", "kv_read", "kv_write", "activation")
BYTES_LIMIT, TIME_LIMIT, ENERGY_LIMIT, PAIRS_LIMIT = 0.10, 0.03, 0.05, 0.01


def open_engine(model: Path, sequences: int, tokens_each: int, longest: int = 8192, **options: Any) -> Any:
    from qwen_fast import _engine

    fixed = {"load_format": "dummy", "device": "cuda", "quantization": "w4", "lm_head_dtype": "model"}
    sizes = {"max_num_seqs": max(16, sequences), "max_num_batched_tokens": 8192, "max_model_len": longest}
    engine = _engine.Engine(
        str(model), **fixed, **sizes, kv_cache_tokens=sequences * tokens_each + 8192 + 64, **options
    )
    check_logits(engine)
    return engine


def verdict(what: str, off: float, limit: float) -> dict[str, Any]:
    agrees = abs(off) <= limit
    print(f"  {what}: {100 * off:+.2f} %, {'within' if agrees else 'NOT within'} {100 * limit:g} %", flush=True)
    return {"off": off, "limit": limit, "agrees": agrees}


# -- bytes -------------------------------------------------------------------------------------------------------


def profiler() -> tuple[Callable[[], None], Callable[[], None]]:
    """Begin and end of what ncu looks at, in the process's own CUDA context."""
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: Any) -> None:
        code = getattr(driver, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name} gave {code}")

    context = ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxSetCurrent", context)
    return (lambda: call("cuProfilerStart")), (lambda: call("cuProfilerStop"))


def counted(engine: Any) -> dict[str, int]:
    meter = engine.stats()["meter"]
    return {"steps": meter["num_steps"], **{kind: meter["total"][f"{kind}_bytes"] for kind in KINDS}}


def child(model: Path, case: str) -> None:
    """Runs under ncu: only the steps of the case are profiled. Prints what the meter counted for them."""
    batch = 16 if case == "decode 16" else 1
    engine = open_engine(model, batch, 2 * PREFILL_TOKENS)
    vocab_size = engine.info()["vocab_size"]
    greedy = {"temperature": 0.0, "ignore_eos": True}
    start, stop = profiler()
    if case.startswith("prefill"):
        length = int(case.split()[1])
        prompts, tokens = [prompt_ids(length, vocab_size, 5)], 1
        finish(engine.submit(prompt_ids(length, vocab_size, 6), max_tokens=1, **greedy))  # warm
    else:  # all but the last token of each prompt is in the cache: every step is a decode step
        prompts = [prompt_ids(CACHED_TOKENS + 1, vocab_size, i) for i in range(batch)]
        tokens = DECODE_STEPS
        for prompt in prompts:
            finish(engine.submit(prompt, max_tokens=2, **greedy))
        for request in [engine.submit(prompt, max_tokens=4, **greedy) for prompt in prompts]:  # graphs of all sizes
            finish(request)
    before = counted(engine)
    start()
    for request in [engine.submit(prompt, max_tokens=tokens, **greedy) for prompt in prompts]:
        finish(request)
    stop()
    after = counted(engine)
    print(json.dumps({name: after[name] - before[name] for name in after}))
    engine.close()


def find_ncu(given: Path | None) -> str | None:
    if given is not None:
        return str(given)
    packaged = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    return str(packaged[-1]) if packaged else shutil.which("ncu")


def dram_bytes(report: str) -> dict[str, tuple[int, float, float]]:
    """Of each kernel of an ncu report (--csv, one row for each call and metric): calls, bytes read, bytes written."""
    lines = report.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        raise RuntimeError(f"ncu gave no table: {report[-2000:]}")
    moved: dict[str, list[float]] = {}
    calls: dict[str, set[str]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[header:]))):
        if row.get("Metric Name") in METRICS:
            if row["Metric Unit"] != "byte":
                raise RuntimeError(f"{row['Metric Name']} is in {row['Metric Unit']!r}; asked for bytes")
            name = row["Kernel Name"].partition("(")[0]
            calls.setdefault(name, set()).add(row["ID"])
            both = moved.setdefault(name, [0.0, 0.0])
            both[METRICS.index(row["Metric Name"])] += float(row["Metric Value"].replace(",", ""))
    return {name: (len(calls[name]), both[0], both[1]) for name, both in moved.items()}


def measure_bytes(model: Path, case: str, ncu: str) -> dict[str, Any]:
    options = ["--csv", "--print-units", "base", "--metrics", ",".join(METRICS), "--profile-from-start", "off"]
    options += ["--cache-control", "none", "--clock-control", "none", "--target-processes", "all"]
    command = [ncu, *options, sys.executable, __file__, "--child", case, "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"steps"')]
    if done.returncode != 0 or not said:
        raise RuntimeError(f"ncu ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    meter, kernels = said[0], dram_bytes(done.stdout)
    steps, total = meter["steps"], sum(meter[kind] for kind in KINDS)
    moved = sum(read + written for _, read, written in kernels.values())
    print(f"{case}: a step moves {moved / steps / 1e6:,.1f} MB by ncu; {steps} steps")
    for name, (calls, read, written) in sorted(kernels.items(), key=lambda one: -sum(one[1][1:])):
        megabytes = [f"{one / steps / 1e6:,.1f}" for one in (read, written)]
        print(f"  {name[:60]:60} {calls / steps:6.1f} calls, MB read {megabytes[0]:>9}, written {megabytes[1]:>9}")
    parts = ", ".join(f"{kind} {meter[kind] / steps / 1e6:,.1f}" for kind in KINDS)
    print(f"  counted {total / steps / 1e6:,.1f} MB: {parts}")
    found = verdict("bytes", total / moved - 1, BYTES_LIMIT)
    return {"case": case, "ncu_bytes": moved, "kernels": kernels, "counted": meter, **found}


# -- time and energy ---------------------------------------------------------------------------------------------


def decode_for(engine: Any, batch: int, seconds: float, look: Callable[[], Any]) -> list[tuple[float, Any]]:
    """(time, look()) every 50 ms, the first once all sequences decode, the last after `seconds`."""
    vocab_size = engine.info()["vocab_size"]
    most = engine.info()["max_model_len"] - 64
    engine.reset_prefix_cache()
    requests = [
        engine.submit(prompt_ids(32, vocab_size, i), max_tokens=most, temperature=0.0, ignore_eos=True)
        for i in range(batch)
    ]
    for request in requests:
        request.read()  # its first token
    time.sleep(0.5)
    seen = [(time.monotonic(), look())]
    while seen[-1][0] - seen[0][0] < seconds:
        time.sleep(0.05)
        seen.append((time.monotonic(), look()))
    if engine.stats()["num_running"] != batch:
        raise RuntimeError(f"some of {batch} sequences ended within {seconds} s, or waited for blocks")
    for request in requests:
        request.cancel()
    for request in requests:
        finish(request)
    return seen


def measure_time(name: str, model: Path) -> dict[str, Any]:
    engine = open_engine(model, 64, 16384 if name == "0.5B" else 4096, 32768)
    try:
        seen = decode_for(engine, 64, 3.0, lambda: engine.stats()["meter"]["busy_ns"])
    finally:
        engine.close()
    wall = seen[-1][0] - seen[0][0]
    device = (seen[-1][1] - seen[0][1]) / 1e9
    print(f"{name}, 64 sequences: {device:.3f} s on the device in {wall:.3f} s")
    return {"model": name, "wall_s": wall, "device_s": device, **verdict("device time", device / wall - 1, TIME_LIMIT)}


class Power(threading.Thread):
    """NVML's power every 20 ms: samples of (seconds of the monotonic clock, watts)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        if self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self._device)):
            raise RuntimeError("NVML cannot be initialised, or has no device")
        self.samples: list[tuple[float, float]] = []
        self._stopping = False

    def run(self) -> None:
        value = ctypes.c_uint()
        while not self._stopping:
            if self._nvml.nvmlDeviceGetPowerUsage(self._device, ctypes.byref(value)):
                raise RuntimeError("nvmlDeviceGetPowerUsage failed")
            self.samples.append((time.monotonic(), value.value / 1e3))
            time.sleep(0.02)

    def stop(self) -> None:
        self._stopping = True
        self.join()

    def joules(self, begin: float, end: float) -> float:
        """The integral, by trapezoids, from begin to end."""
        inside = [sample for sample in self.samples if begin <= sample[0] <= end]
        if len(inside) < 10 or inside[0][0] - begin > 0.2 or end - inside[-1][0] > 0.2:
            raise RuntimeError(f"{len(inside)} samples of power between {begin} and {end}")
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(inside))
        return area * (end - begin) / (inside[-1][0] - inside[0][0])


def moves(seen: list[tuple[float, int]]) -> tuple[tuple[float, int], tuple[float, int]]:
    """The first and the last look that found the counter moved: what lies between is whole windows."""
    moved = [b for a, b in itertools.pairwise(seen) if b[1] != a[1]]
    if len(moved) < 10:
        raise RuntimeError(f"the energy counter moved {len(moved)} times")
    return moved[0], moved[-1]


def measure_energy(name: str, model: Path, seconds: float) -> list[dict[str, Any]]:
    engine = open_engine(model, 16, 32768, 32768)
    power = Power()
    power.start()
    try:
        begin = time.monotonic()
        time.sleep(12)
        meter = engine.stats()["meter"]
        idle, (source,) = meter["idle"]["energy_uj"], [one for one in meter["sources"] if one["name"] == "gpu0"]
        if "gpu0" not in idle or source["idle_watts"] is None:
            raise RuntimeError(f"no energy is measured: {source}")
        idle_watts = power.joules(begin + 2, begin + 12) / 10
        print(
            f"{name}, no step for 12 s: {source['idle_watts']:.1f} W by the meter, {idle_watts:.1f} W by NVML's power"
        )
        decode_for(engine, 16, 5.0, lambda: None)  # warm
        seen = decode_for(engine, 16, seconds, lambda: engine.stats()["meter"]["total"]["energy_uj"]["gpu0"])
        balance = engine.stats()["meter"]
    finally:
        power.stop()
        engine.close()
    first, last = moves(seen)
    metered, integral = (last[1] - first[1]) / 1e6, power.joules(first[0], last[0])
    wall = last[0] - first[0]
    print(
        f"{name}, 16 sequences for {wall:.1f} s: {metered:,.0f} J by the meter, {integral:,.0f} J by the integral of power"
    )
    parts = [balance[one]["energy_uj"]["gpu0"] for one in ("requests", "idle", "unsettled")]
    if sum(parts) != balance["total"]["energy_uj"]["gpu0"]:
        raise RuntimeError(f"requests, idle and unsettled are {parts}, together not the total")
    idle_case = {"model": name, "what": "idle", "watts": source["idle_watts"], "nvml_watts": idle_watts}
    busy_case = {"model": name, "what": "busy", "wall_s": wall, "joules": metered, "nvml_joules": integral}
    return [
        {**idle_case, **verdict("idle power", source["idle_watts"] / idle_watts - 1, ENERGY_LIMIT)},
        {**busy_case, **verdict("energy", metered / integral - 1, ENERGY_LIMIT)},
    ]


# -- what it costs -----------------------------------------------------------------------------------------------


def measure_pairs(name: str, model: Path, batch: int, pairs: int) -> dict[str, Any]:
    engines = {on: open_engine(model, batch, 512, meter=on) for on in (True, False)}
    try:
        tokens = {on: decode_run(engine, batch, 128, 256)[1] for on, engine in engines.items()}  # warm
        if batch == 1 and tokens[True] != tokens[False]:
            raise RuntimeError("the meter changed the tokens")
        steps: dict[bool, list[float]] = {True: [], False: []}
        for i in range(pairs):
            for on in (True, False) if i % 2 else (False, True):
                steps[on].append(decode_run(engines[on], batch, 128, 256)[0])
    finally:
        for engine in engines.values():
            engine.close()
    ratios = sorted(a / b for a, b in zip(steps[True], steps[False]))
    off = statistics.median(ratios) - 1
    on_us, off_us = (1e6 * statistics.median(steps[on]) for on in (True, False))
    print(
        f"{name}, {batch} sequences: a step takes {on_us:.2f} us with the meter, {off_us:.2f} us without; {pairs} pairs"
    )
    print(f"  ratios: quartiles {ratios[pairs // 4]:.4f}, {ratios[3 * pairs // 4]:.4f}")
    found = verdict("metering", max(off, 0.0), PAIRS_LIMIT)
    return {
        "model": name,
        "batch": batch,
        "us_with": on_us,
        "us_without": off_us,
        "ratios": ratios,
        **found,
        "off": off,
    }


def arguments() -> argparse.Namespace:
    given = parser(__doc__)
    given.add_argument("--ask", default="bytes,time,energy,pairs", help="questions, by comma")
    given.add_argument("--ncu", type=Path, help="the program ncu")
    given.add_argument("--seconds", type=float, default=30.0, help="of the energy window")
    given.add_argument("--pairs", type=int, default=20, help="of runs with the meter and without")
    given.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    given.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    return given.parse_args()


def main() -> None:
    args = arguments()
    if args.child:
        child(args.model, args.child)
        return
    asked, rows, failed = set(args.ask.split(",")), [], []
    with tempfile.TemporaryDirectory() as directory:
        models = {name: dummy(Path(directory) / name, shape) for name, shape in SHAPES.items()}

        def answer(what: str, measure: Callable[..., Any], *values: Any) -> None:
            """One question that fails does not keep the others from being asked."""
            try:
                found = measure(*values)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                failed.append(f"{what}: {error}")
                print(f"{what} FAILED: {error}", flush=True)
                return
            for row in found if isinstance(found, list) else [found]:
                rows.append({"question": what, **row})
                if not row["agrees"]:
                    failed.append(f"{what}: off by {100 * row['off']:+.2f} %")

        ncu = find_ncu(args.ncu)
        if "pairs" in asked:
            for batch in (1, 64):
                answer("pairs", measure_pairs, "0.5B", models["0.5B"], batch, args.pairs)
        if "time" in asked:
            for name, model in models.items():
                answer("time", measure_time, name, model)
        if "energy" in asked:
            answer("energy", measure_energy, "7B", models["7B"], args.seconds)
        if "bytes" in asked and ncu is None:
            failed.append("bytes: ncu was not found")
        elif "bytes" in asked:
            for case in CASES:
                answer("bytes", measure_bytes, models["7B"], case, str(ncu))
    save("gpu-meter", rows, args.save, args.results, True, failed=failed, **gpu_environment(args))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
