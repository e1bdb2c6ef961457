"""Low-bit KV caches on a GPU: against the CPU's, against 16 bits, and against themselves under every circumstance.

The CPU's cache of the same format is the reference: same codes from nearly the same keys and values, the bias of k_proj
added as exactly. What remains between the two is the GPU's 16-bit arithmetic, which a bf16 cache has as well.
"""

import numpy as np
import pytest
from model_helpers import (
    _engine,
    finish,
    heldout_ids,
    log_softmax,
    logits,
    mean_kl,
    open_engine,
    random_weights,
    small_config,
    write_dense,
    write_dummy,
)
from test_determinism import bits
from test_gpu import CUDA, INVARIANT, LAZY, OPTIONS, PROMPTS, SLACK, free_bytes, run_alone

pytestmark = pytest.mark.gpu

EIGHT, FOUR = ("fp8_e4m3", "int8"), ("int4", "nf4")
FORMATS = EIGHT + FOUR
CPU = {"dtype": "float32", "activation_dtype": "float32"}
ROW_BYTES = {"fp8_e4m3": (1, 2), "int8": (1, 2), "int4": (0.5, 1 / 16), "nf4": (0.5, 1 / 16)}


def low(format, **options):
    return {"kv_cache_dtype": format, **options}


def prompt_logits(model, ids, **options):
    with open_engine(model, **{"enable_prefix_caching": False, **options}) as engine:
        return logits(engine, ids)


# -- the same numbers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(demo):
    """The demo's held-out text, and its logits on the CPU over a float32 cache."""
    ids = heldout_ids(demo, 700)
    return ids, prompt_logits(demo, ids, **CPU)


@pytest.mark.parametrize("format", FORMATS)
def test_logits_are_the_cpus(demo, held_out, format):
    """The GPU's arithmetic costs no more over a low-bit cache than over a 16-bit one, and a flipped code here and there."""
    ids, exact = held_out
    cpu = prompt_logits(demo, ids, **{**CPU, **low(format)})
    gpu = prompt_logits(demo, ids, **{**CUDA, **low(format)})
    plain = prompt_logits(demo, ids, **CUDA)
    cost, apart, arithmetic = mean_kl(exact, cpu), mean_kl(cpu, gpu), mean_kl(exact, plain)
    ours = mean_kl(exact, gpu)
    print(f"{format}: CPU {cost:.2e} from float32, GPU {ours:.2e}; {apart:.2e} apart; 16-bit cache {arithmetic:.2e}")
    assert apart < 2 * arithmetic + 0.5 * cost + 1e-4
    assert ours < 2 * arithmetic + 1.3 * cost + 1e-4


