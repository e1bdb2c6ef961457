"""Sampling in a running engine, on the CPU and on a GPU, against the model of ../sampler_model.py: every token is one
that the model would draw from the engine's own logits, whatever runs beside it.

The logits of the output's positions are asked for afterwards, as those of a prompt: the same bits, since the engines are
batch invariant.
"""

import numpy as np
import pytest
from model_helpers import DEFAULTS, _engine, finish, log_softmax, logits, write_dummy
from sampler_model import acceptable, edit

VOCAB, REAL = 1000, 990
NEW_TOKENS = 12

PLAIN = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0, "presence": 0.0, "frequency": 0.0,
    "seed": 1, "sample_index": 0, "min_tokens": 0, "bias": {}, "allowed": [], "bad_words": [], "stop": [], "bitmask": None,
}  # fmt: skip

CASES = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 0.2},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 5},
    "top-k of one": {"top_k": 1},
    "top-k of all": {"top_k": 5000},
    "top-p": {"top_p": 0.7},
    "top-p, flat": {"top_p": 0.95, "temperature": 2.5},
    "min-p": {"min_p": 0.1},
    "all filters": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    "repetition": {"repetition": 1.5},
    "repetition, greedy": {"repetition": 1.5, "temperature": 0.0},
    "presence and frequency": {"presence": 1.0, "frequency": 0.7, "temperature": 0.5},
    "negative penalties": {"presence": -0.5, "frequency": -0.5},
    "bias": {"bias": {3: 5.0, 4: -100.0, 999: 100.0}, "temperature": 0.8},
    "bias, greedy": {"bias": {42: 100.0}, "temperature": 0.0},
    "allowed": {"allowed": [5, 17, 300, 301, 302, 995]},
    "allowed, greedy": {"allowed": [5, 17, 300], "temperature": 0.0},
    "bad words": {"bad_words": [[11], [12, 13], [500]], "temperature": 0.0},
    "min tokens": {"min_tokens": 6, "stop": [8], "temperature": 2.0},
    "everything": {
        "temperature": 0.9, "top_k": 60, "top_p": 0.92, "min_p": 0.01, "repetition": 1.1, "presence": 0.2, "frequency": 0.1,
        "bias": {1: 2.0}, "bad_words": [[20]], "seed": 2**64 - 1, "sample_index": 3,
    },
}  # fmt: skip


def case_of(name):
    return {**PLAIN, "seed": 1000 + len(name), **CASES[name], "prompt": prompt_of(name), "real": REAL}


def prompt_of(name):
    rng = np.random.default_rng(sum(map(ord, name)))
    return rng.integers(0, REAL, 10 + len(name)).tolist()


def options_of(case):
    same = ("temperature", "top_k", "top_p", "min_p", "seed", "sample_index", "min_tokens", "bad_words")
    return {
        **{key: case[key] for key in same},
        **{f"{key}_penalty": case[key] for key in ("repetition", "presence", "frequency")},
        "logit_bias": case["bias"] or None,
        "allowed_token_ids": case["allowed"] or None,
        "stop_token_ids": case["stop"],
        "max_tokens": NEW_TOKENS,
        "logprobs": 4,
    }


@pytest.fixture(scope="module")
def engine(tmp_path_factory, device):
    """On the CPU in float32, on a GPU its fast path."""
    model = write_dummy(tmp_path_factory.mktemp("sampling"), vocab_size=VOCAB)
    options = {"device": device, "load_format": "dummy", "batch_invariant": True}
    if device == "cuda":
        options |= {"dtype": "bfloat16", "activation_dtype": "auto", "kv_cache_dtype": "auto"}
    engine = _engine.Engine(str(model), **{**DEFAULTS, **options})
    engine.set_vocabulary([b"<%d>" % i for i in range(REAL)], [])  # ids from REAL on are padding rows
    yield engine
    engine.close()


