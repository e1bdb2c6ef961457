"""The module qwen_fast._engine: arguments, lifetimes, threads, signals, exit."""

from __future__ import annotations

import array
import ast
import contextlib
import functools
import gc
import importlib.util
import inspect
import math
import os
import pathlib
import select
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc

import pytest

from qwen_fast import _engine

VOCAB_SIZE = 512
PROMPT = [1, 2, 3]
I32 = 2**31
NAN, INF = math.nan, math.inf
OPTIONS = {"load_format": "dummy", "device": "cpu", "kv_cache_tokens": 2048, "num_threads": 1}


@pytest.fixture(scope="module")
def model_dir(tiny_config):
    return str(tiny_config())


@pytest.fixture(scope="module")
def shared_engine(model_dir):
    """One engine for the tests that only have it refuse something."""
    engine = _engine.Engine(model_dir, **OPTIONS)
    yield engine
    assert engine.stats()["num_running"] == engine.stats()["num_waiting"] == 0
    engine.close()


@pytest.fixture
def engine(model_dir):
    engine = _engine.Engine(model_dir, **OPTIONS)
    yield engine
    engine.close()


def read_all(request, timeout=60.0):
    """All tokens, and the last output."""
    tokens = []
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        output = request.read(timeout)
        assert output is not None, "nothing to read in time"
        tokens += output["token_ids"]
        if output["finished"]:
            return tokens, output
    raise AssertionError("the request did not end in time")


