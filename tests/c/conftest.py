"""The C tests come last, and what they need is compiled at a low priority while the others run."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
compiling = pytest.StashKey[subprocess.Popen[bytes]]()


def is_c_test(item: pytest.Item) -> bool:
    return item.path.parent == HERE


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=is_c_test)


def pytest_collection_finish(session: pytest.Session) -> None:
    kinds = {is_c_test(item) for item in session.items}
    if kinds == {False, True} and not session.config.option.collectonly:
        command = ["nice", sys.executable, str(HERE / "run.py"), "--compile"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        session.config.stash[compiling] = subprocess.Popen(command, **quiet)


def end_compiling(config: pytest.Config) -> None:
    """What is not compiled by now waits for its test."""
    process = config.stash.get(compiling, None)
    if process is not None:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module", autouse=True)
def nothing_beside(pytestconfig: pytest.Config) -> None:
    end_compiling(pytestconfig)


def pytest_unconfigure(config: pytest.Config) -> None:
    end_compiling(config)
