"""How fast does the CPU compute prompts, and which share of its int8 rate is that?

efficiency = multiply-adds of the linear layers (attention and the head not counted) per second, over the rate of int8
multiply-adds from registers that probe.c measures in the same process, before and after each run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import (
    Probe,
    demo_dir,
    dummy_0_5b,
    efficiency,
    finish,
    linear_macs_per_token,
    logits_hash,
    measure_between,
    parser,
    prompt_ids,
    save,
    spread,
)


def prefill(engine: Any, length: int) -> float:
    """Prompt tokens per second, from the first step to the first token."""
    engine.reset_prefix_cache()
    ids = prompt_ids(length, engine.info()["vocab_size"])
    output = finish(engine.submit(ids, max_tokens=1, temperature=0.0, ignore_eos=True))
    assert output["num_cached_tokens"] == 0
    return length / (output["first_token_time"] - output["first_scheduled_time"])


def measure(name: str, model: Path, probe: Probe, args: Any, **options: Any) -> list[dict[str, Any]]:
    from qwen_fast import _engine

    rows = []
    engine = _engine.Engine(
        str(model), kv_cache_tokens=8192, max_model_len=4096, num_threads=args.threads, isa=args.isa, **options
    )
    try:
        info = engine.info()
        macs = linear_macs_per_token(info)
        digest = logits_hash(engine)
        print(f"\n{name}: {info['description']}; logits {digest}, twice the same")
        for length in (128, 512, 2048):
            prefill(engine, 64)  # warm
            rates, (dots, reads) = measure_between(
                lambda length=length: prefill(engine, length),
                (probe.int8_macs_per_s, probe.read_bytes_per_s),
                args.repeats,
            )
            row = {
                "model": name,
                "prompt_tokens": length,
                "threads": args.threads,
                "tokens_per_s": spread(rates),
                "linear_macs_per_token": macs,
                "int8_macs_per_s": spread(dots),
                "int8_efficiency": efficiency(macs, rates, dots),
                "read_bytes_per_s": spread(reads),
                "logits": digest,
            }
            rows.append(row)
            rate, peak = row["tokens_per_s"], row["int8_macs_per_s"]["median"]
            read = row["read_bytes_per_s"]["median"]
            print(
                f"  {length:5} tokens: {rate['median']:8.1f} tok/s (best {rate['best']:.1f}), {macs * rate['median'] / 1e9:.0f} of "
                f"{peak / 1e9:.0f} G multiply-adds/s, efficiency {row['int8_efficiency']['median']:.2f}; {read / 1e9:.1f} GB/s read"
            )
    finally:
        engine.close()
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=["demo", "0.5b"], help="one of the two models")
    args = arguments.parse_args()
    probe = Probe(args.threads)
    rows = []
    if args.only != "0.5b":
        rows += measure("demo", demo_dir(), probe, args)
    if args.only != "demo":
        with tempfile.TemporaryDirectory() as directory:
            model = dummy_0_5b(Path(directory))
            rows += measure("0.5B shape", model, probe, args, quantization="w4", load_format="dummy")
    save("cpu-prefill", rows, args.save)


if __name__ == "__main__":
    main()
