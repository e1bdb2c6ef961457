"""How many tokens a second does 4-bit decoding give on this CPU, and which share of the memory bandwidth is that?

Every decoded token reads all layers, the output head and the KV cache once: 4-bit codes with their scales as they
are stored. efficiency = those bytes times steps per second, over the read bandwidth that probe.c measures in the
same process, before and after each run. The demo model fits into a cache, so its efficiency may pass 1. A batch shares
those bytes, so its limit is arithmetic: int8 efficiency = multiply-adds of the linear layers and the head per second,
over the rate from registers (probe.c again).
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
    kv_bytes_per_token,
    linear_macs_per_token,
    logits_hash,
    measure_between,
    parser,
    prompt_ids,
    save,
    spread,
)

PROMPT_TOKENS = 32


def decode(engine: Any, batch: int, new_tokens: int) -> float:
    """Steps per second, from the first token of the last sequence to start, to the end."""
    vocab_size = engine.info()["vocab_size"]
    engine.reset_prefix_cache()
    requests = [
        engine.submit(prompt_ids(PROMPT_TOKENS, vocab_size, i), max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        for i in range(batch)
    ]
    outputs = [finish(request) for request in requests]
    assert all(output["num_output_tokens"] == new_tokens for output in outputs)
    begin = max(output["first_token_time"] for output in outputs)
    end = min(output["last_token_time"] for output in outputs)
    # Sequences may start a step apart; the slowest first token and the fastest last one bound the steps they share.
    first = min(output["first_token_time"] for output in outputs)
    late_steps = round((begin - first) / max((end - first) / (new_tokens - 1), 1e-9))
    return (new_tokens - 1 - late_steps) / (end - begin)


def measure(name: str, model: Path, new_tokens: int, probe: Probe, args: Any, **options: Any) -> list[dict[str, Any]]:
    from qwen_fast import _engine

    rows = []
    engine = _engine.Engine(
        str(model), kv_cache_tokens=8192, max_model_len=1024, num_threads=args.threads, isa=args.isa, **options
    )
    try:
        info, memory = engine.info(), engine.stats()["memory"]
        macs = linear_macs_per_token(info) + info["hidden_size"] * info["vocab_size"]
        digest = logits_hash(engine)
        print(f"\n{name}: {info['description']}; load {info['load_seconds']:.2f} s; logits {digest}, twice the same")
        for batch in (1, 8):
            context = PROMPT_TOKENS + new_tokens / 2
            step_bytes = memory["layers_bytes"] + memory["head_bytes"] + batch * context * kv_bytes_per_token(info)
            decode(engine, batch, 8)  # warm
            steps, (reads, dots) = measure_between(
                lambda batch=batch: decode(engine, batch, new_tokens),
                (probe.read_bytes_per_s, probe.int8_macs_per_s),
                args.repeats,
            )
            row = {
                "model": name,
                "batch": batch,
                "threads": args.threads,
                "new_tokens": new_tokens,
                "tokens_per_s": spread([batch * rate for rate in steps]),
                "bytes_per_step": round(step_bytes),
                "read_bytes_per_s": spread(reads),
                "bandwidth_efficiency": efficiency(step_bytes, steps, reads),
                "int8_macs_per_s": spread(dots),
                "int8_efficiency": efficiency(macs * batch, steps, dots),
                "logits": digest,
                "load_seconds": info["load_seconds"],
            }
            rows.append(row)
            rate, read = row["tokens_per_s"], row["read_bytes_per_s"]
            print(
                f"  batch {batch}: {rate['median']:8.1f} tok/s (best {rate['best']:.1f}), {step_bytes / 1e6:.0f} MB a step, "
                f"{read['median'] / 1e9:.1f} GB/s read, efficiency {row['bandwidth_efficiency']['median']:.2f}; "
                f"int8 efficiency {row['int8_efficiency']['median']:.2f}"
            )
        ratio = rows[1]["tokens_per_s"]["median"] / rows[0]["tokens_per_s"]["median"]
        print(f"  batch 8 over batch 1: {ratio:.1f}")
    finally:
        engine.close()
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=["demo", "0.5b"], help="one of the two models")
    args = arguments.parse_args()
    probe = Probe(args.threads)
    print(f"{args.threads} threads; loads of {probe.read_width} bits, int8 multiply-adds of {probe.dot_width} bits")
    rows = []
    if args.only != "0.5b":
        for head in ("int8", "int4"):
            rows += measure(f"demo, {head} head", demo_dir(), 768, probe, args, lm_head_dtype=head)
    if args.only != "demo":
        with tempfile.TemporaryDirectory() as directory:
            model = dummy_0_5b(Path(directory))
            for head in ("int8", "int4"):
                options = {"quantization": "w4", "lm_head_dtype": head, "load_format": "dummy"}
                rows += measure(f"0.5B shape, {head} head", model, 96, probe, args, **options)
    save("cpu-decode", rows, args.save)


if __name__ == "__main__":
    main()
