"""What the tests of this directory share: oracles, engines, and models to run on both.

An oracle is a program that nobody here wrote (torch, transformers, safetensors). Where one is missing its tests are
skipped, except under CI=true: there a missing oracle is a failure.
"""

import contextlib
import hashlib
import importlib
import json
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from quant_writers import bf16_bits, round_to

DATA = Path(__file__).parent / "data"


def oracle(name):
    """The module, or a skip; under CI=true the ImportError."""
    if os.environ.get("CI") == "true":
        return importlib.import_module(name)
    return pytest.importorskip(name)


_engine = importlib.import_module("qwen_fast._engine")


# Where a model can run here, as options of an engine: each instruction-set path of the CPU, the slowest first, and a GPU.
PLACES = {name: {"isa": name} for name in _engine.build_info()["isas"]} | {"cuda": {"device": "cuda"}}


def place_marks(place):
    return [pytest.mark.gpu] if place == "cuda" else []


def places():
    """PLACES for a parameter `on`."""
    return [pytest.param(on, id=place, marks=place_marks(place)) for place, on in PLACES.items()]


def place_pairs(values, long, left_out=lambda place, value: False):
    """PLACES by values, for two parameters. long(place, value): it takes too long for a default run."""
    return [
        pytest.param(
            on, value, id=f"{place}-{value}", marks=place_marks(place) + [pytest.mark.long] * long(place, value)
        )
        for place, on in PLACES.items()
        for value in values
        if not left_out(place, value)
    ]


def demo_dir():
    """The packaged demo checkpoint, 4 bits."""
    import qwen_fast

    return Path(qwen_fast.__file__).parent / "demo"


