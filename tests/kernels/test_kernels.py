"""Every kernel test as a pytest test, on both code paths; and that all kernels compile for every generation."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import shutil
import subprocess

import pytest

_spec = importlib.util.spec_from_file_location("qf_kernel_tests_run", pathlib.Path(__file__).with_name("run.py"))
runner = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runner)

KERNELS = sorted(runner.KERNELS.glob("*.cu"))
GENERATIONS = ["80", "86", "89", "90a"]
# Calls save registers in memory under its limit of 64; without the limit (one block an SM) nothing is saved, and 256 rows
# of top_p take 10 % longer.
# Low-bit decode attention holds one block of 512 threads an SM, so 128 registers: four of its kernels save 4 to 24 bytes,
# one or two accesses in the loop; what was tried with fewer values in flight was slower.
SPILLING = ["qf_sample_finish_kernel", "attention_decode_lowbit_kernel"]


def test_there_are_kernel_tests():
    assert runner.test_names()


@pytest.fixture
def programs(request):
    """The folder that --kernel-programs names, or None: then the programs are built here."""
    folder = request.config.getoption("--kernel-programs")
    if folder is None and shutil.which("nvcc") is None:
        pytest.skip("no nvcc, and no --kernel-programs")
    return pathlib.Path(folder) if folder else None


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["best", "sm80"])
@pytest.mark.parametrize("name", runner.test_names())
def test_kernel(programs, name, path):
    program = programs / f"test_{name}" if programs else runner.build(name)
    status, output = runner.run(program, ["--sm80"] if path == "sm80" else [])
    assert status == 0, output


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize("tool", runner.SANITIZERS)
@pytest.mark.parametrize("name", runner.test_names())
def test_kernel_under_sanitizer(programs, name, tool):
    if runner.find_sanitizer() is None:
        pytest.skip("no compute-sanitizer")
    program = programs / f"test_{name}" if programs else runner.build(name)
    status, output = runner.run(program, [], tool)
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support the GPU here")
    assert status == 0, output


@pytest.mark.long
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_compiles_for_every_generation(source, tmp_path):
    """Machine code for each and PTX of plain 9.0, without a warning; on Hopper nothing spills out of registers, but for
    the kernels in SPILLING."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in GENERATIONS]
    codes.append("-gencode=arch=compute_90,code=compute_90")
    flags = [*runner.NVCC_FLAGS, "-Xcompiler", "-fPIC,-Wextra", "-Xptxas", "-v"]
    command = ["nvcc", *flags, *codes, *runner.INCLUDES, "-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not [line for line in said.splitlines() if "warning" in line.lower()], said
    assert spills(said, "sm_90a") == []


def spills(said, arch):
    """Lines of ptxas -v about kernels of this generation, SPILLING left out, that move registers to memory and back."""
    current, found = "", []
    for line in said.splitlines():
        compiling = re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line)
        if compiling:
            current = "" if any(name in compiling[1] for name in SPILLING) else compiling[2]
        elif current == arch and re.search(r"[1-9]\d* bytes spill", line):
            found.append(line.strip())
    return found


def test_spills_are_seen():
    said = (
        "ptxas info    : Compiling entry function 'qf_sample_finish_kernel' for 'sm_90a'\n    4 bytes spill stores\n"
        "ptxas info    : Compiling entry function 'a' for 'sm_80'\n    0 bytes stack frame, 8 bytes spill stores\n"
        "ptxas info    : Compiling entry function 'a' for 'sm_90a'\n    8 bytes stack frame, 16 bytes spill stores\n"
        "ptxas info    : Compiling entry function 'b' for 'sm_90a'\n    0 bytes stack frame, 0 bytes spill stores\n"
    )
    assert spills(said, "sm_90a") == ["8 bytes stack frame, 16 bytes spill stores"]