def run_python(code, *arguments, timeout=60):
    """Runs code in a fresh interpreter that imports this package."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


# --- arguments ------------------------------------------------------------------------------------------------

INT32_OPTIONS = [
    "quantization_group_size", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
    "tensor_parallel_size", "num_threads", "kv_cache_16bit_window", "max_steps_in_flight", "max_waiting_requests",
]  # fmt: skip
STRING_OPTIONS = [
    "load_format", "device", "dtype", "activation_dtype", "quantization", "lm_head_dtype", "kv_cache_dtype", "isa",
    "hf_overrides", "cpu_offload",
]  # fmt: skip
UINT64_OPTIONS = ["kv_cache_memory", "memory_bytes", "dummy_seed"]
DOUBLE_OPTIONS = ["memory_utilization", "cpu_offload_gb"]
BOOL_OPTIONS = ["enable_prefix_caching", "batch_invariant", "enforce_eager", "meter"]
BAD_OPTIONS = [
    *[(name, value, TypeError) for name in INT32_OPTIONS for value in ("1", 1.0, None, [1])],
    *[(name, value, ValueError) for name in INT32_OPTIONS for value in (I32, -I32 - 1, 2**63, 10**5000, -(10**30))],
    *[(name, value, TypeError) for name in STRING_OPTIONS for value in (1, b"auto", ["auto"])],
    *[(name, value, ValueError) for name in STRING_OPTIONS for value in ("au\0to", "\0", "\ud800")],
    *[(name, value, ValueError) for name in UINT64_OPTIONS for value in (-1, 2**64, -(2**70))],
    *[(name, 1.5, TypeError) for name in (*UINT64_OPTIONS, "kv_cache_tokens")],
    ("kv_cache_tokens", 2**63, ValueError),
    *[(name, value, ValueError) for name in DOUBLE_OPTIONS for value in (NAN, INF, -INF, 10**400)],
    *[(name, value, TypeError) for name in DOUBLE_OPTIONS for value in ("0.5", None, [])],
    *[(name, value, TypeError) for name in BOOL_OPTIONS for value in (1, "yes", None)],
    *[("kv_cache_16bit_layers", value, TypeError) for value in (1, "0", [1.5], [None])],
    *[("kv_cache_16bit_layers", value, ValueError) for value in ([I32], [0, -I32 - 1], [2**63], [-1], [10**6])],
    *[("progress", value, TypeError) for value in (1, "print")],
]


def case_ids(cases):
    """Numbered: some values have no short text, and some none at all."""
    return [f"{name}-{number}" for number, (name, *_) in enumerate(cases)]


@pytest.mark.parametrize(("name", "value", "error"), BAD_OPTIONS, ids=case_ids(BAD_OPTIONS))
@pytest.mark.parametrize("function", [_engine.Engine, _engine.estimate], ids=["Engine", "estimate"])
def test_bad_engine_argument(model_dir, function, name, value, error):
    with pytest.raises(error) as caught:
        function(model_dir, **{**OPTIONS, name: value})
    assert isinstance(caught.value, UnicodeEncodeError) or name in str(caught.value)


@pytest.mark.parametrize("function", [_engine.Engine, _engine.estimate], ids=["Engine", "estimate"])
def test_bad_call(model_dir, function):
    for arguments, options, words in [
        ((), {}, "model_dir"),
        ((model_dir, "auto"), {}, "positional"),
        ((model_dir,), {"model_dir": model_dir}, "multiple values"),
        ((model_dir,), {"modle": 1}, "modle"),
        ((1,), {}, "model_dir"),
        ((None,), {}, "model_dir"),
    ]:
        with pytest.raises(TypeError, match=words):
            function(*arguments, **options)
    with pytest.raises(ValueError, match="NUL"):
        function("a\0b")


@pytest.mark.parametrize("function", [_engine.Engine, _engine.estimate], ids=["Engine", "estimate"])
def test_failures_of_the_engine_have_their_exceptions(model_dir, tmp_path, function):
    with pytest.raises(ValueError, match="block_size"):
        function(model_dir, **{**OPTIONS, "block_size": 17})
    with pytest.raises(_engine.ModelError, match=r"config\.json is missing"):
        function(str(tmp_path), **OPTIONS)
    with pytest.raises(OSError, match=r"config\.json"):
        function(str(tmp_path / "nowhere"), **OPTIONS)
    if not any(gpu["usable"] for gpu in _engine.device_info()):
        error = _engine.EngineError if _engine.build_info()["cuda"] else NotImplementedError
        with pytest.raises(error, match="cuda"):
            function(model_dir, **{**OPTIONS, "device": "cuda"})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(_engine.ModelError, match=r"config\.json"):
        function(str(tmp_path), **OPTIONS)


INT32_PARAMETERS = ["max_tokens", "top_k", "min_tokens", "logits_start", "logits_stop", "priority", "max_unread_tokens"]
FLOAT_PARAMETERS = [
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "mask_timeout",
]  # fmt: skip
ID_PARAMETERS = ["prompt_token_ids", "allowed_token_ids", "stop_token_ids", "eos_token_ids"]
BAD_PARAMETERS = [
    *[(name, value, TypeError) for name in INT32_PARAMETERS for value in ("1", 1.5, None)],
    *[(name, value, ValueError) for name in INT32_PARAMETERS for value in (I32, -I32 - 1, 10**5000)],
    *[(name, value, TypeError) for name in FLOAT_PARAMETERS for value in ("1", None, [1.0])],
    *[(name, value, ValueError) for name in FLOAT_PARAMETERS for value in (NAN, INF, -INF, 1e300, 10**400)],
    *[(name, value, ValueError) for name in ("mask_timeout",) for value in (0, -1.0, 2e9)],
    *[(name, value, ValueError) for name in ("logprobs", "prompt_logprobs") for value in (-1, I32)],
    *[(name, value, TypeError) for name in ("logprobs", "prompt_logprobs") for value in (1.0, "1")],
    *[(name, value, ValueError) for name in ("seed", "cache_salt", "tag") for value in (-1, 2**64, -(2**80), 10**5000)],
    *[(name, value, TypeError) for name in ("seed", "cache_salt", "tag") for value in (1.0, "1")],
    *[("sample_index", value, ValueError) for value in (-1, 2**32)],
    *[(name, value, TypeError) for name in ID_PARAMETERS for value in (1, "12", {1, 2}, [1, "2"], [1.0], [None], [[1]])],
    *[(name, value, ValueError) for name in ID_PARAMETERS for value in ([I32], (1, -I32 - 1), [10**5000])],
    *[(name, value, TypeError) for name in ID_PARAMETERS for value in (b"12", array.array("f", [1]), array.array("H"))],
    *[(name, array.array("q", [1, 2**31]), ValueError) for name in ID_PARAMETERS],
    *[("logit_bias", value, TypeError) for value in ([(1, 2.0)], {"1": 1.0}, {1: "1"}, {1.0: 1.0}, {1: None})],
    *[("logit_bias", value, ValueError) for value in ({1: NAN}, {1: INF}, {I32: 1.0}, {1: 1e300})],
    *[("bad_words", value, TypeError) for value in (1, "abc", b"abc", [1], [[1], ["2"]], [[1], 2])],
    ("bad_words", [[1, 2], [3, I32]], ValueError),
    *[("stop", value, TypeError) for value in ("abc", b"abc", 1, None, [b"a"], ["a", 1])],
    *[("stop", value, ValueError) for value in (["a\0b"], ["a", "\0"], ["\ud800"])],
    *[
        (name, value, TypeError)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "guided", "notify")
        for value in (1, "yes", None)
    ],
    *[("leader", value, TypeError) for value in (1, "a", object())],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error"), BAD_PARAMETERS, ids=case_ids(BAD_PARAMETERS))
def test_bad_submit_argument(shared_engine, name, value, error):
    with pytest.raises(error) as caught:
        shared_engine.submit(**{"prompt_token_ids": PROMPT, name: value})
    assert isinstance(caught.value, UnicodeEncodeError) or name in str(caught.value)


def test_refused_arguments_leak_nothing(model_dir, shared_engine):
    def refuse_all():
        for name, value, error in BAD_OPTIONS:
            with contextlib.suppress(error):
                _engine.estimate(model_dir, **{**OPTIONS, name: value})
        for name, value, error in BAD_PARAMETERS:
            with contextlib.suppress(error):
                shared_engine.submit(**{"prompt_token_ids": PROMPT, "stop": ["a"], "bad_words": [[1]], name: value})
        gc.collect()

    rounds = 20
    references = [value for _, value, _ in [*BAD_OPTIONS, *BAD_PARAMETERS] if value is not None]
    refuse_all()
    counts = [sys.getrefcount(value) for value in references]
    tracemalloc.start()
    try:
        refuse_all()
        size = tracemalloc.get_traced_memory()[0]
        for _ in range(rounds):
            refuse_all()
        growth = tracemalloc.get_traced_memory()[0] - size
    finally:
        tracemalloc.stop()
    assert growth < 16 * rounds  # less than one small block a round
    leaked = [
        value for value, count in zip(references, counts, strict=True) if sys.getrefcount(value) - count >= rounds
    ]
    assert leaked == []


def test_bad_submit_call(shared_engine):
    with pytest.raises(TypeError, match="prompt_token_ids"):
        shared_engine.submit()
    with pytest.raises(TypeError, match="max_token"):
        shared_engine.submit(PROMPT, max_token=1)
    with pytest.raises(TypeError, match="positional"):
        shared_engine.submit(PROMPT, 1)
    with pytest.raises(TypeError, match="multiple values"):
        shared_engine.submit(PROMPT, prompt_token_ids=PROMPT)
    with pytest.raises(ValueError, match="prompt"):
        shared_engine.submit([])
    with pytest.raises(ValueError, match=str(VOCAB_SIZE + 7)):
        shared_engine.submit([1, VOCAB_SIZE + 7])
    with pytest.raises(ValueError, match="temperature"):
        shared_engine.submit(PROMPT, temperature=-1.0)
    with pytest.raises(TypeError):
        _engine.Request()


def test_leader_of_another_engine(model_dir, shared_engine):
    other = _engine.Engine(model_dir, **OPTIONS)
    with pytest.raises(ValueError, match="leader"):
        shared_engine.submit(PROMPT, leader=other.submit(PROMPT, max_tokens=1))
    other.close()


@pytest.mark.parametrize(
    "prompt",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        [True, 2, 3],
        array.array("i", [1, 2, 3]),
        array.array("q", [1, 2, 3]),
        memoryview(array.array("i", [1, 9, 2, 9, 3, 9]))[::2],
    ],
    ids=["list", "tuple", "range", "bool", "int32", "int64", "strided"],
)
def test_prompt_kinds(engine, prompt):
    greedy = {"max_tokens": 4, "temperature": 0}
    tokens, output = read_all(engine.submit(prompt, **greedy))
    assert output["num_prompt_tokens"] == 3
    assert tokens == read_all(engine.submit(PROMPT, **greedy))[0]


def test_prompt_of_numpy(engine):
    numpy = pytest.importorskip("numpy")
    for dtype in ("int32", "int64"):
        request = engine.submit(numpy.array(PROMPT, dtype), max_tokens=1)
        assert read_all(request)[1]["num_prompt_tokens"] == 3
    with pytest.raises(TypeError, match="one-dimensional"):
        engine.submit(numpy.zeros((2, 2), "int32"))
    for dtype in ("float32", "uint8", ">i4", "uint64"):
        with pytest.raises(TypeError, match="prompt_token_ids"):
            engine.submit(numpy.array(PROMPT, dtype))


def test_arguments_that_change_while_they_are_read(engine):
    """__index__ runs in the middle of a conversion: what it changes must not be what is being read."""

    class Emptying:
        def __init__(self, target):
            self.target = target

        def __index__(self):
            self.target.clear()
            gc.collect()
            return 1

    prompt = [1, 2]
    prompt[1:] = [Emptying(prompt), *range(1000, 1100)]
    with pytest.raises(ValueError, match="prompt_token_ids"):
        engine.submit([*prompt[:2], I32])
    prompt[:] = [Emptying(prompt), 2, 3]
    assert read_all(engine.submit(prompt, max_tokens=1))[1]["num_prompt_tokens"] == 3
    bias = {}
    bias.update({Emptying(bias): 1.0, 5: 2.0, 6: 3.0})
    read_all(engine.submit(PROMPT, max_tokens=1, logit_bias=bias))
    options = {"max_tokens": 1}
    options["priority"] = Emptying(options)
    read_all(engine.submit(PROMPT, **options))


def test_set_vocabulary_arguments(model_dir):
    engine = _engine.Engine(model_dir, **OPTIONS)
    for tokens, special, error, words in [
        ("ab", [], TypeError, "tokens"),
        (b"ab", [], TypeError, "tokens"),
        (1, [], TypeError, "tokens"),
        ([b"a", "b"], [], TypeError, r"tokens\[1\]"),
        ([b"a"], [1], ValueError, r"special\[0\]"),
        ([b"a"], [-1], ValueError, r"special\[0\]"),
        ([b"a"], ["0"], TypeError, r"special\[0\]"),
        ([b"a"], b"", ValueError, "special"),
        ([b"a"], None, TypeError, "special"),
        ([b"a"] * (VOCAB_SIZE + 1), [], ValueError, str(VOCAB_SIZE)),
    ]:
        with pytest.raises(error, match=words):
            engine.set_vocabulary(tokens, special)
    engine.set_vocabulary([b"a"] * VOCAB_SIZE, [0, 1])
    _, output = read_all(engine.submit(PROMPT, max_tokens=1, allowed_token_ids=[7]))
    assert output["text"] == "a"
    engine.close()
    with pytest.raises(_engine.EngineError, match="closed"):
        engine.set_vocabulary([b"a"], [])


def test_quantize_rtn():
    weights = memoryview(array.array("f", [0.5] * 3 * 70)).cast("B").cast("f", (3, 70))
    codes, scales, zeros = _engine.quantize_rtn(weights, 4, 32)
    assert (len(codes), len(scales), len(zeros)) == (3 * 70, 3 * 3 * 4, 3 * 3)
    for arguments, error, words in [
        ((weights, 5, 32), ValueError, "bits"),
        ((weights, 4, 0), ValueError, "group_size"),
        ((weights, 4, 1.0), TypeError, "group_size"),
        ((weights, I32, 32), ValueError, "bits"),
        ((array.array("f", [1.0]), 4, 32), TypeError, "weights"),
        ((memoryview(b"1234").cast("B", (2, 2)), 4, 32), TypeError, "weights"),
        (([[1.0]], 4, 32), TypeError, "weights"),
    ]:
        with pytest.raises(error, match=words):
            _engine.quantize_rtn(*arguments)


def test_dequantize_arguments(tmp_path):
    for arguments, error in [
        ((1, "lm_head"), TypeError),
        (("a\0", "lm_head"), ValueError),
        ((str(tmp_path), 1), TypeError),
    ]:
        with pytest.raises(error):
            _engine.dequantize(*arguments)
    with pytest.raises((OSError, _engine.ModelError)):
        _engine.dequantize(str(tmp_path / "nowhere"), "model.layers.0.self_attn.q_proj")


def test_build_info():
    info = _engine.build_info()
    assert info["version"] == _engine.__version__
    assert info["isa"] in info["isas"]
    assert info["cpu_count"] >= 1
    assert isinstance(info["cuda"], bool)
    assert info["cuda"] == bool(info["cuda_archs"])
    assert isinstance(info["compiler"], str)


def test_device_info():
    fields = next(node for node in STUB.body if isinstance(node, ast.ClassDef) and node.name == "DeviceInfo").body
    names = [node.target.id for node in fields if isinstance(node, ast.AnnAssign)]
    for number, gpu in enumerate(_engine.device_info()):
        assert list(gpu) == names
        assert gpu["index"] == number and gpu["name"]
        assert gpu["usable"] is not bool(gpu["reason"])
        assert 0 <= gpu["free_bytes"] <= gpu["total_bytes"]


# --- outputs --------------------------------------------------------------------------------------------------


def test_output(engine):
    tokens, output = read_all(
        engine.submit(PROMPT, max_tokens=5, logprobs=2, prompt_logprobs=1, logits_stop=2, seed=2**64 - 1, tag=2**64 - 1)
    )
    assert len(tokens) == output["num_output_tokens"] == 5
    assert all(0 <= token < VOCAB_SIZE for token in tokens)
    assert (output["finish_reason"], output["stop_reason"], output["error"]) == ("length", None, None)
    assert output["seed"] == 2**64 - 1
    assert output["prompt_logprobs"][0] is None
    assert [len(row) for row in output["prompt_logprobs"][1:]] == [2, 2]
    logits = output["logits"]
    assert (logits.format, logits.shape, logits.readonly) == ("f", (2, VOCAB_SIZE), True)
    assert all(len(row) == 3 and all(len(entry) == 3 for entry in row) for row in output["logprobs"])


def test_outputs_have_the_keys_of_the_stub(engine):
    stub = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
    names = [node.target.id for node in stub["Output"].body if isinstance(node, ast.AnnAssign)]
    first = names[: names.index("finished") + 1]
    request = engine.submit(PROMPT, max_tokens=300)
    output = request.read()
    assert list(output) == first
    assert list(read_all(request)[1]) == names
    assert request.read() is None
    memory = [node.target.id for node in stub["MemoryReport"].body if isinstance(node, ast.AnnAssign)]
    assert list(engine.stats()["memory"]) == memory


def test_reports(engine):
    info, stats = engine.info(), engine.stats()
    assert (info["vocab_size"], info["block_size"], info["backend"]) == (VOCAB_SIZE, 32, "cpu")
    assert info.pop("kv_cache_16bit_layers") == []
    assert all(isinstance(value, str | int | float) for value in info.values())
    assert stats.pop("failed") is False and stats.pop("meter")["enabled"] is True
    assert all(isinstance(value, int) for value in {**stats.pop("memory"), **stats}.values())
    engine.reset_prefix_cache()


def test_read_timeout(engine):
    request = engine.submit(PROMPT, guided=True, max_tokens=2)
    for value, error in [
        ("1", TypeError),
        (-1, ValueError),
        (NAN, ValueError),
        (INF, ValueError),
        (10**400, ValueError),
    ]:
        with pytest.raises(error, match="timeout"):
            request.read(value)
    assert request.read(timeout=60)["mask_position"] == 0
    start = time.monotonic()
    assert request.read(0) is None
    assert request.read(0.2) is None
    assert 0.2 <= time.monotonic() - start < 5


def test_set_mask(engine):
    words = array.array("I", [0xFFFFFFFF] * (VOCAB_SIZE // 32))
    request = engine.submit(PROMPT, guided=True, max_tokens=1)
    assert request.read(60)["mask_position"] == 0
    for position, mask, error in [
        (0, words[:-1], ValueError),
        (1, words, ValueError),
        (-1, words, ValueError),
        (I32, words, ValueError),
        (0.0, words, TypeError),
        (0, bytes(words), TypeError),
        (0, list(words), TypeError),
        (0, memoryview(words)[::2], BufferError),
        (0, memoryview(bytearray(4 * len(words) + 1))[1:].cast("I"), ValueError),
    ]:
        with pytest.raises(error):
            request.set_mask(position, mask)
    request.set_mask(0, words)
    assert len(read_all(request)[0]) == 1


def test_notification(engine):
    requests = [engine.submit(PROMPT, max_tokens=3, notify=True, tag=tag) for tag in range(600)]
    fd = engine.event_fd()
    finished = set()
    end = time.monotonic() + 60
    while len(finished) < len(requests) and time.monotonic() < end:
        select.select([fd], [], [], 10)
        for tag in engine.take_ready():
            assert requests[tag].tag == tag
            output = requests[tag].read(0)
            if output is not None and output["finished"]:
                finished.add(tag)
    assert len(finished) == len(requests)
    assert engine.take_ready() == []


# --- lifetimes ------------------------------------------------------------------------------------------------


def count_objects():
    gc.collect()
    kinds = [type(item) for item in gc.get_objects()]
    return kinds.count(_engine.Engine), kinds.count(_engine.Request), threads(), len(os.listdir("/proc/self/fd"))


def threads():
    return len(os.listdir("/proc/self/task"))


def test_nothing_leaks(model_dir):
    def cycle(number):
        engine = _engine.Engine(model_dir, **OPTIONS)
        engine.set_vocabulary([b"a"] * VOCAB_SIZE, [0])
        request = engine.submit(PROMPT, max_tokens=2, stop=["never"], logit_bias={1: 1.0}, bad_words=[[1, 2]])
        if number % 2:
            read_all(request)
        if number % 3:
            engine.close()

    def references():
        return sys.getrefcount(_engine.Engine), sys.getrefcount(_engine.Request)

    cycle(1)
    objects, before = count_objects(), references()
    for number in range(200):
        cycle(number)
    assert count_objects() == objects
    assert references() == before


def test_refused_creation_leaks_nothing(model_dir, tmp_path):
    before = count_objects()
    for _ in range(50):
        with pytest.raises(ValueError, match="block_size"):
            _engine.Engine(model_dir, **{**OPTIONS, "block_size": 17})
        with pytest.raises(_engine.ModelError, match="config"):
            _engine.Engine(str(tmp_path), **OPTIONS)
    assert count_objects() == before


def test_objects_in_a_cycle_are_collected(model_dir):
    before = count_objects()
    box = [_engine.Engine(model_dir, **OPTIONS)]
    box += [box[0].submit(PROMPT), box]
    del box
    assert count_objects() == before


def test_progress(model_dir):
    calls = []
    _engine.Engine(model_dir, **OPTIONS, progress=lambda done, total: calls.append((done, total))).close()
    assert calls
    assert all(0 <= done <= total for done, total in calls)
    assert calls == sorted(calls)


def test_progress_that_raises(model_dir):
    class Stop(Exception):
        pass

    calls = []

    def progress(done, total):
        calls.append(done)
        raise Stop("enough")

    before = count_objects()
    with pytest.raises(Stop, match="enough"):
        _engine.Engine(model_dir, **OPTIONS, progress=progress)
    assert len(calls) == 1
    assert count_objects() == before


def test_closed_engine(model_dir):
    engine = _engine.Engine(model_dir, **OPTIONS)
    running = engine.submit(PROMPT, guided=True)
    assert not engine.closed
    engine.close()
    engine.close()
    assert engine.closed
    output = running.read(60)
    while not output["finished"]:
        output = running.read(60)
    assert output["finish_reason"] == "abort"
    assert running.read() is None
    running.cancel()
    for call in (engine.info, engine.stats, engine.event_fd, engine.take_ready, engine.reset_prefix_cache):
        with pytest.raises(_engine.EngineError, match="closed"):
            call()
    with pytest.raises(_engine.EngineError, match="closed"):
        engine.submit(PROMPT)


def test_request_outlives_the_engine_object(model_dir):
    request = _engine.Engine(model_dir, **OPTIONS).submit(PROMPT, max_tokens=3)
    gc.collect()
    assert len(read_all(request)[0]) == 3


def test_cancel(engine):
    request = engine.submit(PROMPT, guided=True)
    request.cancel()
    request.cancel()
    assert read_all(request)[1]["finish_reason"] == "abort"


def test_dropping_a_request_cancels_it(engine):
    requests = [engine.submit(PROMPT, guided=True) for _ in range(3)]
    assert len(requests) == 3
    del requests
    end = time.monotonic() + 30
    while engine.stats()["num_running"] + engine.stats()["num_waiting"] > 0:
        assert time.monotonic() < end
        time.sleep(0.01)


# --- threads --------------------------------------------------------------------------------------------------


def blocked_request(engine):
    """A request whose read() waits until it is cancelled: it is guided and gets no mask."""
    request = engine.submit(PROMPT, guided=True)
    assert request.read(60)["mask_position"] == 0
    return request


def run_thread(function):
    """Starts it; the list gets what it returns, or its exception."""
    results = []

    def run():
        try:
            results.append(function())
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def test_other_threads_run_during_read(engine):
    request = blocked_request(engine)
    thread, results = run_thread(lambda: request.read(30))
    count = 0
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        count += 1
    assert thread.is_alive()
    assert count > 1000
    request.cancel()
    thread.join(10)
    assert results[0]["finish_reason"] == "abort"


def test_one_reader_at_a_time(engine):
    request = blocked_request(engine)
    thread, results = run_thread(lambda: request.read(30))
    end = time.monotonic() + 10
    while True:
        try:
            assert request.read(0) is None
        except RuntimeError as error:
            assert "one reader" in str(error)  # the first reads may come before the thread's
            break
        assert time.monotonic() < end
    request.cancel()
    thread.join(10)
    assert results[0]["finished"]


def test_close_wakes_readers(model_dir):
    engine = _engine.Engine(model_dir, **OPTIONS)
    requests = [blocked_request(engine) for _ in range(4)]
    readers = [run_thread(functools.partial(request.read, 30)) for request in requests]
    closers = [run_thread(engine.close) for _ in range(4)]
    for thread, results in [*readers, *closers]:
        thread.join(20)
        assert len(results) == 1, "a thread hangs"
    assert all(results[0]["finish_reason"] == "abort" for _, results in readers)
    assert all(results == [None] for _, results in closers)


def test_close_while_others_call(model_dir):
    """Each call either works or says that the engine is closed."""

    def work(engine, start):
        start.wait()
        while True:
            try:
                engine.submit(PROMPT, max_tokens=1).read(5)
                engine.stats()
                engine.take_ready()
            except _engine.EngineError:
                return "closed"

    for _ in range(10):
        engine = _engine.Engine(model_dir, **OPTIONS)
        start = threading.Barrier(4)
        workers = [run_thread(lambda engine=engine, start=start: work(engine, start)) for _ in range(3)]
        start.wait()
        time.sleep(0.01)
        engine.close()
        for thread, results in workers:
            thread.join(20)
            assert results == ["closed"]


# --- signals, exit, other interpreters ------------------------------------------------------------------------

PRELUDE = f"""
import os, signal, sys, threading, time
from qwen_fast import _engine
engine = _engine.Engine(sys.argv[1], **{OPTIONS!r})
def blocked():
    request = engine.submit({PROMPT}, guided=True)
    assert request.read(60)["mask_position"] == 0
    return request
