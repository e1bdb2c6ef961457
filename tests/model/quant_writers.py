"""Writes tiny random Qwen2 checkpoints in every format that the engine reads, with numpy alone.

The packers follow the formats' own description, not the engine's code, and the dequantised float32 weights come back to
the caller: a test compares the engine with them, or loads them into a reference implementation.
"""

import json
import pathlib

import numpy as np

FORMATS = ("bf16", "fp16", "fp32", "awq", "gptq", "compressed-tensors")

# Shift (in nibbles) of logical column j of an AWQ word.
_AWQ_SHIFT = (0, 4, 1, 5, 2, 6, 3, 7)

_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64"}


class _Stored:
    """A tensor as it goes to the file: raw bytes with a dtype name and a shape."""

    def __init__(self, array, dtype):
        self.shape = list(array.shape)
        self.dtype = _SAFETENSORS_NAMES[dtype]
        if dtype == "bfloat16":
            self.data = bf16_bits(array).astype("<u2").tobytes()
        else:
            self.data = np.ascontiguousarray(array.astype(np.dtype(dtype).newbyteorder("<"))).tobytes()


def bf16_bits(array):
    """The upper halves of float32 values, rounded to nearest even (finite values only)."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def round_to(array, dtype):
    """float32 values that `dtype` represents exactly."""
    array = np.asarray(array, np.float32)
    if dtype == "bfloat16":
        return (bf16_bits(array).astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype).astype(np.float32)


def save_safetensors(path, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.data)


def pack_words(values, bits, axis):
    """Packs unsigned `bits`-wide integers along `axis` into int32 words, low bits first, padded with zeros."""
    per_word = 32 // bits
    values = np.moveaxis(np.asarray(values, np.uint32), axis, -1)
    pad = -values.shape[-1] % per_word
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, pad)])
    values = values.reshape(*values.shape[:-1], -1, per_word)
    words = np.zeros(values.shape[:-1], np.uint32)
    for i in range(per_word):
        words |= values[..., i] << np.uint32(bits * i)
    return np.moveaxis(words, -1, axis).view(np.int32)


def pack_awq(values):
    """Packs 4-bit integers (rows, columns) along the columns in AutoAWQ's interleaved order."""
    values = np.asarray(values, np.uint32).reshape(values.shape[0], -1, 8)
    words = np.zeros(values.shape[:2], np.uint32)
    for column, nibble in enumerate(_AWQ_SHIFT):
        words |= values[..., column] << np.uint32(4 * nibble)
    return words.view(np.int32)


def quantize(weight, bits, groups, num_groups, sym, scale_dtype):
    """Round to nearest. `groups` (k) gives each column's group. Returns q (n, k), scales and zeros (n, num_groups)."""
    n, _ = weight.shape
    maxq = 2**bits - 1
    scales = np.zeros((n, num_groups), np.float32)
    zeros = np.zeros((n, num_groups), np.int64)
    q = np.zeros(weight.shape, np.int64)
    for g in range(num_groups):
        columns = np.flatnonzero(groups == g)
        part = weight[:, columns]
        if sym:
            scale = 2 * np.abs(part).max(1) / maxq
            zero = np.full(n, (maxq + 1) // 2)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / maxq
            zero = np.clip(np.round(-low / np.maximum(scale, 1e-8)), 0, maxq).astype(np.int64)
        scale = round_to(np.maximum(scale, 1e-5), scale_dtype)
        scales[:, g], zeros[:, g] = scale, zero
        q[:, columns] = np.clip(np.round(part / scale[:, None]) + zero[:, None], 0, maxq)
    return q, scales, zeros


def dequantize(q, scales, zeros, groups):
    return scales[:, groups] * (q - zeros[:, groups]).astype(np.float32)


def _column_groups(rng, k, group_size, desc_act):
    size = k if group_size == -1 else group_size
    groups = np.arange(k) // size
    if desc_act:
        order = rng.permutation(k)
        shuffled = np.empty(k, np.int64)
        shuffled[order] = groups
        groups = shuffled
    return groups, -(-k // size)


def _write_linear(rng, name, weight, fmt, opts, tensors):
    """Adds the tensors of one quantised linear; returns its dequantised weight."""
    bits, sym, desc_act = opts["bits"], opts["sym"], opts["desc_act"]
    scale_dtype = opts["scale_dtype"]
    n, k = weight.shape
    groups, num_groups = _column_groups(rng, k, opts["group_size"], desc_act)
    q, scales, zeros = quantize(weight, bits, groups, num_groups, sym, scale_dtype)
    if fmt == "awq":
        tensors[name + ".qweight"] = _Stored(pack_awq(q.T), "int32")
        tensors[name + ".qzeros"] = _Stored(pack_awq(zeros.T), "int32")
        tensors[name + ".scales"] = _Stored(scales.T, scale_dtype)
    elif fmt == "gptq":
        stored_zeros = zeros if opts["gptq_v2"] else (zeros - 1) & (2**bits - 1)
        tensors[name + ".qweight"] = _Stored(pack_words(q.T, bits, 0), "int32")
        tensors[name + ".qzeros"] = _Stored(pack_words(stored_zeros.T, bits, 1), "int32")
        tensors[name + ".scales"] = _Stored(scales.T, scale_dtype)
        tensors[name + ".g_idx"] = _Stored(groups, "int32")
    else:
        tensors[name + ".weight_packed"] = _Stored(pack_words(q, bits, 1), "int32")
        tensors[name + ".weight_scale"] = _Stored(scales, scale_dtype)
        tensors[name + ".weight_shape"] = _Stored(np.array([n, k]), "int64")
        if not sym:
            tensors[name + ".weight_zero_point"] = _Stored(pack_words(zeros, bits, 0), "int32")
        if desc_act:
            tensors[name + ".weight_g_idx"] = _Stored(groups, "int32")
    return dequantize(q, scales, zeros, groups)


def quantization_config(fmt, opts):
    bits, group_size, sym = opts["bits"], opts["group_size"], opts["sym"]
    if fmt == "awq":
        return {"quant_method": "awq", "bits": bits, "group_size": group_size, "version": "gemm", "zero_point": not sym,
                "modules_to_not_convert": list(opts["dense_modules"]) or None}
    if fmt == "gptq":
        config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym,
                  "desc_act": opts["desc_act"]}
        if opts["gptq_v2"]:
            config["checkpoint_format"] = "gptq_v2"
        return config
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "dynamic": False,
               "strategy": "channel" if group_size == -1 else "group",
               "group_size": None if group_size == -1 else group_size,
               "actorder": "group" if opts["desc_act"] else None}
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head", *opts["dense_modules"]], "kv_cache_scheme": None, "config_groups": {"group_0": group}}


