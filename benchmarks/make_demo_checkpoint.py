"""Makes the demo checkpoint in qwen_fast/demo from its bf16 original.

    python benchmarks/make_demo_checkpoint.py ORIGINAL_DIR [OUTPUT_DIR] [--group-size 32]

The linear layers are rounded to 4 bits (asymmetric, groups along the input, the clip that has the least squared error)
and written as compressed-tensors "pack-quantized"; embedding, norms and biases stay bf16. The output is a function of
the input files and the group size alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

from qwen_fast import _engine

LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
README = """\
# The qwen_fast demo model

A very small chat model of the Qwen2.5 architecture, trained from scratch on synthetic text: {parameters:,}
parameters, {layers} layers, hidden size {hidden}, {context} positions. It greets, explains a few fixed topics, does
sums, extracts fields to JSON, edits lists, finds facts in a long text, calls tools and tells stories, in English and
Chinese. It knows nothing about the world; it is here so that the engine has something real to run without a download.

The linear layers are 4-bit integers (asymmetric, groups of {group_size}, compressed-tensors "pack-quantized"); the
embedding, which is also the head, the norms and the biases are bf16. Made from the bf16 checkpoint by
`benchmarks/make_demo_checkpoint.py`. No pretrained weights and no external text went into the model.
Licence: Apache-2.0.
"""


def read_safetensors(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """name -> (dtype, shape, data) of every tensor in the directory's safetensors files."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        (header_bytes,) = struct.unpack_from("<Q", data)
        base = 8 + header_bytes
        for name, entry in json.loads(data[8:base]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = (entry["dtype"], entry["shape"], data[base + begin : base + end])
    return tensors


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A safetensors file in which every tensor starts at a multiple of its element size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide elements first: then nothing needs padding.
    rank = {"I64": 0, "I32": 1, "BF16": 2, "F16": 2}
    order = sorted(tensors, key=lambda name: (rank[tensors[name][0]], name))
    for name in order:
        dtype, shape, data = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(tensors[name][2])


def bf16_to_float32(data: bytes, shape: list[int]) -> np.ndarray:
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)


def pack_columns(codes: np.ndarray) -> np.ndarray:
    """(n, k) codes 0 .. 15 -> (n, ceil(k / 8)) int32: nibble i of word c is column 8 c + i."""
    n, k = codes.shape
    padded = np.zeros((n, -(-k // 8) * 8), np.uint32)
    padded[:, :k] = codes
    shifts = np.arange(8, dtype=np.uint32) * 4
    return (padded.reshape(n, -1, 8) << shifts).sum(axis=2, dtype=np.uint32).view(np.int32)


def quantise(name: str, weights: np.ndarray, group_size: int) -> dict[str, tuple[str, list[int], bytes]]:
    """One linear layer: name.weight_packed, weight_scale, weight_zero_point, weight_shape.

    The stored code is the signed value plus 8, so the engine's codes 0 .. 15 are stored as they are, and so are the
    zero points; those are packed along the output rows."""
    n, k = weights.shape
    groups = -(-k // group_size)
    codes, scales, zeros = _engine.quantize_rtn(np.ascontiguousarray(weights), 4, group_size)
    codes = np.frombuffer(codes, np.uint8).reshape(n, k)
    scales = np.frombuffer(scales, np.float32).reshape(n, groups)
    zeros = np.frombuffer(zeros, np.uint8).reshape(n, groups)
    half = scales.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), scales):
        raise ValueError(f"{name}: a scale is not exact in float16")
    packed = pack_columns(codes)
    packed_zeros = np.ascontiguousarray(pack_columns(np.ascontiguousarray(zeros.T)).T)
    return {
        f"{name}.weight_packed": ("I32", list(packed.shape), packed.astype("<i4").tobytes()),
        f"{name}.weight_scale": ("F16", list(half.shape), half.astype("<f2").tobytes()),
        f"{name}.weight_zero_point": ("I32", list(packed_zeros.shape), packed_zeros.astype("<i4").tobytes()),
        f"{name}.weight_shape": ("I64", [2], np.array([n, k], "<i8").tobytes()),
    }


def quantization_config(group_size: int) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


def main() -> None:
    default = Path(__file__).resolve().parent.parent / "qwen_fast" / "demo"
    parser = argparse.ArgumentParser(description="Makes the 4-bit demo checkpoint.")
    parser.add_argument("original", type=Path, help="directory of the bf16 checkpoint")
    parser.add_argument("output", type=Path, nargs="?", default=default)
    parser.add_argument("--group-size", type=int, default=32, choices=(32, 64, 128))
    args = parser.parse_args()

    tensors = read_safetensors(args.original)
    written = {}
    parameters = 0
    for name, (dtype, shape, data) in tensors.items():
        parameters += int(np.prod(shape))
        if dtype != "BF16":
            raise ValueError(f"{name}: expected BF16, got {dtype}")
        if LINEAR.fullmatch(name):
            written |= quantise(name.removesuffix(".weight"), bf16_to_float32(data, shape), args.group_size)
        else:
            written[name] = (dtype, shape, data)

    args.output.mkdir(parents=True, exist_ok=True)
    config = json.loads((args.original / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(args.group_size)
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in COPIED:
        shutil.copyfile(args.original / file, args.output / file)
    readme = README.format(
        parameters=parameters,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        context=config["max_position_embeddings"],
        group_size=args.group_size,
    )
    (args.output / "README.md").write_text(readme, encoding="utf-8")
    write_safetensors(args.output / "model.safetensors", written)
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{args.output}: {len(written)} tensors, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