def check_tokens(engine, case, output):
    """Each token may follow those before it, and its logprobs are those of the raw logits."""
    tokens = output["token_ids"]
    rows = logits(engine, case["prompt"] + tokens, len(case["prompt"]) - 1, len(case["prompt"]) + len(tokens) - 1)
    for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        expected = acceptable(case, edit({**case, "logits": row}, tokens[:i]), i)
        assert token in expected, (i, token, expected)
    for row, token, reported in zip(log_softmax(rows), tokens, output["logprobs"], strict=True):
        order = np.lexsort((np.arange(len(row)), -row))
        assert [entry[0] for entry in reported] == [token, *order[:4]]
        np.testing.assert_allclose([entry[1] for entry in reported], row[[token, *order[:4]]], atol=2e-5, rtol=1e-5)
        assert [entry[2] for entry in reported] == [int(np.where(order == token)[0][0]) + 1, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def alone(engine):
    """name -> the output of the case's request alone."""
    return {name: finish(engine.submit(prompt_of(name), **options_of(case_of(name)))) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_tokens(engine, alone, name):
    check_tokens(engine, case_of(name), alone[name])


def test_together(engine, alone):
    """All at once, twice: greedy rows beside sampled ones, penalties beside none."""
    for _ in range(2):
        requests = {name: engine.submit(prompt_of(name), **options_of(case_of(name))) for name in CASES}
        for name, request in requests.items():
            output = finish(request)
            assert (output["token_ids"], output["logprobs"]) == (alone[name]["token_ids"], alone[name]["logprobs"]), (
                name
            )


def test_stop_token(engine):
    """min_tokens holds the stop token back, and then it ends the output."""
    options = {"bias": {8: 100.0}, "stop": [8], "temperature": 0.0}
    for min_tokens in (0, 5):
        case = {**PLAIN, **options, "min_tokens": min_tokens, "prompt": [1, 2, 3], "real": REAL}
        output = finish(engine.submit(case["prompt"], **options_of(case)))
        assert output["token_ids"][-1] == 8 and len(output["token_ids"]) == min_tokens + 1
        assert (output["finish_reason"], output["stop_reason"]) == ("stop", 8)
        check_tokens(engine, case, output)


def test_prompt_logprobs(engine):
    prompt = prompt_of("prompt logprobs")
    output = finish(engine.submit(prompt, max_tokens=1, prompt_logprobs=3))
    rows = log_softmax(logits(engine, prompt))
    assert output["prompt_logprobs"][0] is None
    for row, token, reported in zip(rows, prompt[1:], output["prompt_logprobs"][1:]):
        order = np.lexsort((np.arange(len(row)), -row))
        assert [entry[0] for entry in reported] == [token, *order[:3]]
        np.testing.assert_allclose([entry[1] for entry in reported], row[[token, *order[:3]]], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guided(engine, temperature):
    """A mask for each position; a request that waits for its mask holds nobody up."""
    rng = np.random.default_rng(3)
    case = {**PLAIN, "temperature": temperature, "seed": 5, "prompt": [4, 5, 6], "real": REAL}
    request = engine.submit(case["prompt"], **options_of(case), guided=True, ignore_eos=True)
    masks, tokens = [], []
    while True:
        output = request.read(timeout=60)
        assert output is not None
        tokens += output["token_ids"]
        if output["finished"]:
            break
        if output["mask_position"] >= 0:
            assert output["mask_position"] == len(masks)
            free = finish(engine.submit([1, 2], max_tokens=2, temperature=0.0, ignore_eos=True))
            assert len(free["token_ids"]) == 2
            allowed = rng.random(VOCAB) < 0.05
            allowed[17] = True
            masks.append(allowed)
            padded = np.zeros((VOCAB + 31) // 32 * 32, np.uint8)
            padded[:VOCAB] = allowed
            request.set_mask(output["mask_position"], np.packbits(padded, bitorder="little").view(np.uint32))
    assert output["error"] is None and len(tokens) == len(masks) == NEW_TOKENS
    rows = logits(engine, case["prompt"] + tokens, len(case["prompt"]) - 1, len(case["prompt"]) + len(tokens) - 1)
    for i, row in enumerate(rows):
        assert masks[i][tokens[i]]
        assert tokens[i] in acceptable(case, edit({**case, "logits": row, "bitmask": masks[i]}, tokens[:i]), i)


def test_seeds(engine):
    """The same seed and index give the same tokens, others give others."""
    prompt = [9, 8, 7]
    base = {"max_tokens": 16, "temperature": 1.5, "ignore_eos": True}

    def draw(**options):
        return finish(engine.submit(prompt, **base, **options))["token_ids"]

    assert draw(seed=1) == draw(seed=1)
    assert len({tuple(draw(seed=seed, sample_index=index)) for seed in (1, 2, 2**63) for index in (0, 1)}) == 6
