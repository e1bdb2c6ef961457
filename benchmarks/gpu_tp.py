"""How fast is one model over several GPUs, and how far is that from what they could do?

Random weights in the real shapes. Decoding: 128 tokens in, 256 out, the time of a step while all sequences decode
(gpu_common.decode_run); prompts: 2,048 tokens, from the first step to the first token; the median of the runs counts.
Each row stands beside its limit: the bytes that a GPU must read in a step over its measured bandwidth, and two all-reduces a
layer and one at the end, each as long as the all-reduce program measured it for that many rows. One GPU is among the numbers
of GPUs, so that the gain can be seen; a model that does not fit is left out and named.

--all-reduce: tests/multi_gpu/test_all_reduce as built before (it checks before it times, and compares with NCCL);
without it the limit has no time of messages. --gpus 1,2,4 and --rows choose what to run; with --save the file is written
anew after each row.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from common import dummy, save, spread
from gpu_common import Limits, check_logits, decode_run, gpu_environment, parser, percent, step_bytes, step_flops
from gpu_prefill import prefill

PROMPT_TOKENS, NEW_TOKENS = 128, 256
PREFILL_TOKENS = 2048


class Row(NamedTuple):
    name: str
    shape: str
    quantization: str | None
    batch: int  # 0: a prompt


ROWS = [
    Row("7b-w4-1", "qwen2.5-7b", "w4", 1),
    Row("7b-w4-64", "qwen2.5-7b", "w4", 64),
    Row("7b-bf16-1", "qwen2.5-7b", None, 1),
    Row("72b-w4-1", "qwen2.5-72b", "w4", 1),
    Row("72b-w4-prefill", "qwen2.5-72b", "w4", 0),
]

# "    1 x  3584      7.0 KB  one shot    2.10, with norm    2.43; two shots with norm    4.10; chosen one; NCCL ..."
MEASURED = re.compile(
    r"^ *(\d+) x +(\d+) +([\d.]+) KB  one shot +[\d.]+, with norm +([\d.]+); two shots with norm +([\d.]+); chosen (\w+)"
    r"(?:; NCCL bf16 +([\d.]+), float32 +([\d.]+), float32 then norm +([\d.]+))?"
)


def parse_messages(said: str) -> dict[tuple[int, int], dict[str, Any]]:
    """(rows, hidden_size) to microseconds, of the all-reduce program's table."""
    found = {}
    for match in filter(None, map(MEASURED.match, said.splitlines())):
        rows, hidden, kb, one, two, chosen, *nccl = match.groups()
        ours = float(one if chosen == "one" else two)
        names = ("nccl_bf16_us", "nccl_float32_us", "nccl_float32_norm_us")
        others = {name: float(value) for name, value in zip(names, nccl) if value is not None}
        ratio = {"nccl_over_ours": others["nccl_bf16_us"] / ours} if others else {}
        found[int(rows), int(hidden)] = {"bf16_kb": float(kb), "ours_us": ours, "form": chosen, **others, **ratio}
    return found


def measure_messages(program: Path, gpus: int, nccl: str | None) -> dict[tuple[int, int], dict[str, Any]]:
    command = [str(program.absolute()), str(gpus), "--bench", *(["--nccl", nccl] if nccl else [])]
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{program} failed: {(done.stdout + done.stderr)[-2000:]}")
    return parse_messages(done.stdout)


def message_seconds(messages: dict[tuple[int, int], dict[str, Any]], info: dict[str, Any], rows: int) -> float | None:
    """Of a step's all-reduces, by the nearest measured number of rows that is not less."""
    fitting = sorted(count for count, hidden in messages if hidden == info["hidden_size"] and count >= rows)
    if not fitting:
        return None
    return (2 * info["num_layers"] + 1) * messages[fitting[0], info["hidden_size"]]["ours_us"] * 1e-6


def open_engine(row: Row, gpus: int, model: Path) -> Any:
    from qwen_fast import _engine

    positions = max(row.batch * (PROMPT_TOKENS + NEW_TOKENS + 64), PREFILL_TOKENS + 256) + 2 * 4096
    options = {"quantization": row.quantization} if row.quantization else {}
    return _engine.Engine(
        str(model),
        device="cuda",
        tensor_parallel_size=gpus,
        load_format="dummy",
        max_num_batched_tokens=8192,
        max_num_seqs=64,
        max_model_len=8192,
        kv_cache_tokens=positions,
        **options,
    )


