"""A checkpoint with the shapes, names and files of an AWQ one, and made-up content: for measuring how long a start takes.

One block of random bytes is made once and written over and over, at changing offsets. Codes and zero points may be any
bits; scales are such that every linear layer keeps the size of what it is given, so that logits are finite. Embedding,
head, norms and biases are fp16.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from common import CONFIGS

GROUP = 128
SHARD_BYTES = 4_000_000_000
BLOCK_BYTES = 64 << 20
QUANTIZATION = {
    "quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True,
    "modules_to_not_convert": None,
}  # fmt: skip

Tensor = tuple[str, list[int], str, str]  # dtype, shape, the block it is taken from, its name


def tensors(config: dict[str, Any]) -> list[Tensor]:
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden),
        "mlp.down_proj": (hidden, inter),
    }  # fmt: skip
    found: list[Tensor] = [("F16", [vocab, hidden], "values", "model.embed_tokens.weight")]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found.append(("F16", [hidden], "ones", f"{prefix}{norm}.weight"))
        for name, (n, k) in linears.items():
            found.append(("I32", [k, n // 8], "codes", f"{prefix}{name}.qweight"))
            found.append(("I32", [k // GROUP, n // 8], "codes", f"{prefix}{name}.qzeros"))
            found.append(("F16", [k // GROUP, n], f"scales {k}", f"{prefix}{name}.scales"))
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                found.append(("F16", [n], "values", f"{prefix}{name}.bias"))
    found.append(("F16", [hidden], "ones", "model.norm.weight"))
    if not config["tie_word_embeddings"]:
        found.append(("F16", [vocab, hidden], "values", "lm_head.weight"))
    return found


def size_of(tensor: Tensor) -> int:
    size = {"I32": 4, "F16": 2}[tensor[0]]
    for width in tensor[1]:
        size *= width
    return size


class Blocks:
    """Bytes of each kind, as long as one likes, from one block each."""

    def __init__(self, block_bytes: int) -> None:
        import numpy

        self.numpy = numpy
        self.random = numpy.random.default_rng(7)
        self.block_bytes = block_bytes
        self.offset = 0
        self.made: dict[str, memoryview] = {}

    def block(self, kind: str) -> memoryview:
        if kind not in self.made:
            half, count = self.numpy.float16, self.block_bytes // 2
            if kind == "codes":
                data = self.random.bytes(self.block_bytes)
            elif kind == "values":  # as of trained embeddings
                data = (0.03 * self.random.standard_normal(count, self.numpy.float32)).astype(half).tobytes()
            else:
                # A code and its zero point, both uniform in 0 .. 15, differ by 6.5 in the root of the mean square.
                scale = 1.0 if kind == "ones" else 1 / (6.5 * int(kind.split()[1]) ** 0.5)
                data = self.numpy.full(count, scale, half).tobytes()
            self.made[kind] = memoryview(data)
        return self.made[kind]

    def write(self, file: Any, kind: str, size: int) -> None:
        """Another stretch of the block each time, so that no two tensors are alike."""
        block = self.block(kind)
        self.offset = (self.offset + 4096) % self.block_bytes
        at = self.offset
        while size > 0:
            piece = block[at : at + size]
            file.write(piece)
            size -= len(piece)
            at = 0


def shards(all_tensors: list[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    found: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in all_tensors:
        if found[-1] and filled + size_of(tensor) > shard_bytes:
            found.append([])
            filled = 0
        found[-1].append(tensor)
        filled += size_of(tensor)
    return found


def write_shard(path: Path, part: list[Tensor], blocks: Blocks) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in part:
        dtype, shape, _, name = tensor
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size_of(tensor)]}
        end += size_of(tensor)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in part:
            blocks.write(file, tensor[2], size_of(tensor))


def write_awq(
    directory: Path, shape: str, shard_bytes: int = SHARD_BYTES, block_bytes: int = BLOCK_BYTES, **changes: Any
) -> int:
    """Writes configs/<shape>.json, changed, and its shards into `directory`; returns the bytes of all tensors."""
    config = {**json.loads((CONFIGS / f"{shape}.json").read_text()), **changes}
    config |= {"torch_dtype": "float16", "quantization_config": QUANTIZATION}
    directory.mkdir(parents=True, exist_ok=True)
    parts = shards(tensors(config), shard_bytes)
    total = sum(size_of(tensor) for part in parts for tensor in part)
    free = shutil.disk_usage(directory).free
    if free < total + (1 << 30):
        raise OSError(f"{directory}: {free} bytes are free; {total} and a GiB to spare are needed")
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    blocks = Blocks(block_bytes)
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        write_shard(directory / file, part, blocks)
        weight_map |= {tensor[3]: file for tensor in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def read_files(directory: Path) -> None:
    """Reads all shards once, so that they lie in the page cache."""
    buffer = bytearray(16 << 20)
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
