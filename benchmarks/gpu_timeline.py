"""Where does the time of a decode step go?

Random weights in the real shapes, 4 bits in groups of 128. The step is timed as gpu_decode.py does, then once more under
torch.profiler, whose records of every kernel (CUPTI's) are added up by kernel and place: calls, microseconds, the bytes
and operations of that kernel, the share that the larger of bytes / measured read rate and operations / measured product rate
is of its time, the gap before it, and what of it ran beside its predecessor (timeline.py says how time is given to kernels that overlap).
Busy time and gaps together must agree with the step's time without the profiler, within --tolerance percent; otherwise the exit
status is 1.

Bytes are what the kernel must read and write once, whether they lie in memory or, like activations, in the L2 cache. One sequence
decodes in one kernel; --decode-program names the test program tests/kernels/run.py builds for it (test_decode), whose
timeline of the kernel's inside is printed and saved with the rest.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import dummy, kv_bytes_per_token, save, spread
from gpu_common import (
    GATE_TOKENS,
    SHAPES,
    Limits,
    attention_macs,
    check_against_cpu,
    check_logits,
    decode_run,
    gpu_environment,
    parser,
    step_bytes,
    step_flops,
)
from timeline import Part, Step, account, read_trace, split_steps

PROMPT_TOKENS, NEW_TOKENS = 128, 128
LINEARS = ("qkv", "o", "gate_up", "down")


# -- what a kernel must do -------------------------------------------------------------------------------------------


def roles(names: Sequence[str], num_layers: int) -> list[str]:
    """The place of each linear layer of a step, by their order; "" of the other kernels."""
    linears = [i for i, name in enumerate(names) if "linear" in name]
    places = [*LINEARS * num_layers, "head"]
    if len(linears) < 2:  # the layers run in one kernel, and perhaps the head too
        places = ["head"] * len(linears)
    if len(linears) != len(places):
        raise ValueError(f"a step has {len(linears)} linear layers; expected {len(places)}, or one kernel for all")
    found = [""] * len(names)
    for i, place in zip(linears, places):
        found[i] = place
    return found


def linear_size(info: dict[str, Any], place: str) -> tuple[int, int]:
    """n, k of a linear layer."""
    hidden, q = info["hidden_size"], info["num_heads"] * info["head_dim"]
    kv = info["num_kv_heads"] * info["head_dim"]
    return {
        "qkv": (q + 2 * kv, hidden),
        "o": (hidden, q),
        "gate_up": (2 * info["intermediate_size"], hidden),
        "down": (hidden, info["intermediate_size"]),
        "head": (info["vocab_size"], hidden),
    }[place]


def weight_bytes(n: int, k: int) -> int:
    """4 bits with a scale and a zero point, 4 bytes, for each group of 128, as packed."""
    n, k = -(-n // 16) * 16, -(-k // 128) * 128
    return n * k // 2 + n * (k // 128) * 4


def work(
    name: str, place: str, info: dict[str, Any], head_bytes: int, batch: int, context: float
) -> tuple[float, float]:
    """Bytes and operations of one call; zeros where there is nothing to speak of."""
    hidden, q = info["hidden_size"], info["num_heads"] * info["head_dim"]
    kv = info["num_kv_heads"] * info["head_dim"]
    if place:
        n, k = linear_size(info, place)
        out = n if place == "gate_up" else 4 * n  # bf16 of half the rows, or float32
        stored = head_bytes if place == "head" else weight_bytes(n, k)
        return stored + batch * (2 * k + out), 2.0 * batch * n * k
    if "attention" in name and "merge" not in name:
        layers = info["num_layers"]
        moved = batch * (context * kv_bytes_per_token(info) / layers + 4 * q)
        return moved, 2.0 * batch * attention_macs(info, context) / layers
    per_token = 0
    if "norm" in name:
        per_token = hidden * (4 + 4 + 4 + 2)  # residual in and out, what is added to it, the result
    elif "rope_kv" in name:
        per_token = (q + 2 * kv) * (4 + 2)
    elif "sample" in name and "finish" not in name:
        per_token = 4 * info["vocab_size"]
    elif "embedding" in name or "step_begin" in name:
        per_token = hidden * (2 + 4)
    return batch * per_token, 0.0


# -- measuring -------------------------------------------------------------------------------------------------------


def profile_step(engine: Any, batch: int, directory: Path) -> tuple[Step, float]:
    """The account of a step, and the step's seconds as they were beside the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        seconds, _ = decode_run(engine, batch, PROMPT_TOKENS, NEW_TOKENS)
    path = directory / "trace.json"
    recorded.export_chrome_trace(str(path))
    events = read_trace(json.loads(path.read_text()))
    num_layers = engine.info()["num_layers"]
    return account(split_steps(events), lambda names: roles(names, num_layers)), seconds


