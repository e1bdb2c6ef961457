"""One model over several GPUs: what one GPU gives, within what another order of sums moves; the same bits from run to run.

In float32 sums over ranks move logits by a few millionths of the largest. With 16-bit operands a value may fall on the
other side of a rounding boundary: distributions are compared, and greedy tokens may part only at a near-tie.
"""

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
from test_tensor_parallel import FORMATS, SHAPES, bits, prompt_for, requests_for, shape, tokens

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
@pytest.mark.parametrize("options", [{}, {"quantization": "w4"}], ids=["bf16", "w4"])
def test_made_up_weights(options, size, tmp_path):
    """Each rank makes up its part of the same model; 14 heads on 2 kv heads, as 0.5B has."""
    model = write_dummy(tmp_path / "model", **shape(14, 2, 64, intermediate_size=19 * 256, vocab_size=2000))
    prompt = prompt_for({"vocab_size": 2000})
    check_float32(model, prompt, size, load_format="dummy")
    check_fast(model, prompt, size, load_format="dummy", limit=1e-2, **options)


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


# --- options ----------------------------------------------------------------------------------------------------------


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
