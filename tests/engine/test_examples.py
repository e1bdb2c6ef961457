"""The examples run as they are (notebooks: tests/test_notebooks.py)."""

import pathlib
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


def test_stream():
    done = subprocess.run([sys.executable, EXAMPLES / "stream.py"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Nora" in done.stdout and "What is 128 + 256?\n  128 + 256 = 384\n" in done.stdout
