"""The package without its native engine: a source folder that nobody built, and an extension that cannot be imported."""

import json
import pathlib
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

import qwen_fast

ROOT = pathlib.Path(__file__).resolve().parents[2]
BLOCKED = "import sys; sys.modules['qwen_fast._engine'] = None\n"
DOCTOR = "from qwen_fast.cli import main\nsys.exit(main(['doctor', *sys.argv[1:]]))"


def run(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A source folder without a built extension. (-S below: an editable installation would find its own extension.)"""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "qwen_fast", folder / "qwen_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (folder / "setup.py").write_text("")
    return folder


def test_doctor_reports_all_the_same():
    done = run("-c", BLOCKED + DOCTOR)
    assert done.returncode == 1
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert {"qwen_fast", "python", "platform", "cpus", "memory", "engine", "tokenizers", "numpy"} <= set(shown)
    assert shown["engine"].startswith("not built")
    (problem,) = done.stderr.splitlines()
    assert problem.startswith("problem: the native engine is not built") and "install" in problem


def test_doctor_json():
    done = run("-c", BLOCKED + DOCTOR, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["engine"] is None and report["demo_model"]
    assert "not built" in report["problems"][0]


def test_doctor_in_a_source_folder(checkout):
    done = run("-S", "-c", "import sys\n" + DOCTOR, cwd=checkout)
    assert done.returncode == 1 and "python " in done.stdout
    assert f"the native engine is not built in this folder, {checkout}: build it there with `pip install" in done.stderr


@pytest.mark.parametrize("name", ["LLM", "AsyncLLM", "ModelError"])
def test_import_in_a_source_folder(checkout, name):
    done = run("-S", "-c", f"import qwen_fast\nqwen_fast.SamplingParams(n=2)\nqwen_fast.{name}", cwd=checkout)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: the native engine is not built in this folder, {checkout}: build it")
    assert "`pip install -e .`" in last and "or leave the source folder" in last


def test_command_in_a_source_folder(checkout):
    done = run("-S", "-m", "qwen_fast", "generate", "x", cwd=checkout)
    assert done.returncode == 1
    assert done.stderr.startswith("qwen-fast: error: the native engine is not built in this folder")


def test_an_engine_that_cannot_be_loaded(checkout, tmp_path):
    """It is there, but not for this machine: another message, with the loader's words."""
    shutil.copytree(checkout / "qwen_fast", tmp_path / "qwen_fast")
    (tmp_path / "qwen_fast" / f"_engine{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    done = run("-S", "-c", "import qwen_fast; qwen_fast.LLM", cwd=tmp_path)
    assert "cannot be loaded: " in done.stderr.splitlines()[-1]


def test_errors_are_the_engine_s():
    from qwen_fast import _engine, errors

    assert qwen_fast.ModelError is errors.ModelError is _engine.ModelError
    assert qwen_fast.EngineError is errors.EngineError is _engine.EngineError
