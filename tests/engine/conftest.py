"""Fixtures of the engine's tests."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def away_from_the_sources(tmp_path_factory):
    """`python -m qwen_fast` and `python -c` prefer what lies in the working directory: the tests' processes start in an
    empty one, so that they import the installed package, not the source folder, which need not hold an extension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield
