"""Builds and runs the C tests: `python tests/c/run.py [name...] [--sanitizer address|thread|none] [--keep]`.

A test is a file tests/c/test_<name>.c; comments at its top say how to build it (paths relative to csrc):

    /* sources: base/status.c base/alloc.c */  or whole folders: model/
    /* sanitizers: address thread */     address = ASan + UBSan, thread = TSan; one build for each
    /* alloc-faults: yes */              one more ASan build in which alloc_fault.c replaces base/alloc.c

A source that never goes without another says so itself (`/* needs: base/json_scan.c */`), and tests need not list that.
Objects are cached in build/c-tests by compiler, flags and the times of everything they include, so running again
is quick, and several runs at once do not disturb each other.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "c-tests"

# -g1: the lines of a report; gcc would take four times as long to follow variables through sanitized code.
CFLAGS = (
    "-std=c11 -D_GNU_SOURCE -DQF_CHECK_INVARIANTS -g1 -O1 -Wall -Wextra -Wconversion -Wshadow -Werror "
    "-ffp-contract=off -pthread"
).split()
LIBRARIES = ["-pthread", "-lm", "-ldl"]
SANITIZER_FLAGS = {
    "none": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread", "-fno-omit-frame-pointer"],
}
SANITIZER_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}
RUN_TIMEOUT_S = 300


class BuildError(Exception):
    """The compiler or linker refused; the text is what it said."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One build of one test."""

    name: str
    sanitizer: str
    alloc_faults: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}-{self.sanitizer}" + ("-faults" if self.alloc_faults else "")


def compiler() -> list[str] | None:
    """The command of the C compiler (CC from the environment, else cc), or None if there is none."""
    command = shlex.split(os.environ.get("CC", "cc"))
    return command if command and shutil.which(command[0]) else None


def read_tags(path: pathlib.Path) -> dict[str, list[str]]:
    """The words after `sources:`, `sanitizers:`, `alloc-faults:` and `needs:` in the comments of a C file."""
    tags: dict[str, list[str]] = {}
    for match in re.finditer(r"/\*\s*(sources|sanitizers|alloc-faults|needs):(.*?)\*/", path.read_text(), re.DOTALL):
        tags.setdefault(match[1], []).extend(match[2].replace("*", " ").split())
    return tags


def read_sources(path: pathlib.Path) -> list[str]:
    """What a test links: its `sources:`, and what each of these says it `needs:` in turn."""
    names = []
    for name in read_tags(path).get("sources", []):
        folder = sorted(str(source.relative_to(CSRC)) for source in (CSRC / name).glob("*.c")) if name[-1] == "/" else []
        names.extend(folder or [name])
    for name in names:  # grows while it is walked
        if not (CSRC / name).exists():
            raise BuildError(f"{path.name}: there is no csrc/{name}")
        names.extend(needed for needed in read_tags(CSRC / name).get("needs", []) if needed not in names)
    return names


def test_names() -> list[str]:
    return sorted(path.stem.removeprefix("test_") for path in TESTS.glob("test_*.c"))


def variants(name: str) -> list[Variant]:
    tags = read_tags(TESTS / f"test_{name}.c")
    result = [Variant(name, sanitizer) for sanitizer in tags.get("sanitizers", ["address"])]
    if tags.get("alloc-faults") == ["yes"]:
        result.append(Variant(name, "address", alloc_faults=True))
    for variant in result:
        if variant.sanitizer not in SANITIZER_FLAGS:
            raise BuildError(f"test_{name}.c: unknown sanitizer {variant.sanitizer!r}")
    return result


@functools.cache
def launcher(sanitizer: str) -> tuple[list[str] | None, str]:
    """What to put before a program of this sanitizer, or None and the reason why it cannot run here.

    ThreadSanitizer cannot map its shadow under some kernels' address randomisation: then setarch -R switches it off.
    """
    command = compiler()
    if command is None:
        return None, "no C compiler (CC or cc)"
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "probe.c")
        source.write_text("int main(void) { return 0; }\n")
        program = source.with_suffix("")
        build = [*command, *SANITIZER_FLAGS[sanitizer], "-pthread", str(source), "-o", str(program)]
        if subprocess.run(build, capture_output=True, timeout=120).returncode != 0:
            return None, f"{command[0]} has no runtime for the {sanitizer} sanitizer"
        for prefix in ([], ["setarch", platform.machine(), "-R"]):
            if prefix and not shutil.which(prefix[0]):
                continue
            run = subprocess.run([*prefix, str(program)], capture_output=True, timeout=60)
            if run.returncode == 0:
                return prefix, ""
    return None, f"a program built with the {sanitizer} sanitizer does not start here"


