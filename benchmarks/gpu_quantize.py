"""How long does quantising a 7B-shaped checkpoint take on a GPU, and how much memory?

First the pieces are checked on a small model: the layers on the GPU give the CPU's outputs, and a tap sees the CPU's
inputs. Then a checkpoint with the exact shapes of configs/<shape>.json is written: random bf16 weights with outlier
channels in the embedding and the norms, as trained models have. `quantize` runs on it with made-up token ids for
calibration, and the result must load in the engine, give finite logits, and be nearer to the original than it is to a
shuffled one. Times by phase, and the peaks of host and device memory, are printed and saved.

    python gpu_quantize.py --method awq --save
    python gpu_quantize.py --method gptq --layers 4
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import CONFIGS, HERE, finish, prompt_ids, save
from gpu_common import gpu_environment, mean_kl

BLOCK_VALUES = 1 << 25
OUTLIER_SHARE, OUTLIER_SIZE = 0.005, 12.0
SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 2048}  # fmt: skip


def bf16(values: Any) -> Any:
    import numpy as np

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            found[f"{at}self_attn.{name}_proj.weight"], found[f"{at}self_attn.{name}_proj.bias"] = (
                (rows, hidden),
                (rows,),
            )
        found[f"{at}self_attn.o_proj.weight"] = (hidden, hidden)
        found[f"{at}mlp.gate_proj.weight"] = found[f"{at}mlp.up_proj.weight"] = (inter, hidden)
        found[f"{at}mlp.down_proj.weight"] = (hidden, inter)
        found[f"{at}input_layernorm.weight"] = found[f"{at}post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    return found


def write_model(directory: Path, shape: str, **changes: Any) -> int:
    """Returns the bytes of all tensors. Weights are stretches of one block of normal values, another start each, times
    1 / sqrt(inputs)."""
    import numpy as np

    config = {**json.loads((CONFIGS / f"{shape}.json").read_text()), **changes}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(BLOCK_VALUES, dtype=np.float32)
    outliers = np.where(rng.random(config["hidden_size"]) < OUTLIER_SHARE, OUTLIER_SIZE, 1.0).astype(np.float32)
    shapes, blocks, header, end, at = shapes_of(config), {}, {}, 0, 0
    for name, extent in shapes.items():
        size = 2 * int(np.prod(extent))
        header[name] = {"dtype": "BF16", "shape": list(extent), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, extent in shapes.items():
            if len(extent) == 1:
                values = normal[: extent[0]] * 0.1
                file.write(bf16(values if name.endswith("bias") else outliers * (1 + values)).tobytes())
                continue
            if name.startswith("model.embed"):
                for first in range(0, extent[0], 4096):
                    rows = min(4096, extent[0] - first)
                    at = (at + 7919) % (BLOCK_VALUES - 4096 * extent[1])
                    file.write(bf16(normal[at : at + rows * extent[1]].reshape(rows, -1) * outliers).tobytes())
                continue
            if extent[1] not in blocks:
                blocks[extent[1]] = bf16(normal / np.sqrt(extent[1])).tobytes()
            left = 2 * extent[0] * extent[1]
            at = (at + 104729) % BLOCK_VALUES
            start = 2 * at
            while left > 0:
                piece = memoryview(blocks[extent[1]])[start : start + left]
                file.write(piece)
                left, start = left - len(piece), 0
    return end


# -- the pieces, on a small model


def check_layers(directory: Path, device: str) -> dict[str, float]:
    """The largest difference from the CPU's float32, relative to the largest value, of outputs and tapped inputs."""
    import numpy as np

    from qwen_fast import _engine

    model = directory / "small"
    write_model(model, "qwen2.5-7b", **SMALL)
    hidden = np.random.default_rng(1).standard_normal((70 + 33, 512)).astype(np.float32)
    seen: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, place, dtype in (
        ("cpu", "cpu", "float32"),
        ("float32", device, "float32"),
        ("bfloat16", device, "bfloat16"),
    ):
        layers = _engine.Layers(str(model), device=place, dtype=dtype, max_tokens=256)
        rows, taps = hidden.copy(), {}

        def tap(layer: int, linear: str, x: Any, taps: dict[str, Any] = taps) -> None:
            taps.setdefault(f"{layer}.{linear}", []).append(np.array(x))

        layers.forward(0, 2, rows, [70, 33], tap)
        layers.close()
        seen[name] = rows, {key: np.concatenate(parts) for key, parts in taps.items()}
    found = {}
    reference_rows, reference = seen["cpu"]
    for name, limit in (("float32", 1e-3), ("bfloat16", 5e-2)):
        rows, taps = seen[name]
        if taps.keys() != reference.keys() or any(taps[key].shape != reference[key].shape for key in taps):
            raise RuntimeError(f"{name}: the taps saw {sorted(taps)}, the CPU's {sorted(reference)}")
        pairs = [(reference_rows, rows), *((reference[key], taps[key]) for key in taps)]
        found[name] = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
        if not found[name] < limit:
            raise RuntimeError(f"layers in {name} on {device} differ from the CPU's by {found[name]} (limit {limit})")
    print(f"layers and taps on {device} against the CPU: {found}", flush=True)
    return found