def table(step: Step, engine: Any, batch: int, limits: Limits) -> list[dict[str, Any]]:
    info, memory = engine.info(), engine.stats()["memory"]
    head = memory["head_bytes"] or memory["embedding_bytes"]
    context = PROMPT_TOKENS + NEW_TOKENS / 2
    linears = sum(weight_bytes(*linear_size(info, place)) for place in LINEARS) * info["num_layers"]
    if not 0.98 < linears / memory["layers_bytes"] <= 1:
        raise RuntimeError(f"linear layers of {linears} bytes do not fit to layers of {memory['layers_bytes']}")
    places = {place for _, place in step.parts}
    rows = []
    for (name, place), part in step.parts.items():
        moved, flops = work(name, place, info, head, batch, context)
        if "qkv" not in places and "decode" in name:
            moved, flops = step_bytes(engine, batch, context), step_flops(info, batch, context)
            place = "all layers, head"
            if "head" in places:
                moved, flops = moved - head, flops - 2.0 * batch * info["hidden_size"] * info["vocab_size"]
                place = "all layers"
        rows.append({"kernel": name, "place": place, **row_of(part, part.calls * moved, part.calls * flops, limits)})
    return rows


def row_of(part: Part, moved: float, flops: float, limits: Limits) -> dict[str, Any]:
    """least_us: what the measured limits allow."""
    bounds = [
        amount / (rate * unit) * 1e6
        for amount, rate, unit in ((moved, limits.read_gbs, 1e9), (flops, limits.gemm_tflops, 1e12))
        if rate
    ]
    least = max(bounds, default=0.0)
    return {
        "calls": part.calls,
        "us": part.own,
        "gap_us": part.gap,
        "overlapped_us": part.overlapped,
        "bytes": moved,
        "flops": flops,
        "least_us": least,
        "share": least / part.own if part.own > 0 and moved > 0 else None,
    }


def print_table(rows: list[dict[str, Any]], step: Step) -> None:
    print(f"  {'kernel':34} {'place':16} calls       us  us/call  gaps us  beside   MB a call   GB/s  of the roofline")
    for row in rows:
        rate = f"{row['bytes'] / row['us'] / 1e3:6,.0f}" if row["bytes"] and row["us"] > 0 else "     -"
        share = f"{100 * row['share']:4.0f} %" if row["share"] is not None else "     -"
        print(
            f"  {row['kernel'][:34]:34} {row['place']:16} {row['calls']:5.4g} {row['us']:8.2f} {row['us'] / row['calls']:8.2f} "
            f"{row['gap_us']:8.2f} {row['overlapped_us']:7.2f} {row['bytes'] / row['calls'] / 1e6:11.3f} {rate} {share}"
        )
    busy, gaps = sum(row["us"] for row in rows), sum(row["gap_us"] for row in rows)
    least = sum(row["least_us"] for row in rows)
    print(
        f"  {'sum':34} {'':16} {sum(row['calls'] for row in rows):5.4g} {busy:8.2f} {'':8} {gaps:8.2f}; together "
        f"{busy + gaps:.2f} us, the mean of {step.steps} steps; the limits allow {least:.2f} us"
    )