def compile_object(source: pathlib.Path, flags: list[str], command: list[str] | None = None) -> pathlib.Path:
    """Compiles one file unless the cached object is newer than all that went into it."""
    command = command or compiler()
    if command is None:
        raise BuildError("no C compiler (CC or cc)")
    if not source.exists():
        raise BuildError(f"{source} does not exist")
    BUILD.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr((str(source), command, flags)).encode()).hexdigest()[:16]
    target = BUILD / f"{source.stem}-{key}.o"
    depends = target.with_suffix(".d")
    if is_fresh(target, depends):
        return target
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        object_file = pathlib.Path(folder, "out.o")
        start = pathlib.Path(folder, "start")
        start.touch()
        includes = [f"-I{path}" for path in (CSRC, CSRC / "include", TESTS)]
        run_compiler([*command, *flags, *includes, "-MMD", "-c", str(source), "-o", str(object_file)])
        # Dated to when the compiler began: a file that is edited meanwhile then counts as newer.
        begun = start.stat().st_mtime_ns
        os.utime(object_file, ns=(begun, begun))
        os.replace(object_file.with_suffix(".d"), depends)
        os.replace(object_file, target)
    return target


def is_fresh(target: pathlib.Path, depends: pathlib.Path) -> bool:
    try:
        built = target.stat().st_mtime_ns
        needed = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        return all(os.stat(path).st_mtime_ns < built for path in needed)
    except (OSError, IndexError):
        return False


def run_compiler(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if run.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{run.stdout}{run.stderr}")


def link(
    objects: list[pathlib.Path], flags: list[str], program: pathlib.Path, command: list[str] | None = None
) -> pathlib.Path:
    command = command or compiler()
    if command is None:
        raise BuildError("no C compiler (CC or cc)")
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        out = pathlib.Path(folder, "program")
        run_compiler([*command, *flags, *map(str, objects), *LIBRARIES, "-o", str(out)])
        os.replace(out, program)
    return program


def compilations(variant: Variant) -> list[tuple[pathlib.Path, list[str]]]:
    """What a variant links: files and the flags of each."""
    source = TESTS / f"test_{variant.name}.c"
    flags = [*CFLAGS, *SANITIZER_FLAGS[variant.sanitizer]]
    fault_alloc = {"base/alloc.c": TESTS / "alloc_fault.c"} if variant.alloc_faults else {}
    paths = [fault_alloc.get(name, CSRC / name) for name in read_sources(source)]
    test_flags = [*flags, "-DCHECK_ALLOC_FAULTS"] if variant.alloc_faults else flags
    return [*((path, flags) for path in paths), (source, test_flags)]


def build(variant: Variant) -> pathlib.Path:
    """Builds one variant and returns the program. Raises BuildError with the compiler's words."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda one: compile_object(*one), compilations(variant)))
    return link(objects, [*CFLAGS, *SANITIZER_FLAGS[variant.sanitizer]], BUILD / variant.label)


def compile_all(chosen: list[Variant]) -> None:
    """Every object of these, once. What the compiler refuses is left for build() to report; SIGTERM ends it when the
    files under way are done."""
    jobs = dict.fromkeys((path, *flags) for variant in chosen for path, flags in compilations(variant))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, *flags in jobs:
            pool.submit(compile_object, path, flags)
        signal.signal(signal.SIGTERM, lambda *_: pool.shutdown(wait=False, cancel_futures=True))


def run(variant: Variant, program: pathlib.Path) -> tuple[int, str]:
    """Runs a built test: its exit status (-1 where it ran too long) and all that it printed."""
    prefix, reason = launcher(variant.sanitizer)
    if prefix is None:
        raise BuildError(reason)
    environment = {**os.environ, **SANITIZER_ENVIRONMENT}
    try:
        done = subprocess.run(
            [*prefix, str(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
            timeout=RUN_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        return -1, (error.stdout or b"").decode(errors="replace") + f"\nran for more than {RUN_TIMEOUT_S} s"
    return done.returncode, done.stdout.decode(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds and runs the C tests.")
    parser.add_argument("names", nargs="*", help="tests by name (threads, json, ...); all where none is given")
    parser.add_argument("--sanitizer", choices=sorted(SANITIZER_FLAGS), help="only this one, asked for or not")
    parser.add_argument("--keep", action="store_true", help="print the path of each program that was built")
    parser.add_argument("--compile", action="store_true", help="fill the cache of objects and run nothing")
    options = parser.parse_args()
    failed = 0
    ahead: list[Variant] = []
    for name in options.names or test_names():
        name = pathlib.Path(name).stem.removeprefix("test_")
        if not (TESTS / f"test_{name}.c").exists():
            parser.error(f"there is no test called {name!r}; there are: {', '.join(test_names())}")
        chosen = variants(name)
        if options.sanitizer:
            chosen = [v for v in chosen if v.sanitizer == options.sanitizer] or [Variant(name, options.sanitizer)]
        if options.compile:
            ahead += chosen
            continue
        for variant in chosen:
            try:
                program = build(variant)
                status, output = run(variant, program)
            except BuildError as error:
                status, output = 1, str(error)
            summary = output.strip().splitlines()[-1] if output.strip() else ""
            print(f"{'ok    ' if status == 0 else 'FAILED'} {variant.label}: {summary}", flush=True)
            if options.keep and (BUILD / variant.label).exists():
                print(f"       {BUILD / variant.label}")
            if status != 0:
                failed += 1
                print(output, flush=True)
    compile_all(ahead)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
