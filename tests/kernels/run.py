"""Builds and runs the kernels' tests: `python tests/kernels/run.py [name...] [--bench] [--sm80] [--sanitizer TOOL]`.

A test is a program tests/kernels/test_<name>.cu over check_cuda.cuh; a comment at its top says which CPU sources it
compares with (`/* sources: base/status.c backend/cpu/linear.c */`, relative to csrc). All kernels are linked to each.
It needs one GPU. --sm80 makes it take the code path of older GPUs; --bench adds a table of times; --sanitizer runs it
under a tool of compute-sanitizer, which takes many times as long.

Objects are cached in build/kernel-tests by compiler, flags and the times of all that they include. --programs names a
folder of programs built before (test_<name>), for a machine without the compiler.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent.parent
CSRC = ROOT / "csrc"
KERNELS = ROOT / "kernels"
BUILD = ROOT / "build" / "kernel-tests"

INCLUDES = [f"-I{path}" for path in (KERNELS, CSRC, TESTS, ROOT / "tests" / "c")]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-Wall"]
C_FLAGS = "-std=c11 -D_GNU_SOURCE -O2 -ffp-contract=off -fno-math-errno -pthread".split()
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
TRACKED_BARRIERS = 16384  # mbarriers of all blocks together that a tool follows; beyond its default it guesses
SLOW_SANITIZERS = ("racecheck", "initcheck")  # their programs leave out the largest shapes
RUN_TIMEOUT_S = 300
SANITIZER_TIMEOUT_S = 3600


class BuildError(Exception):
    """A compiler or the linker refused; the text is what it said."""


def test_names() -> list[str]:
    return sorted(path.stem.removeprefix("test_") for path in TESTS.glob("test_*.cu"))


def read_sources(path: pathlib.Path) -> list[str]:
    """The words after `sources:` and, of those files, after `needs:`, in comments; `model/` is all of a folder."""
    found = re.findall(r"/\*\s*sources:(.*?)\*/", path.read_text(), re.DOTALL)
    names: list[str] = []
    for name in " ".join(found).replace("*", " ").split():
        folder = [str(source.relative_to(CSRC)) for source in sorted((CSRC / name).glob("*.c"))]
        names.extend(folder if name.endswith("/") else [name])
    for name in names:  # grows while it is walked
        if not (CSRC / name).exists():
            raise BuildError(f"{path.name}: there is no csrc/{name}")
        needed = re.findall(r"/\*\s*needs:(.*?)\*/", (CSRC / name).read_text(), re.DOTALL)
        names.extend(other for other in " ".join(needed).split() if other not in names)
    return names


def present_arch() -> str:
    """sm_90a and its like: the machine code for the GPU here, or Hopper's where there is none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        shown = ""
    name = shown.split("\n")[0].strip().replace(".", "") or "90"
    return "90a" if name == "90" else name


@functools.cache
def cuda_include() -> str:
    """The folder of cuda_runtime_api.h, as nvcc says: the nvcc on PATH may be a link or a script."""
    if shutil.which("nvcc") is None:
        raise BuildError("nvcc was not found")
    command = ["nvcc", "--dryrun", "-c", str(KERNELS / "device.cu")]
    dry_run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    (top,) = [line.partition("=")[2] for line in dry_run.stderr.splitlines() if line.startswith("#$ TOP=")]
    return os.path.join(top, "include")


def compile_object(source: pathlib.Path, arch: str) -> pathlib.Path:
    """Compiles one file unless the cached object is newer than all that went into it."""
    if source.suffix == ".cu":
        own = re.findall(r"^/\* nvcc: (.*) \*/$", source.read_text(), re.MULTILINE)
        command = ["nvcc", *NVCC_FLAGS, *" ".join(own).split(), f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    else:
        command = [*shlex.split(os.environ.get("CC", "cc")), *C_FLAGS, "-isystem", cuda_include()]
    if shutil.which(command[0]) is None:
        raise BuildError(f"{command[0]} was not found")
    BUILD.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr((str(source), command)).encode()).hexdigest()[:16]
    target = BUILD / f"{source.stem}-{key}.o"
    depends = target.with_suffix(".d")
    if is_fresh(target, depends):
        return target
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        made = pathlib.Path(folder, "out.o")
        run_compiler([*command, *INCLUDES, "-MMD", "-MF", f"{folder}/out.d", "-c", str(source), "-o", str(made)])
        os.replace(f"{folder}/out.d", depends)
        os.replace(made, target)
    return target


