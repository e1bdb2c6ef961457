"""Fuzzes the parsers: `python tests/fuzz/run.py --seconds S [name...]`.

A target is a file tests/fuzz/fuzz_<name>.c with LLVMFuzzerTestOneInput() and a comment that lists its sources as the
C tests do (see tests/c/run.py); its seeds are the files of tests/fuzz/corpus/<name>/. It is built with clang's
libFuzzer where there is one, otherwise with cc and driver.c, always under ASan and UBSan. What the fuzzer finds on its
way goes to a temporary folder. An input that crashes, leaks or hangs is printed in hex, and the run fails.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

FUZZ = pathlib.Path(__file__).resolve().parent
CORPUS = FUZZ / "corpus"

_spec = importlib.util.spec_from_file_location("qf_c_tests_run", FUZZ.parent / "c" / "run.py")
c_tests = sys.modules.get(_spec.name) or importlib.util.module_from_spec(_spec)
if _spec.name not in sys.modules:
    sys.modules[_spec.name] = c_tests
    _spec.loader.exec_module(c_tests)

BUILD = c_tests.ROOT / "build" / "fuzz"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
MAX_LEN_BYTES = 1 << 16


def targets() -> list[str]:
    return sorted(path.stem.removeprefix("fuzz_") for path in FUZZ.glob("fuzz_*.c"))


@functools.cache
def libfuzzer() -> list[str] | None:
    """The command of a clang that has libFuzzer, or None."""
    command = shlex.split(os.environ.get("CLANG", "clang"))
    if not command or not shutil.which(command[0]):
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "probe.c")
        source.write_text("int LLVMFuzzerTestOneInput(const void *d, unsigned long n) { return d && n ? 0 : 0; }\n")
        build = [*command, "-fsanitize=fuzzer,address,undefined", str(source), "-o", str(source.with_suffix(""))]
        return command if subprocess.run(build, capture_output=True, timeout=120).returncode == 0 else None


def engines() -> list[str]:
    """Which of "libfuzzer" and "driver" can be built here, the better one first."""
    return (["libfuzzer"] if libfuzzer() else []) + (["driver"] if c_tests.launcher("address")[0] is not None else [])


def build(target: pathlib.Path, engine: str) -> pathlib.Path:
    """Builds a target file with one engine. Raises c_tests.BuildError."""
    BUILD.mkdir(parents=True, exist_ok=True)
    c_tests.BUILD.mkdir(parents=True, exist_ok=True)
    command = libfuzzer() if engine == "libfuzzer" else c_tests.compiler()
    sources = [target, *(c_tests.CSRC / name for name in c_tests.read_sources(target))]
    sanitize = SANITIZE
    if engine == "libfuzzer":
        sanitize = [*SANITIZE, "-fsanitize=fuzzer-no-link"]
    else:
        sources.append(FUZZ / "driver.c")
    flags = [*c_tests.CFLAGS, *sanitize]
    objects = [c_tests.compile_object(source, flags, command) for source in sources]
    link_flags = [*SANITIZE, "-fsanitize=fuzzer"] if engine == "libfuzzer" else SANITIZE
    return c_tests.link(objects, link_flags, BUILD / f"{target.stem}-{engine}", command)


def fuzz(program: pathlib.Path, engine: str, seeds: list[pathlib.Path], seconds: int) -> tuple[bool, str]:
    """Runs a built target. Whether it held, and a report: the end of the output and the reproducer if there is one."""
    environment = {**os.environ, **c_tests.SANITIZER_ENVIRONMENT}
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        reproducer = scratch / "reproducer"
        if engine == "libfuzzer":
            found = scratch / "corpus"
            found.mkdir()
            for seed in seeds:
                shutil.copyfile(seed, found / seed.name)
            command = [str(program), f"-max_total_time={seconds}", f"-max_len={MAX_LEN_BYTES}", "-timeout=20"]
            command += ["-rss_limit_mb=3000", f"-exact_artifact_path={reproducer}", "-print_final_stats=1", str(found)]
        else:
            command = [str(program), str(seconds), str(reproducer), *map(str, seeds)]
        try:
            run = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds * 3 + 120, env=environment,
                cwd=folder,
            )
            status, output = run.returncode, run.stdout.decode(errors="replace")
        except subprocess.TimeoutExpired as error:
            status, output = -1, (error.stdout or b"").decode(errors="replace") + "\nthe fuzzer did not end in time"
        if status == 0:
            return True, summary(output)
        report = "\n".join(output.splitlines()[-80:])
        if reproducer.exists():
            data = reproducer.read_bytes()
            report += f"\nreproducer, {len(data)} bytes in hex:\n{data.hex()}"
        return False, report


def summary(output: str) -> str:
    """One line: libFuzzer's count of runs and its last word on coverage, or the driver's line."""
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", output)
    if not runs:
        return output.strip().splitlines()[-1] if output.strip() else ""
    coverage = re.findall(r"cov: (\d+) ft: (\d+)", output)
    return f"{runs[1]} runs" + (f", {coverage[-1][0]} edges, {coverage[-1][1]} features" if coverage else "")


def seeds_of(name: str) -> list[pathlib.Path]:
    return sorted(path for path in (CORPUS / name).glob("*") if path.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzzes the parsers.")
    parser.add_argument("names", nargs="*", help="targets by name (json, ...); all where none is given")
    parser.add_argument("--seconds", type=int, default=10, help="time for each target (default 10)")
    parser.add_argument("--engine", choices=["libfuzzer", "driver"], help="default: libfuzzer if clang has it")
    options = parser.parse_args()
    available = engines()
    engine = options.engine or (available[0] if available else None)
    if engine not in available:
        parser.error(f"no compiler here builds {engine or 'a fuzzer'}")
    failed = False
    for name in options.names or targets():
        name = pathlib.Path(name).stem.removeprefix("fuzz_")
        if name not in targets():
            parser.error(f"there is no target called {name!r}; there are: {', '.join(targets())}")
        try:
            held, report = fuzz(build(FUZZ / f"fuzz_{name}.c", engine), engine, seeds_of(name), options.seconds)
        except c_tests.BuildError as error:
            held, report = False, str(error)
        print(f"{'ok    ' if held else 'FAILED'} {name} ({engine}): {report}", flush=True)
        failed = failed or not held
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
