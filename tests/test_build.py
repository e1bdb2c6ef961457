"""The build: what the wheel and the source distribution hold, and what is said when a tool is missing."""

from __future__ import annotations

import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "kernels", "qwen_fast"]

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture
def source_copy(tmp_path):
    """A copy of what is built, so that a build does not touch the repository."""
    copy = tmp_path / "source"
    copy.mkdir()
    ignore = shutil.ignore_patterns("*.so", "*.o", "__pycache__")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=ignore)
        elif path.exists():
            shutil.copy(path, copy / name)
    return copy


def run_setup(folder, *arguments, prelude="", timeout=60, **environment):
    """setup.py as a build tool runs it, after `prelude`, with these variables set (or, if None, not set). The kernels
    take minutes and are left out unless a test asks for them."""
    environment = {"QF_WITHOUT_CUDA": "1", **environment}
    code = f"import runpy, sys\nsys.argv = {['setup.py', *arguments]!r}\n{prelude}\nrunpy.run_path('setup.py', run_name='__main__')"
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_missing_compiler(source_copy, tmp_path):
    for environment in ({"CC": "/nonexistent"}, {"CC": None, "PATH": str(tmp_path)}):
        result = run_setup(source_copy, "build_ext", "--inplace", **environment)
        assert result.returncode != 0
        assert "build-essential" in result.stderr
        assert "Traceback" not in result.stderr


def test_missing_python_header(source_copy, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    names = ("include", "platinclude")
    prelude = f"import sysconfig\npaths = sysconfig.get_path\nfolders = {dict.fromkeys(names, str(empty))!r}\n"
    prelude += "sysconfig.get_path = lambda name, *rest, **words: folders.get(name) or paths(name, *rest, **words)\n"
    prelude += "import setuptools\nfrom distutils import sysconfig as old\n"
    prelude += f"old.get_python_inc = lambda *rest, **words: {str(empty)!r}\n"
    compiler = tmp_path / "cc"
    compiler.symlink_to("/bin/true")
    result = run_setup(source_copy, "build_ext", "--inplace", prelude=prelude, CC=str(compiler))
    assert result.returncode != 0
    assert "python3-dev" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def setup_names():
    """What setup.py defines, without what it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))


def test_cuda_archs(setup_names, monkeypatch, tmp_path):
    archs = setup_names["cuda_archs"]
    monkeypatch.setenv("QF_CUDA_ARCHS", "90, 80;86 90")
    assert archs() == ["80", "86", "90"]
    for wrong in ("70", "sm_90", "9.0", "90a", "-1"):
        monkeypatch.setenv("QF_CUDA_ARCHS", wrong)
        with pytest.raises(Exception, match="QF_CUDA_ARCHS="):
            archs()
    monkeypatch.setenv("QF_CUDA_ARCHS", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert archs() == ["80", "90"]
    tool = tmp_path / "nvidia-smi"
    for shown, expected in [
        ("echo 9.0; echo 8.9; echo 9.0", ["89", "90"]),
        ("echo 12.0; echo 7.5", ["120"]),
        ("echo 7.5", ["80", "90"]),
        ("echo 9.0; exit 9", ["80", "90"]),
        ("echo no devices", ["80", "90"]),
    ]:
        tool.write_text(f"#!/bin/sh\n{shown}\n")
        tool.chmod(0o755)
        assert archs() == expected


def test_arch_flags(setup_names):
    flags = setup_names["arch_flags"]
    code = "-gencode=arch=compute_{},code=sm_{}".format
    ptx = "-gencode=arch=compute_{0},code=compute_{0}".format
    assert flags(["80", "90"]) == [code(80, 80), code("90a", "90a"), ptx(90)]
    assert flags(["90", "120"]) == [code("90a", "90a"), code(120, 120), ptx(90)]
    assert flags(["80", "86"]) == [code(80, 80), code(86, 86), ptx(86)]


def test_own_flags(setup_names, tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text("/* y = x * w + b */\n/* nvcc: --fmad=false -Xptxas -v */\n")
    assert setup_names["own_flags"](str(source)) == ["--fmad=false", "-Xptxas", "-v"]
    source.write_text("/* y = x * w + b\n * nvcc: none */\n")
    assert setup_names["own_flags"](str(source)) == []


@pytest.mark.long
def test_distributions(source_copy, tmp_path):
    """The wheel holds the package and no C; the source distribution holds all the C, and builds the same wheel."""
    out = tmp_path / "dist"
    sdist = run_setup(source_copy, "-q", "sdist", "-d", str(out))
    assert sdist.returncode == 0, sdist.stderr
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path / "unpacked")
    files = [path for folder in ("csrc", "kernels") for path in (source_copy / folder).rglob("*.*") if path.is_file()]
    assert {path.suffix for path in files} == {".c", ".h", ".cu", ".cuh"}
    assert {path.relative_to(source_copy).as_posix() for path in files} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]

    (unpacked,) = (tmp_path / "unpacked").iterdir()
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", str(out), "."]
    pip = subprocess.run(
        command,
        cwd=unpacked,
        env={**os.environ, "QF_WITHOUT_CUDA": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert pip.returncode == 0, pip.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        scripts = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
        demo = {item.filename: item.compress_size for item in archive.infolist() if "/demo/" in item.filename}
    assert {f"qwen_fast/demo/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")} <= set(demo)
    assert sum(demo.values()) < 16_000_000
    assert f"qwen_fast/_engine{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert {"qwen_fast/_engine.pyi", "qwen_fast/py.typed"} <= set(names)
    assert not [name for name in names if name.endswith((".c", ".h", ".cu", ".cuh", ".o"))]
    folders = {name.partition("/")[0] for name in names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"qwen_fast"}
    assert "Requires-Python: >=3.10" in metadata
    assert "qwen-fast = qwen_fast.cli:main" in scripts