def is_fresh(target: pathlib.Path, depends: pathlib.Path) -> bool:
    try:
        built = target.stat().st_mtime_ns
        needed = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        return all(os.stat(path).st_mtime_ns < built for path in needed)
    except (OSError, IndexError):
        return False


def run_compiler(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def build(name: str, arch: str | None = None, jobs: int | None = None) -> pathlib.Path:
    """Builds one test and returns the program. Raises BuildError with the compiler's words."""
    arch = arch or present_arch()
    source = TESTS / f"test_{name}.cu"
    sources = [source, *sorted(KERNELS.glob("*.cu")), *(CSRC / path for path in read_sources(source))]
    with concurrent.futures.ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(lambda path: compile_object(path, arch), sources)]
    program = BUILD / f"test_{name}"
    run_compiler(["nvcc", *objects, "-Xcompiler", "-pthread", "-lm", "-o", str(program)])
    return program


def find_sanitizer() -> str | None:
    """compute-sanitizer, from PATH or from beside the compiler."""
    beside = pathlib.Path(os.path.realpath(shutil.which("nvcc") or "")).parent
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(beside))


def run(program: pathlib.Path, arguments: list[str], sanitizer: str | None = None) -> tuple[int, str]:
    """Runs a built test: its exit status (-1 where it ran too long) and all that it printed."""
    command = [str(program), *arguments]
    timeout_s = RUN_TIMEOUT_S
    if sanitizer:
        tool = find_sanitizer()
        if tool is None:
            return 1, "compute-sanitizer was not found"
        options = ["--tool", sanitizer, "--error-exitcode", "86"]
        if sanitizer in ("racecheck", "synccheck"):
            options += ["--num-cuda-barriers", str(TRACKED_BARRIERS)]
        command = [tool, *options, *command]
        if sanitizer in SLOW_SANITIZERS:
            command.append("--brief")
        timeout_s = SANITIZER_TIMEOUT_S
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        return -1, (error.stdout or b"").decode(errors="replace") + f"\nran for more than {timeout_s} s"
    return done.returncode, done.stdout.decode(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds and runs the kernels' tests.")
    parser.add_argument("names", nargs="*", help="tests by name; all where none is given")
    parser.add_argument("--bench", action="store_true", help="time each kernel too, and print the tables")
    parser.add_argument("--sm80", action="store_true", help="the code path of GPUs before Hopper")
    parser.add_argument("--sanitizer", choices=SANITIZERS, help="run under this tool of compute-sanitizer")
    parser.add_argument("--arch", help="compute capability to compile for (default: that of the GPU here)")
    parser.add_argument("--build-only", action="store_true", help="build the programs and print their paths")
    parser.add_argument(
        "--programs", type=pathlib.Path, help="a folder of programs built before, to run in their place"
    )
    options = parser.parse_args()
    arguments = ["--bench"] * options.bench + ["--sm80"] * options.sm80
    failed = 0
    for name in options.names or test_names():
        name = pathlib.Path(name).stem.removeprefix("test_")
        if not options.programs and name not in test_names():
            parser.error(f"there is no test called {name!r}; there are: {', '.join(test_names())}")
        try:
            program = options.programs / f"test_{name}" if options.programs else build(name, options.arch)
            if options.build_only:
                print(program)
                continue
            status, output = run(program, arguments, options.sanitizer)
        except (BuildError, OSError) as error:
            status, output = 1, str(error)
        failed += status != 0
        print(f"{'ok    ' if status == 0 else 'FAILED'} {name}", flush=True)
        if status != 0 or options.bench:
            print(output, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
