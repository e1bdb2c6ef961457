"""Fixtures of the model tests."""

import pytest
from model_helpers import demo_dir, places


@pytest.fixture(scope="session")
def demo():
    """The directory of the packaged 4-bit demo checkpoint."""
    return demo_dir()


@pytest.fixture(scope="session")
def original_demo(shared_dir):
    """The directory of the 16-bit checkpoint behind the demo."""
    path = shared_dir / "demo-model"
    if not (path / "config.json").exists():
        pytest.skip(f"the demo's 16-bit checkpoint is not in {shared_dir}")
    return path


def pytest_generate_tests(metafunc):
    """A test with `on` runs on every path of the CPU and on a GPU, unless its module chooses the pairs itself."""
    if "on" in metafunc.fixturenames and not hasattr(metafunc.module, "pytest_generate_tests"):
        metafunc.parametrize("on", places(), scope="session")
