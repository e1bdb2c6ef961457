"""Fixtures of the model tests."""

import pytest
from model_helpers import demo_dir, isas


@pytest.fixture(scope="session")
def demo():
    """The directory of the 16-bit demo checkpoint."""
    return demo_dir()


def pytest_generate_tests(metafunc):
    """A test with `isa` runs on every path, unless its module chooses the pairs itself."""
    if "isa" in metafunc.fixturenames and not hasattr(metafunc.module, "pytest_generate_tests"):
        metafunc.parametrize("isa", isas(), scope="session")