def run(engine: Any, row: Row, repeats: int) -> list[float]:
    """Seconds of a step, or of the prompt."""
    if row.batch == 0:
        prefill(engine, PREFILL_TOKENS)
        return [prefill(engine, PREFILL_TOKENS)[0] for _ in range(repeats)]
    decode_run(engine, row.batch, PROMPT_TOKENS, NEW_TOKENS)
    return [decode_run(engine, row.batch, PROMPT_TOKENS, NEW_TOKENS)[0] for _ in range(repeats)]


def measure(
    row: Row, gpus: int, model: Path, limits: Limits, messages: dict, args: argparse.Namespace
) -> dict[str, Any]:
    engine = open_engine(row, gpus, model)
    try:
        info, memory = engine.info(), engine.stats()["memory"]
        digest = check_logits(engine)
        seconds = spread(run(engine, row, args.repeats))
        tokens = row.batch or PREFILL_TOKENS
        context = PREFILL_TOKENS / 2 if row.batch == 0 else PROMPT_TOKENS + NEW_TOKENS / 2
        # memory's weights are the largest rank's; keys and values are shared out
        moved = step_bytes(engine, 0, 0) + (step_bytes(engine, tokens, context) - step_bytes(engine, 0, 0)) / gpus
        flops = step_flops(info, tokens, context) / gpus
        sent = message_seconds(messages, info, tokens) if gpus > 1 else 0.0
        least = max(moved / limits.read_gbs / 1e9 if limits.read_gbs else 0.0,
                    flops / limits.gemm_tflops / 1e12 if limits.gemm_tflops else 0.0)  # fmt: skip
        found = {
            "row": row.name,
            "gpus": gpus,
            "batch": row.batch,
            "prompt_tokens": PREFILL_TOKENS if row.batch == 0 else PROMPT_TOKENS,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds["median"],
            "limit_seconds": least + (sent or 0.0),
            "limit_messages_seconds": sent,
            "load_seconds": info["load_seconds"],
            "memory": memory,
            "logits": digest,
            "description": info["description"],
            **limits.shares(moved, flops, seconds["median"]),
        }
    finally:
        engine.close()
    print(
        f"{row.name:16} {gpus} GPU{'s' if gpus > 1 else ' '}: {1e3 * seconds['median']:8.3f} ms, {found['tokens_per_s']:10,.0f} tok/s; limit "
        f"{1e3 * found['limit_seconds']:7.3f} ms (messages {'not measured' if sent is None else f'{1e3 * sent:.3f}'}); "
        f"{percent(found['read_share'])} of reads; load {info['load_seconds']:.1f} s",
        flush=True,
    )
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gpus", default="1,2,4", help="numbers of GPUs, by comma")
    arguments.add_argument("--rows", default=",".join(row.name for row in ROWS), help="by comma")
    arguments.add_argument("--all-reduce", type=Path, help="tests/multi_gpu/test_all_reduce as built before")
    arguments.add_argument("--nccl", help="libnccl.so.2, for the all-reduce program")
    arguments.add_argument("--budget-seconds", type=float, help="begin no row after so many seconds")
    args = arguments.parse_args()
    begin = time.monotonic()
    limits = Limits(args)
    wanted = args.rows.split(",")
    more: dict[str, Any] = {"limits": limits.said, "messages": {}, "left_out": []}
    rows: list[dict[str, Any]] = []
    counts = [int(count) for count in args.gpus.split(",")]
    messages: dict[int, dict[tuple[int, int], dict[str, Any]]] = {}
    for gpus in counts:
        if gpus > 1 and args.all_reduce:
            messages[gpus] = measure_messages(args.all_reduce, gpus, args.nccl)
            more["messages"][gpus] = [{"rows": r, "hidden_size": h, **one} for (r, h), one in messages[gpus].items()]
    with tempfile.TemporaryDirectory() as directory:
        for row in (row for row in ROWS if row.name in wanted):
            model = dummy(Path(directory) / row.shape, row.shape)
            for gpus in counts:
                if args.budget_seconds is not None and time.monotonic() - begin > args.budget_seconds:
                    more["left_out"].append(f"{row.name} on {gpus}: no time")
                    continue
                try:
                    rows.append(measure(row, gpus, model, limits, messages.get(gpus, {}), args))
                except MemoryError as error:
                    more["left_out"].append(f"{row.name} on {gpus}: {error}")
                    print(f"{row.name} on {gpus}: {error}")
                save("gpu-tp", rows, args.save, args.results, False, **gpu_environment(args), **more)
    for left in more["left_out"]:
        print(f"left out: {left}")


if __name__ == "__main__":
    main()
