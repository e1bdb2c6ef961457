"""What the GPU benchmarks share: the GPU's measured limits, a check of the kernels before any timing, aligned batches.

Limits. Reads: probe.cu, built with nvcc where it is there or given as --probe. Matrix products: torch.matmul in bf16
where torch is there, in a process of its own. Both are measured once, just before. --read-gbs and --gemm-tflops give figures
taken elsewhere, and the results say so.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import HERE, dummy, finish, kv_bytes_per_token, linear_macs_per_token, logits_hash, prompt_ids

SHAPES = {"0.5B": "qwen2.5-0.5b", "7B": "qwen2.5-7b"}
CHECK_TOKENS = 96
GATE_TOKENS = 4096
MEAN_KL = 1e-3  # of the fast path against the CPU's float32 activations, on the same codes

MATMUL = """
import json, torch
times = {}
for m, k, n in ((2048, 3584, 37888), (8192, 8192, 8192)):
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(k, n, device="cuda", dtype=torch.bfloat16)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = 1e9
    for _ in range(20):
        start.record()
        a @ b
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop))
    times[f"{m}x{k}x{n}"] = 2 * m * k * n / best / 1e9
print(json.dumps({"torch": torch.__version__, "gemm_tflops": times}))
"""


def parser(description: str | None) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--only", choices=sorted(SHAPES), help="one of the two shapes")
    result.add_argument("--repeats", type=int, default=5, help="runs of each case; the median counts")
    result.add_argument("--probe", type=Path, help="probe.cu as built before")
    result.add_argument("--read-gbs", type=float, help="read bandwidth in GB/s, in place of the probe")
    result.add_argument("--gemm-tflops", type=float, help="bf16 TFLOP/s of a matrix product, in place of torch")
    result.add_argument("--skip-check", action="store_true", help="do not compare with the CPU first")
    result.add_argument("--commit", help="for the results, where there is no git")
    result.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-<what>.json")
    result.add_argument("--results", type=Path, default=HERE / "results", help="the folder for --save")
    return result


class Limits:
    """read_gbs and gemm_tflops: the best readings, or None; `said` goes into the results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.read_gbs: float | None = args.read_gbs
        self.gemm_tflops: float | None = args.gemm_tflops
        self.said: dict[str, Any] = {"read_gbs": args.read_gbs, "gemm_tflops": args.gemm_tflops, "given": True}
        if self.read_gbs is None:
            probe = read_probe(args.probe)
            self.read_gbs = max(probe["read_gbs"].values()) if probe else None
            self.said |= {"read_gbs": self.read_gbs, "probe": probe, "given": False}
        if self.gemm_tflops is None:
            found = run_json([sys.executable, "-c", MATMUL])
            self.gemm_tflops = max(found["gemm_tflops"].values()) if found else None
            self.said |= {"gemm_tflops": self.gemm_tflops, "matmul": found, "given": False}
        reads = f"{self.read_gbs:,.0f} GB/s" if self.read_gbs else "not measured"
        products = f"{self.gemm_tflops:,.0f} TFLOP/s" if self.gemm_tflops else "not measured"
        print(f"limits: reads {reads}, bf16 matrix products {products}")

    def shares(self, moved_bytes: float, flops: float, seconds: float) -> dict[str, float | None]:
        """What a run moved and computed a second, and its shares of the limits."""
        gbs, tflops = moved_bytes / seconds / 1e9, flops / seconds / 1e12
        return {
            "bytes": moved_bytes,
            "flops": flops,
            "gbs": gbs,
            "tflops": tflops,
            "read_share": gbs / self.read_gbs if self.read_gbs else None,
            "gemm_share": tflops / self.gemm_tflops if self.gemm_tflops else None,
        }


def read_probe(program: Path | None) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as directory:
        if program is None:
            if shutil.which("nvcc") is None:
                return None
            program = Path(directory) / "probe"
            command = ["nvcc", "-O3", "-arch=native", str(HERE / "probe.cu"), "-o", str(program)]
            subprocess.run(command, check=True, timeout=300)
        found = run_json([str(program.absolute())])
        if found is None:
            raise RuntimeError(f"{program} failed")
        return found


