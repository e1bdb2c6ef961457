"""Stores to keep conversations in, and the page's logic on the demo model."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
from ui_helpers import LIMITS

from qwen_fast import AsyncLLM
from qwen_fast.ui.history import HistoryStore, open_store


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of its own on a Unix socket."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server")
    folder = tmp_path_factory.mktemp("redis")
    command = [program, "--port", "0", "--unixsocket", str(folder / "s"), "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 10
        while not (folder / "s").exists():
            assert process.poll() is None and time.monotonic() < deadline, "redis-server does not start"
            time.sleep(0.01)
        yield f"unix://{folder / 's'}"
        process.terminate()


@pytest.fixture(params=["sqlite", "redis"])
def where(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
    """What --history takes."""
    if request.param == "redis":
        url: str = request.getfixturevalue("redis_url")
        return url
    return str(tmp_path / "history.sqlite3")


@pytest.fixture
def store(where: str) -> Iterator[HistoryStore]:
    opened = open_store(where, LIMITS)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def slow_demo() -> Iterator[AsyncLLM]:
    """The demo model on the reference path: slow enough to be stopped."""
    llm = AsyncLLM("demo", device="cpu", num_threads=1, isa="scalar")
    yield llm
    llm.close()
