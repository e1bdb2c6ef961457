"""Bad files, configs and arguments, and the message that each must get: what is wrong, its value, what was expected.

TABLES below are the list. Every row starts from a checkpoint that loads, breaks one thing, and gives the exception and a
regular expression for its text. A message may never come from somewhere deeper (a KeyError, a torch word).
"""

import copy
import json
import random
import re
import shutil
import struct

import numpy as np
import pytest
from model_helpers import (
    _engine,
    logits,
    open_engine,
    oracle,
    random_weights,
    safetensors_bytes,
    small_config,
    tensor_shapes,
    write_dense,
)
from quant_writers import write_checkpoint

ModelError, EngineError = _engine.ModelError, _engine.EngineError

CONFIG = small_config(
    hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=64,
    bos_token_id=62, eos_token_id=63,
)  # fmt: skip
EMBED = "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"
K_BIAS = "model.layers.0.self_attn.k_proj.bias"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of one layer that loads; each row breaks a copy of it."""
    path = tmp_path_factory.mktemp("good") / "model"
    write_dense(path, CONFIG, random_weights(CONFIG, 1))
    with open_engine(path) as engine:
        assert logits(engine, [1, 2, 3]).shape == (3, 64)
    return path


@pytest.fixture
def broken(good, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(good, path)
    return path


def fails(path, exception, pattern, **options):
    with pytest.raises(exception) as caught, open_engine(path, **options):
        pass
    check(caught, pattern)


def check(caught, pattern):
    message = str(caught.value)
    assert re.search(pattern, message), f"{message!r} has nothing like {pattern!r}"
    assert len(message) < 1000 and "\n" not in message
    print(f"{type(caught.value).__name__}: {message}")


# --- config.json ---------------------------------------------------------------------------------------------

MISSING = object()
QUANT = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
}


def ct(**weights):
    config = copy.deepcopy(CT)
    config["config_groups"]["group_0"]["weights"].update(weights)
    return config


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

CONFIG_ROWS = [
    # name, changes, regular expression
    ("model_type", {"model_type": "llama"}, r"config\.json.*model_type.*\"llama\".*qwen2"),
    ("mixture of experts", {"model_type": "qwen2_moe"}, r"model_type.*\"qwen2_moe\""),
    ("no model_type", {"model_type": MISSING}, r"model_type"),
    ("no hidden_size", {"hidden_size": MISSING}, r"hidden_size"),
    ("hidden_size 0", {"hidden_size": 0}, r"\"hidden_size\" is 0; expected"),
    ("hidden_size negative", {"hidden_size": -64}, r"\"hidden_size\" is -64; expected"),
    ("hidden_size a string", {"hidden_size": "64"}, r"\"hidden_size\" is \"64\"; expected an integer"),
    ("hidden_size a fraction", {"hidden_size": 64.5}, r"\"hidden_size\" is 64\.5; expected an integer"),
    ("hidden_size huge", {"hidden_size": 2**40}, r"\"hidden_size\" is 1099511627776; expected an integer from"),
    ("hidden_size beyond 64 bits", {"hidden_size": 10**30}, r"\"hidden_size\" is .*; expected an integer"),
    ("hidden_size null", {"hidden_size": None}, r"hidden_size"),
    ("layers 0", {"num_hidden_layers": 0}, r"\"num_hidden_layers\" is 0"),
    ("layers a bool", {"num_hidden_layers": True}, r"\"num_hidden_layers\" is true"),
    ("layers a list", {"num_hidden_layers": [1]}, r"\"num_hidden_layers\" is a list of 1"),
    ("heads do not divide hidden", {"num_attention_heads": 3, "num_key_value_heads": 1}, r"\"hidden_size\" is 64; .*num_attention_heads.* 3"),
    ("kv heads do not divide heads", {"num_attention_heads": 2, "num_key_value_heads": 3}, r"\"num_key_value_heads\" is 3; .*divisor"),
    ("kv heads more than heads", {"num_key_value_heads": 2}, r"\"num_key_value_heads\" is 2; .*num_attention_heads.* 1"),
    ("head_dim odd", {"head_dim": 63}, r"head size is 63.*even number"),
    ("head_dim too large", {"hidden_size": 512, "num_attention_heads": 1}, r"head size is 512.*256"),
    ("vocab_size 0", {"vocab_size": 0}, r"\"vocab_size\" is 0"),
    ("vocab_size absurd", {"vocab_size": 2**31}, r"\"vocab_size\" is 2147483648"),
    ("intermediate_size 0", {"intermediate_size": 0}, r"\"intermediate_size\" is 0"),
    ("positions 0", {"max_position_embeddings": 0}, r"\"max_position_embeddings\" is 0"),
    ("eps 0", {"rms_norm_eps": -1e-6}, r"\"rms_norm_eps\" is -"),
    ("eps a string", {"rms_norm_eps": "1e-6"}, r"\"rms_norm_eps\" is \"1e-6\"; expected a number"),
    ("theta 0", {"rope_theta": 0}, r"\"rope_theta\" is 0"),
    ("theta negative", {"rope_theta": -1.0}, r"\"rope_theta\" is -1"),
    ("activation", {"hidden_act": "gelu"}, r"\"hidden_act\" is \"gelu\"; expected .*silu"),
    ("tie a string", {"tie_word_embeddings": "yes"}, r"\"tie_word_embeddings\" is \"yes\"; expected"),
    ("dtype unknown", {"torch_dtype": "float8"}, r"\"torch_dtype\" is \"float8\"; expected"),
    ("rope scaling of another kind", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling.*\"llama3\""),
    ("rope scaling a number", {"rope_scaling": 4}, r"rope_scaling.* is 4"),
    ("yarn without factor", {"rope_scaling": {k: v for k, v in YARN.items() if k != "factor"}}, r"rope_scaling.*factor"),
    ("yarn factor below 1", {"rope_scaling": {**YARN, "factor": 0.5}}, r"rope_scaling.*\"factor\" is 0\.5"),
    ("yarn factor a string", {"rope_scaling": {**YARN, "factor": "4"}}, r"rope_scaling.*\"factor\" is \"4\""),
    ("yarn positions 0", {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, r"original_max_position_embeddings\" is 0"),
    ("yarn extends beyond all positions", {"rope_scaling": {**YARN, "factor": 1e9, "original_max_position_embeddings": 2**20}}, r"factor"),
    ("sliding window 0", {"use_sliding_window": True, "sliding_window": 0}, r"\"sliding_window\" is 0"),
    ("layer_types contradict", {"layer_types": ["sliding_attention"]}, r"\"layer_types\" has \"sliding_attention\" for layer 0; expected"),
    ("layer_types too short", {"layer_types": []}, r"layer_types"),
    ("quant method unknown", {"quantization_config": {"quant_method": "bitsandbytes"}}, r"quant_method.*\"bitsandbytes\"; expected"),
    ("quant no method", {"quantization_config": {"bits": 4}}, r"quant_method"),
    ("quant config a list", {"quantization_config": [4]}, r"quantization_config"),
    ("gptq 3 bits", {"quantization_config": {**QUANT, "bits": 3}}, r"\"bits\" is 3; expected"),
    ("gptq group size 0", {"quantization_config": {**QUANT, "group_size": 0}}, r"\"group_size\" is 0; expected"),
    ("gptq group size -2", {"quantization_config": {**QUANT, "group_size": -2}}, r"\"group_size\" is -2; expected"),
    ("gptq marlin file", {"quantization_config": {**QUANT, "checkpoint_format": "marlin"}}, r"\"checkpoint_format\" is \"marlin\"; expected"),
    ("gptq desc_act a string", {"quantization_config": {**QUANT, "desc_act": "no"}}, r"\"desc_act\" is \"no\"; expected"),
    ("awq 8 bits", {"quantization_config": {"quant_method": "awq", "bits": 8, "group_size": 32, "zero_point": True, "version": "gemm"}}, r"\"bits\" is 8; expected"),
    ("awq gemv", {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemv_fast"}}, r"\"version\" is \"gemv_fast\"; expected"),
    ("ct format", {"quantization_config": {**CT, "format": "float-quantized"}}, r"\"format\" is \"float-quantized\"; expected"),
    ("ct 2 bits", {"quantization_config": ct(num_bits=2)}, r"\"num_bits\" is 2; expected"),
    ("ct float weights", {"quantization_config": ct(type="float")}, r"\"type\" is \"float\"; expected"),
    ("ct strategy", {"quantization_config": ct(strategy="tensor")}, r"\"strategy\" is \"tensor\"; expected"),
    ("ct no groups", {"quantization_config": {**CT, "config_groups": {}}}, r"config_groups"),
]  # fmt: skip


@pytest.mark.parametrize("changes, pattern", [row[1:] for row in CONFIG_ROWS], ids=[row[0] for row in CONFIG_ROWS])
def test_config(broken, changes, pattern):
    config = json.loads((broken / "config.json").read_text())
    for key, value in changes.items():
        if value is MISSING:
            config.pop(key)
        else:
            config[key] = value
    (broken / "config.json").write_text(json.dumps(config))
    fails(broken, ModelError, pattern)


CONFIG_TEXTS = [
    ("empty", b"", r"config\.json"),
    ("not JSON", b"hello", r"config\.json: byte 0"),
    ("cut off", json.dumps(CONFIG).encode()[:100], r"config\.json: byte \d+"),
    ("a list", b"[]", r"config\.json holds a list"),
    ("twice the same key", b'{"model_type": "qwen2", "model_type": "qwen2"}', r"the key \"model_type\" twice"),
    ("text after the object", json.dumps(CONFIG).encode() + b"{}", r"config\.json: byte \d+: the text goes on"),
    ("not UTF-8", b'{"model_type": "qwen\xff"}', r"config\.json: byte \d+"),
    ("deep", b'{"a":' + b"[" * 100_000, r"config\.json: byte \d+: nested deeper than"),
    ("NaN", json.dumps({**CONFIG, "rms_norm_eps": float("nan")}).encode(), r"config\.json: byte \d+"),
    ("a NUL byte", b'{"model_type": "qwen2"\x00}', r"config\.json: byte \d+"),
]


@pytest.mark.parametrize("text, pattern", [row[1:] for row in CONFIG_TEXTS], ids=[row[0] for row in CONFIG_TEXTS])
def test_config_text(broken, text, pattern):
    (broken / "config.json").write_bytes(text)
    fails(broken, ModelError, pattern)


# --- safetensors ---------------------------------------------------------------------------------------------


def read_parts(path):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(change):
    """Breaks the header (a dict of dicts) and keeps the data."""

    def apply(path):
        header, data = read_parts(path / "model.safetensors")
        header = change(header) or header
        (path / "model.safetensors").write_bytes(safetensors_bytes(header, data))

    return apply


def with_bytes(change):
    def apply(path):
        file = path / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def without_tensor(name):
    """The file without one tensor, its data closed up."""

    def apply(path):
        header, data = read_parts(path / "model.safetensors")
        new, out = {}, b""
        for key, entry in header.items():
            if key != name:
                begin, end = entry["data_offsets"]
                new[key] = {**entry, "data_offsets": [len(out), len(out) + end - begin]}
                out += data[begin:end]
        (path / "model.safetensors").write_bytes(safetensors_bytes(new, out))

    return apply


def change(name, **fields):
    return with_header(lambda header: header[name].update(fields))


def shift(header):
    for entry in header.values():
        entry["data_offsets"] = [x + 2 for x in entry["data_offsets"]]


def overlap(header):
    header[UP]["data_offsets"] = [header[UP]["data_offsets"][0] - 2, header[UP]["data_offsets"][1] - 2]


FILE = r"model\.safetensors"
SAFETENSORS_ROWS = [
    ("empty file", with_bytes(lambda raw: b""), FILE),
    ("seven bytes", with_bytes(lambda raw: raw[:7]), FILE),
    ("header length 0", with_bytes(lambda raw: b"\0" * 8 + raw[8:]), FILE),
    ("header longer than the file", with_bytes(lambda raw: struct.pack("<Q", len(raw)) + raw[8:]), FILE),
    ("header length 2^64-1", with_bytes(lambda raw: b"\xff" * 8 + raw[8:]), FILE),
    ("header length 2^63", with_bytes(lambda raw: struct.pack("<Q", 2**63) + raw[8:]), FILE),
    ("header over 100 MB", with_bytes(lambda raw: struct.pack("<Q", 100_000_001) + raw[8:]), FILE),
    ("data cut off", with_bytes(lambda raw: raw[:-2]), FILE),
    ("data too long", with_bytes(lambda raw: raw + b"\0\0"), FILE),
    ("header not JSON", with_bytes(lambda raw: safetensors_bytes(b"{nonsense}", raw[-64:])), FILE),
    ("header a list", with_bytes(lambda raw: safetensors_bytes(b"[]")), FILE),
    ("header not UTF-8", with_bytes(lambda raw: safetensors_bytes(b'{"\xff\xfe": {}}')), FILE),
    ("no tensors", with_bytes(lambda raw: safetensors_bytes({})), r"model\.embed_tokens\.weight|embed_tokens"),
    ("a key twice", with_bytes(lambda raw: safetensors_bytes(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}')), r"twice"),
    ("metadata not strings", with_header(lambda h: {"__metadata__": {"a": 1}, **h}), r"__metadata__"),
    ("entry without dtype", with_header(lambda h: {**h, UP: {k: v for k, v in h[UP].items() if k != "dtype"}}), r"up_proj.*dtype"),
    ("entry without offsets", with_header(lambda h: {**h, UP: {k: v for k, v in h[UP].items() if k != "data_offsets"}}), r"up_proj.*data_offsets"),
    ("dtype unknown", change(UP, dtype="F12"), r"up_proj.*F12"),
    ("dtype of integers", change(UP, dtype="I16"), r"up_proj.*I16"),
    ("dtype too wide for its bytes", change(UP, dtype="F32"), r"up_proj"),
    ("shape with a negative size", change(UP, shape=[-128, -64]), r"up_proj.*shape"),
    ("shape that overflows", change(UP, shape=[2**40, 2**40]), r"up_proj"),
    ("shape beyond 64 bits", change(UP, shape=[10**30]), r"up_proj|byte"),
    ("shape not of the model", change(UP, shape=[64, 128]), r"up_proj.*\(?64, 128\)?.*128, 64"),
    ("shape flat", change(UP, shape=[8192]), r"up_proj"),
    ("shape a string", change(UP, shape="big"), r"up_proj.*shape"),
    ("offsets reversed", with_header(lambda h: h[UP].update(data_offsets=h[UP]["data_offsets"][::-1])), r"up_proj"),
    ("offsets negative", change(UP, data_offsets=[-16384, 0]), r"up_proj.*data_offsets"),
    ("offsets beyond the file", change(UP, data_offsets=[2**50, 2**50 + 16384]), FILE),
    ("offsets overlap", with_header(overlap), FILE),
    ("offsets do not begin at 0", with_header(shift), FILE),
    ("offsets of three numbers", change(UP, data_offsets=[0, 1, 2]), r"up_proj.*data_offsets"),
    ("no embedding", without_tensor(EMBED), r"model\.embed_tokens\.weight"),
    ("no k bias", without_tensor(K_BIAS), r"layers\.0\.self_attn\.k_proj\.bias"),
    ("no up_proj", without_tensor(UP), r"layers\.0\.mlp\.up_proj"),
    ("no final norm", without_tensor("model.norm.weight"), r"model\.norm\.weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    "change, pattern", [row[1:] for row in SAFETENSORS_ROWS], ids=[row[0] for row in SAFETENSORS_ROWS]
)
def test_safetensors(broken, change, pattern):
    change(broken)
    fails(broken, ModelError, pattern)


def test_untied_without_lm_head(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    fails(broken, ModelError, r"lm_head\.weight")


# --- directories and index.json ------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def with_index(weight_map, rename=None):
    def apply(path):
        file = path / "model.safetensors"
        header, _ = read_parts(file)
        file.rename(path / "shard.safetensors")
        if callable(weight_map):
            text = json.dumps(
                {"metadata": {}, "weight_map": weight_map({name: "shard.safetensors" for name in header})}
            )
        else:
            text = weight_map
        (path / INDEX).write_text(text)

    return apply


def only_pytorch_bin(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


INDEX_ROWS = [
    ("not JSON", with_index("nonsense"), ModelError, r"index\.json: byte 0"),
    ("a list", with_index("[]"), ModelError, r"index\.json"),
    ("no weight_map", with_index("{}"), ModelError, r"index\.json.*weight_map"),
    ("weight_map a list", with_index('{"weight_map": []}'), ModelError, r"index\.json.*weight_map"),
    ("a file that is a number", with_index(lambda m: {**m, UP: 1}), ModelError, r"index\.json.*up_proj"),
    ("a file outside the directory", with_index(lambda m: {**m, UP: "../model.safetensors"}), ModelError, r"\.\./model\.safetensors"),
    ("an absolute file", with_index(lambda m: {**m, UP: "/etc/passwd"}), ModelError, r"/etc/passwd"),
    ("a file in a subdirectory", with_index(lambda m: {**m, UP: "a/b.safetensors"}), ModelError, r"a/b\.safetensors"),
    ("a file that is not there", with_index(lambda m: {**m, UP: "lost.safetensors"}), ModelError, r"lost\.safetensors is missing"),
    ("a tensor that the shard lacks", with_index(lambda m: {**m, "model.layers.9.x": "shard.safetensors"}), ModelError, r"model\.layers\.9\.x"),
    ("a tensor that the index lacks", with_index(lambda m: {k: v for k, v in m.items() if k != UP}), ModelError, r"up_proj"),
    ("an empty name", with_index(lambda m: {**m, UP: ""}), ModelError, r"up_proj|index\.json"),
    ("a name with NUL", with_index(lambda m: {**m, UP: "shard.safetensors\0x"}), ModelError, r"index\.json"),
    ("no weights", lambda p: (p / "model.safetensors").unlink(), ModelError, r"model\.safetensors.* is missing"),
    ("only pytorch_model.bin", only_pytorch_bin, ModelError, r"pytorch_model\.bin.*only safetensors is"),
    ("no config", lambda p: (p / "config.json").unlink(), ModelError, r"config\.json is missing"),
    ("config is a directory", lambda p: ((p / "config.json").unlink(), (p / "config.json").mkdir()), OSError, r"config\.json"),
    ("weights are a directory", lambda p: ((p / "model.safetensors").unlink(), (p / "model.safetensors").mkdir()), OSError, r"model\.safetensors"),
    ("nothing there", lambda p: shutil.rmtree(p), OSError, r"config\.json|model"),
]  # fmt: skip


@pytest.mark.parametrize(
    "change, exception, pattern", [row[1:] for row in INDEX_ROWS], ids=[row[0] for row in INDEX_ROWS]
)
def test_directory(broken, change, exception, pattern):
    change(broken)
    fails(broken, exception, pattern)


# --- arguments of the engine ---------------------------------------------------------------------------------

ARGUMENT_ROWS = [
    ("dtype", {"dtype": "int8"}, ValueError, r"dtype.*\"?int8"),
    ("activation_dtype", {"activation_dtype": "int4"}, ValueError, r"activation_dtype.*int4"),
    ("quantization", {"quantization": "w3"}, ValueError, r"quantization.*w3"),
    ("quantization that the file is not", {"quantization": "awq"}, ValueError, r"quantization.*awq"),
    ("lm_head_dtype", {"lm_head_dtype": "int2"}, ValueError, r"lm_head_dtype.*int2"),
    ("kv_cache_dtype", {"kv_cache_dtype": "fp7"}, ValueError, r"kv_cache_dtype.*fp7"),
    ("kv_cache_16bit_window", {"kv_cache_16bit_window": -3}, ValueError, r"kv_cache_16bit_window.*0 to 1048576.*-3"),
    ("kv_cache_16bit_window too large", {"kv_cache_16bit_window": 2**21}, ValueError, r"kv_cache_16bit_window.*2097152"),
    ("kv_cache_16bit_layers", {"kv_cache_16bit_layers": [0, 9]}, ValueError, r"16bit_layers\[1\] must be 0 to 0; got 9"),
    ("kv_cache_16bit_layers negative", {"kv_cache_16bit_layers": (-1,)}, ValueError, r"16bit_layers\[0\] must be 0 to 0; got -1"),
    ("load_format", {"load_format": "pickle"}, ValueError, r"load_format.*pickle"),
    ("device", {"device": "tpu"}, ValueError, r"device.*tpu"),
    ("isa", {"isa": "sse9"}, ValueError, r"isa.*sse9"),
    ("block_size", {"block_size": 24}, ValueError, r"block_size.*24"),
    ("block_size 0", {"block_size": 0}, ValueError, r"block_size.*0"),
    ("quantization_group_size", {"quantization": "w4", "quantization_group_size": 48}, ValueError, r"group_size.*48"),
    ("max_model_len negative", {"max_model_len": -1}, ValueError, r"max_model_len.*-1"),
    ("max_model_len beyond the checkpoint", {"max_model_len": 10**6}, ValueError, r"max_model_len.*1000000.*512"),
    ("max_model_len beyond the cache", {"max_model_len": 512, "kv_cache_tokens": 64}, ValueError, r"max_model_len|kv_cache"),
    ("max_num_seqs", {"max_num_seqs": 0}, ValueError, r"max_num_seqs.*0"),
    ("max_num_batched_tokens", {"max_num_batched_tokens": 0}, ValueError, r"max_num_batched_tokens.*0"),
    ("tensor_parallel_size 0", {"tensor_parallel_size": 0}, ValueError, r"tensor_parallel_size.*0"),
    ("kv_cache_tokens negative", {"kv_cache_tokens": -5}, ValueError, r"kv_cache_tokens.*-5"),
    ("kv_cache_memory too small", {"kv_cache_tokens": 0, "kv_cache_memory": 10}, ValueError, r"kv_cache_memory|KV cache"),
    ("kv_cache both given", {"kv_cache_tokens": 64, "kv_cache_memory": 1 << 20}, ValueError, r"kv_cache"),
    ("num_threads negative", {"num_threads": -1}, ValueError, r"num_threads.*-1"),
    ("num_threads absurd", {"num_threads": 10**6}, ValueError, r"num_threads.*1000000"),
    ("memory_utilization negative", {"kv_cache_tokens": 0, "memory_utilization": -0.5}, ValueError, r"memory_utilization.*-0\.5"),
    ("memory_utilization above 1", {"kv_cache_tokens": 0, "memory_utilization": 1.5}, ValueError, r"memory_utilization.*1\.5"),
    ("memory_utilization NaN", {"kv_cache_tokens": 0, "memory_utilization": float("nan")}, ValueError, r"memory_utilization.*nan"),
    ("max_steps_in_flight", {"max_steps_in_flight": 3}, ValueError, r"max_steps_in_flight.*3"),
    ("max_waiting_requests", {"max_waiting_requests": -1}, ValueError, r"max_waiting_requests.*-1"),
    ("overrides not JSON", {"hf_overrides": "{"}, ValueError, r"hf_overrides"),
    ("overrides a list", {"hf_overrides": "[]"}, ValueError, r"hf_overrides is a list"),
    ("overrides that break the model", {"hf_overrides": '{"num_attention_heads": 7}'}, ValueError, r"num_attention_heads|hidden_size"),
    ("device without a number", {"device": "cuda:"}, ValueError, r"device.*cuda:"),
    ("device of a strange number", {"device": "cuda:x"}, ValueError, r"device.*cuda:x"),
    ("device of a negative number", {"device": "cuda:-1"}, ValueError, r"device.*cuda:-1"),
    ("cpu_offload", {"cpu_offload": "disk"}, ValueError, r"cpu_offload.*disk"),
    ("cpu_offload_gb negative", {"cpu_offload_gb": -1.0}, ValueError, r"cpu_offload_gb.*-1"),
    ("memory for nothing", {"kv_cache_tokens": 0, "memory_bytes": 1 << 10}, MemoryError, r"1024"),
    ("memory too small for the cache", {"kv_cache_tokens": 1 << 20, "memory_bytes": 1 << 20}, MemoryError, r"1048576"),
    ("KV cache of 2^40 tokens", {"kv_cache_tokens": 1 << 40}, MemoryError, r"KV cache of \d+ .*exceed the \d+ bytes"),
    ("KV cache beyond all memory", {"kv_cache_tokens": 1 << 30}, MemoryError, r"bytes"),
]  # fmt: skip


@pytest.mark.parametrize(
    "options, exception, pattern", [row[1:] for row in ARGUMENT_ROWS], ids=[row[0] for row in ARGUMENT_ROWS]
)
def test_engine_argument(good, device, options, exception, pattern):
    if device == "cuda" and not {"isa", "device", "activation_dtype"}.isdisjoint(options):
        return  # of the CPU, or it says which device itself
    with pytest.raises((ValueError, MemoryError)) as caught, open_engine(good, **{"device": device, **options}):
        pass
    assert type(caught.value) is exception  # not ModelError: the file is good
    check(caught, pattern)


# --- arguments of a request ----------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
REQUEST_ROWS = [
    ("empty prompt", {"prompt": []}, ValueError, r"prompt"),
    ("prompt with an id too large", {"prompt": [1, 64]}, ValueError, r"prompt.*64"),
    ("prompt with a negative id", {"prompt": [1, -1]}, ValueError, r"prompt.*-1"),
    ("prompt with an id beyond 32 bits", {"prompt": [2**32]}, (ValueError, OverflowError), r"prompt|4294967296"),
    ("prompt of texts", {"prompt": ["a"]}, TypeError, r"prompt|int"),
    ("prompt longer than the model", {"prompt": [1] * 513}, ValueError, r"513.*512"),
    ("prompt longer than the cache", {"prompt": [1] * 500, "max_tokens": 5}, ValueError, r"500"),
    ("max_tokens -2", {"max_tokens": -2}, ValueError, r"max_tokens.*-2"),
    ("temperature negative", {"temperature": -0.1}, ValueError, r"temperature.*-0\.1"),
    ("temperature NaN", {"temperature": NAN}, ValueError, r"temperature.*nan"),
    ("temperature infinite", {"temperature": INF}, ValueError, r"temperature.*inf"),
    ("temperature huge", {"temperature": 101.0}, ValueError, r"temperature.*101"),
    ("top_p 0", {"top_p": 0.0}, ValueError, r"top_p.*0"),
    ("top_p above 1", {"top_p": 1.1}, ValueError, r"top_p.*1\.1"),
    ("top_k -2", {"top_k": -2}, ValueError, r"top_k.*-2"),
    ("min_p above 1", {"min_p": 1.5}, ValueError, r"min_p.*1\.5"),
    ("repetition_penalty 0", {"repetition_penalty": 0.0}, ValueError, r"repetition_penalty.*0"),
    ("repetition_penalty NaN", {"repetition_penalty": NAN}, ValueError, r"repetition_penalty.*nan"),
    ("presence_penalty 3", {"presence_penalty": 3.0}, ValueError, r"presence_penalty.*3"),
    ("frequency_penalty -3", {"frequency_penalty": -3.0}, ValueError, r"frequency_penalty.*-3"),
    ("logprobs 65", {"logprobs": 65}, ValueError, r"logprobs.*65"),
    ("logprobs -1", {"logprobs": -1}, ValueError, r"logprobs.*-1"),
    ("prompt_logprobs 65", {"prompt_logprobs": 65}, ValueError, r"prompt_logprobs.*65"),
    ("min_tokens negative", {"min_tokens": -1}, ValueError, r"min_tokens.*-1"),
    ("logit_bias of an unknown id", {"logit_bias": {64: 1.0}}, ValueError, r"logit_bias.*64"),
    ("logit_bias too large", {"logit_bias": {1: 101.0}}, ValueError, r"logit_bias.*101"),
    ("logit_bias NaN", {"logit_bias": {1: NAN}}, ValueError, r"logit_bias.*nan"),
    ("logit_bias a list", {"logit_bias": [1]}, TypeError, r"logit_bias|dict"),
    ("allowed_token_ids empty", {"allowed_token_ids": []}, ValueError, r"allowed_token_ids"),
    ("allowed_token_ids unknown", {"allowed_token_ids": [99]}, ValueError, r"allowed_token_ids.*99"),
    ("bad_words empty", {"bad_words": [[]]}, ValueError, r"bad_words"),
    ("bad_words unknown", {"bad_words": [[1, 77]]}, ValueError, r"77"),
    ("stop empty", {"stop": [""]}, ValueError, r"stop"),
    ("stop a number", {"stop": [1]}, TypeError, r"stop|str"),
    ("stop_token_ids unknown", {"stop_token_ids": [64]}, ValueError, r"stop_token_ids.*64"),
    ("seed negative", {"seed": -1}, (ValueError, OverflowError), r"seed|negative|unsigned"),
    ("logits_stop beyond the prompt", {"logits_start": 0, "logits_stop": 9}, ValueError, r"logits.*9"),
    ("logits_start after stop", {"logits_start": 3, "logits_stop": 1}, ValueError, r"logits"),
    ("sample_index negative", {"sample_index": -1}, (ValueError, OverflowError), r"sample_index|negative|unsigned"),
    ("an unknown argument", {"temprature": 1.0}, TypeError, r"temprature"),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine(good, device):
    with open_engine(good, device=device, kv_cache_tokens=256, max_model_len=256) as engine:
        yield engine


@pytest.mark.parametrize(
    "options, exception, pattern", [row[1:] for row in REQUEST_ROWS], ids=[row[0] for row in REQUEST_ROWS]
)
def test_request_argument(engine, options, exception, pattern):
    options = dict(options)
    prompt = options.pop("prompt", [1, 2, 3])
    if len(prompt) == 513:
        pattern = r"513.*256"
    with pytest.raises(exception) as caught:
        engine.submit(prompt, **{"max_tokens": 4, **options})
    check(caught, pattern)
    assert logits(engine, [1, 2, 3]).shape == (3, 64)  # a refused request harms nobody


def test_closed_engine(good, device):
    with open_engine(good, device=device) as engine:
        engine.close()
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            engine.submit([1], max_tokens=1)


# --- quantised files -----------------------------------------------------------------------------------------

Q = "model.layers.0.mlp.up_proj."


NUMPY = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16, "I16": np.int16, "I32": np.int32, "I64": np.int64}


def rewrite(path, change):
    """Applies change(name -> array) to a checkpoint's one file; bf16 values are seen as their 16 bits."""
    header, data = read_parts(path / "model.safetensors")
    header.pop("__metadata__", None)
    tensors = {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], NUMPY[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }
    change(tensors)
    tags = {np.dtype(kind): tag for tag, kind in NUMPY.items()}
    new, out = {}, b""
    for name, value in tensors.items():
        raw = value.tobytes()
        entry = {"dtype": tags[value.dtype], "shape": list(value.shape)}
        new[name] = {**entry, "data_offsets": [len(out), len(out) + len(raw)]}
        out += raw
    (path / "model.safetensors").write_bytes(safetensors_bytes(new, out))