"""


def test_ctrl_c_during_read(model_dir):
    result = run_python(
        PRELUDE
        + textwrap.dedent("""
        request = blocked()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background may ignore it
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        try:
            request.read()
        except KeyboardInterrupt:
            print("interrupted", time.monotonic() - start < 3)
        assert request.read(0) is None
        request.cancel()
        print(request.read(10)["finish_reason"])
        """),
        model_dir,
    )
    assert result.stdout.split() == ["interrupted", "True", "abort"], result.stderr
    assert result.returncode == 0


def test_a_signal_handler_runs_and_read_goes_on(model_dir):
    result = run_python(
        PRELUDE
        + textwrap.dedent("""
        request = blocked()
        signal.signal(signal.SIGUSR1, lambda *_: request.cancel())
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        print(request.read(30)["finish_reason"])
        """),
        model_dir,
    )
    assert result.stdout.split() == ["abort"], result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "request = engine.submit([1, 2, 3], max_tokens=400); request.read()",
        "requests = [engine.submit([1, 2, 3], max_tokens=400) for _ in range(20)]; requests[0].read()",
        "loop = [blocked()]; loop.append(loop)",
        "threading.Thread(target=blocked().read, daemon=True).start(); time.sleep(0.2)",
        "request = blocked(); del engine",
        "request = blocked(); engine.close()",
        "request = blocked(); sys.exit(0)",
        "import atexit; request = blocked(); atexit.register(engine.close)",
    ],
)
def test_exit_in_the_middle_of_a_stream(model_dir, code):
    result = run_python(PRELUDE + code, model_dir, timeout=30)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_exit_is_quick(model_dir):
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + "request = blocked(); print('end', flush=True)", model_dir],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdout.readline() == b"end\n"
    assert process.wait(5) == 0
    process.stdout.close()


def test_forked_child(model_dir):
    result = run_python(
        PRELUDE
        + textwrap.dedent("""
        import warnings
        warnings.simplefilter("ignore")
        request = blocked()
        child = os.fork()
        if child == 0:
            for call in (engine.stats, request.read, request.cancel, lambda: engine.submit([1])):
                try:
                    call()
                except _engine.EngineError as error:
                    assert "forked" in str(error), error
                else:
                    os._exit(2)
            engine.close()
            del request, engine
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        request.cancel()
        print(request.read(10)["finish_reason"])
        """),
        model_dir,
    )
    assert result.stdout.split() == ["0", "abort"], result.stderr


def test_second_import_is_a_module_of_its_own(model_dir):
    spec = importlib.util.spec_from_file_location("qwen_fast._engine", _engine.__file__)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert other is not _engine
    assert other.Engine is not _engine.Engine
    assert other.ModelError is not _engine.ModelError
    engine = other.Engine(model_dir, **OPTIONS)
    assert isinstance(engine.submit(PROMPT, max_tokens=1), other.Request)
    engine.close()
    with pytest.raises(other.EngineError):
        engine.stats()
    kind = other.Engine
    del other, spec, engine
    gc.collect()
    with pytest.raises(OSError, match="config"):
        kind("/nowhere")


def test_subinterpreter(model_dir):
    name = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
    result = run_python(
        f"""
        import sys
        import {name} as interpreters
        code = '''if True:
            from qwen_fast import _engine
            engine = _engine.Engine({model_dir!r}, **{OPTIONS!r})
            request = engine.submit([1, 2, 3], max_tokens=2)
            while not request.read()["finished"]:
                pass
        '''
        for _ in range(2):
            interpreter = interpreters.create()
            assert not interpreters.run_string(interpreter, code)
            interpreters.destroy(interpreter)
        print("done")
        """
    )
    assert result.stdout == "done\n", result.stderr


# --- the interface --------------------------------------------------------------------------------------------

STUB_PATH = pathlib.Path(_engine.__file__).with_name("_engine.pyi")
STUB = ast.parse(STUB_PATH.read_text())


def stub_parameters(function):
    """(name, kind, default) of each parameter but self and cls."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    result = [(item.arg, "positional", default) for item, default in zip(positional, defaults, strict=True)]
    result += [
        (item.arg, "keyword", default)
        for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    result += [(arguments.kwarg.arg, "others", None)] if arguments.kwarg else []
    return [
        (name, kind, "required" if default is None else ast.literal_eval(default))
        for name, kind, default in result
        if name not in ("self", "cls")
    ]


def runtime_parameters(function):
    kinds = {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
        inspect.Parameter.KEYWORD_ONLY: "keyword",
        inspect.Parameter.VAR_KEYWORD: "others",
    }
    return [
        (
            parameter.name,
            kinds[parameter.kind],
            "required" if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]


def public(container):
    return {name for name in vars(container) if not name.startswith("_")}


def test_the_stub_is_the_module():
    types_only = {
        "MemoryReport", "DeviceInfo", "Output", "Amounts", "Usage", "EnergySource", "IdleAmounts", "UnsettledAmounts",
        "MeterStats",
    }  # fmt: skip
    classes = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
    functions = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
    assert public(_engine) == (classes.keys() | functions.keys()) - types_only
    for name, node in functions.items():
        runtime = getattr(_engine, name)
        assert runtime_parameters(runtime) == stub_parameters(node), name
        assert runtime.__doc__, name
    for name in ("Engine", "Request", "Layers"):
        kind = getattr(_engine, name)
        members = {node.name: node for node in classes[name].body if isinstance(node, ast.FunctionDef)}
        fields = {node.target.id for node in classes[name].body if isinstance(node, ast.AnnAssign)}
        assert public(kind) == (members.keys() | fields) - {"__new__"}
        for member, node in members.items():
            if member == "__new__":
                assert runtime_parameters(kind) == stub_parameters(node)
            elif not node.decorator_list:
                assert runtime_parameters(getattr(kind, member)) == stub_parameters(node), member
            assert member == "__new__" or getattr(kind, member).__doc__, member


def test_exceptions():
    assert issubclass(_engine.ModelError, ValueError)
    assert issubclass(_engine.EngineError, RuntimeError)


def test_only_the_init_function_is_exported():
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", _engine.__file__], capture_output=True, text=True, check=True
    )
    symbols = {line.split()[-1] for line in listing.stdout.splitlines()} - {"_init", "_fini"}
    assert symbols == {"PyInit__engine"}
