"""Fixtures of the model tests."""

import pytest
from model_helpers import demo_dir, isas, original_demo_dir


@pytest.fixture(scope="session")
def demo():
    """The directory of the packaged 4-bit demo checkpoint."""
    return demo_dir()


@pytest.fixture(scope="session")
def original_demo():
    """The directory of the 16-bit checkpoint behind the demo."""
    path = original_demo_dir()
    if path is None:
        pytest.skip("the demo's 16-bit checkpoint is not beside the repository")
    return path


def pytest_generate_tests(metafunc):
    """A test with `isa` runs on every path, unless its module chooses the pairs itself."""
    if "isa" in metafunc.fixturenames and not hasattr(metafunc.module, "pytest_generate_tests"):
        metafunc.parametrize("isa", isas(), scope="session")
