"""Fixtures of the model tests."""

import pytest
from model_helpers import demo_dir, isas


@pytest.fixture(scope="session")
def demo():
    """The directory of the 16-bit demo checkpoint."""
    return demo_dir()


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames and "number_format" not in metafunc.fixturenames:
        metafunc.parametrize("isa", isas(), scope="session")
