"""One model over several GPUs: what one GPU gives, within what another order of sums moves; the same bits from run to run.

In float32 sums over ranks move logits by a few millionths of the largest. With 16-bit operands a value may fall on the
other side of a rounding boundary: distributions are compared, and greedy tokens may part only at a near-tie.
"""

import os
import time

import numpy as np
import pytest
from model_helpers import (
    _engine,
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
from test_tensor_parallel import (
    AWKWARD,
    CACHES,
    FORMATS,
    SHAPES,
    awkward_model,
    bits,
    prompt_for,
    requests_for,
    shape,
    tokens,
)

from qwen_fast.loading import find_nccl

AUTO = dict.fromkeys(("dtype", "activation_dtype", "kv_cache_dtype", "lm_head_dtype"), "auto")
FLOAT32 = {"device": "cuda"}
FAST = {"device": "cuda", **AUTO}
SAME = 2e-5  # of the largest logit
NEAR_TIE = 0.5  # a difference of logits at which tokens may part
SAMPLED = {"max_tokens": 20, "temperature": 0.8, "top_p": 0.95, "ignore_eos": True, "logprobs": 2}

SIZES = [
    pytest.param(2, marks=pytest.mark.gpu2),
    pytest.param(3, marks=pytest.mark.gpu4),
    pytest.param(4, marks=pytest.mark.gpu4),
]
every_size = pytest.mark.parametrize("size", SIZES)


def logits_and_tokens(path, prompt, size, **options):
    with open_engine(path, tensor_parallel_size=size, **options) as engine:
        assert engine.info()["tensor_parallel_size"] == size
        return logits(engine, prompt), tokens(engine, prompt[: len(prompt) // 2])


def check_float32(path, prompt, size, **options):
    alone, alone_tokens = logits_and_tokens(path, prompt, 1, **FLOAT32, **options)
    ours, our_tokens = logits_and_tokens(path, prompt, size, **FLOAT32, **options)
    difference = relative_difference(alone, ours)
    print(f"{size} ranks: {difference:.1e} of the largest logit")
    assert difference < SAME
    assert our_tokens == alone_tokens


def check_fast(path, prompt, size, limit=1e-3, **options):
    """Distributions, and greedy tokens up to the first near-tie."""
    half = len(prompt) // 2
    with open_engine(path, **FAST, **options) as engine:
        alone = logits(engine, prompt)
        alone_tokens = tokens(engine, prompt[:half])
        steps = logits(engine, prompt[:half] + alone_tokens, half - 1, half - 1 + len(alone_tokens))
    ours, our_tokens = logits_and_tokens(path, prompt, size, **FAST, **options)
    divergence = mean_kl(alone, ours)
    parted = [i for i, (a, b) in enumerate(zip(alone_tokens, our_tokens, strict=True)) if a != b]
    print(f"{size} ranks: mean KL {divergence:.1e}, tokens part at {parted[:1] or 'no place'}")
    assert divergence < limit
    if parted:
        row = steps[parted[0]]
        assert row[alone_tokens[parted[0]]] - row[our_tokens[parted[0]]] < NEAR_TIE


# --- models and formats ---------------------------------------------------------------------------------------------


@every_size
def test_demo(demo, size):
    ids = heldout_ids(demo, 120)
    check_float32(demo, ids, size)
    check_fast(demo, ids, size)


@every_size
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, size, tmp_path):
    changes, _ = SHAPES[name]
    if size > changes["num_attention_heads"]:
        pytest.skip("fewer heads than ranks")
    config = small_config(**changes)
    write_checkpoint(tmp_path, config, "bf16", seed=5)
    check_float32(tmp_path, prompt_for(config), size)


@every_size
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, size, tmp_path):
    """6 heads of 32 in float32, 6 of 64 in 16 bits: o_proj and down_proj are cut inside groups by some size."""
    fmt, options = FORMATS[name]
    for folder, head_dim, check in (("float32", 32, check_float32), ("fast", 64, check_fast)):
        config = small_config(**shape(6, 2, head_dim, intermediate_size=416))
        write_checkpoint(tmp_path / folder, config, fmt, seed=9, **options)
        check(tmp_path / folder, prompt_for(config), size)


@every_size
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_cuts(name, size, tmp_path):
    """Columns that begin and end inside words of the file and inside groups: never refused, and what becomes of them is told.
    Heads of 64 leave that to down_proj."""
    config, options = awkward_model(tmp_path / "float32", name)
    if name != "w4":
        check_float32(tmp_path / "float32", prompt_for(config), size)
    fewer = shape(4, 4, 64, intermediate_size=config["intermediate_size"], tie_word_embeddings=False)
    config, options = awkward_model(tmp_path / "fast", name, **fewer)
    check_fast(tmp_path / "fast", prompt_for(config), size, **options)
    with open_engine(tmp_path / "fast", tensor_parallel_size=size, **FAST, **options) as engine:
        description = engine.info()["description"]
        print(description)
        told = "parts of linears in 16 bits: cut inside groups" in description
        assert told == (name in ("w4", "gptq4-act-order"))


@every_size
@pytest.mark.parametrize("group", [32, 128])
def test_weights_rounded_while_loading(group, size, tmp_path):
    """As 0.5B has it: o_proj's heads of 64 are cut inside groups of 128, which are rounded whole: the weights are the same."""
    config = small_config(**shape(14, 2, 64, intermediate_size=19 * 128), tie_word_embeddings=False)
    write_checkpoint(tmp_path, config, "bf16", seed=4)
    rounded = {"quantization": "w4", "quantization_group_size": group}
    check_fast(tmp_path, prompt_for(config), size, **rounded)
    with open_engine(tmp_path, tensor_parallel_size=size, **FAST, **rounded) as engine:
        assert "cut inside groups" not in engine.info()["description"]


@every_size
@pytest.mark.parametrize("options", [{}, {"quantization": "w4"}], ids=["bf16", "w4"])
def test_made_up_weights(options, size, tmp_path):
    """Each rank makes up its part of the same model; 14 heads on 2 kv heads, as 0.5B has."""
    model = write_dummy(tmp_path / "model", **shape(14, 2, 64, intermediate_size=19 * 256, vocab_size=2000))
    prompt = prompt_for({"vocab_size": 2000})
    check_float32(model, prompt, size, load_format="dummy")
    check_fast(model, prompt, size, load_format="dummy", limit=1e-2, **options)


# --- caches and memory -------------------------------------------------------------------------------------------------


@every_size
@pytest.mark.parametrize("name", CACHES)
def test_rounded_kv_caches(name, size, demo):
    """Apart by what rounding to the cache's format costs, and no more: codes flip where arithmetic differs."""
    ids = heldout_ids(demo, 300)
    rows = []
    for ranks, cache in ((1, {}), (1, CACHES[name]), (size, CACHES[name])):
        with open_engine(demo, tensor_parallel_size=ranks, **{**FAST, **cache}) as engine:
            rows.append(logits(engine, ids))
            if ranks == size:
                prompts = [ids[:50], ids[100:217], ids[3:4]]
                first = run_together(engine, prompts)
                assert [len(token_ids) for token_ids, _ in first] == [SAMPLED["max_tokens"]] * 3
    plain, alone, ours = rows
    cost, apart = mean_kl(plain, alone), mean_kl(alone, ours)
    print(f"{name} over {size} ranks: mean KL {apart:.1e}; the cache costs {cost:.1e}")
    assert apart < 1e-3 + 0.5 * cost


OFFLOADS = {
    "embeddings": {"cpu_offload": "embeddings"},
    "layers": {"cpu_offload_gb": 0.002},
    "all": {"cpu_offload": "embeddings", "cpu_offload_gb": 64.0},
}


@every_size
def test_offload(demo, size):
    """Weights in the host's memory: not a bit changes."""
    options = {**FAST, "batch_invariant": True, "lm_head_dtype": "int8", "tensor_parallel_size": size}
    prompts = requests_for(8000)
    with open_engine(demo, **options) as engine:
        expected = run_together(engine, prompts)
        whole = engine.stats()["memory"]
    for name, offload in OFFLOADS.items():
        with open_engine(demo, **options, **offload) as engine:
            assert run_together(engine, prompts) == expected, name
            memory = engine.stats()["memory"]
            assert memory["embedding_bytes"] + memory["layers_bytes"] < whole["embedding_bytes"] + whole["layers_bytes"]


# --- one kernel a decode step -----------------------------------------------------------------------------------------


SPLITTABLE = shape(24, 12, 64, intermediate_size=3072, vocab_size=3000, num_hidden_layers=3)  # by 2, 3 and 4


@every_size
def test_decode_in_one_kernel(size, tmp_path):
    """A sequence alone takes the decode kernel on all ranks; steps with others, before and after, take graphs of kernels."""
    model = write_dummy(tmp_path / "model", **SPLITTABLE)
    options = {"load_format": "dummy", "quantization": "w4"}
    prompt = prompt_for({"vocab_size": 3000})
    check_fast(model, prompt, size, limit=1e-2, **options)
    greedy = {"temperature": 0.0, "ignore_eos": True}
    found = []
    for _ in range(2):
        with open_engine(model, tensor_parallel_size=size, enable_prefix_caching=False, **FAST, **options) as engine:
            assert "decode in one kernel" in engine.info()["description"]
            alone = finish(engine.submit(prompt, max_tokens=100, **greedy))["token_ids"]
            together = [engine.submit(prompt[i:], max_tokens=30, **greedy) for i in range(5)]
            for request in together:
                finish(request)
            assert finish(engine.submit(prompt, max_tokens=100, **greedy))["token_ids"] == alone
            found.append(alone)
    assert found[0] == found[1]


@every_size
@pytest.mark.parametrize(
    "change",
    [{"quantization": None}, {"batch_invariant": True}, {"enforce_eager": True}, {"heads": (14, 2)}],
    ids=lambda change: next(iter(change)),
)
def test_not_in_one_kernel(change, size, tmp_path):
    """Ranks agree on it, whatever keeps one of them from it: 14 heads of 64 are cut inside a group of o_proj's columns."""
    model = write_dummy(tmp_path / "model", **{**SPLITTABLE, **shape(*change.get("heads", (24, 12)), 64)})
    options = {"load_format": "dummy", **FAST, "quantization": "w4", **change}
    options = {name: value for name, value in options.items() if name != "heads" and value is not None}
    with open_engine(model, tensor_parallel_size=size, **options) as engine:
        assert "decode in one kernel" not in engine.info()["description"]
        assert len(tokens(engine, prompt_for({"vocab_size": 3000}))) == 24


# --- what runs beside it --------------------------------------------------------------------------------------------


def run_together(engine, prompts):
    started = [engine.submit(prompt, seed=i, **SAMPLED) for i, prompt in enumerate(prompts)]
    return [bits(finish(request)) for request in started]


@every_size
def test_the_same_bits_twice(demo, size):
    """Of requests alone, run by run and engine by engine; together with batch_invariant, whatever the batch is."""
    prompts = requests_for(8000)
    found = []
    for _ in range(2):
        with open_engine(demo, tensor_parallel_size=size, **FAST) as engine:
            alone = [bits(finish(engine.submit(prompt, seed=i, **SAMPLED))) for i, prompt in enumerate(prompts)]
            found.append(alone)
    assert found[0] == found[1]
    invariant = {**FAST, "batch_invariant": True, "tensor_parallel_size": size}
    with open_engine(demo, enable_prefix_caching=False, **invariant) as engine:
        alone = [bits(finish(engine.submit(prompt, seed=i, **SAMPLED))) for i, prompt in enumerate(prompts)]
        assert run_together(engine, prompts) == alone
        assert run_together(engine, prompts) == alone
    with open_engine(demo, **{**invariant, "max_num_batched_tokens": 32, "enforce_eager": True}) as engine:
        assert run_together(engine, prompts) == alone


@every_size
@pytest.mark.parametrize("cache", [{}, {"kv_cache_dtype": "int4", "kv_cache_16bit_window": 32}], ids=["bf16", "int4"])
def test_prefix_cache_and_preemption(demo, size, cache):
    """The same bits from the prefix cache, in small chunks, and computed again after a preemption."""
    prompts = requests_for(8000)
    options = {**FAST, "batch_invariant": True, "tensor_parallel_size": size, "block_size": 16, **cache}
    with open_engine(demo, enable_prefix_caching=False, **options) as engine:
        alone = [bits(finish(engine.submit(prompt, seed=i, **SAMPLED))) for i, prompt in enumerate(prompts)]
    with open_engine(demo, **options) as engine:
        for _ in range(2):
            assert run_together(engine, prompts) == alone
        assert engine.stats()["prefix_hit_tokens"] > 0 or cache  # the window is longer than these prompts
    tight = {"max_num_batched_tokens": 24, "kv_cache_tokens": 256, "max_model_len": 256, "max_num_seqs": 8}
    with open_engine(demo, **{**options, **tight}) as engine:
        assert run_together(engine, prompts) == alone
        assert engine.stats()["num_preemptions"] > 0


@every_size
def test_batches_larger_than_one_exchange(demo, size):
    """Prefill in two shots, cut into launches; then 64 sequences at once, with every kind of sampling."""
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 8000, length).tolist() for length in rng.integers(1, 90, 64)]
    options = {**FAST, "kv_cache_tokens": 16384, "max_num_seqs": 64, "batch_invariant": True}
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.9, "repetition_penalty": 1.2},
        {"temperature": 0.7, "bad_words": [[5, 6]]},  # sampled on the host
        {"temperature": 0.0, "allowed_token_ids": [3, 500, 7000], "logprobs": 3},
    ]
    long_prompt = rng.integers(0, 8000, 1500).tolist()
    answers, ends = [], []
    for ranks in (1, size):
        with open_engine(demo, tensor_parallel_size=ranks, **options) as engine:
            ends.append(logits(engine, long_prompt, 1490, 1500))
            started = [
                engine.submit(prompt, max_tokens=12, ignore_eos=True, seed=i, **kinds[i % 4])
                for i, prompt in enumerate(prompts)
            ]
            answers.append([finish(request)["token_ids"] for request in started])
    same = sum(a == b for a, b in zip(*answers, strict=True))
    print(f"mean KL {mean_kl(*ends):.1e}; {same} of {len(prompts)} answers agree")
    assert mean_kl(*ends) < 1e-3
    assert same >= 0.8 * len(prompts)  # sampled tokens part where a threshold is crossed


