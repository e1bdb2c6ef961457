"""Tiny checkpoints, an engine's logits, and readers of the three formats written from their descriptions."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from qwen_fast import _engine

TINY = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 320, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "sliding_window": 512,
    "max_window_layers": 2, "bos_token_id": 318, "eos_token_id": 319,
}  # fmt: skip
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip
_DTYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "I64": np.int64}


def token_blocks(count: int = 4, length: int = 256, seed: int = 1, vocab: int = 300) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, vocab, (count, length)).tolist()


def bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_model(path: pathlib.Path, seed: int = 3, **changes: Any) -> pathlib.Path:
    """Random weights with a few channels far larger than the rest, as trained models have."""
    config = {**TINY, **changes}
    rng = np.random.default_rng(seed)
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim
    loud = np.where(rng.random(hidden) < 0.03, 8.0, 1.0)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((vocab, hidden)) * 2.5 / np.sqrt(hidden) * loud}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        rows = dict(zip(LINEARS, (hidden, kv, kv, hidden, inter, inter, hidden)))
        for name, n in rows.items():
            k = inter if name == "mlp.down_proj" else hidden
            tensors[f"{at}{name}.weight"] = rng.standard_normal((n, k)) / np.sqrt(k)
            if name[-6] in "qkv":
                tensors[f"{at}{name}.bias"] = 0.3 * rng.standard_normal(n)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = 1 + 0.2 * rng.standard_normal(hidden)
    tensors["model.norm.weight"] = 1 + 0.2 * rng.standard_normal(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = rng.standard_normal((vocab, hidden)) * 2.5 / np.sqrt(hidden)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    header, data = {}, b""
    for name, values in tensors.items():
        raw = bf16(values).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint; bfloat16 as float32."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + at for at in entry["data_offsets"])
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(raw[begin:end], "<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(raw[begin:end], _DTYPES[entry["dtype"]])
            found[name] = values.reshape(entry["shape"])
    return found


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """(..., words) to (..., words * per_word), low bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (
        ((words.view(np.uint32)[..., None] >> shifts) & (2**bits - 1)).reshape(*words.shape[:-1], -1).astype(np.int64)
    )


def dense_weight(tensors: dict[str, np.ndarray], config: dict[str, Any], module: str) -> np.ndarray:
    """float32 (n, k) of a quantised linear, by its format's description."""
    quant = config["quantization_config"]
    if quant["quant_method"] == "awq":
        order = [0, 4, 1, 5, 2, 6, 3, 7]  # nibble of each of a word's eight columns

        def columns(words):
            parts = _fields(words, 4).reshape(words.shape[0], -1, 8)[:, :, order]
            return parts.reshape(words.shape[0], -1)

        q, z = columns(tensors[f"{module}.qweight"]), columns(tensors[f"{module}.qzeros"])
        scale = tensors[f"{module}.scales"].astype(np.float32)
        groups = np.arange(q.shape[0]) // (q.shape[0] // scale.shape[0])
        return ((q - z[groups]).astype(np.float32) * scale[groups]).T
    if quant["quant_method"] == "gptq":
        bits = quant["bits"]
        q = _fields(tensors[f"{module}.qweight"].T.copy(), bits)  # (n, k)
        z = _fields(tensors[f"{module}.qzeros"], bits) + 1  # (groups, n)
        assert z.max() <= 2**bits - 1  # no reader has to wrap
        scale, groups = tensors[f"{module}.scales"].astype(np.float32), tensors[f"{module}.g_idx"]
        return (q - z.T[:, groups]).astype(np.float32) * scale.T[:, groups]
    schemes = quant["config_groups"]
    mine = [one for one in schemes.values() if ("lm_head" in one["targets"][0]) == (module == "lm_head")]
    weights = mine[0]["weights"]
    bits, (n, k) = weights["num_bits"], tensors[f"{module}.weight_shape"]
    q = _fields(tensors[f"{module}.weight_packed"], bits)[:, :k]
    scale = tensors[f"{module}.weight_scale"].astype(np.float32)
    z = np.full(scale.shape, 2 ** (bits - 1))
    if not weights["symmetric"]:
        z = _fields(tensors[f"{module}.weight_zero_point"].T.copy(), bits)[:, :n].T
    groups = np.arange(k) // (k // scale.shape[1])
    if weights["actorder"] == "group":
        groups = tensors[f"{module}.weight_g_idx"]
    return (q - z[:, groups]).astype(np.float32) * scale[:, groups]


def dense_weights(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json, and all weights under their dense names."""
    config, tensors = json.loads((path / "config.json").read_text()), read_tensors(path)
    found = {
        name: values for name, values in tensors.items() if name.endswith((".bias", "norm.weight", "tokens.weight"))
    }
    modules = [f"model.layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in LINEARS]
    for module in [*modules, "lm_head"]:
        if f"{module}.weight" in tensors:
            found[f"{module}.weight"] = tensors[f"{module}.weight"]
        elif module != "lm_head" or not config["tie_word_embeddings"]:
            found[f"{module}.weight"] = dense_weight(tensors, config, module)
    return config, found


def log_probs(path: pathlib.Path, ids: list[int], window: int = 512, **options: Any) -> np.ndarray:
    """float64 (tokens, vocab), each window on its own."""
    settings = {"device": "cpu", "dtype": "float32", "activation_dtype": "float32", "lm_head_dtype": "model"}
    engine = _engine.Engine(str(path), **{**settings, "kv_cache_tokens": 1024, "max_model_len": 512, **options})
    try:
        parts = []
        for at in range(0, len(ids), window):
            piece = ids[at : at + window]
            request = engine.submit(piece, max_tokens=0, logits_start=0, logits_stop=len(piece))
            while (output := request.read(None)) is None or not output["finished"]:
                pass
            if output["error"] is not None:
                raise output["error"]
            rows = np.asarray(output["logits"], np.float64)
            parts.append(rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True))
    finally:
        engine.close()
    return np.concatenate(parts)


def mean_kl(reference: np.ndarray, ours: np.ndarray) -> float:
    return float((np.exp(reference) * (reference - ours)).sum(-1).mean())


def files_of(path: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
