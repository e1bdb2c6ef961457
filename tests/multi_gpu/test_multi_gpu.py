"""The GPUs of one host together: tests/multi_gpu/test_*.cu, built as the kernels' tests are (tests/kernels/run.py).

--kernel-programs names a folder of programs built before, for a machine without the compiler.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("qf_kernel_tests_run", HERE.parent / "kernels" / "run.py")
runner = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runner)

KERNELS = {  # that each program needs
    "test_all_reduce": ["all_reduce", "device", "peer_io", "rmsnorm"],
    "test_decode_ranks": ["all_reduce", "decode_step", "device", "peer_io"],
}


def build(name: str, arch: str | None = None) -> pathlib.Path:
    """The test with its kernels, linked anew; BuildError has the compiler's words."""
    arch = arch or runner.present_arch()
    source = HERE / f"{name}.cu"
    sources = [runner.KERNELS / f"{kernel}.cu" for kernel in KERNELS[name]]
    sources += [runner.CSRC / path for path in runner.read_sources(source)]
    objects = [str(runner.compile_object(path, arch)) for path in [source, *sources]]
    program = runner.BUILD / name
    runner.run_compiler(["nvcc", *objects, "-Xcompiler", "-pthread", "-ldl", "-lm", "-o", str(program)])
    return program


@pytest.fixture(scope="module", params=sorted(KERNELS))
def program(request):
    folder = request.config.getoption("--kernel-programs")
    if folder is None and shutil.which("nvcc") is None:
        pytest.skip("no nvcc, and no --kernel-programs")
    return pathlib.Path(folder, request.param) if folder else build(request.param)


def run(program: pathlib.Path, ranks: int, *options: str) -> None:
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0"}  # multicast stays off
    command = [str(program), str(ranks), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "passed" in said


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("options", [[], ["--sm80"]], ids=["best", "sm80"])
def test_ranks_on_one_gpu(program, ranks, options):
    run(program, ranks, "--one-device", *options)


@pytest.mark.gpu2
@pytest.mark.parametrize("options", [[], ["--sm80"]], ids=["best", "sm80"])
def test_two_gpus(program, options):
    run(program, 2, *options)


@pytest.mark.gpu4
@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize("options", [[], ["--sm80"]], ids=["best", "sm80"])
def test_four_gpus(program, ranks, options):
    run(program, ranks, *options)


def test_the_table_is_read():
    """benchmarks/gpu_tp.py takes the lengths of messages from what the program prints."""
    sys.path.insert(0, str(HERE.parent.parent / "benchmarks"))
    import gpu_tp

    said = (
        "NCCL 22803\nmicroseconds a call, in graphs; bytes are those of bf16, ours sends float32\n"
        "    1 x  3584      7.0 KB  one shot    2.10, with norm    2.50; two shots with norm    4.10; chosen one; "
        "NCCL bf16   10.00, float32   11.00, float32 then norm   13.00; NCCL bf16 / ours with norm 4.00\n"
        "   73 x  3584    511.0 KB  one shot   12.00, with norm   12.50; two shots with norm    7.00; chosen two\n"
    )
    found = gpu_tp.parse_messages(said)
    assert set(found) == {(1, 3584), (73, 3584)}
    assert found[1, 3584]["ours_us"] == 2.5 and found[1, 3584]["nccl_over_ours"] == 4.0
    assert found[73, 3584] == {"bf16_kb": 511.0, "ours_us": 7.0, "form": "two"}
    info = {"hidden_size": 3584, "num_layers": 28}
    assert gpu_tp.message_seconds(found, info, 1) == pytest.approx(57 * 2.5e-6)
    assert gpu_tp.message_seconds(found, info, 2) == pytest.approx(57 * 7e-6)
    assert gpu_tp.message_seconds(found, info, 74) is None


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_compiles(name, tmp_path, monkeypatch):
    """For Hopper and for what came before it."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    monkeypatch.setattr(runner, "BUILD", tmp_path)
    for arch in ("80", "90a"):
        assert build(name, arch).exists()
