"""A 16-bit checkpoint as the quantisers see it: its config, its layers' weights, and slices of one layer that the engine
loads by itself, so that a large model is never in memory whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError
from ..tokenizer import read_json_object
from .tensors import Stored, TensorFiles, round_to, to_f32, write_file, write_parts

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Linears by their common input; the first one's name is the input's.
INPUTS = {
    "q_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
NORMS = ("input_layernorm", "post_attention_layernorm")
_SLICE_VOCAB = 256  # rows of a slice's embedding, which nothing reads
_COPIED = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
           "added_tokens.json", "generation_config.json", "chat_template.json", "chat_template.jinja", "LICENSE")  # fmt: skip


def block_of(linear: str) -> str:
    """ "self_attn.q_proj" for "q_proj"."""
    return f"{'mlp' if linear in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{linear}"


class Model:
    """A checkpoint directory. ModelError where it is none, or is quantised already."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).resolve()
        self.config = read_json_object(self.directory / "config.json")
        quantised = self.config.get("quantization_config") or {}
        old = [name for name in ("quantize_config.json", "quant_config.json") if (self.directory / name).is_file()]
        if quantised or old:
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else "unknown"
            said = f"its config.json says {method!r}" if quantised else f"it has a {old[0]}"
            raise ModelError(f"{self.directory} is quantised already ({said}); quantise the 16-bit checkpoint")
        if self.config.get("model_type") != "qwen2":
            raise ModelError(f"{self.directory}: model_type is {self.config.get('model_type')!r}; expected 'qwen2'")
        self.tensors = TensorFiles(self.directory)
        self.num_layers = self._number("num_hidden_layers")
        self.hidden_size = self._number("hidden_size")
        self.vocab_size = self._number("vocab_size")
        self.num_heads = self._number("num_attention_heads")
        self.tied = bool(self.config.get("tie_word_embeddings", False))

    def _number(self, key: str) -> int:
        value = self.config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{self.directory / 'config.json'}: {key} is {value!r}; expected a whole number above 0")
        return value

    @property
    def head_name(self) -> str:
        """The tensor that the output head reads."""
        tied = self.tied and "lm_head.weight" not in self.tensors
        return "model.embed_tokens.weight" if tied else "lm_head.weight"

    @property
    def scale_dtype(self) -> str:
        """Of the scales of formats that leave it open: as the weights are."""
        return self.tensors[self.layer_name(0, "self_attn.q_proj.weight")].dtype

    def layer_name(self, layer: int, rest: str) -> str:
        return f"model.layers.{layer}.{rest}"

    def layer_tensors(self, layer: int) -> dict[str, Stored]:
        """All tensors of a layer by what follows "model.layers.N."."""
        prefix = self.layer_name(layer, "")
        return {name[len(prefix) :]: self.tensors[name] for name in self.tensors if name.startswith(prefix)}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear, of the first layer: the engine checks that the others are alike."""
        found = {}
        for linear in LINEARS:
            name = self.layer_name(0, f"{block_of(linear)}.weight")
            shape = self.tensors[name].shape
            if len(shape) != 2:
                raise ModelError(f"tensor {name!r} has shape {shape}; expected two dimensions")
            found[linear] = (shape[0], shape[1])
        return found

    def embed(self, token_ids: np.ndarray) -> np.ndarray:
        """float32 (tokens, hidden_size) of int32 ids."""
        stored = self.tensors["model.embed_tokens.weight"]
        if stored.shape != (self.vocab_size, self.hidden_size):
            expected = (self.vocab_size, self.hidden_size)
            raise ModelError(f"model.embed_tokens.weight has shape {stored.shape}; expected {expected}")
        raw = np.frombuffer(stored.data, {"F32": "<u4"}.get(stored.dtype, "<u2")).reshape(stored.shape)
        rows = Stored(
            stored.dtype, (len(token_ids), self.hidden_size), np.ascontiguousarray(raw[token_ids]).data.cast("B")
        )
        return to_f32(rows, "model.embed_tokens.weight")

    def write_slice(self, directory: Path, layer: int, tensors: Mapping[str, Stored], quantization: Any) -> None:
        """A checkpoint of this layer alone, with these tensors."""
        config = {key: value for key, value in self.config.items() if key not in ("layer_types", "quantization_config")}
        slides = bool(config.get("use_sliding_window")) and layer >= int(config.get("max_window_layers") or 0)
        config |= {"num_hidden_layers": 1, "vocab_size": _SLICE_VOCAB, "tie_word_embeddings": True}
        config |= {"use_sliding_window": slides, "max_window_layers": 0}
        if quantization is not None:
            config["quantization_config"] = quantization
        dtype = self.scale_dtype
        zeros = Stored(
            dtype,
            (_SLICE_VOCAB, self.hidden_size),
            bytes(_SLICE_VOCAB * self.hidden_size * (4 if dtype == "F32" else 2)),
        )
        named = {self.layer_name(0, rest): tensor for rest, tensor in tensors.items()}
        named |= {"model.embed_tokens.weight": zeros, "model.norm.weight": self.tensors["model.norm.weight"]}
        directory.mkdir(exist_ok=True)
        write_parts(directory / "config.json", [json.dumps(config).encode()], durable=False)
        write_file(directory / "model.safetensors", named, durable=False)

    def other_files(self) -> list[Path]:
        """What goes into the new checkpoint as it is."""
        return [path for name in _COPIED if (path := self.directory / name).is_file()]

    def fingerprint(self) -> str:
        """Of the config, the headers, sizes and times of the weight files, and samples of their content."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path, header in zip(self.tensors.paths, self.tensors.headers):
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode() + header)
            with path.open("rb") as file:
                for i in range(64):
                    file.seek(status.st_size * i // 64)
                    digest.update(file.read(4096))
        return digest.hexdigest()


class Layer:
    """One layer's weights in float32, changed by the quantisers, and the tensors that do not change."""

    def __init__(self, model: Model, index: int) -> None:
        self.index = index
        self.stored = model.layer_tensors(index)
        self.weights = {linear: self._f32(f"{block_of(linear)}.weight") for linear in LINEARS}
        self.dtypes = {name: self._get(f"{name}.weight").dtype for name in NORMS}
        self.norms = {name: self._f32(f"{name}.weight") for name in NORMS}

    def _get(self, name: str) -> Stored:
        if name not in self.stored:
            raise ModelError(f"tensor 'model.layers.{self.index}.{name}' is missing from the checkpoint")
        return self.stored[name]

    def _f32(self, name: str) -> np.ndarray:
        values = to_f32(self._get(name), f"model.layers.{self.index}.{name}")
        if not np.isfinite(values).all():
            raise ModelError(f"tensor 'model.layers.{self.index}.{name}' holds values that are not finite")
        return values

    def fold_norm(self, name: str, scale: np.ndarray) -> np.ndarray:
        """Divides a norm's weight by scale, rounded as the file stores it; returns what it was divided by exactly."""
        old = self.norms[name]
        new = round_to(old / scale, self.dtypes[name])
        usable = (new != 0) & np.isfinite(new)
        new = np.where(usable, new, old)
        self.norms[name] = new
        return np.where(usable, old / np.where(usable, new, 1), 1).astype(np.float32)
