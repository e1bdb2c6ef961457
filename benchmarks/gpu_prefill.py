"""How fast does the GPU compute prompts, and which share of its matrix-product rate is that?

Random weights in the real shapes, 4 bits in groups of 128, 16-bit head; prompts of 2,048 and 32,768 tokens, from the
first step to the first token, the median of five runs. Operations: the linear layers of every token, causal attention (half
of all pairs), and the head of the last token.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import dummy, finish, linear_macs_per_token, prompt_ids, save, spread
from gpu_common import SHAPES, Limits, attention_macs, check_against_cpu, check_logits, gpu_environment, parser, percent

LENGTHS = (2048, 32768)


def prefill(engine: Any, length: int) -> tuple[float, list[int]]:
    """Seconds from the first step to the first token, and that token."""
    engine.reset_prefix_cache()
    ids = prompt_ids(length, engine.info()["vocab_size"])
    output = finish(engine.submit(ids, max_tokens=1, temperature=0.0, ignore_eos=True))
    if output["num_cached_tokens"] != 0 or not 0 <= output["token_ids"][0] < engine.info()["vocab_size"]:
        raise RuntimeError(f"not a whole prefill: {output}")
    return output["first_token_time"] - output["first_scheduled_time"], output["token_ids"]


def measure(name: str, model: Path, limits: Limits, args: argparse.Namespace) -> list[dict[str, Any]]:
    from qwen_fast import _engine

    sizes = {"max_num_batched_tokens": args.chunk, "max_num_seqs": 16, "max_model_len": max(LENGTHS) + 64}
    engine = _engine.Engine(
        str(model),
        quantization=args.quantization,
        load_format="dummy",
        device="cuda",
        kv_cache_tokens=max(LENGTHS) + 128,
        **sizes,
    )
    rows = []
    try:
        info, memory = engine.info(), engine.stats()["memory"]
        digest = check_logits(engine)
        print(f"\n{name}: {info['description']}; load {info['load_seconds']:.2f} s; logits {digest}, twice the same")
        for length in LENGTHS:
            prefill(engine, length)  # warm
            runs = [prefill(engine, length) for _ in range(args.repeats)]
            if len({token for _, (token,) in runs}) != 1:
                raise RuntimeError(f"greedy runs gave different tokens: {[token for _, token in runs]}")
            seconds = [one for one, _ in runs]
            macs = length * (linear_macs_per_token(info) + attention_macs(info, length / 2))
            macs += info["hidden_size"] * info["vocab_size"]
            chunks = -(-length // args.chunk)
            row = {
                "model": name,
                "quantization": args.quantization,
                "prompt_tokens": length,
                "chunk": args.chunk,
                "seconds": spread(seconds),
                "tokens_per_s": spread([length / one for one in seconds]),
                "logits": digest,
                **limits.shares(chunks * memory["layers_bytes"], 2.0 * macs, spread(seconds)["median"]),
            }
            rows.append(row)
            rate = row["tokens_per_s"]
            print(
                f"  {length:6} tokens in chunks of {args.chunk}: {1e3 * row['seconds']['median']:8.2f} ms, {rate['median']:9,.0f} tok/s "
                f"(best {rate['best']:,.0f}); {row['flops'] / 1e12:7.2f} TFLOP: {row['tflops']:6.1f} TFLOP/s, "
                f"{percent(row['gemm_share'])} of products",
                flush=True,
            )
    finally:
        engine.close()
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens (default 8192)")
    arguments.add_argument("--quantization", default="w4", choices=["w4", "none"])
    args = arguments.parse_args()
    limits = Limits(args)
    rows: list[dict[str, Any]] = []
    checks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, shape in SHAPES.items():
            if args.only not in (None, name):
                continue
            if not args.skip_check:
                checks[name] = check_against_cpu(name, Path(directory), {"quantization": args.quantization})
            model = dummy(Path(directory) / name, shape, max_position_embeddings=max(LENGTHS) + 64)
            rows += measure(name, model, limits, args)
    save("gpu-prefill", rows, args.save, args.results, **gpu_environment(args), limits=limits.said, checks=checks)


if __name__ == "__main__":
    main()
