"""Logits against transformers in float32, for every variation of the architecture and of its files.

Tolerances. DENSE bounds the largest difference of any logit, relative to the largest logit, where both sides
compute in float32: it is rounding in another order of summation. With a k_proj bias of the size of the published
ones attention scores reach hundreds, and rounding them costs more: there the yardstick is the error of
transformers' own float32 against its float64. The 16-bit KV cache, and the bfloat16 operands of a GPU's fast path, are
bounded by the mean Kullback-Leibler divergence.
"""

import json
import os

import numpy as np
import pytest
from model_helpers import (
    finish,
    heldout_ids,
    log_softmax,
    logits,
    mean_kl,
    open_engine,
    oracle,
    random_weights,
    relative_difference,
    small_config,
    transformers_logits,
    transformers_model,
    write_dense,
)
from quant_writers import round_to, write_checkpoint

pytestmark = pytest.mark.oracle
oracle("transformers")

DENSE = 5e-6
KL = 1e-3

FAST = {"device": "cuda", "dtype": "bfloat16", "kv_cache_dtype": "auto"}
COMPUTE = [
    pytest.param({}, id="cpu"),
    pytest.param({"device": "cuda"}, id="cuda-float32", marks=pytest.mark.gpu),
    pytest.param(FAST, id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=COMPUTE)
def compute(request):
    """Options of an engine: float32 on the CPU and on a GPU, and a GPU's fast path."""
    return request.param


def check(reference, ours, compute, dense=DENSE):
    """Within rounding in float32, within KL on the fast path."""
    divergence, difference = mean_kl(reference, ours), relative_difference(reference, ours)
    print(f"mean KL {divergence:.2e}, largest difference {difference:.2e} of the largest logit")
    assert divergence < KL
    assert difference < dense or compute is FAST


def prompt(config, length=100, seed=7):
    return np.random.default_rng(seed).integers(0, config["vocab_size"], length).tolist()


def shape(heads, kv_heads, head_dim, **changes):
    return small_config(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads, **changes
    )


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
UNTIED = {"tie_word_embeddings": False}
SLIDING = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "num_hidden_layers": 3}

VARIATIONS = {
    "group1-d64": shape(4, 4, 64),
    "group3-d64": shape(6, 2, 64, **UNTIED),
    "group6-d64": shape(6, 1, 64),
    "group7-d64": shape(14, 2, 64),
    "group8-d64": shape(8, 1, 64, **UNTIED),
    "group1-d128": shape(2, 2, 128, **UNTIED),
    "group3-d128": shape(3, 1, 128),
    "group6-d128": shape(6, 1, 128, **UNTIED),
    "group7-d128": shape(7, 1, 128, **UNTIED),
    "group8-d128": shape(8, 1, 128),
    "odd-sizes": shape(3, 1, 64, intermediate_size=118, vocab_size=333),
    "eps-1e-5": shape(4, 2, 64, rms_norm_eps=1e-5),
    "theta-1e4": shape(4, 2, 64, rope_theta=10000.0),
    "theta-1e7": shape(4, 2, 64, rope_theta=1e7),
    "yarn-d64": shape(4, 2, 64, rope_scaling=YARN, max_position_embeddings=64),
    "yarn-d128": shape(4, 2, 128, rope_scaling=YARN, max_position_embeddings=64, **UNTIED),
    "yarn-as-published": shape(
        2, 1, 128, max_position_embeddings=32768, rope_scaling={**YARN, "original_max_position_embeddings": 32768}
    ),
    "yarn-attention-factor": shape(
        4, 2, 64, rope_scaling={**YARN, "attention_factor": 1.3}, max_position_embeddings=64
    ),
    "sliding": shape(4, 2, 64, **SLIDING),
    "sliding-from-layer-0": shape(4, 2, 64, **{**SLIDING, "max_window_layers": 0}),
    "sliding-yarn-untied": shape(4, 2, 64, **SLIDING, **UNTIED, rope_scaling=YARN, max_position_embeddings=64),
    "sliding-window-set-but-off": shape(4, 2, 64, **{**SLIDING, "use_sliding_window": False}),
    "one-layer": shape(4, 2, 64, num_hidden_layers=1),
}

