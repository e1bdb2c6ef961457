"""One model over several CPU ranks: the same logits and greedy tokens as on one, for counts that divide and that do not,
every format of weights and KV cache, and whatever the scheduler does; the same bits from run to run.

Sums over ranks add the same products in another order: in float32 that moves logits by about a millionth of the largest.
Where numbers are rounded on the way (a 16- or 8-bit cache, int8 activations) some fall on the other side of a rounding
boundary, and the distributions are compared instead.
"""

import struct

import numpy as np
import pytest
from model_helpers import (
    finish,
    heldout_ids,
    logits,
    mean_kl,
    open_engine,
    relative_difference,
    small_config,
    write_dummy,
)
from quant_writers import write_checkpoint

from qwen_fast import _engine

SAME = 5e-6  # of the largest logit
SIZES = (2, 4)
GREEDY = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}


def tokens(engine, prompt, **changes):
    return finish(engine.submit(list(prompt), **{**GREEDY, **changes}))["token_ids"]


def logits_and_tokens(path, prompt, size, **options):
    with open_engine(path, tensor_parallel_size=size, **options) as engine:
        info = engine.info()
        assert info["tensor_parallel_size"] == size
        assert info["description"].startswith(f"{size} x CPU, " if size > 1 else "CPU, ")
        return logits(engine, prompt), tokens(engine, prompt[: len(prompt) // 2])


def prompt_for(config, length=70):
    return np.random.default_rng(3).integers(0, config["vocab_size"], length).tolist()


def check_sizes(path, prompt, sizes, same=SAME, **options):
    alone, alone_tokens = logits_and_tokens(path, prompt, 1, **options)
    for size in sizes:
        ours, our_tokens = logits_and_tokens(path, prompt, size, **options)
        difference = relative_difference(alone, ours)
        print(f"{size} ranks: {np.abs(alone - ours).max():.1e}, {difference:.1e} of the largest logit")
        assert difference < same
        assert our_tokens == alone_tokens


# --- the demo model ----------------------------------------------------------------------------------------------


def test_demo(demo):
    ids = heldout_ids(demo, 120)
    alone, _ = logits_and_tokens(demo, ids, 1)
    for size in (2, 3, 4, 6):  # 6 query heads on 2 kv heads, o_proj cut inside groups
        ours, _ = logits_and_tokens(demo, ids, size)
        assert np.abs(alone - ours).max() < 1e-4
    check_sizes(demo, ids, (2, 4, 6))


def test_demo_with_rounding_on_the_way(demo):
    """The options that a user gets: int8 activations and a bfloat16 cache. Tokens may part at a near-tie, no sooner."""
    ids = heldout_ids(demo, 120)
    options = {"dtype": "auto", "activation_dtype": "auto", "kv_cache_dtype": "auto"}
    with open_engine(demo, **options) as engine:
        alone = logits(engine, ids)
        alone_tokens = tokens(engine, ids[:40])
        steps = logits(engine, ids[:40] + alone_tokens, 39, 39 + len(alone_tokens))
    for size in SIZES:
        ours, our_tokens = logits_and_tokens(demo, ids, size, **options)
        assert mean_kl(alone, ours) < 1e-4
        with open_engine(demo, tensor_parallel_size=size, **options) as engine:
            our_tokens = tokens(engine, ids[:40])
        parted = [i for i, (a, b) in enumerate(zip(alone_tokens, our_tokens, strict=True)) if a != b]
        if parted:
            row = steps[parted[0]]
            assert row[alone_tokens[parted[0]]] - row[our_tokens[parted[0]]] < 0.5


# --- shapes ------------------------------------------------------------------------------------------------------


def shape(heads, kv_heads, head_dim, **changes):
    return {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **changes,
    }


UNTIED = {"tie_word_embeddings": False}

SHAPES = {
    "14-heads-2-kv": (shape(14, 2, 16), (2, 3, 4, 7, 14)),  # shares of 4, 3, 4, 3 heads over 4 ranks
    "6-heads-1-kv": (shape(6, 1, 32, **UNTIED), (2, 4, 5)),
    "9-heads-3-kv": (shape(9, 3, 32), (2, 3, 4)),
    "odd-intermediate": (shape(4, 2, 32, intermediate_size=333, **UNTIED), (2, 3, 4)),
    "odd-vocabulary": (shape(4, 4, 32, vocab_size=331), (2, 3, 4)),
    "small-vocabulary": (shape(4, 2, 32, vocab_size=67, **UNTIED), (4,)),
    "sliding-window": (
        shape(4, 2, 32, use_sliding_window=True, sliding_window=24, max_window_layers=1, num_hidden_layers=3),
        (2, 4),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, tmp_path):
    changes, sizes = SHAPES[name]
    config = small_config(**changes)
    write_checkpoint(tmp_path, config, "bf16", seed=5)
    check_sizes(tmp_path, prompt_for(config), sizes)


def test_eight_ranks_of_a_model_like_7b(tmp_path):
    """28 heads on 4 kv heads (each on two ranks, with 4 and 3 query heads), 148 groups of the MLP, scaled down."""
    changes = shape(28, 4, 8, intermediate_size=148 * 8, vocab_size=1188, **UNTIED)
    config = small_config(**changes)
    write_dummy(tmp_path / "model", **changes)
    for options in ({}, {"quantization": "w4", "activation_dtype": "float32"}):
        check_sizes(tmp_path / "model", prompt_for(config), (2, 4, 8), load_format="dummy", **options)


# --- formats -----------------------------------------------------------------------------------------------------

FORMATS = {
    "fp32": ("fp32", {}),
    "fp16-shards": ("fp16", {"shards": 3}),
    "awq": ("awq", {"group_size": 32}),
    "awq-128": ("awq", {"group_size": 128, "tie": False}),
    "gptq4": ("gptq", {"group_size": 32, "sym": False}),
    "gptq4-biases": ("gptq", {"group_size": 64, "zero_biases": True}),
    "gptq8": ("gptq", {"bits": 8, "group_size": 64}),
    "gptq-act-order": ("gptq", {"group_size": 32, "desc_act": True}),
    "gptq-channel": ("gptq", {"group_size": -1}),
    "ct4": ("compressed-tensors", {"group_size": 32, "sym": False}),
    "ct8": ("compressed-tensors", {"bits": 8, "group_size": 128}),
    "ct-act-order": ("compressed-tensors", {"group_size": 64, "desc_act": True}),
    "ct-channel": ("compressed-tensors", {"group_size": -1}),
    "ct-mixed": ("compressed-tensors", {"dense_modules": ("model.layers.0.mlp.down_proj",)}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, tmp_path):
    """6 heads of 32: o_proj (192 columns) and down_proj (416) are cut inside groups by some size."""
    fmt, options = FORMATS[name]
    config = small_config(**shape(6, 2, 32, intermediate_size=416))
    write_checkpoint(tmp_path, config, fmt, seed=9, **options)
    check_sizes(tmp_path, prompt_for(config), (2, 4, 6))


# 12 heads of 22, and a few features between: ranks' columns of o_proj and down_proj begin and end inside words of the file,
# inside groups, and in pieces that no kernel packs.
AWKWARD = {
    "awq": ("awq", {"group_size": 32}, 8),
    "gptq4": ("gptq", {"group_size": 32, "sym": False}, 8),
    "gptq4-act-order": ("gptq", {"group_size": 32, "desc_act": True}, 40),
    "gptq8": ("gptq", {"bits": 8, "group_size": 64}, 4),
    "ct4": ("compressed-tensors", {"group_size": 128, "sym": False}, 7),
    "ct8": ("compressed-tensors", {"bits": 8, "group_size": 32}, 7),
    "w4": ("bf16", {}, 24),
}


def awkward_model(path, name, **changes):
    """Writes it; returns its config and the options that it wants."""
    fmt, options, features = AWKWARD[name]
    config = small_config(**{**shape(12, 12, 22, intermediate_size=features), **changes})
    write_checkpoint(path, config, fmt, seed=12, **options)
    return config, {"quantization": "w4"} if name == "w4" else {}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_cuts(name, tmp_path):
    config, options = awkward_model(tmp_path, name)
    check_sizes(tmp_path, prompt_for(config), (2, 3, 4), **options)
    with open_engine(tmp_path, tensor_parallel_size=4, **options) as engine:  # 3 heads: 66 columns
        assert "parts of linears in 32 bits: cut inside groups" in engine.info()["description"]


@pytest.mark.parametrize("head", ["model", "int8", "int4"])
def test_weights_rounded_while_loading(head, tmp_path):
    """Groups that a cut splits are rounded as on one rank: the weights are the same."""
    config = small_config(**shape(6, 2, 32, intermediate_size=416), tie_word_embeddings=head == "model")
    write_checkpoint(tmp_path, config, "bf16", seed=4)
    for group in (32, 128):
        options = {"quantization": "w4", "quantization_group_size": group, "lm_head_dtype": head}
        check_sizes(tmp_path, prompt_for(config), (2, 4, 6), **options)


CACHES = {name: {"kv_cache_dtype": name} for name in ("bfloat16", "fp8_e4m3", "int8", "int4", "nf4")}
CACHES["int4-window"] = {"kv_cache_dtype": "int4", "kv_cache_16bit_window": 32, "kv_cache_16bit_layers": (0, 5)}


@pytest.mark.parametrize("name", CACHES)
def test_rounded_kv_caches(name, demo):
    ids = heldout_ids(demo, 120)
    alone, _ = logits_and_tokens(demo, ids, 1, **CACHES[name])
    for size in SIZES:
        ours, _ = logits_and_tokens(demo, ids, size, **CACHES[name])
        divergence = mean_kl(alone, ours)
        print(f"{size} ranks: mean KL {divergence:.1e}")
        assert divergence < 1e-5


# --- what runs beside it -----------------------------------------------------------------------------------------


def requests_for(vocab_size):
    rng = np.random.default_rng(8)
    shared = rng.integers(0, vocab_size, 100).tolist()
    lengths = (1, 17, 64, 100, 40, 90, 130)
    return [(shared + rng.integers(0, vocab_size, 40).tolist())[: length + i] for i, length in enumerate(lengths)]


def bits(output):
    return output["token_ids"], [
        [(token, struct.pack("<d", logprob), rank) for token, logprob, rank in row] for row in output["logprobs"]
    ]


SAMPLED = {"max_tokens": 20, "temperature": 0.8, "top_p": 0.95, "ignore_eos": True, "logprobs": 2}


def run_together(engine, prompts):
    started = [engine.submit(prompt, seed=i, **SAMPLED) for i, prompt in enumerate(prompts)]
    return [bits(finish(request)) for request in started]


@pytest.mark.parametrize("size", SIZES)
def test_same_bits_whatever_runs_beside(size, tmp_path):
    """Alone, together, in small chunks, from the prefix cache, preempted, with other threads and two steps in flight."""
    config = small_config(**shape(6, 2, 32, intermediate_size=416))
    write_checkpoint(tmp_path, config, "gptq", seed=2)
    prompts = requests_for(config["vocab_size"])
    options = {"dtype": "bfloat16", "activation_dtype": "int8", "kv_cache_dtype": "auto", "block_size": 16}
    options["tensor_parallel_size"] = size
    with open_engine(tmp_path, enable_prefix_caching=False, num_threads=1, **options) as engine:
        alone = [bits(finish(engine.submit(prompt, seed=i, **SAMPLED))) for i, prompt in enumerate(prompts)]
    with open_engine(tmp_path, num_threads=5, max_steps_in_flight=2, **options) as engine:
        assert run_together(engine, prompts) == alone
        assert run_together(engine, prompts) == alone
        assert engine.stats()["prefix_hit_tokens"] > 0
    tight = {"max_num_batched_tokens": 24, "kv_cache_tokens": 256, "max_model_len": 256, "max_num_seqs": 8}
    with open_engine(tmp_path, **{**options, **tight}) as engine:
        assert run_together(engine, prompts) == alone
        assert engine.stats()["num_preemptions"] > 0


def test_logprobs_and_masks(tmp_path):
    """What is read from the logits of all ranks: log-probabilities, of prompts too, and allowed tokens."""
    config = small_config(**shape(4, 2, 32, vocab_size=331))
    write_checkpoint(tmp_path, config, "fp32", seed=6)
    prompt = prompt_for(config, 30)
    allowed = [2, 100, 210, 330]
    found = []
    for size in (1, 3):
        with open_engine(tmp_path, tensor_parallel_size=size) as engine:
            output = finish(engine.submit(prompt, **GREEDY, logprobs=4, prompt_logprobs=2))
            masked = tokens(engine, prompt, allowed_token_ids=allowed)
            found.append((output, masked))
    (one, one_masked), (three, three_masked) = found
    assert one_masked == three_masked and set(three_masked) <= set(allowed)
    assert one["token_ids"] == three["token_ids"]
    for rows in ("logprobs", "prompt_logprobs"):
        for a, b in zip(one[rows], three[rows], strict=True):
            assert (a is None) == (b is None)
            for (token, logprob, rank), (our_token, our_logprob, our_rank) in zip(a or (), b or (), strict=True):
                assert (token, rank) == (our_token, our_rank)
                assert abs(logprob - our_logprob) < 1e-4


# --- options and memory ------------------------------------------------------------------------------------------


def test_more_ranks_than_heads(demo):
    with pytest.raises(ValueError, match="tensor_parallel_size is 7; the model has only 6 attention heads"):
        _engine.Engine(str(demo), device="cpu", tensor_parallel_size=7)
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        _engine.Engine(str(demo), device="cpu", tensor_parallel_size=0)


def test_comm_and_watchdog_are_checked(demo):
    for options, message in (
        ({"tensor_parallel_comm": "nccl"}, "device is cpu, tensor_parallel_size 1"),
        ({"tensor_parallel_comm": "peer", "tensor_parallel_size": 2}, "device is cpu, tensor_parallel_size 2"),
        ({"tensor_parallel_comm": "mpi", "tensor_parallel_size": 2}, "tensor_parallel_comm must be"),
        ({"watchdog_seconds": 1e6}, "watchdog_seconds must be at most 86400"),
        ({"watchdog_seconds": float("nan")}, "watchdog_seconds must be"),
    ):
        with pytest.raises(ValueError, match=message):
            _engine.Engine(str(demo), device="cpu", **options)
    with open_engine(demo, tensor_parallel_size=2, watchdog_seconds=0.0) as engine:
        assert len(tokens(engine, [1, 2, 3])) == 24


def test_layers_alone_are_whole(demo):
    with pytest.raises(NotImplementedError, match="tensor_parallel_size=2 for layers alone: only 1, as a tap"):
        _engine.Layers(str(demo), device="cpu", tensor_parallel_size=2)


def test_memory_is_the_sum_of_the_ranks(demo):
    """What one machine needs for all of them: weights as before, and the replicated keys and values."""
    options = {"device": "cpu", "kv_cache_tokens": 1024, "num_threads": 2}
    one, two, four = (_engine.estimate(str(demo), tensor_parallel_size=size, **options) for size in (1, 2, 4))
    assert two["embedding_bytes"] == four["embedding_bytes"] == one["embedding_bytes"]
    assert one["layers_bytes"] <= two["layers_bytes"] < 1.1 * one["layers_bytes"]
    assert two["kv_block_bytes"] == one["kv_block_bytes"]  # 2 kv heads over 2 ranks
    assert four["kv_block_bytes"] == 2 * one["kv_block_bytes"]
    with open_engine(demo, tensor_parallel_size=4, **options) as engine:
        memory = engine.stats()["memory"]
        assert memory["num_blocks"] == one["num_blocks"]
        assert memory["kv_cache_bytes"] == memory["num_blocks"] * memory["kv_block_bytes"]
        tokens(engine, [1, 2, 3])
        usage = engine.stats()["meter"]["total"]
        assert usage["weight_bytes"] > 0 and usage["kv_write_bytes"] > 0


@pytest.mark.parametrize("kv", ["bfloat16", "int4"])
def test_meter_counts_what_every_rank_holds(demo, kv):
    """2 kv heads over 4 ranks: each is there twice."""
    written = []
    for size in (1, 2, 4):
        with open_engine(
            demo, device="cpu", tensor_parallel_size=size, kv_cache_dtype=kv, kv_cache_tokens=1024
        ) as engine:
            tokens(engine, [1, 2, 3])
            written.append(engine.stats()["meter"]["total"]["kv_write_bytes"])
    assert written[0] > 0 and written == [written[0], written[0], 2 * written[0]]