@every_size
def test_cancels(demo, size):
    """Requests come and go for a while; those that stay get what they get alone."""
    options = {**FAST, "batch_invariant": True, "tensor_parallel_size": size, "max_num_seqs": 16}
    prompt = list(range(1, 60))
    with open_engine(demo, enable_prefix_caching=False, **options) as engine:
        expected = finish(engine.submit(prompt, max_tokens=40, temperature=0.0, ignore_eos=True))["token_ids"]
        rng = np.random.default_rng(1)
        begin = time.monotonic()
        while time.monotonic() - begin < 5:
            stays = engine.submit(prompt, max_tokens=40, temperature=0.0, ignore_eos=True)
            others = [
                engine.submit(rng.integers(0, 8000, int(length)).tolist(), max_tokens=200, ignore_eos=True)
                for length in rng.integers(1, 100, 12)
            ]
            time.sleep(float(rng.uniform(0, 0.02)))
            for other in others:
                other.cancel()
            assert finish(stays)["token_ids"] == expected
        deadline = time.monotonic() + 5  # the last ones may have been given up a moment ago
        while engine.stats()["num_free_blocks"] != engine.info()["num_blocks"] and time.monotonic() < deadline:
            time.sleep(0.01)
        stats = engine.stats()
        assert not stats["failed"] and stats["num_finished_abort"] > 0
        assert stats["num_free_blocks"] == engine.info()["num_blocks"]