def _linear_shapes(config):
    hidden, inter, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    return {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden),
            "mlp.down_proj": (hidden, inter)}


def _save(path, tensors, shards):
    path = pathlib.Path(path)
    if shards == 1:
        save_safetensors(path / "model.safetensors", tensors)
        return
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file_name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_safetensors(path / file_name, part)
        weight_map.update(dict.fromkeys(part, file_name))
    total = sum(len(t.data) for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoint(path, config, fmt, seed, *, bits=4, group_size=32, sym=None, desc_act=False, gptq_v2=False,
                     shards=1, tie=None, bias_scale=1.0, scale_dtype=None, dense_modules=(), zero_biases=False):
    """Writes config.json and safetensors into `path` (made if missing).

    Returns the float32 weights, biases and norms under their Hugging Face names; quantised linears dequantised. The
    keyword options: `sym` (default: False for AWQ, else True), `bias_scale` (of k_proj), `dense_modules` (module names
    left in 16 bits), `zero_biases` (store zero biases on o, gate, up and down, as AutoGPTQ did).
    """
    if fmt not in FORMATS:
        raise ValueError(f"fmt is {fmt!r}; expected one of {FORMATS}")
    rng = np.random.default_rng(seed)
    config = dict(config)
    quantised = fmt in ("awq", "gptq", "compressed-tensors")
    dtype = {"bf16": "bfloat16", "fp32": "float32", "compressed-tensors": "bfloat16"}.get(fmt, "float16")
    opts = {"bits": bits, "group_size": group_size, "sym": fmt != "awq" if sym is None else sym, "desc_act": desc_act,
            "gptq_v2": gptq_v2, "scale_dtype": scale_dtype or dtype, "dense_modules": tuple(dense_modules)}
    if tie is not None:
        config["tie_word_embeddings"] = tie
    config.setdefault("model_type", "qwen2")
    config.setdefault("architectures", ["Qwen2ForCausalLM"])
    config["torch_dtype"] = dtype
    if quantised:
        config["quantization_config"] = quantization_config(fmt, opts)
    tensors, weights = {}, {}

    def add(name, values):
        weights[name] = round_to(values, dtype)
        tensors[name] = _Stored(weights[name], dtype)

    hidden, vocab = config["hidden_size"], config["vocab_size"]
    add("model.embed_tokens.weight", rng.standard_normal((vocab, hidden)) * 0.5)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{prefix}{norm}.weight", 1 + 0.1 * rng.standard_normal(hidden))
        for suffix, (n, k) in _linear_shapes(config).items():
            name = prefix + suffix
            weight = (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
            if quantised and name not in opts["dense_modules"]:
                weights[name + ".weight"] = _write_linear(rng, name, weight, fmt, opts, tensors)
            else:
                add(name + ".weight", weight)
            if suffix[-6:] in ("q_proj", "k_proj", "v_proj"):
                scale = bias_scale if suffix.endswith("k_proj") else 0.1
                add(name + ".bias", rng.standard_normal(n) * scale)
            elif zero_biases:
                tensors[name + ".bias"] = _Stored(np.zeros(n, np.float32), dtype)
    add("model.norm.weight", 1 + 0.1 * rng.standard_normal(hidden))
    if not config.get("tie_word_embeddings", False):
        add("lm_head.weight", rng.standard_normal((vocab, hidden)) / np.sqrt(hidden))
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    (pathlib.Path(path) / "config.json").write_text(json.dumps(config, indent=2))
    _save(path, tensors, shards)
    return weights