def edit(name, function):
    return lambda tensors: tensors.__setitem__(name, np.ascontiguousarray(function(tensors[name])))


QUANT_ROWS = [
    ("gptq no qweight", "gptq", {}, lambda t: t.pop(Q + "qweight"), r"up_proj.*qweight"),
    ("gptq no scales", "gptq", {}, lambda t: t.pop(Q + "scales"), r"up_proj.*scales"),
    ("gptq no qzeros", "gptq", {"sym": False}, lambda t: t.pop(Q + "qzeros"), r"up_proj.*qzeros"),
    ("gptq qweight transposed", "gptq", {}, edit(Q + "qweight", lambda a: a.T), r"up_proj.*qweight"),
    ("gptq scales of another group size", "gptq", {}, edit(Q + "scales", lambda a: a[:1]), r"up_proj.*scales"),
    ("gptq qweight in 64 bits", "gptq", {}, edit(Q + "qweight", lambda a: a.astype(np.int64)), r"up_proj.*qweight"),
    ("gptq g_idx out of range", "gptq", {"desc_act": True}, edit(Q + "g_idx", lambda a: a + 1000), r"up_proj.*g_idx"),
    ("gptq g_idx negative", "gptq", {"desc_act": True}, edit(Q + "g_idx", lambda a: a - 1000), r"up_proj.*g_idx"),
    ("gptq g_idx too short", "gptq", {"desc_act": True}, edit(Q + "g_idx", lambda a: a[:-1]), r"up_proj.*g_idx"),
    ("awq no qzeros", "awq", {}, lambda t: t.pop(Q + "qzeros"), r"up_proj.*qzeros"),
    ("awq qweight cut", "awq", {}, edit(Q + "qweight", lambda a: a[:, :-1]), r"up_proj.*qweight"),
    ("awq scales as integers", "awq", {}, edit(Q + "scales", lambda a: a.astype(np.int16)), r"up_proj.*scales"),
    ("ct no weight_packed", "compressed-tensors", {}, lambda t: t.pop(Q + "weight_packed"), r"up_proj.*weight_packed"),
    ("ct no weight_scale", "compressed-tensors", {}, lambda t: t.pop(Q + "weight_scale"), r"up_proj.*weight_scale"),
    ("ct weight_shape lies", "compressed-tensors", {}, edit(Q + "weight_shape", lambda a: a + 1), r"up_proj.*weight_shape"),
    ("ct no zero points", "compressed-tensors", {"sym": False}, lambda t: t.pop(Q + "weight_zero_point"), r"up_proj.*weight_zero_point"),
]  # fmt: skip


