"""One small engine and one report of it for all tests of this folder."""

from __future__ import annotations

import pytest
from cost_helpers import PRICES, load

from qwen_fast.cost.run import Runner, Settings
from qwen_fast.cost.workloads import STUDY_A, fixed


@pytest.fixture(scope="session")
def llm():
    with load({"kv_cache_tokens": 8192}) as one:
        yield one


@pytest.fixture(scope="session")
def settings():
    workloads = (fixed("short", "short QA", 24, 12), STUDY_A[1], fixed("chat", "chat", 30, 6))
    return Settings(workloads=workloads, users=(1, 3), quick=True, window_s=0.02, prices=PRICES, wall_watts={3: 100.0})


@pytest.fixture(scope="session")
def measured(tmp_path_factory, settings):
    path = tmp_path_factory.mktemp("cost") / "measurements.json"
    data = Runner({}, settings, load, path).run()
    return data, path
