"""The C sampler against the model of sampler_model.py: same masks, same candidates and, given the same random words, the
same token."""

import ctypes
import os
import pathlib
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sampler_model import acceptable, edit, philox

CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"
SOURCES = "base/status base/alloc sample/params sample/philox sample/state sample/select sample/sampler".split()
i32, u32, f32, ptr = ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_void_p


class Params(ctypes.Structure):
    _fields_ = [
        ("temperature", f32), ("top_k", i32), ("top_p", f32), ("min_p", f32), ("repetition_penalty", f32),
        ("presence_penalty", f32), ("frequency_penalty", f32), ("seed", ctypes.c_uint64), ("sample_index", u32),
        ("min_tokens", i32), ("num_logprobs", i32), ("logit_bias", ptr), ("num_logit_bias", i32),
        ("allowed_token_ids", ptr), ("num_allowed_token_ids", i32), ("bad_words", ptr), ("num_bad_words", i32),
        ("stop_token_ids", ptr), ("num_stop_token_ids", i32),
    ]  # fmt: skip


class Bias(ctypes.Structure):
    _fields_ = [("token_id", i32), ("bias", f32)]


class BadWords(ctypes.Structure):
    _fields_ = [("token_ids", ptr), ("length", i32)]


class Logprob(ctypes.Structure):
    _fields_ = [("token_id", i32), ("rank", i32), ("logprob", f32)]


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        assert os.environ.get("CI") != "true", "no C compiler"
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("sampler") / "sampler.so"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-ffp-contract=off", "-fPIC", "-shared", f"-I{CSRC}"]
    subprocess.run([*compiler, *flags, *(str(CSRC / f"{s}.c") for s in SOURCES), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.qf_sampling_params_init.argtypes = [ptr]
    library.qf_sampler_create.argtypes = [i32, ptr, ptr]
    library.qf_sample_state_create.argtypes = [ptr, ptr, i32, i32, i32, i32, ptr, ptr]
    library.qf_sample.argtypes = [ptr, ptr, ptr, ptr, ptr, ptr]
    library.qf_logprobs.argtypes = [ptr, ptr, i32, i32, ptr]
    library.qf_sampler_destroy.argtypes = library.qf_sample_state_destroy.argtypes = [ptr]
    library.qf_sampler_destroy.restype = library.qf_sample_state_destroy.restype = None
    return library


def ints(values):
    return np.asarray(values, np.int32)


@st.composite
def cases(draw):
    size = draw(st.sampled_from([1, 2, 3, 17, 64, 118, 1000, 4099]))
    real = draw(st.integers(max(1, size - 70), size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = (rng.standard_normal(size) * draw(st.sampled_from([0.0, 0.01, 1, 4, 30]))).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)  # many ties
    if draw(st.booleans()):
        logits[rng.random(size) < 0.3] = -np.inf
    token = st.integers(0, size - 1)
    tokens = st.lists(token, max_size=6)
    return {
        "logits": logits,
        "real": real,
        "temperature": draw(st.sampled_from([0.0, 0.001, 0.3, 0.7, 1.0, 1.5, 50.0])),
        "top_k": draw(st.sampled_from([-1, 0, 1, 2, 5, 20, 100, 5000])),
        "top_p": draw(st.sampled_from([1e-4, 0.1, 0.5, 0.8, 0.95, 0.9999, 1.0, 1.0])),
        "min_p": draw(st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.7, 1.0])),
        "repetition": draw(st.sampled_from([1.0, 1.0, 1.1, 2.0, 0.5])),
        "presence": draw(st.sampled_from([0.0, 0.5, -1.0])),
        "frequency": draw(st.sampled_from([0.0, 0.25, -0.5])),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "sample_index": draw(st.integers(0, 2**32 - 1)),
        "min_tokens": draw(st.integers(0, 3)),
        "bias": draw(st.dictionaries(token, st.floats(-100, 100, width=32), max_size=4)),
        "allowed": draw(st.one_of(st.just([]), st.lists(token, min_size=1, max_size=30))),
        "bad_words": draw(st.lists(st.lists(token, min_size=1, max_size=3), max_size=4)),
        "stop": draw(tokens),
        "prompt": draw(tokens),
        "bitmask": (rng.random(size) < 0.6) if draw(st.booleans()) else None,
    }


def c_params(lib, case):
    """The struct, and everything that it borrows."""
    params = Params()
    lib.qf_sampling_params_init(ctypes.byref(params))
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "sample_index", "min_tokens"):
        setattr(params, name, case[name])
    for name in ("repetition", "presence", "frequency"):
        setattr(params, f"{name}_penalty", case[name])
    bias = (Bias * len(case["bias"]))(*(Bias(*item) for item in case["bias"].items()))
    allowed, stop = ints(case["allowed"]), ints(case["stop"])
    words = [ints(w) for w in case["bad_words"]]
    bad_words = (BadWords * len(words))(*(BadWords(w.ctypes.data, len(w)) for w in words))
    params.logit_bias, params.num_logit_bias = ctypes.addressof(bias), len(bias)
    if len(allowed):
        params.allowed_token_ids, params.num_allowed_token_ids = allowed.ctypes.data, len(allowed)
    params.bad_words, params.num_bad_words = ctypes.addressof(bad_words), len(words)
    params.stop_token_ids, params.num_stop_token_ids = stop.ctypes.data, len(stop)
    return params, (bias, allowed, stop, words, bad_words)