# name -> config, Euclidean norm of the k_proj bias in the first and the last layer
LARGE_BIAS = {
    "d64": (shape(4, 2, 64, num_hidden_layers=3), 900.0),
    "d128-yarn": (
        shape(7, 1, 128, num_hidden_layers=3, rope_scaling=YARN, max_position_embeddings=64, **UNTIED),
        600.0,
    ),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_architecture(tmp_path, name, compute):
    config = VARIATIONS[name]
    stored = write_dense(tmp_path, config, random_weights(config, 11))
    ids = prompt(config, 200)
    reference = transformers_logits(transformers_model(config, stored), ids)
    with open_engine(tmp_path, **compute) as engine:
        ours = logits(engine, ids)
    assert np.abs(reference).max() > 3.0  # a flat distribution would hide errors
    check(reference, ours, compute)


@pytest.mark.parametrize("name", LARGE_BIAS)
def test_k_bias_of_the_published_size(tmp_path, name, device):
    config, norm = LARGE_BIAS[name]
    stored = write_dense(tmp_path, config, random_weights(config, 11, norm))
    ids = prompt(config, 200)
    model = transformers_model(config, stored)
    float32 = transformers_logits(model, ids)
    exact = transformers_logits(model.double(), ids)
    with open_engine(tmp_path, device=device) as engine:
        ours = logits(engine, ids)
    theirs, error = relative_difference(exact, float32), relative_difference(exact, ours)
    print(f"{name}: error {error:.2e} of the largest logit; transformers in float32 {theirs:.2e}")
    assert theirs > 5 * DENSE  # the bias is large enough to matter
    assert error < 4 * theirs


def test_every_path_and_a_control(tmp_path, on):
    """The tolerance sees one wrong weight: the control."""
    config = small_config(num_hidden_layers=3)
    stored = write_dense(tmp_path, config, random_weights(config, 3))
    ids = prompt(config)
    model = transformers_model(config, stored)
    with open_engine(tmp_path, **on) as engine:
        ours = logits(engine, ids)
    assert relative_difference(transformers_logits(model, ids), ours) < DENSE
    with oracle("torch").inference_mode():
        model.model.layers[1].mlp.down_proj.weight[5, 17] += 0.05
    assert relative_difference(transformers_logits(model, ids), ours) > 2 * DENSE


@pytest.mark.parametrize("fmt", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shards", [1, 5])
def test_checkpoint_dtype_and_shards(tmp_path, fmt, shards, compute):
    config = small_config(tie_word_embeddings=False)
    stored = write_dense(tmp_path, config, random_weights(config, 5), fmt, shards)
    ids = prompt(config)
    reference = transformers_logits(transformers_model(config, stored), ids)
    with open_engine(tmp_path, **compute) as engine:
        check(reference, logits(engine, ids), compute)


@pytest.mark.parametrize("name", ["group3-d64", "yarn-d64", "sliding-yarn-untied", "sliding-window-set-but-off"])
def test_files_that_transformers_wrote(tmp_path, name, compute):
    """save_pretrained: shards, and today's spellings (rope_parameters, dtype, layer_types)."""
    config = VARIATIONS[name]
    weights = {k: round_to(v, "bfloat16") for k, v in random_weights(config, 13).items()}
    model = transformers_model(config, weights)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_theta" not in written and "layer_types" in written
    assert (tmp_path / "model.safetensors.index.json").exists()
    ids = prompt(config, 150)
    with open_engine(tmp_path, **compute) as engine:
        check(transformers_logits(model, ids), logits(engine, ids), compute)


def test_lm_head_beside_tied_embeddings(tmp_path, compute):
    """Quantised exports of tied models may carry a separate lm_head.weight: it counts."""
    config = small_config(tie_word_embeddings=False)
    stored = write_dense(tmp_path, config, random_weights(config, 17))
    ids = prompt(config)
    reference = transformers_logits(transformers_model(config, stored), ids)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": True}))
    with open_engine(tmp_path, **compute) as engine:
        check(reference, logits(engine, ids), compute)


def test_hf_overrides_turn_yarn_on(tmp_path, compute):
    config = small_config(max_position_embeddings=64)
    stored = write_dense(tmp_path, config, random_weights(config, 19))
    ids = prompt(config, 200)
    reference = transformers_logits(transformers_model({**config, "rope_scaling": YARN}, stored), ids)
    with open_engine(tmp_path, hf_overrides=json.dumps({"rope_scaling": YARN}), **compute) as engine:
        assert engine.info()["max_model_len"] == 256
        check(reference, logits(engine, ids), compute)


@pytest.fixture(scope="module")
def original_reference(original_demo):
    """2,000 tokens of the held-out text, and what transformers says of them."""
    torch, transformers = oracle("torch"), oracle("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(original_demo, dtype=torch.float32).eval()
    ids = heldout_ids(original_demo, 2000)
    return ids, transformers_logits(model, ids)


def test_original_demo_float32(original_demo, original_reference, device):
    ids, reference = original_reference
    with open_engine(original_demo, device=device) as engine:
        assert relative_difference(reference, logits(engine, ids)) < DENSE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_original_demo_16_bit(original_demo, original_reference, dtype, device):
    ids, reference = original_reference
    with open_engine(original_demo, dtype=dtype, kv_cache_dtype="auto", device=device) as engine:
        divergence = mean_kl(reference, logits(engine, ids))
    print(f"{dtype}: mean KL {divergence:.2e} over {len(ids)} tokens")
    assert divergence < KL


def dequantized_demo(demo):
    """The packaged checkpoint's weights by the format's description: scale * (code - zero point), low nibbles first."""
    safetensors_torch, torch = oracle("safetensors.torch"), oracle("torch")
    tensors = safetensors_torch.load_file(demo / "model.safetensors")

    def nibbles(words, axis):
        shifts = torch.arange(0, 32, 4)
        parts = torch.stack([(words >> shift) & 15 for shift in shifts], dim=axis + 1)
        return parts.flatten(axis, axis + 1).numpy().astype(np.float32)

    weights = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            scale = tensors[module + ".weight_scale"].float().numpy()
            n, k = tensors[module + ".weight_shape"].tolist()
            zero = nibbles(tensors[module + ".weight_zero_point"], 0)[:n]
            groups = np.arange(k) // (k // scale.shape[1])
            weights[module + ".weight"] = scale[:, groups] * (nibbles(tensor, 1)[:, :k] - zero[:, groups])
        elif kind in ("weight", "bias"):
            weights[name] = tensor.float().numpy()
    return weights


def test_packaged_demo(demo, device):
    """Float32 to rounding, the 16-bit cache and then the default (on the CPU int8 activations) within their divergence."""
    config = json.loads((demo / "config.json").read_text())
    ids = heldout_ids(demo, 2000)
    reference = transformers_logits(transformers_model(config, dequantized_demo(demo)), ids)
    with open_engine(demo, device=device) as engine:
        assert relative_difference(reference, logits(engine, ids)) < DENSE
    with open_engine(demo, device=device, dtype="auto", kv_cache_dtype="auto") as engine:
        assert mean_kl(reference, logits(engine, ids)) < KL
    options = dict.fromkeys(("dtype", "kv_cache_dtype", "activation_dtype", "lm_head_dtype"), "auto")
    with open_engine(demo, device=device, **options) as engine:
        divergence = mean_kl(reference, logits(engine, ids))
        print(f"default, {engine.info()['activation_dtype']} activations: mean KL {divergence:.2e}")
    assert divergence < KL


QUANTIZED = {
    "awq": ("awq", {}),
    "awq-group32": ("awq", {"group_size": 32}),
    "awq-untied": ("awq", {"tie": False}),
    "gptq-4-sym": ("gptq", {"bits": 4, "sym": True}),
    "gptq-4-asym": ("gptq", {"bits": 4, "sym": False}),
    "gptq-8-sym": ("gptq", {"bits": 8, "sym": True}),
    "gptq-8-asym": ("gptq", {"bits": 8, "sym": False}),
    "gptq-v2-4-asym": ("gptq", {"bits": 4, "sym": False, "gptq_v2": True}),
    "gptq-v2-8-sym": ("gptq", {"bits": 8, "sym": True, "gptq_v2": True}),
    "gptq-4-desc-act": ("gptq", {"bits": 4, "sym": True, "desc_act": True}),
    "gptq-8-desc-act-asym": ("gptq", {"bits": 8, "sym": False, "desc_act": True}),
    "gptq-4-group32": ("gptq", {"bits": 4, "sym": True, "group_size": 32}),
    "gptq-4-group64-shards": ("gptq", {"bits": 4, "sym": True, "group_size": 64, "shards": 3}),
    "gptq-4-channel": ("gptq", {"bits": 4, "sym": True, "group_size": -1}),
    "ct-4-sym": ("compressed-tensors", {"bits": 4, "sym": True}),
    "ct-4-asym": ("compressed-tensors", {"bits": 4, "sym": False}),
    "ct-8-sym": ("compressed-tensors", {"bits": 8, "sym": True}),
    "ct-4-channel": ("compressed-tensors", {"bits": 4, "sym": True, "group_size": -1}),
    "ct-8-channel": ("compressed-tensors", {"bits": 8, "sym": True, "group_size": -1}),
    "ct-4-actorder": ("compressed-tensors", {"bits": 4, "sym": True, "desc_act": True}),
    "ct-4-asym-actorder-group32": ("compressed-tensors", {"bits": 4, "sym": False, "desc_act": True, "group_size": 32}),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_checkpoint(tmp_path, name, compute):
    """Float activations: the difference from transformers on the dequantised weights is rounding alone."""
    fmt, options = QUANTIZED[name]
    config = small_config(tie_word_embeddings=options.get("tie", True), num_hidden_layers=2)
    dense = write_checkpoint(tmp_path, config, fmt, 23, **options)
    written = json.loads((tmp_path / "config.json").read_text())
    ids = prompt(config, 150)
    reference = transformers_logits(transformers_model(written, dense), ids)
    with open_engine(tmp_path, lm_head_dtype="model", **compute) as engine:
        check(reference, logits(engine, ids), compute, 10 * DENSE)


def large_activation_weights(config):
    """Weights under which the residual stream and the input of down_proj pass 1e6, far beyond float16."""
    weights = random_weights(config, 29)
    for i in range(config["num_hidden_layers"]):
        weights[f"model.layers.{i}.mlp.gate_proj.weight"] *= 600.0
        weights[f"model.layers.{i}.mlp.up_proj.weight"] *= 600.0
    return weights


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "half"])
def test_large_activations(tmp_path, fmt, dtype, device):
    config = small_config(num_hidden_layers=3)
    stored = write_dense(tmp_path, config, large_activation_weights(config), fmt)
    model = transformers_model(config, stored)
    seen = {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _m, _i, out, i=i: seen.__setitem__(f"residual {i}", float(out.abs().max())))
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _m, args, i=i: seen.__setitem__(f"down {i}", float(args[0].abs().max()))
        )
    ids = prompt(config)
    reference = transformers_logits(model, ids)
    assert max(v for k, v in seen.items() if k.startswith("residual")) > 1e6
    assert max(v for k, v in seen.items() if k.startswith("down")) > 1e6
    kv = "float32" if dtype == "float32" else "auto"
    with open_engine(tmp_path, device=device, dtype=dtype, kv_cache_dtype=kv) as engine:
        ours = logits(engine, ids)
    assert np.isfinite(ours).all()
    if dtype == "float32":
        assert relative_difference(reference, ours) < DENSE
    assert mean_kl(reference, ours) < KL


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"device": "cuda"}, FAST], ids=["cuda-float32", "cuda"])
def test_32k_context(tmp_path, options):
    """The last rows of a prompt of 32,768 tokens, and what is generated behind it."""
    config = shape(4, 2, 64, max_position_embeddings=33000)
    stored = write_dense(tmp_path, config, random_weights(config, 37))
    ids = prompt(config, 32768 + 8)
    model = transformers_model(config, stored, attention="sdpa", num_threads=os.cpu_count())
    with oracle("torch").inference_mode():
        hidden = model.model(oracle("torch").tensor([ids])).last_hidden_state[0, 32704:]
        reference = model.lm_head(hidden).numpy()
    with open_engine(tmp_path, **options, kv_cache_tokens=2 * 33024, enable_prefix_caching=False) as engine:
        ours = logits(engine, ids, 32704)
        output = finish(engine.submit(ids[:32768], max_tokens=8, temperature=0.0, logprobs=0, ignore_eos=True))
        whole = ids[:32768] + output["token_ids"]
        again = log_softmax(logits(engine, whole, 32767, len(whole) - 1))
    check(reference, ours, options, 4 * DENSE)  # sums over 32,768 values
    decoded = [row[0][1] for row in output["logprobs"]]
    np.testing.assert_allclose(
        decoded, again[np.arange(8), output["token_ids"]], atol=0.03 if options is FAST else 1e-4
    )


def test_large_activations_w4a8(tmp_path):
    """int8 activations take their scale from the values, so 1e6 is as good as 1: measured against float activations
    on the same 4-bit weights, and against the same model with ordinary activations."""
    config = small_config(num_hidden_layers=3)
    divergences = {}
    for name, weights in (("ordinary", random_weights(config, 29)), ("large", large_activation_weights(config))):
        path = tmp_path / name
        write_dense(path, config, weights)
        ids = prompt(config)
        rows = {}
        for activation in ("float32", "int8"):
            with open_engine(path, quantization="w4", activation_dtype=activation, lm_head_dtype="model") as engine:
                rows[activation] = logits(engine, ids)
        assert np.isfinite(rows["int8"]).all()
        divergences[name] = mean_kl(rows["float32"], rows["int8"])
    print(divergences)
    assert divergences["large"] < 5 * divergences["ordinary"] + 1e-3
