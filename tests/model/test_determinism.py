"""The same request gives the same tokens and the same log-probabilities, bit for bit, whatever runs beside it.

One reference per instruction-set path and number format: every request alone, in an engine with one thread and no
prefix cache, the whole prompt in one step. Then the same requests under every other circumstance. Comparison is of
floats by their bits. On a GPU this is what batch_invariant=True promises.
"""

import random
import struct

import pytest
from model_helpers import finish, open_engine, place_pairs, write_dummy

FORMATS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16", "kv_cache_dtype": "auto"},
    "w4a8": {
        "quantization": "w4",
        "dtype": "bfloat16",
        "activation_dtype": "int8",
        "lm_head_dtype": "int8",
        "kv_cache_dtype": "auto",
    },
    "w4-float-activations": {
        "quantization": "w4",
        "dtype": "bfloat16",
        "lm_head_dtype": "int4",
        "kv_cache_dtype": "auto",
    },
    "fp8-cache": {"kv_cache_dtype": "fp8_e4m3", "kv_cache_16bit_layers": [1]},
    "int4-cache": {"dtype": "bfloat16", "kv_cache_dtype": "int4"},
    "int4-window": {"dtype": "bfloat16", "kv_cache_dtype": "int4", "kv_cache_16bit_window": 17},
    "int8-window": {"kv_cache_dtype": "int8", "kv_cache_16bit_window": 70},
}

QUICK = ("float32", "w4a8")
LONG = ("fp8-cache", "int8-window")
CPU_ONLY = ("w4a8", "fp8-cache", "int4-cache", "int4-window", "int8-window")

VOCAB = 320


def make_requests():
    """Short and long prompts, shared prefixes, greedy and seeded sampling, penalties."""
    rng = random.Random(5)
    shared = [rng.randrange(VOCAB) for _ in range(150)]
    requests = []
    for i, length in enumerate((1, 2, 17, 33, 64, 95, 130, 150, 200, 130)):
        tail = [rng.randrange(VOCAB) for _ in range(length)]
        prompt = (shared + tail)[:length] if i % 2 == 0 else tail
        options = {"max_tokens": 40 if length < 100 else 24, "ignore_eos": True, "logprobs": 3}
        if i % 3 == 0:
            options.update(temperature=0.0)
        elif i % 3 == 1:
            options.update(temperature=0.9, top_p=0.9, top_k=40, seed=1000 + i)
        else:
            options.update(temperature=1.3, min_p=0.02, seed=i, repetition_penalty=1.1, frequency_penalty=0.3)
        requests.append((prompt, options))
    return requests


REQUESTS = make_requests()
ALL = range(len(REQUESTS))


def bits(output):
    """Tokens and log-probabilities in a form that compares the floats by their bits."""
    return output["token_ids"], [
        [(token, struct.pack("<d", logprob), rank) for token, logprob, rank in row] for row in output["logprobs"]
    ]


def run_alone(engine, indices=ALL):
    return {i: bits(finish(engine.submit(REQUESTS[i][0], **REQUESTS[i][1]))) for i in indices}


def run_together(engine, indices=ALL):
    handles = [(i, engine.submit(REQUESTS[i][0], **REQUESTS[i][1])) for i in indices]
    return {i: bits(finish(handle)) for i, handle in handles}


@pytest.fixture(scope="module")
def number_format(request):
    return FORMATS[request.param]


