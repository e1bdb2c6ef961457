"""What does a low-bit KV cache save on this GPU, in memory and in time?

The 7B shape with random 4-bit weights: whole decode steps through the engine, 32 sequences of 8,192 tokens each, and
one of 131,072, over a 16-bit cache and over those of 8 and 4 bits. A context is filled once by prefill; the runs after
that find it in the prefix cache and decode again, so they time nothing else; the median counts. Beside each: the bytes
that a step must read (layers, head, and the cache by the memory plan) as a share of the reads measured just before, the
cache's size against 16 bits, and the step's time against 16 bits.

Before the timing: logits are finite and twice the same, and a low-bit engine's short greedy runs give the same tokens twice.

With --save the file is written anew after each row. After --budget-seconds no further row is begun; the rows left out are
named in the results.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from common import dummy, save, spread
from gpu_common import (
    GATE_TOKENS,
    SHAPES,
    Limits,
    check_logits,
    decode_run,
    gpu_environment,
    parser,
    percent,
    step_flops,
)

NEW_TOKENS = 64
WARM_TOKENS = 128


def step_bytes(engine: Any, batch: int, context: float) -> float:
    """What one decode step must read, the cache as the memory plan has it."""
    memory, info = engine.stats()["memory"], engine.info()
    head = memory["head_bytes"] or memory["embedding_bytes"]
    token = memory["kv_block_bytes"] / memory["block_size"]
    return memory["layers_bytes"] + head + batch * (context * token + 2 * info["hidden_size"])


def measure(engine: Any, batch: int, context: int, limits: Limits, repeats: int) -> dict[str, Any]:
    """One row: the engine is warm for this batch when its prompts are filled."""
    begin = time.monotonic()
    decode_run(engine, batch, context - NEW_TOKENS, NEW_TOKENS)
    fill = time.monotonic() - begin
    seconds, tokens = [], []
    for _ in range(repeats):
        one, ids = decode_run(engine, batch, context - NEW_TOKENS, NEW_TOKENS, fresh=False)
        seconds.append(one)
        tokens.append(ids)
    agree = all(ids == tokens[0] for ids in tokens)
    if batch == 1 and not agree:
        raise RuntimeError("greedy runs of one sequence over the same cache gave different tokens")
    mean = context - NEW_TOKENS / 2
    return {
        "batch": batch,
        "context": context,
        "new_tokens": NEW_TOKENS,
        "fill_seconds": fill,
        "step_seconds": spread(seconds),
        "runs_agree": agree,  # a batch's neighbours may come a step earlier or later
        **limits.shares(
            step_bytes(engine, batch, mean), step_flops(engine.info(), batch, mean), spread(seconds)["median"]
        ),
    }


def check(engine: Any, batch: int) -> str:
    """The logits' hash; and two short greedy runs, which warm the graphs too."""
    digest = check_logits(engine)
    runs = [decode_run(engine, batch, WARM_TOKENS, 16)[1] for _ in range(2)]
    if batch == 1 and runs[0] != runs[1]:
        raise RuntimeError("greedy runs of one sequence gave different tokens")
    return digest


class Report:
    """Rows so far, written after each; the 16-bit row of each case is what the others are set against."""

    def __init__(self, args: argparse.Namespace, limits: Limits) -> None:
        self.args, self.limits = args, limits
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.environment = gpu_environment(args)
        self.begin = time.monotonic()

    def late(self, what: str) -> bool:
        budget = self.args.budget_seconds
        late = budget is not None and time.monotonic() - self.begin > budget
        if late:
            self.left_out.append(what)
            print(f"  left out, after {budget:g} s: {what}", flush=True)
        return late

    def add(self, row: dict[str, Any]) -> None:
        same = [one for one in self.rows if one["batch"] == row["batch"] and one["context"] == row["context"]]
        base = next((one for one in same if one["kv_cache_dtype"] == "auto"), row)
        row["kv_bytes_ratio"] = row["kv_bytes_per_token"] / base["kv_bytes_per_token"]
        row["speedup"] = base["step_seconds"]["median"] / row["step_seconds"]["median"]
        self.rows.append(row)
        self.write()
        step = row["step_seconds"]["median"]
        print(
            f"  {row['batch']:2} x {row['context']:6,} {row['kv_cache_dtype']:8} step {step * 1e6:7,.0f} us, {row['speedup']:.2f} x; "
            f"KV {row['kv_bytes_per_token']:7,.0f} B a token, {row['kv_bytes_ratio']:.3f}; {row['bytes'] / 1e9:6.3f} GB: "
            f"{row['gbs']:5,.0f} GB/s {percent(row['read_share'])} of reads; filled in {row['fill_seconds']:.1f} s"
            f"{'' if row['runs_agree'] else '; runs differ'}",
            flush=True,
        )

    def write(self, say: bool = False) -> None:
        more = {"limits": self.limits.said, "left_out": self.left_out}
        save("gpu-kv", self.rows, self.args.save, self.args.results, say, **self.environment, **more)


def run(report: Report, model: Path, kv_cache_dtype: str, batch: int, context: int) -> None:
    from qwen_fast import _engine

    args = report.args
    engine = _engine.Engine(
        str(model),
        device="cuda",
        load_format="dummy",
        quantization="w4",
        kv_cache_dtype=kv_cache_dtype,
        max_num_batched_tokens=8192,
        max_num_seqs=max(batch, 16),
        max_model_len=context,
        kv_cache_tokens=batch * (context + 64) + 2 * GATE_TOKENS + 64,
    )
    try:
        digest = check(engine, batch)
        memory = engine.stats()["memory"]
        row = {"kv_cache_dtype": kv_cache_dtype, **measure(engine, batch, context, report.limits, args.repeats)}
        row |= {
            "kv_block_bytes": memory["kv_block_bytes"],
            "kv_bytes_per_token": memory["kv_block_bytes"] / memory["block_size"],
            "logits": digest,
        }
        report.add(row)
    finally:
        engine.close()


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(only="7B", repeats=3)
    arguments.add_argument("--dtypes", default="auto,int4,fp8_e4m3,int8,nf4", help="of the batch, by comma")
    arguments.add_argument("--long-dtypes", default="auto,int4", help="of the long context, by comma; empty: none")
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--context", type=int, default=8192, help="tokens of each sequence of the batch")
    arguments.add_argument("--long-context", type=int, default=131072, help="tokens of the one long sequence")
    arguments.add_argument("--budget-seconds", type=float, help="begin no row after so many seconds")
    args = arguments.parse_args()
    report = Report(args, Limits(args))
    cases = [(dtype, args.batch, args.context) for dtype in args.dtypes.split(",") if dtype]
    cases[2:2] = [(dtype, 1, args.long_context) for dtype in args.long_dtypes.split(",") if dtype]
    with tempfile.TemporaryDirectory() as directory:
        model = dummy(Path(directory), SHAPES[args.only], max_position_embeddings=max(args.context, args.long_context))
        for dtype, batch, context in cases:
            if not report.late(f"{dtype}, {batch} x {context}"):
                run(report, model, dtype, batch, context)
    report.write(say=True)


if __name__ == "__main__":
    main()