@pytest.mark.parametrize("format", FORMATS)
def test_greedy_tokens_are_the_cpus(demo, format):
    """Until the two best tokens are nearly equal: there either may come."""
    prompts = [PROMPTS[1], PROMPTS[3], heldout_ids(demo, 200)]
    request = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True, "logprobs": 2}
    outputs = []
    for options in ({**CPU, **low(format)}, {**CUDA, **low(format)}):
        with open_engine(demo, **options) as engine:
            outputs.append([finish(engine.submit(prompt, **request)) for prompt in prompts])
    agreed = 0
    for cpu, gpu in zip(*outputs, strict=True):
        for i, (ours, theirs) in enumerate(zip(gpu["token_ids"], cpu["token_ids"], strict=True)):
            if ours != theirs:
                best = sorted((logprob for _, logprob, _ in cpu["logprobs"][i]), reverse=True)
                assert best[0] - best[1] < (0.2 if format in EIGHT else 0.6), (format, i)
                break
            agreed += 1
    assert agreed >= 12


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(14, 2, 64), (7, 1, 128)])
@pytest.mark.parametrize("norm", [2.0, 600.0])
def test_stressed_biases(tmp_path, format, heads, kv_heads, head_dim, norm):
    """Biases of Qwen2.5-7B's size: 8 bits stay as near to float32 as a 16-bit cache is. A cache that took the bias into its
    codes would be nowhere near (tests of the CPU show it)."""
    config = small_config(hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads)
    write_dense(tmp_path, config, random_weights(config, 11, k_bias_norm=norm))
    ids = [(31 * i + 7 * (i // 5)) % 300 for i in range(400)]
    exact = prompt_logits(tmp_path, ids, **CPU)
    cpu = prompt_logits(tmp_path, ids, **{**CPU, **low(format)})
    gpu = prompt_logits(tmp_path, ids, **{**CUDA, **low(format)})
    plain = prompt_logits(tmp_path, ids, **CUDA)
    cost, ours, arithmetic = mean_kl(exact, cpu), mean_kl(exact, gpu), mean_kl(exact, plain)
    print(f"{format}, norm {norm:g}: CPU {cost:.2e}, GPU {ours:.2e}, GPU with 16 bits {arithmetic:.2e}")
    assert ours < 1.5 * arithmetic + 1.5 * cost + 1e-4


def test_yarn(tmp_path):
    """The attention factor counts once in queries and once in keys, biases too."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config = small_config(hidden_size=896, num_attention_heads=7, num_key_value_heads=1, rope_scaling=scaling)
    write_dense(tmp_path, config, random_weights(config, 12, k_bias_norm=30.0))
    ids = [(31 * i + 7 * (i // 5)) % 300 for i in range(300)]
    exact = prompt_logits(tmp_path, ids, **CPU)
    plain, ours = (prompt_logits(tmp_path, ids, **{**CUDA, **low(kv)}) for kv in ("auto", "int8"))
    assert mean_kl(exact, ours) < 2 * mean_kl(exact, plain) + 1e-3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(14, 2, 64), (7, 1, 128)])
def test_decode_agrees_with_prefill(tmp_path, format, heads, kv_heads, head_dim):
    """Log-probabilities of tokens as they were generated, and of the same tokens as a prompt. 16-bit sums in another order
    flip a code here and there: the finer the codes, the less it shows."""
    largest = {"int8": 0.15, "fp8_e4m3": 0.4, "int4": 0.8, "nf4": 0.8}[format]
    shape = {"hidden_size": heads * head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = small_config(**shape, max_position_embeddings=1024)
    write_dense(tmp_path, config, random_weights(config, 5, k_bias_norm=40.0))
    with open_engine(tmp_path, **{**CUDA, **low(format)}, quantization="w4") as engine:
        for length in (3, 250, 900):
            prompt = [(37 * i) % 300 for i in range(length)]
            output = finish(engine.submit(prompt, **{**OPTIONS, "max_tokens": 40}))
            whole = prompt + output["token_ids"]
            engine.reset_prefix_cache()
            rows = log_softmax(logits(engine, whole, length - 1, len(whole) - 1))
            decoded = np.array([row[0][1] for row in output["logprobs"]])
            apart = np.abs(decoded - rows[np.arange(40), output["token_ids"]])
            print(f"{format} after {length}: largest {apart.max():.3f}, mean {apart.mean():.4f}")
            assert apart.max() < largest and apart.mean() < largest / 4, length


def test_decode_in_batches(tmp_path):
    """1 to 64 sequences that decode together: log-probabilities beside neighbours are near those alone."""
    model = write_dummy(tmp_path, hidden_size=896, num_attention_heads=14, num_key_value_heads=2)
    prompts = [[(7 * i + 3 * j) % 300 for j in range(1 + 5 * i % 160)] for i in range(64)]
    request = {"max_tokens": 8, "temperature": 0.0, "logprobs": 3, "ignore_eos": True}
    options = {**CUDA, **low("int4"), "load_format": "dummy", "quantization": "w4", "kv_cache_tokens": 32768}
    with open_engine(model, **options) as engine:
        alone = [finish(engine.submit(prompt, **request)) for prompt in prompts]
        for batch in (2, 3, 8, 17, 64):
            engine.reset_prefix_cache()
            together = [engine.submit(prompt, **request) for prompt in prompts[:batch]]
            for one, reference in zip(together, alone):
                ours, theirs = finish(one)["logprobs"][0], reference["logprobs"][0]
                ours = {token: logprob for token, logprob, _ in ours}
                both = [(ours[token], logprob) for token, logprob, _ in theirs if token in ours]
                assert len(both) >= 3
                np.testing.assert_allclose(*zip(*both), atol=0.3)


# -- the same bits -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(demo):
    """With a 16-bit cache."""
    with open_engine(demo, **INVARIANT) as engine:
        return run_alone(engine)


@pytest.fixture(scope="module", params=[low("int4"), low("fp8_e4m3"), low("int4", kv_cache_16bit_window=40)])
def cache(request):
    return request.param


@pytest.fixture(scope="module")
def reference(demo, cache):
    with open_engine(demo, **{**INVARIANT, **cache}, enable_prefix_caching=False) as engine:
        return run_alone(engine)


def test_two_runs(demo):
    """Without batch_invariant: a request alone has one order of everything, in graphs or not."""
    for format in FORMATS:
        with open_engine(demo, **{**CUDA, **low(format)}) as engine:
            expected = run_alone(engine)
            engine.reset_prefix_cache()
            assert run_alone(engine) == expected, format
        with open_engine(demo, **{**CUDA, **low(format)}, enforce_eager=True) as engine:
            assert run_alone(engine) == expected, format


@pytest.mark.parametrize(
    "circumstances",
    [
        {},
        {"enforce_eager": True},
        {"max_num_batched_tokens": 48},
        {"kv_cache_tokens": 512, "max_model_len": 512, "enable_prefix_caching": False},
        {"kv_cache_tokens": 512, "max_model_len": 512, "max_num_batched_tokens": 40, "block_size": 16},
        {"block_size": 128},
        {"cpu_offload_gb": 64.0},
    ],
    ids=str,
)
def test_invariance(demo, cache, reference, circumstances):
    """Alone and together, with and without prefix hits, in chunks, after preemption."""
    with open_engine(demo, **{**INVARIANT, **cache, **circumstances}) as engine:
        for _ in range(2):
            requests = [engine.submit(prompt, **OPTIONS) for prompt in PROMPTS * 3]
            assert [bits(finish(one)) for one in requests] == reference * 3
        assert run_alone(engine) == reference
        stats = engine.stats()
        if "kv_cache_tokens" in circumstances:
            assert stats["num_preemptions"] > 0
        elif "kv_cache_16bit_window" not in cache:
            assert stats["prefix_hit_tokens"] > 0


def test_all_layers_in_16_bits(demo, plain):
    """Nothing is left of the low-bit cache then, and nothing shows."""
    layers = list(range(8))
    with open_engine(demo, **{**INVARIANT, **low("int4", kv_cache_16bit_layers=layers)}) as engine:
        assert run_alone(engine) == plain


def test_a_window_over_everything(demo, held_out):
    """Every position is read in 16 bits, by the low-bit kernels. The bias joins the sums elsewhere: another rounding here
    and there."""
    ids = held_out[0]
    rows = [prompt_logits(demo, ids, **{**CUDA, **low(kv)}) for kv in ("auto", "int4")]
    window = prompt_logits(demo, ids, **{**CUDA, **low("int4", kv_cache_16bit_window=2048)})
    assert mean_kl(rows[0], window) < 0.02 * mean_kl(rows[0], rows[1])


# -- memory and messages -----------------------------------------------------------------------------------------


def test_16_bits_help(tmp_path):
    """One of two layers, or the newest half of the positions, in 16 bits."""
    config = small_config(hidden_size=896, num_attention_heads=14, num_key_value_heads=2)
    write_dense(tmp_path, config, random_weights(config, 11))
    ids = [(31 * i + 7 * (i // 5)) % 300 for i in range(400)]
    exact, costs = prompt_logits(tmp_path, ids, **CPU), {}
    for name, more in (
        ("int4", {}),
        ("layers", {"kv_cache_16bit_layers": [0]}),
        ("window", {"kv_cache_16bit_window": 200}),
    ):
        costs[name] = mean_kl(exact, prompt_logits(tmp_path, ids, **{**CUDA, **low("int4", **more)}))
    print(costs)
    assert costs["layers"] < 0.5 * costs["int4"] and costs["window"] < 0.7 * costs["int4"]


@pytest.mark.parametrize("more", [{}, {"kv_cache_16bit_layers": [0, 7]}, {"kv_cache_16bit_window": 64}], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_the_plan_is_what_is_allocated(demo, format, more):
    options = {**CUDA, **low(format, **more), "kv_cache_tokens": 1 << 19, "num_threads": 2, "max_model_len": 4096}
    planned = _engine.estimate(str(demo), **options)
    before = free_bytes()[0]
    with open_engine(demo, **options) as engine:
        memory, info = engine.stats()["memory"], engine.info()
        taken = before - free_bytes()[0]
    names = ("embedding", "layers", "head", "workspace", "kv_cache")
    assert [memory[f"{name}_bytes"] for name in names] == [planned[f"{name}_bytes"] for name in names]
    total = sum(memory[f"{name}_bytes"] for name in names)
    assert total <= taken + SLACK
    assert taken <= total + LAZY
    data, scales = ROW_BYTES[format]
    row = info["head_dim"] * (data + scales) if format in FOUR else info["head_dim"] * data + scales
    rows = 2 * info["num_kv_heads"] * memory["block_size"]
    in_16 = len(more.get("kv_cache_16bit_layers", ()))
    expected = rows * ((info["num_layers"] - in_16) * row + in_16 * 2 * info["head_dim"])
    assert memory["kv_block_bytes"] == expected
    assert (memory["kv_window_bytes"] > 0) == ("kv_cache_16bit_window" in more)
    assert f"KV cache {format}" in info["description"]
    assert info["kv_cache_dtype"] == format


def test_refusals(demo):
    options = {**CUDA, **low("int4"), "dtype": "float32", "quantization": "auto"}
    with pytest.raises(NotImplementedError, match="float32"), open_engine(demo, **options):
        pass
