"""The helpers of tests/model are those of the engines here, too."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "model"))


@pytest.fixture(scope="session")
def demo():
    """The directory of the packaged 4-bit demo checkpoint."""
    from model_helpers import demo_dir

    return demo_dir()