@pytest.mark.parametrize(
    "fmt, options, change, pattern", [row[1:] for row in QUANT_ROWS], ids=[row[0] for row in QUANT_ROWS]
)
def test_quantized_file(tmp_path, fmt, options, change, pattern):
    write_checkpoint(tmp_path, copy.deepcopy(CONFIG), fmt, 3, group_size=32, **options)
    with open_engine(tmp_path):
        pass
    rewrite(tmp_path, change)
    fails(tmp_path, ModelError, pattern)


# --- tokenizer.json, generation_config.json and the Python API -----------------------------------------------

TOKENIZER_ROWS = [
    ("not JSON", lambda t: "nonsense", r"tokenizer\.json"),
    ("a list", lambda t: "[]", r"tokenizer\.json"),
    ("no model", lambda t: json.dumps({k: v for k, v in t.items() if k != "model"}), r"tokenizer\.json"),
    ("vocab a list", lambda t: json.dumps({**t, "model": {**t["model"], "vocab": []}}), r"tokenizer\.json"),
    ("id beyond the model", lambda t: json.dumps({**t, "model": {**t["model"], "vocab": {**t["model"]["vocab"], "zzzz": 10**7}}}), r"tokenizer\.json|vocab"),
    ("negative id", lambda t: json.dumps({**t, "model": {**t["model"], "vocab": {**t["model"]["vocab"], "zzzz": -1}}}), r"tokenizer\.json"),
]  # fmt: skip