def measure(
    name: str,
    head: str,
    model: Path,
    directory: Path,
    limits: Limits,
    args: argparse.Namespace,
    cases: list[dict[str, Any]],
) -> None:
    """Adds a case for each batch size."""
    from qwen_fast import _engine

    batches = [int(one) for one in args.batches.split(",")]
    most = max(batches)
    engine = _engine.Engine(
        str(model),
        quantization="w4",
        lm_head_dtype=head,
        load_format="dummy",
        device="cuda",
        max_num_batched_tokens=8192,
        max_num_seqs=max(16, most),
        max_model_len=8192,
        kv_cache_tokens=most * (PROMPT_TOKENS + NEW_TOKENS + 64) + 2 * GATE_TOKENS,
    )
    try:
        digest = check_logits(engine)
        print(f"\n{name}, {head} head: {engine.info()['description']}; logits {digest}, twice the same")
        for batch in batches:
            decode_run(engine, batch, PROMPT_TOKENS, NEW_TOKENS)  # warm: graphs, clocks
            plain = spread([decode_run(engine, batch, PROMPT_TOKENS, NEW_TOKENS)[0] for _ in range(args.repeats)])
            step, beside = profile_step(engine, batch, directory)
            rows = table(step, engine, batch, limits)
            step_us = 1e6 * plain["median"]
            off = step.us / step_us - 1
            agrees = abs(off) <= args.tolerance / 100
            print(f" batch {batch}: a step takes {step_us:.2f} us without the profiler, {1e6 * beside:.2f} us with it")
            print_table(rows, step)
            print(
                f"  busy + gaps are {100 * off:+.2f} % off the step's time: "
                f"{'within' if agrees else 'NOT within'} {args.tolerance:g} %",
                flush=True,
            )
            cases.append(
                {
                    "model": name,
                    "head": head,
                    "batch": batch,
                    "step_seconds": plain,
                    "step_seconds_with_profiler": beside,
                    "accounted_us": step.us,
                    "steps": step.steps,
                    "off": off,
                    "agrees": agrees,
                    "kernels": rows,
                    "logits": digest,
                }
            )
    finally:
        engine.close()


def inside(program: Path) -> list[str]:
    """What the decode kernel's test prints of its own clocks."""
    done = subprocess.run(
        [str(program.absolute()), "--bench"], capture_output=True, text=True, check=False, timeout=400
    )
    print("\n" + done.stdout + done.stderr, flush=True)
    if done.returncode != 0:
        raise RuntimeError(f"{program} ended with {done.returncode}")
    return [line for line in done.stdout.splitlines() if re.search(r"\S", line)]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batches", default="1", help="batch sizes, by comma (default 1)")
    arguments.add_argument("--heads", default="model", help="lm_head_dtype, by comma (default model)")
    arguments.add_argument("--tolerance", type=float, default=5.0, help="percent (default 5)")
    arguments.add_argument("--decode-program", type=Path, help="the decode kernel's test, as built before")
    args = arguments.parse_args()
    import torch

    torch.zeros(1, device="cuda")  # the profiler records what torch has initialised
    limits = Limits(args)
    cases: list[dict[str, Any]] = []
    checks: dict[str, Any] = {}
    lines: list[str] = []
    try:
        with tempfile.TemporaryDirectory() as directory:
            for name, shape in SHAPES.items():
                if args.only not in (None, name):
                    continue
                model = dummy(Path(directory) / name, shape)
                for head in args.heads.split(","):
                    if not args.skip_check:
                        options = {"quantization": "w4", "lm_head_dtype": head}
                        checks[f"{name}, {head} head"] = check_against_cpu(name, Path(directory), options)
                    measure(name, head, model, Path(directory), limits, args, cases)
        if args.decode_program:
            lines = inside(args.decode_program)
    finally:  # what was measured before a failure stays
        more = {"limits": limits.said, "checks": checks, "decode_program": lines}
        save("gpu-timeline", cases, args.save, args.results, True, **gpu_environment(args), **more)
    wrong = [f"{case['model']} batch {case['batch']}" for case in cases if not case["agrees"]]
    if wrong:
        sys.exit(f"kernels and gaps do not add up to the step: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
