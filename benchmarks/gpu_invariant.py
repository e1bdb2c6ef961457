"""What does batch_invariant=True cost?

The same shapes with and without it, random weights, 4 bits in groups of 128: a decode step of 1 and of 64 sequences (128
tokens in, 256 out) and a prompt of 2,048 tokens. The two engines of a shape come one after the other, each with a whole
warm-up. With it, the tokens of a sequence among 64 must be those of the sequence alone; that is checked first.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import dummy, save, spread
from gpu_common import GATE_TOKENS, SHAPES, check_against_cpu, check_logits, decode_run, gpu_environment, parser
from gpu_prefill import prefill

PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 128, 256, 2048


def measure(model: Path, batches: list[int], invariant: bool, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step by batch, and of the prompt."""
    from qwen_fast import _engine

    most = max(batches)
    engine = _engine.Engine(
        str(model),
        quantization="w4",
        load_format="dummy",
        device="cuda",
        max_num_batched_tokens=8192,
        max_num_seqs=max(16, most),
        max_model_len=8192,
        kv_cache_tokens=most * (PROMPT_TOKENS + NEW_TOKENS + 64) + 2 * GATE_TOKENS,
        batch_invariant=invariant,
    )
    try:
        check_logits(engine)
        first = {batch: decode_run(engine, batch, PROMPT_TOKENS, NEW_TOKENS)[1] for batch in batches}
        if invariant and any(tokens[0] != first[batches[0]][0] for tokens in first.values()):
            raise RuntimeError(f"a sequence's tokens depend on its neighbours: batches of {batches}")
        prefill(engine, PREFILL_TOKENS)
        found = {
            f"step of {batch}": [decode_run(engine, batch, PROMPT_TOKENS, NEW_TOKENS)[0] for _ in range(repeats)]
            for batch in batches
        }
        found[f"prompt of {PREFILL_TOKENS:,}"] = [prefill(engine, PREFILL_TOKENS)[0] for _ in range(repeats)]
        return found
    finally:
        engine.close()


def compare(name: str, plain: dict[str, list[float]], invariant: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for what, seconds in plain.items():
        without, with_it = spread(seconds), spread(invariant[what])
        price = with_it["median"] / without["median"] - 1
        rows.append({"model": name, "what": what, "seconds": without, "seconds_invariant": with_it, "price": price})
        print(
            f"  {name:5} {what:16} {1e6 * without['median']:10,.1f} us, invariant {1e6 * with_it['median']:10,.1f} us: "
            f"{100 * price:+.1f} %",
            flush=True,
        )
    return rows


def main() -> None:
    arguments: argparse.ArgumentParser = parser(__doc__)
    arguments.add_argument("--batches", default="1,64", help="batch sizes, by comma (default 1,64)")
    args = arguments.parse_args()
    batches = [int(one) for one in args.batches.split(",")]
    rows: list[dict[str, Any]] = []
    checks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, shape in SHAPES.items():
            if args.only not in (None, name):
                continue
            if not args.skip_check:
                options = {"quantization": "w4", "batch_invariant": True}
                checks[name] = check_against_cpu(name, Path(directory), options)
            model = dummy(Path(directory) / name, shape)
            plain, invariant = (measure(model, batches, choice, args.repeats) for choice in (False, True))
            rows += compare(name, plain, invariant)
    save("gpu-invariant", rows, args.save, args.results, **gpu_environment(args), checks=checks)


if __name__ == "__main__":
    main()