@pytest.mark.parametrize("change, pattern", [row[1:] for row in TOKENIZER_ROWS], ids=[row[0] for row in TOKENIZER_ROWS])
def test_tokenizer(demo, tmp_path, change, pattern):
    from qwen_fast import LLM

    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(demo / name, tmp_path / name)
    tokenizer = json.loads((demo / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(change(tokenizer), encoding="utf-8")
    with pytest.raises((ModelError, OSError)) as caught:
        LLM(str(tmp_path), load_format="dummy", kv_cache_tokens=256)
    check(caught, pattern)


def test_no_tokenizer(good):
    """Token ids still work; text is refused with the name of the file."""
    from qwen_fast import LLM, SamplingParams

    with LLM(str(good), kv_cache_tokens=256) as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 2
        with pytest.raises(ModelError, match=r"tokenizer\.json"):
            llm.generate("text")


def test_generation_config(demo, tmp_path):
    from qwen_fast import LLM

    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copy(demo / name, tmp_path / name)
    (tmp_path / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises((ValueError, TypeError), match=r"generation_config\.json.*temperature.*hot"):
        LLM(str(tmp_path), load_format="dummy", kv_cache_tokens=256)


# --- the safetensors package as a second opinion --------------------------------------------------------------

# Where we refuse what the package accepts, each with its reason: the pattern of our message.
STRICTER = {
    r"does not begin with": "white space before the header's brace, which the format's description forbids",
    r"dtype": "a tensor of the model with a dtype that no format of ours stores",
    r"embed_tokens|lm_head|layers|model\.norm|shape": "a tensor that the model needs is missing or has another shape",
    r"rank|dimensions": "more than four dimensions",
    r"deeper|nested": "JSON nested deeper than our limit",
    r"bytes of name|name": "a tensor name beyond our limit",
}


def mutate(rng, header, data):
    """One random change to a valid file: of its JSON values, its text, or its sizes."""
    text = json.dumps(header)
    kind = rng.randrange(12)
    entries = [key for key in header if key != "__metadata__"]
    if kind < 5:
        changed = copy.deepcopy(header)
        entry = changed[rng.choice(entries)]
        field = rng.choice(["dtype", "shape", "data_offsets"])
        entry[field] = rng.choice(
            [None, 0, "F32", "bf16", "BF16", [], [0], [0, 0], [2**63], [2**64], [-1], [1.0, 2.0], {"a": 1}, entry[field][:-1],
             [*entry[field], 1] if isinstance(entry[field], list) else "F64", True]
        )  # fmt: skip
        text = json.dumps(changed)
    elif kind == 5:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice('{}[]",:0-x \\\t') + text[at + 1 :]
    elif kind == 6:
        at = rng.randrange(len(text))
        text = text[:at] + text[at + 1 :]
    elif kind == 7:
        data = data[: -rng.randrange(1, 9)] if rng.random() < 0.5 else data + b"\0" * rng.randrange(1, 9)
    elif kind == 8:
        text += rng.choice([" ", "      ", "\n", "\0", "x", "\t \n"])
    elif kind == 9:
        text = rng.choice([" ", "\n", "\ufeff"]) + text
    elif kind == 10:
        changed = {
            "__metadata__": rng.choice([{}, {"a": "b"}, {"a": 1}, {"a": None}, [], "x", None, {"a": {}}]),
            **header,
        }
        text = json.dumps(changed)
    else:
        changed = dict(header)
        changed[rng.choice(["extra", "é\u0000", "", "x" * 3000])] = rng.choice(
            [{"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]},
             {"dtype": "F32", "shape": [], "data_offsets": [len(data), len(data)]},
             {"dtype": "I64", "shape": [0, 5], "data_offsets": [0, 0]},
             {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]},
             {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [len(data), len(data)], "more": 1}]
        )  # fmt: skip
        text = json.dumps(changed, ensure_ascii=rng.random() < 0.5)
    raw = text.encode("utf-8", "surrogatepass")
    length = len(raw) if rng.random() < 0.95 else max(0, len(raw) + rng.choice([-1, 1, 8, 10**9]))
    return struct.pack("<Q", length) + raw + data


@pytest.mark.parametrize("seed", range(4))
def test_accepts_and_refuses_like_the_safetensors_package(good, tmp_path, seed):
    safetensors = oracle("safetensors")
    header, data = read_parts(good / "model.safetensors")
    rng = random.Random(seed)
    shutil.copy(good / "config.json", tmp_path / "config.json")
    file = tmp_path / "model.safetensors"
    count = {"both accept": 0, "both refuse": 0, "stricter": 0}
    for _ in range(300):
        raw = mutate(rng, header, data)
        file.write_bytes(raw)
        try:
            safetensors.deserialize(raw)
            package = None
        except safetensors.SafetensorError as error:
            package = str(error)
        try:
            _engine.estimate(str(tmp_path), kv_cache_tokens=64)
            ours = None
        except ModelError as error:
            ours = str(error)
        case = raw[:8].hex() + " " + raw[8 : 8 + len(raw) - len(data)][:3000].decode("utf-8", "replace")
        assert not (ours is None and package is not None), f"accepted, but the package says {package}: {case}"
        if ours is None:
            count["both accept"] += 1
        elif package is not None:
            count["both refuse"] += 1
        else:
            count["stricter"] += 1
            assert any(re.search(pattern, ours) for pattern in STRICTER), (
                f"refused without a listed reason: {ours}: {case}"
            )
    print(count)
    assert count["both accept"] > 20 and count["both refuse"] > 100


def test_summary():
    """The size of the tables, so that none of them is emptied unseen."""
    tables = {
        "config.json": CONFIG_ROWS,
        "config.json as text": CONFIG_TEXTS,
        "safetensors": SAFETENSORS_ROWS,
        "directory and index": INDEX_ROWS,
        "engine arguments": ARGUMENT_ROWS,
        "request arguments": REQUEST_ROWS,
        "quantised files": QUANT_ROWS,
        "tokenizer.json": TOKENIZER_ROWS,
    }
    for name, rows in tables.items():
        print(f"{name:24} {len(rows):4}")
        assert len({row[0] for row in rows}) == len(rows)
    total = sum(len(rows) for rows in tables.values())
    print(f"{'all':24} {total:4}")
    assert total >= 200
    assert len(tensor_shapes(CONFIG)) == 14
