"""A GPU of several that hangs or fails: every request has its error within 5 s of that being known, the engine says that it
has failed, closing it returns, and after a hang the next engine of the process is not concerned.

The faults are real ones (gpu_faults.py): a kernel that takes all of the GPU's room for a while, and one that breaks its
context, which is done in a process of its own.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import gpu_faults
import pytest
from model_helpers import _engine, finish, open_engine

from qwen_fast.loading import find_nccl

pytestmark = pytest.mark.gpu2

FAST = {"device": "cuda", "tensor_parallel_size": 2}
FAST |= dict.fromkeys(("dtype", "activation_dtype", "kv_cache_dtype"), "auto")
LONG = {"max_model_len": 2048, "kv_cache_tokens": 16384}
GREEDY = {"max_tokens": 60, "temperature": 0.0, "ignore_eos": True}
PROMPT = list(range(1, 50))


@pytest.fixture(scope="module")
def second():
    """The second GPU; its kernels are loaded before any engine runs."""
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # multicast stays off
    return gpu_faults.Gpu(1)


@pytest.fixture(scope="module")
def expected(demo):
    with open_engine(demo, **FAST) as engine:
        return finish(engine.submit(PROMPT, **GREEDY))["token_ids"]


def check_next_engine(demo, expected):
    with open_engine(demo, **FAST) as engine:
        assert finish(engine.submit(PROMPT, **GREEDY))["token_ids"] == expected


def check_failed(found, words, limit_seconds):
    assert found["failed"]
    assert all(error is not None and any(word in error for word in words) for error in found["errors"]), found
    assert max(found["seconds"]) < limit_seconds + 5, found
    assert found["close_seconds"] < 5, found


def hang(demo, gpu, seconds, **options):
    """What becomes of an engine whose second GPU hangs so long."""
    engine = _engine.Engine(str(demo), **{**FAST, **LONG, **options})
    requests = gpu_faults.start(engine)
    begin = time.monotonic()
    gpu.stall(seconds)
    return gpu_faults.outcome(engine, requests, begin)


def test_a_pause_is_none_of_it(demo, second, expected):
    """Shorter than the others' patience: a quarter of the watchdog's time."""
    with open_engine(demo, **{**FAST, "watchdog_seconds": 40.0}) as engine:
        request = engine.submit(PROMPT, **GREEDY)
        begin = time.monotonic()
        second.stall(1.5)
        assert finish(request)["token_ids"] == expected
        assert not engine.stats()["failed"]
        print(f"{time.monotonic() - begin:.2f} s")


def test_a_gpu_that_comes_back_too_late(demo, second, expected):
    """The other GPU waits for a quarter of the watchdog's time; the engine closes with nothing left behind."""
    found = hang(demo, second, 3.0, watchdog_seconds=6.0)
    print(found)
    check_failed(found, ["rank 0 (cuda:0) waited for rank 1 for 1.5 s in vain"], 1.5)
    check_next_engine(demo, expected)


def test_a_gpu_that_hangs(demo, second, expected):
    """It is given up, with the memory that its thread may still touch; close() does not wait for it."""
    begin = time.monotonic()
    found = hang(demo, second, 8.0, watchdog_seconds=2.0)
    print(found)
    assert time.monotonic() - begin < 8.0  # so it hung all that time
    check_failed(found, ["waited for rank 1 for 0.501 s in vain", "have not finished their step"], 2.0)
    check_next_engine(demo, expected)


def test_nccl_with_a_gpu_that_hangs(demo, second, expected):
    """NCCL's kernels wait without a limit: the watchdog ends them."""
    if find_nccl() is None:
        pytest.skip("NCCL's package is not there")
    comm = {"tensor_parallel_comm": "nccl", "nccl_library": find_nccl()}
    found = hang(demo, second, 4.0, watchdog_seconds=1.5, **comm)
    print(found)
    check_failed(found, ["have not finished their step within 1500 ms"], 1.5)
    check_next_engine(demo, expected)


def test_a_gpu_that_fails(demo):
    """Its errors are found by its own rank; the other GPU's wait for it is ended. CUDA is lost to the process then."""
    here = pathlib.Path(__file__).parent
    python_path = os.pathsep.join([str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here / "gpu_faults.py"), str(demo)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": python_path},
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    check_failed(found, ["launch failure"], 0)
    assert found["next"] == "" or "launch failure" in found["next"]