def run_json(command: list[str]) -> dict[str, Any] | None:
    """The JSON that a command prints last; None where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def gpu_environment(args: argparse.Namespace) -> dict[str, Any]:
    try:
        from qwen_fast import _engine
    except ImportError:  # as in common.environment
        gpus = None
    else:
        gpus = _engine.device_info()

    fields = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
    except OSError:
        shown = ""
    found: dict[str, Any] = {
        "gpus": gpus,
        "nvidia_smi": dict(zip(fields.split(","), shown.split(", "))),
    }
    if args.commit:
        found |= {"commit": args.commit, "modified": False}
    return found


def percent(share: float | None) -> str:
    return "   -" if share is None else f"{100 * share:3.0f}%"


# -- checks ------------------------------------------------------------------------------------------------------


def check_against_cpu(name: str, directory: Path, options: dict[str, Any]) -> dict[str, float]:
    """Two layers of the shape, with a small vocabulary: the logits of the GPU beside the CPU's with float32 activations
    on the same codes, twice the same bits."""
    from qwen_fast import _engine

    model = dummy(directory / f"check-{name}", SHAPES[name], num_hidden_layers=2, vocab_size=8192)
    ids = prompt_ids(CHECK_TOKENS, 8192)
    rows = {}
    for device, extra in (("cuda", {}), ("cpu", {"activation_dtype": "float32"})):
        shared = {**options, "load_format": "dummy", "kv_cache_tokens": 1024, "max_model_len": 512}
        engine = _engine.Engine(str(model), **{**shared, "device": device, **extra})
        try:
            found = [prompt_logits(engine, ids) for _ in range(2)]
        finally:
            engine.close()
        if found[0].tobytes() != found[1].tobytes():
            raise RuntimeError(f"{name} on {device}: two runs gave different logits")
        rows[device] = found[0]
    divergence = mean_kl(rows["cpu"], rows["cuda"])
    print(f"{name}: logits of 2 layers against the CPU: mean KL {divergence:.1e}, twice the same bits")
    if not divergence < MEAN_KL:
        raise RuntimeError(f"{name}: the GPU's logits differ from the CPU's: mean KL {divergence}, limit {MEAN_KL}")
    return {"mean_kl": divergence}


def prompt_logits(engine: Any, ids: list[int]) -> memoryview:
    engine.reset_prefix_cache()
    return finish(engine.submit(ids, max_tokens=0, logits_start=0, logits_stop=len(ids)))["logits"]


def mean_kl(reference: Any, ours: Any) -> float:
    """Mean over rows of KL(reference || ours), in nats; infinite where a logit is not finite."""
    import numpy

    p, q = (numpy.asarray(rows, numpy.float64) for rows in (reference, ours))
    if not (numpy.isfinite(p).all() and numpy.isfinite(q).all()):
        return math.inf
    p, q = (rows - numpy.logaddexp.reduce(rows, axis=-1, keepdims=True) for rows in (p, q))
    return float((numpy.exp(p) * (p - q)).sum(axis=-1).mean())


def check_logits(engine: Any) -> str:
    """The hash of a short prompt's logits: finite, and twice the same."""
    ids = prompt_ids(8, engine.info()["vocab_size"])
    if not all(math.isfinite(x) for row in prompt_logits(engine, ids).tolist() for x in row):
        raise RuntimeError("logits are not finite")
    return logits_hash(engine)


# -- work --------------------------------------------------------------------------------------------------------


def step_bytes(engine: Any, batch: int, context: float) -> float:
    """What one decode step must read: layers and head as stored, a row of the embedding each, and the KV cache."""
    info, memory = engine.info(), engine.stats()["memory"]
    head = memory["head_bytes"] or memory["embedding_bytes"]  # a 16-bit head may be the embedding itself
    row = 2 * info["hidden_size"]
    return memory["layers_bytes"] + head + batch * (context * kv_bytes_per_token(info) + row)


def step_flops(info: dict[str, Any], batch: int, context: float) -> float:
    macs = linear_macs_per_token(info) + info["hidden_size"] * info["vocab_size"] + attention_macs(info, context)
    return 2.0 * batch * macs


def attention_macs(info: dict[str, Any], context: float) -> float:
    """Of one token over so many positions: queries by keys, and weights by values."""
    return 2.0 * info["num_layers"] * info["num_heads"] * info["head_dim"] * context


def submit_together(engine: Any, prompts: list[list[int]], num_gates: int = 2, **options: Any) -> list[Any]:
    """Requests that come to wait together, while the steps that may be in flight compute other prompts, the gates."""
    vocab_size = engine.info()["vocab_size"]
    gates = []
    for i in range(num_gates):
        gates.append(engine.submit(prompt_ids(GATE_TOKENS, vocab_size, 998 + i), max_tokens=0))
        time.sleep(0.002)  # a step of its own
    requests = [engine.submit(prompt, **options) for prompt in prompts]
    for gate in gates:
        finish(gate)
    return requests


def decode_run(
    engine: Any, batch: int, prompt_tokens: int, new_tokens: int, fresh: bool = True, num_gates: int = 2
) -> tuple[float, list[list[int]]]:
    """Seconds per step while all sequences decode, and the tokens. fresh: prompts are computed anew, not found in the
    prefix cache. num_gates: 0 will do for one sequence.

    The window begins with the first token of the last sequence to start and ends with the last token of the first one to
    end. Every step before the window starts some sequences, so the number of moments at which first tokens came says how
    many steps the first sequences were ahead.
    """
    vocab_size = engine.info()["vocab_size"]
    prompts = [prompt_ids(prompt_tokens, vocab_size, i) for i in range(batch)]
    if fresh:
        engine.reset_prefix_cache()
    options = {"max_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
    outputs = [finish(one) for one in submit_together(engine, prompts, num_gates, **options)]
    for output in outputs:
        if len(output["token_ids"]) != new_tokens or not all(0 <= t < vocab_size for t in output["token_ids"]):
            raise RuntimeError(f"expected {new_tokens} tokens below {vocab_size}, got {output['token_ids'][:8]} ...")
    first = sorted(output["first_token_time"] for output in outputs)
    window = min(output["last_token_time"] for output in outputs) - first[-1]
    apart = window / (new_tokens - 1) / 2
    ahead = sum(b - a > apart for a, b in zip(first, first[1:]))
    if window <= 0 or ahead > new_tokens // 2:
        raise RuntimeError(f"{batch} sequences never ran together: they began at {ahead + 1} steps")
    return window / (new_tokens - 1 - ahead), [output["token_ids"] for output in outputs]