# --- NCCL -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nccl(monkeypatch):
    """Options of an engine whose GPUs use NCCL though they reach each other's memory."""
    monkeypatch.setitem(os.environ, "NCCL_NVLS_ENABLE", "0")  # multicast stays off
    path = find_nccl()
    if path is None:
        pytest.skip("NCCL's package is not there")
    return {"tensor_parallel_comm": "nccl", "nccl_library": path}


@every_size
def test_nccl(demo, size, nccl):
    """Sums in NCCL's order: near enough, in graphs and without; a first request of one token, which is captured at once."""
    ids = heldout_ids(demo, 120)
    with open_engine(demo, **FAST) as engine:
        alone, one_token = logits(engine, ids), tokens(engine, ids[:1])
    for options in ({}, {"enforce_eager": True}):
        with open_engine(demo, tensor_parallel_size=size, **{**FAST, **nccl, **options}) as engine:
            assert "ranks over NCCL 2." in engine.info()["description"]
            ours_one_token = tokens(engine, ids[:1])
            ours = logits(engine, ids)
            together = [run_together(engine, requests_for(8000)) for _ in range(2)]
        same = sum(a == b for a, b in zip(one_token, ours_one_token, strict=True))
        print(f"{size} ranks, {options}: mean KL {mean_kl(alone, ours):.1e}; {same} of {len(one_token)} tokens")
        assert mean_kl(alone, ours) < 1e-3
        assert all(len(a[0]) == len(b[0]) for a, b in zip(*together, strict=True))
    with open_engine(demo, **FLOAT32) as engine:
        alone = logits(engine, ids)
    with open_engine(demo, tensor_parallel_size=size, **FLOAT32, **nccl) as engine:
        assert relative_difference(alone, logits(engine, ids)) < SAME


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu2
def test_comm_is_chosen(demo):
    with open_engine(demo, tensor_parallel_size=2, tensor_parallel_comm="peer", **FAST) as engine:
        assert "ranks over peer memory" in engine.info()["description"]
    with pytest.raises(
        ValueError, match=r'tensor_parallel_comm="nccl" is for .* device is cuda, tensor_parallel_size 1'
    ):
        _engine.Engine(str(demo), device="cuda", tensor_parallel_comm="nccl")


@pytest.mark.gpu2
def test_more_gpus_than_there_are(demo):
    count = len(_engine.device_info())
    with pytest.raises((ValueError, _engine.EngineError), match=f"cuda:{count}"):
        _engine.Engine(str(demo), device=f"cuda:{count - 1}", tensor_parallel_size=2)


@every_size
def test_memory_is_each_devices_own(demo, size):
    """What is planned for a device is what is free less of it afterwards, but for the driver's own."""
    before = [gpu["free_bytes"] for gpu in _engine.device_info()]
    with open_engine(demo, tensor_parallel_size=size, **FAST) as engine:
        finish(engine.submit([1, 2, 3], max_tokens=4, ignore_eos=True))
        after = [gpu["free_bytes"] for gpu in _engine.device_info()]
        memory = engine.stats()["memory"]
    print(memory, [b - a for b, a in zip(before, after, strict=True)])
    assert all(b > a for b, a in zip(before[:size], after[:size], strict=True))