def pytest_generate_tests(metafunc):
    """Paths by formats. The plain C path is slow, so it runs two of the formats by default and all under `long`."""
    if "start" in metafunc.fixturenames:
        pairs = place_pairs(
            FORMATS,
            long=lambda place, name: name in LONG or (place == "scalar" and name not in QUICK),
            left_out=lambda place, name: place == "cuda" and name in CPU_ONLY,
        )
        metafunc.parametrize("on, number_format", pairs, indirect=["number_format"], scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """GQA of 3; two and a half groups of 128 in down_proj, one and a half in the others."""
    path = tmp_path_factory.mktemp("dummy")
    shape = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 320}
    return write_dummy(path, **shape, num_hidden_layers=2, vocab_size=VOCAB, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def start(model, on, number_format):
    """Opens an engine of this path and format."""

    def start(**options):
        settings = {**number_format, "load_format": "dummy", "kv_cache_tokens": 4096, "batch_invariant": True}
        return open_engine(model, **{**settings, **on, **options})

    return start


@pytest.fixture(scope="module")
def reference(start):
    with start(num_threads=1, enable_prefix_caching=False, max_num_batched_tokens=2048) as engine:
        result = run_alone(engine)
    chosen = {tuple(tokens) for tokens, _ in result.values()}
    assert len(chosen) == len(REQUESTS)  # requests differ, so a mix-up between them would show
    return result


def test_repeated(start, reference):
    with start() as engine:
        assert run_alone(engine) == reference


def test_mixed_batch(start, reference):
    with start() as engine:
        assert run_together(engine) == reference


def test_prefix_hit(start, reference):
    with start() as engine:
        assert run_together(engine) == reference
        cold = engine.stats()["prefix_hit_tokens"]
        assert run_together(engine) == reference
        # A hit is shortened by 17 - 1 or 70 - 1 tokens for each of the two layers.
        hits = 0 if engine.info()["kv_cache_16bit_window"] == 70 else 400
        assert engine.stats()["prefix_hit_tokens"] > cold + hits


@pytest.mark.parametrize("max_num_batched_tokens", [1, 7, 64])
def test_chunked_prefill(start, reference, max_num_batched_tokens):
    with start(max_num_batched_tokens=max_num_batched_tokens) as engine:
        assert run_together(engine) == reference


def test_preemption(start, reference):
    with start(kv_cache_tokens=256, max_model_len=256, enable_prefix_caching=False) as engine:
        assert run_together(engine) == reference
        assert engine.stats()["num_preemptions"] > 0


def test_preemption_with_prefix_cache_and_chunks(start, reference):
    with start(kv_cache_tokens=256, max_model_len=256, max_num_batched_tokens=48, block_size=16) as engine:
        for _ in range(2):
            assert run_together(engine) == reference
        assert engine.stats()["num_preemptions"] > 0


@pytest.mark.parametrize("num_threads", [2, 4])
def test_threads(start, reference, num_threads):
    with start(num_threads=num_threads) as engine:
        assert run_together(engine) == reference


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_block_size(start, reference, block_size):
    with start(block_size=block_size) as engine:
        assert run_together(engine) == reference


@pytest.mark.parametrize("steps", [1, 2])
def test_steps_in_flight(start, reference, steps):
    with start(max_steps_in_flight=steps) as engine:
        assert run_together(engine) == reference


def test_order_of_arrival_and_cancelled_neighbours(start, reference):
    rng = random.Random(9)
    with start(max_num_seqs=3) as engine:
        for _ in range(2):
            order = list(range(len(REQUESTS)))
            rng.shuffle(order)
            handles = []
            for i in order:
                doomed = engine.submit([i + 1] * rng.randrange(1, 90), max_tokens=200, ignore_eos=True)
                handles.append((i, engine.submit(REQUESTS[i][0], **REQUESTS[i][1], priority=rng.randrange(3))))
                doomed.cancel()
            assert {i: bits(finish(handle)) for i, handle in handles} == reference


def test_the_comparison_sees_another_seed(start, reference):
    """The control: another seed, or another model, is not the same."""
    with start(dummy_seed=1) as engine:
        assert run_alone(engine, [0, 7]) != {i: reference[i] for i in (0, 7)}
    prompt, options = REQUESTS[7]
    with start() as engine:
        assert bits(finish(engine.submit(prompt, **{**options, "seed": 31}))) != reference[7]