def check_small(directory: Path, device: str, method: str) -> dict[str, float]:
    """A small model quantised on the CPU and on the GPU: divergence of each from the original."""
    from qwen_fast.quantize import quantize

    ids = [prompt_ids(512, 1000, seed) for seed in range(16)]
    options = {"method": method, "calibration": ids, "progress": False}
    found = {}
    for place in ("cpu", device):
        out = directory / f"small-{method}-{place}"
        quantize(directory / "small", out, device=place, **options)
        found[place] = divergence(directory / "small", out, "cpu")
    print(f"{method} of a small model, mean KL from the original: {found}", flush=True)
    if not found[device] < 1.5 * found["cpu"] + 1e-4:
        raise RuntimeError(f"{method} on {device} is worse than on the CPU: {found}")
    return found


def prompt_rows(model: Path, device: str, tokens: int = 256) -> Any:
    import numpy as np

    from qwen_fast import _engine

    options = {} if device == "cuda" else {"dtype": "float32", "activation_dtype": "float32"}
    engine = _engine.Engine(str(model), device=device, lm_head_dtype="model", kv_cache_tokens=2048, max_model_len=1024,
                            **options)  # fmt: skip
    try:
        ids = prompt_ids(tokens, engine.info()["vocab_size"], 99)
        rows = np.array(finish(engine.submit(ids, max_tokens=0, logits_start=0, logits_stop=tokens))["logits"])
    finally:
        engine.close()
    if not np.isfinite(rows).all():
        raise RuntimeError(f"{model}: logits are not finite")
    return rows


def divergence(reference: Path, ours: Path, device: str) -> float:
    return mean_kl(prompt_rows(reference, device), prompt_rows(ours, device))


def say_layer(done: int, total: int, notes: dict[str, Any]) -> None:
    print(f"  layer {done} of {total}: {notes}", flush=True)


# -- the whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--method", choices=["awq", "gptq", "rtn"], action="append", help="may be repeated (default: awq, gptq)"
    )
    parser.add_argument("--shape", default="qwen2.5-7b", help="of configs/ (default qwen2.5-7b)")
    parser.add_argument("--layers", type=int, help="so many layers alone")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128, help="sequences of calibration (default 128)")
    parser.add_argument("--sample-tokens", type=int, default=512, help="tokens in each (default 512)")
    parser.add_argument("--skip-check", action="store_true", help="leave out the small model")
    parser.add_argument("--folder", type=Path, help="for the files, about 30 GB at 7B (default: the temporary folder)")
    parser.add_argument("--commit", help="for the results, where there is no git")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-gpu-quantize.json")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the folder for --save")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        return run(args, Path(name))


def run(args: argparse.Namespace, directory: Path) -> int:
    from qwen_fast.quantize import quantize
    from qwen_fast.quantize.quantize_cli import summary

    methods = args.method or ["awq", "gptq"]
    rows = []
    checks: dict[str, Any] = {}
    if not args.skip_check:
        checks["layers"] = check_layers(directory, args.device)
        checks |= {method: check_small(directory, args.device, method) for method in methods}
    config = json.loads((CONFIGS / f"{args.shape}.json").read_text())
    layers = args.layers or config["num_hidden_layers"]
    began = time.monotonic()
    size = write_model(directory / "model", args.shape, num_hidden_layers=layers)
    print(f"{args.shape}, {layers} layers: {size / 1e9:.1f} GB written in {time.monotonic() - began:.1f} s", flush=True)
    ids = [prompt_ids(args.sample_tokens, config["vocab_size"], seed) for seed in range(args.samples)]
    original = prompt_rows(directory / "model", args.device)
    for method in methods:
        out = directory / method
        report = quantize(directory / "model", out, method=method, group_size=args.group_size, device=args.device,
                          calibration=ids, num_samples=args.samples, sample_tokens=args.sample_tokens,
                          progress=say_layer)  # fmt: skip
        print("\n".join(summary(report)), flush=True)
        quantised = prompt_rows(out, args.device)
        found, control = mean_kl(original, quantised), mean_kl(original, quantised[::-1])
        if not found < 0.5 * control:
            raise RuntimeError(f"{method}: mean KL from the original {found}; rows in another order give {control}")
        report |= {"mean_kl": found, "mean_kl_of_shuffled_rows": control, "shape": args.shape, "num_layers": layers}
        report["layers"] = {str(i): notes for i, notes in report["layers"].items()}
        print(
            f"{method}: loads, logits finite, mean KL from the original {found:.4f} (shuffled rows {control:.2f})",
            flush=True,
        )
        rows.append(report)
        shutil.rmtree(out)
        print(json.dumps({key: value for key, value in report.items() if key != "layers"}), flush=True)
    more = gpu_environment(args)
    save("gpu-quantize", rows, args.save, args.results, checks=checks, **more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
