"""Does an engine take the memory that its plan says, and what does it save, and cost, to keep the embedding on the host?

Random weights in the real shapes, 4 bits in groups of 128. Planned: weights, workspace and KV cache, and what the process held
before (context and modules). Beside it what NVML counts for this process after a prompt and some decoded tokens. Then
the same engine with cpu_offload="embeddings": bytes saved on the GPU, and the time of a decode step.
"""

from __future__ import annotations

import gc
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from common import dummy, save, spread
from gpu_common import SHAPES, check_logits, decode_run, gpu_environment, parser

PARTS = ("embedding", "layers", "head", "workspace", "kv_cache")
SIZES = {"max_model_len": 4096, "kv_cache_tokens": 4096 + 64, "max_num_seqs": 8, "max_num_batched_tokens": 512}


def process_bytes() -> int | None:
    """What NVML, through nvidia-smi, counts for this process; None where it does not list it."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    for line in shown.splitlines():
        pid, used = line.split(", ")
        if int(pid) == os.getpid() and used.isdigit():
            return int(used) << 20
    return None


def measure(model: Path, repeats: int, **options: Any) -> dict[str, Any]:
    from qwen_fast import _engine

    engine = _engine.Engine(str(model), load_format="dummy", device="cuda", **SIZES, **options)
    try:
        check_logits(engine)
        decode_run(engine, 1, 64, 64)
        memory = engine.stats()["memory"]
        steps = [decode_run(engine, 1, 128, 256)[0] for _ in range(repeats)]
        return {
            **{f"{part}_bytes": memory[f"{part}_bytes"] for part in PARTS},
            "planned_bytes": sum(memory[f"{part}_bytes"] for part in PARTS),
            "overhead_bytes": memory["device_overhead_bytes"],
            "nvml_bytes": process_bytes(),
            "step_seconds": spread(steps),
        }
    finally:
        engine.close()
        del engine
        gc.collect()


def main() -> None:
    args = parser(__doc__).parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as directory:
        for name in [args.only] if args.only else list(SHAPES):
            model = dummy(Path(directory) / name, SHAPES[name])
            plain = None
            for head, offload in (("model", None), ("int8", None), ("int8", "embeddings")):
                more = {"cpu_offload": offload} if offload else {}
                row = measure(model, args.repeats, quantization="w4", lm_head_dtype=head, **more)
                total = row["planned_bytes"] + row["overhead_bytes"]
                nvml = f"NVML {row['nvml_bytes'] / 2**20:,.0f}" if row["nvml_bytes"] else "NVML not to be had"
                print(
                    f"{name}, {head} head{', embedding on the host' if offload else ''}: "
                    + ", ".join(f"{part} {row[part + '_bytes'] / 2**20:,.1f}" for part in PARTS)
                    + f", overhead {row['overhead_bytes'] / 2**20:,.0f}; in all {total / 2**20:,.0f} MiB, {nvml}; "
                    f"step {row['step_seconds']['median'] * 1e6:,.1f} us"
                )
                if offload and plain:
                    row["saved_bytes"] = plain["planned_bytes"] - row["planned_bytes"]
                    row["slower"] = row["step_seconds"]["median"] / plain["step_seconds"]["median"] - 1
                    print(f"    saves {row['saved_bytes'] / 2**20:,.1f} MiB, {100 * row['slower']:+.2f} % time a step")
                plain = row
                cases.append({"model": name, "head": head, "offload": offload, **row})
    save("gpu-memory", cases, args.save, args.results, **gpu_environment(args), sizes=SIZES)


if __name__ == "__main__":
    main()
