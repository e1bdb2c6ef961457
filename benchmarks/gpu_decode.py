"""How many tokens a second does 4-bit decoding give on this GPU, and which share of what it can read is that?

Random weights in the real shapes, 4 bits in groups of 128, with the 16-bit head and the 8-bit one. 128 tokens in, 256 out;
the time of a step is taken while all sequences decode (gpu_common.decode_run), the median of five runs counts. Beside
each: the bytes that a step must read (weights, scales and head as stored, KV cache at the mean context) and the operations
that it must do, as shares of the limits that were measured just before. One more row: the 7B shape at the end of 32,768
positions.

With --save the file is written anew after each row. After --budget-seconds no further row is begun; the rows left out are
named in the results.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import dummy, save, spread
from gpu_common import (
    GATE_TOKENS,
    SHAPES,
    Limits,
    check_against_cpu,
    check_logits,
    decode_run,
    gpu_environment,
    parser,
    percent,
    step_bytes,
    step_flops,
)

PROMPT_TOKENS, NEW_TOKENS = 128, 256
LONG_TOKENS = 32768


def case(engine: Any, batch: int, prompt_tokens: int, limits: Limits, args: argparse.Namespace) -> dict[str, Any]:
    decode_run(engine, batch, prompt_tokens, NEW_TOKENS)  # warm: graphs, clocks
    seconds, tokens = [], []
    for _ in range(args.repeats):
        one, ids = decode_run(engine, batch, prompt_tokens, NEW_TOKENS)
        seconds.append(one)
        tokens.append(ids)
    same = all(ids == tokens[0] for ids in tokens)
    if batch == 1 and not same:
        raise RuntimeError("greedy runs of one sequence gave different tokens")
    context = prompt_tokens + NEW_TOKENS / 2
    step = spread(seconds)["median"]
    return {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": NEW_TOKENS,
        "step_seconds": spread(seconds),
        "tokens_per_s": spread([batch / one for one in seconds]),
        "runs_agree": same,  # a batch's neighbours may come a step earlier or later
        **limits.shares(step_bytes(engine, batch, context), step_flops(engine.info(), batch, context), step),
    }


class Rows:
    """The rows so far, written after each; and whether there is time for one more."""

    def __init__(self, args: argparse.Namespace, limits: Limits) -> None:
        self.args = args
        self.rows: list[dict[str, Any]] = []
        self.checks: dict[str, Any] = {}
        self.left_out: list[str] = []
        self.environment = gpu_environment(args)
        self.said = limits.said
        self.begin = time.monotonic()

    def write(self, say: bool = False) -> None:
        more = {"limits": self.said, "checks": self.checks, "left_out": self.left_out}
        save("gpu-decode", self.rows, self.args.save, self.args.results, say, **self.environment, **more)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.write()

    def has_time(self, what: str) -> bool:
        budget = self.args.budget_seconds
        late = budget is not None and time.monotonic() - self.begin > budget
        if late:
            self.left_out.append(what)
            print(f"  left out, after {budget:g} s: {what}", flush=True)
        return not late


def in_time(rows: Rows, what: str, batches: list[int]) -> Iterator[int]:
    return (batch for batch in batches if rows.has_time(f"{what}, batch {batch}"))


def measure(
    name: str,
    head: str,
    model: Path,
    batches: list[int],
    long: bool,
    limits: Limits,
    rows: Rows,
    args: argparse.Namespace,
) -> None:
    from qwen_fast import _engine

    options = {"quantization": "w4", "lm_head_dtype": head, "load_format": "dummy", "device": "cuda"}
    most = max(batches) * (PROMPT_TOKENS + NEW_TOKENS + 64) + 2 * GATE_TOKENS
    sizes = {"max_num_batched_tokens": 8192, "max_num_seqs": 256, "max_model_len": 8192, "kv_cache_tokens": most}
    if long:
        sizes |= {
            "max_num_seqs": 16,
            "max_model_len": LONG_TOKENS,
            "kv_cache_tokens": LONG_TOKENS + 2 * GATE_TOKENS + 64,
        }
    more = {
        name: value
        for name, value in (("batch_invariant", args.batch_invariant), ("enforce_eager", args.eager))
        if value
    }
    engine = _engine.Engine(str(model), **options, **sizes, **more)
    try:
        info = engine.info()
        digest = check_logits(engine)
        print(
            f"\n{name}, {head} head: {info['description']}; load {info['load_seconds']:.2f} s; logits {digest}, twice the same"
        )
        what = f"{name}, {head} head{', long' if long else ''}"
        for batch in in_time(rows, what, batches):
            prompt_tokens = LONG_TOKENS - NEW_TOKENS if long else PROMPT_TOKENS
            row = {"model": name, "head": head, **case(engine, batch, prompt_tokens, limits, args), "logits": digest}
            rows.add({**row, "load_seconds": info["load_seconds"], **more})
            rate, step = row["tokens_per_s"], row["step_seconds"]["median"]
            print(
                f"  batch {batch:3} at {prompt_tokens + NEW_TOKENS // 2:5} tokens: {rate['median']:9,.1f} tok/s "
                f"(best {rate['best']:,.1f}), step {step * 1e6:7,.0f} us, {row['bytes'] / 1e9:6.3f} GB: {row['gbs']:5,.0f} GB/s "
                f"{percent(row['read_share'])} of reads; {row['tflops']:6.1f} TFLOP/s {percent(row['gemm_share'])} of products",
                flush=True,
            )
    finally:
        engine.close()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batches", default="1,16,64,256", help="batch sizes, by comma")
    arguments.add_argument("--heads", default="model,int8", help="lm_head_dtype, by comma")
    arguments.add_argument("--no-long", action="store_true", help="leave out the 7B shape at 32,768 positions")
    arguments.add_argument("--batch-invariant", action="store_true")
    arguments.add_argument("--eager", action="store_true", help="enforce_eager: no graphs")
    arguments.add_argument("--budget-seconds", type=float, help="begin no row after so many seconds")
    args = arguments.parse_args()
    limits = Limits(args)
    batches = [int(one) for one in args.batches.split(",")]
    rows = Rows(args, limits)
    with tempfile.TemporaryDirectory() as directory:
        for name, shape in SHAPES.items():
            if args.only not in (None, name):
                continue
            model = dummy(Path(directory) / name, shape)
            for head in args.heads.split(","):
                if not args.skip_check:
                    options = {"quantization": "w4", "lm_head_dtype": head}
                    rows.checks[f"{name}, {head} head"] = check_against_cpu(name, Path(directory), options)
                measure(name, head, model, batches, False, limits, rows, args)
            if name == "7B" and not args.no_long:
                measure(name, "model", model, [1], True, limits, rows, args)
    rows.write(say=True)


if __name__ == "__main__":
    main()
