"""Fixtures that all tests share."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pathlib.Path]:
    """tiny_config(**overrides) writes the config.json of a tiny Qwen2 (2 layers, head_dim 64, vocabulary 512) into a
    new folder and returns the folder: for load_format="dummy". An override of None leaves the key out."""

    def write(**overrides: Any) -> pathlib.Path:
        folder = tmp_path_factory.mktemp("tiny")
        config = {key: value for key, value in {**TINY_CONFIG, **overrides}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture(scope="session")
def ahead(request: pytest.FixtureRequest) -> Iterator[Callable[..., dict[Any, concurrent.futures.Future[Any]]]]:
    """ahead(fixture, parameter, work) calls work(value) for every value of the parameter in the chosen tests that have
    this fixture, in as many threads as there are CPUs, and gives {value: its future}."""
    pools: list[concurrent.futures.ThreadPoolExecutor] = []

    def begin(fixture: str, parameter: str, work: Callable[[Any], Any]) -> dict[Any, concurrent.futures.Future[Any]]:
        pools.append(concurrent.futures.ThreadPoolExecutor(os.cpu_count()))
        tests = [item for item in request.session.items if fixture in getattr(item, "fixturenames", ())]
        values = dict.fromkeys(item.callspec.params[parameter] for item in tests if hasattr(item, "callspec"))
        return {value: pools[-1].submit(work, value) for value in values}

    yield begin
    for pool in pools:
        pool.shutdown(cancel_futures=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared",
        type=pathlib.Path,
        default=ROOT.parent / "shared",
        help="the folder of checkpoints and reference data (default: shared, beside the repository)",
    )
    parser.addoption("--kernel-programs", help="a folder of kernel tests built before: see tests/kernels/run.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What importing the tests and their oracles made is there to stay: no later garbage collection looks at it."""
    gc.collect()
    gc.freeze()


@functools.cache
def missing_gpu() -> str:
    """Why no test can run on a GPU here; empty if one can."""
    from qwen_fast import _engine

    if not _engine.build_info()["cuda"]:
        return "qwen_fast is built without CUDA"
    reasons = [f"{gpu['name']}: {gpu['reason']}" for gpu in _engine.device_info() if not gpu["usable"]]
    return "" if len(reasons) < len(_engine.device_info()) else "; ".join(reasons) or "no GPU is here"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and missing_gpu():
        pytest.skip(missing_gpu())


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """A test with it runs on the CPU, and under `-m gpu` on a GPU."""
    return request.param


@pytest.fixture(scope="session")
def shared_dir(pytestconfig: pytest.Config) -> pathlib.Path:
    """The folder `shared` beside the repository, or --shared: checkpoints and reference data too large for it."""
    path = pytestconfig.getoption("--shared").absolute()
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="session")
def demo_dir() -> pathlib.Path:
    """The demo checkpoint that comes with the package."""
    path = ROOT / "qwen_fast" / "demo"
    assert (path / "config.json").is_file(), f"{path} has no config.json"
    return path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """In CI, where the shared folder is mounted, a skipped test would be one that nobody runs: it fails."""
    report = yield
    strict = os.environ.get("CI") == "true" and item.config.getoption("--shared").is_dir()
    if strict and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"skipped where CI=true and ../shared is there: {reason}"
    return report