def heldout_ids(demo, count):
    """The first tokens of the demo's held-out text."""
    tokenizer = oracle("tokenizers").Tokenizer.from_file(str(demo / "tokenizer.json"))
    text = (DATA / "demo_heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text[: 20 * count]).ids
    assert len(ids) >= count
    return ids[:count]


# --- the engine under test -----------------------------------------------------------------------------------

DEFAULTS = {
    "device": "cpu",
    "dtype": "float32",
    "activation_dtype": "float32",
    "kv_cache_dtype": "float32",
    "kv_cache_tokens": 8192,
    "num_threads": 2,
}


@contextlib.contextmanager
def open_engine(path, **options):
    """A native engine (float32 unless told otherwise) whose token i has the text "<i>"."""
    settings = {**DEFAULTS, **options}
    if settings["device"] != "cpu":  # it chooses its operands by dtype
        settings["activation_dtype"] = options.get("activation_dtype", "auto")
    engine = _engine.Engine(str(path), **settings)
    try:
        vocab_size = engine.info()["vocab_size"]
        engine.set_vocabulary([b"<%d>" % i for i in range(vocab_size)], [])
        yield engine
    finally:
        engine.close()


def finish(request, timeout=300.0):
    """Reads a request to its end. Returns the last output with everything joined."""
    deadline = time.monotonic() + timeout
    token_ids, text, logprobs = [], "", []
    while True:
        output = request.read(timeout=deadline - time.monotonic())
        assert output is not None, f"no end after {timeout} s and {len(token_ids)} tokens"
        token_ids += output["token_ids"]
        text += output["text"]
        logprobs += output["logprobs"] or []
        if output["finished"]:
            if output["error"] is not None:
                raise output["error"]
            return {**output, "token_ids": token_ids, "text": text, "logprobs": logprobs}


def logits(engine, token_ids, start=0, stop=None):
    """float32 (stop - start, vocab_size): the rows that predict the tokens after positions start .. stop - 1."""
    stop = len(token_ids) if stop is None else stop
    output = finish(engine.submit(list(token_ids), max_tokens=0, logits_start=start, logits_stop=stop))
    rows = np.array(output["logits"], dtype=np.float32)
    assert rows.shape[0] == stop - start
    return rows


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


# --- comparing distributions ---------------------------------------------------------------------------------


def log_softmax(rows):
    rows = np.asarray(rows, dtype=np.float64)
    top = rows.max(axis=-1, keepdims=True)
    return rows - top - np.log(np.exp(rows - top).sum(axis=-1, keepdims=True))


def mean_kl(reference, ours):
    """Mean over rows of KL(reference || ours), in nats, summed in float64."""
    p, q = log_softmax(reference), log_softmax(ours)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def relative_difference(reference, ours):
    """The largest difference of a logit over the largest magnitude in the reference."""
    return float(np.abs(np.asarray(reference, np.float64) - ours).max() / np.abs(reference).max())


# --- models --------------------------------------------------------------------------------------------------


def small_config(**changes):
    """config.json of a small Qwen2 in the spelling of the published files."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "sliding_window": 512,
        "max_window_layers": 2,
        "bos_token_id": 318,
        "eos_token_id": 319,
    }
    config.update(changes)
    return config


def write_dummy(path, **changes):
    """A directory for load_format="dummy": config.json alone."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(small_config(**changes)))
    return path


def tensor_shapes(config):
    """name -> shape of every tensor of a dense checkpoint."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, q)
        shapes[f"{at}mlp.gate_proj.weight"] = shapes[f"{at}mlp.up_proj.weight"] = (inter, hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inter)
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def random_weights(config, seed, k_bias_norm=2.0):
    """float32 tensors with activations and logits of the size that trained models have. k_bias_norm: Euclidean
    norm of the k_proj bias in the first and the last layer (600 .. 900 in Qwen2.5-7B)."""
    rng = np.random.default_rng(seed)
    last = config["num_hidden_layers"] - 1
    weights = {}
    for name, shape in tensor_shapes(config).items():
        if name.endswith("embed_tokens.weight") or name == "lm_head.weight":
            value = rng.standard_normal(shape) * 2.5 / np.sqrt(shape[1])
        elif name.endswith("norm.weight"):
            value = 1.0 + 0.2 * rng.standard_normal(shape)
        elif name.endswith("k_proj.bias"):
            value = rng.standard_normal(shape)
            edge = name.split(".")[2] in ("0", str(last))
            value *= (k_bias_norm if edge else min(k_bias_norm, 22.0)) / np.linalg.norm(value)
        elif name.endswith(".bias"):
            value = 0.5 * rng.standard_normal(shape)
        else:
            value = rng.standard_normal(shape) / np.sqrt(shape[1])
        weights[name] = value.astype(np.float32)
    return weights


def safetensors_bytes(header, data=b""):
    """A safetensors file from a header (dict, or its bytes) and a data section."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


DTYPES = {"bf16": ("BF16", "bfloat16"), "fp16": ("F16", "float16"), "fp32": ("F32", "float32")}


def write_dense(path, config, weights, fmt="bf16", shards=1):
    """Writes a checkpoint with our own few lines; returns the float32 values that the file holds."""
    path.mkdir(parents=True, exist_ok=True)
    tag, torch_dtype = DTYPES[fmt]
    (path / "config.json").write_text(json.dumps({**config, "torch_dtype": torch_dtype}))
    stored, files = {}, [{} for _ in range(shards)]
    for i, (name, value) in enumerate(sorted(weights.items())):
        stored[name] = round_to(value, torch_dtype)
        raw = bf16_bits(value) if fmt == "bf16" else value.astype(torch_dtype)
        files[i % shards][name] = (value.shape, raw.tobytes())
    weight_map = {}
    for i, tensors in enumerate(files):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        header, data = {}, b""
        for name, (shape, raw) in tensors.items():
            header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
            weight_map[name] = file
        (path / file).write_bytes(safetensors_bytes(header, data))
    if shards > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return stored


def transformers_model(config, weights, attention="eager", num_threads=2):
    """The same model in transformers, float32. config: the content of config.json."""
    torch, transformers = oracle("torch"), oracle("transformers")
    keep = {
        k: v for k, v in config.items() if k not in ("architectures", "torch_dtype", "dtype", "quantization_config")
    }
    hf_config = transformers.Qwen2Config(**keep)
    hf_config._attn_implementation = attention
    torch.set_num_threads(num_threads)
    model = transformers.Qwen2ForCausalLM(hf_config).float().eval()
    state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in weights.items()}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


def transformers_logits(model, token_ids):
    torch = oracle("torch")
    with torch.inference_mode():
        return model(torch.tensor([list(token_ids)])).logits[0].numpy()