def test_philox_known_answer():
    assert philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_tokens_match_the_model(lib, case):
    size = len(case["logits"])
    params, _alive = c_params(lib, case)
    prompt = ints(case["prompt"])
    sampler, state, error = ptr(), ptr(), ctypes.create_string_buffer(1024)
    assert lib.qf_sampler_create(size, ctypes.byref(sampler), error) == 0
    assert 0 == lib.qf_sample_state_create(
        ctypes.byref(params), prompt.ctypes.data, len(prompt), 8, size, case["real"], ctypes.byref(state), error
    )
    bitmask = None
    if case["bitmask"] is not None:
        padded = np.zeros((size + 31) // 32 * 32, np.uint8)
        padded[:size] = case["bitmask"]
        bitmask = np.packbits(padded, bitorder="little")
    output = []
    for position in range(6):
        expected = acceptable(case, edit(case, output), position)
        token = i32(-7)
        mask = bitmask.ctypes.data if bitmask is not None else None
        lib.qf_sample(sampler, state, case["logits"].ctypes.data, mask, ctypes.byref(token), None)
        assert token.value in expected, (position, output)
        if token.value < 0:
            break
        output.append(token.value)
    lib.qf_sample_state_destroy(state)
    lib.qf_sampler_destroy(sampler)


@pytest.mark.parametrize(
    "top_k, top_p, min_p", [(0, 0.5, 0), (0, 0.95, 0), (0, 0.9, 0.05), (300, 1, 0), (3000, 0.7, 0)]
)
@pytest.mark.parametrize("scale", [0.0, 0.02, 1, 5])
def test_many_candidates(lib, top_k, top_p, min_p, scale):
    """Vocabularies and nuclei large enough for every shortcut: thresholds, buckets, the radix sort."""
    size, draws = 20000, 40
    rng = np.random.default_rng(int(scale * 100) + top_k)
    case = {"logits": (rng.standard_normal(size) * scale).astype(np.float32), "real": size, "temperature": 1.0}
    case |= {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": 5, "sample_index": 1, "min_tokens": 0}
    case |= {"repetition": 1, "presence": 0, "frequency": 0, "bias": {}, "allowed": [], "bad_words": [], "stop": []}
    params, _alive = c_params(lib, case)
    sampler, state, error, token = ptr(), ptr(), ctypes.create_string_buffer(1024), i32()
    assert lib.qf_sampler_create(size, ctypes.byref(sampler), error) == 0
    assert 0 == lib.qf_sample_state_create(ctypes.byref(params), None, 0, draws, size, size, ctypes.byref(state), error)
    for position in range(draws):
        lib.qf_sample(sampler, state, case["logits"].ctypes.data, None, ctypes.byref(token), None)
        assert token.value in acceptable(case, case["logits"], position), position
    lib.qf_sample_state_destroy(state)
    lib.qf_sampler_destroy(sampler)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(size=st.sampled_from([1, 2, 17, 64, 1025, 5000]), scale=st.sampled_from([0, 0.1, 3, 60]), ties=st.booleans(),
       seed=st.integers(0, 2**32 - 1), target=st.integers(0, 4999), num_top=st.integers(0, 64))  # fmt: skip
def test_logprobs_match_log_softmax(lib, size, scale, ties, seed, target, num_top):
    logits = (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)
    logits = np.round(logits) if ties else logits
    target, num_top = target % size, min(num_top, size)
    wide = logits.astype(np.float64)
    expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    order = np.lexsort((np.arange(size), -logits))
    sampler, error = ptr(), ctypes.create_string_buffer(1024)
    assert lib.qf_sampler_create(size, ctypes.byref(sampler), error) == 0
    out = (Logprob * (1 + num_top))()
    lib.qf_logprobs(sampler, logits.ctypes.data, target, num_top, out)
    lib.qf_sampler_destroy(sampler)
    ranks = np.empty(size, np.int64)
    ranks[order] = np.arange(1, size + 1)
    assert [(e.token_id, e.rank) for e in out] == [(t, ranks[t]) for t in [target, *order[:num_top]]]
    np.testing.assert_allclose([e.logprob for e in out], expected[[e.token_id for e in out]], rtol=3e-7, atol=3e-7)
