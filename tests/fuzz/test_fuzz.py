"""Fuzzes every target for a few seconds, and for a minute each under `-m long`. See run.py."""

from __future__ import annotations

import importlib.util
import os
import pathlib

import pytest

_spec = importlib.util.spec_from_file_location("qf_fuzz_run", pathlib.Path(__file__).with_name("run.py"))
runner = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runner)


def best_engine() -> str:
    available = runner.engines()
    if not available:
        if os.environ.get("CI") == "true":
            pytest.fail("no compiler with AddressSanitizer")
        pytest.skip("no compiler with AddressSanitizer")
    return available[0]


def fuzz(name: str, seconds: int) -> tuple[bool, str]:
    engine = best_engine()
    program = runner.build(runner.FUZZ / f"fuzz_{name}.c", engine)
    return runner.fuzz(program, engine, runner.seeds_of(name), seconds)


@pytest.mark.parametrize("name", runner.targets())
def test_every_target_has_seeds(name):
    assert runner.seeds_of(name)


@pytest.fixture(scope="module")
def fuzzed(ahead):
    """{name: the future of a few seconds' fuzzing}: as many targets at once as there are CPUs."""
    return ahead("fuzzed", "name", lambda name: fuzz(name, 5))


@pytest.mark.parametrize("name", runner.targets())
def test_fuzz(name, fuzzed):
    best_engine()
    held, report = fuzzed[name].result()
    assert held, report


@pytest.mark.long
@pytest.mark.parametrize("name", runner.targets())
def test_fuzz_long(name):
    held, report = fuzz(name, 60)
    assert held, report


# Reads one byte too many for inputs that begin with "[1]": close to one of the seeds below.
PLANTED = """
#include <stddef.h>
#include <stdint.h>
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    volatile uint8_t sink = 0;
    if (size >= 3 && data[0] == '[' && data[1] == '1' && data[2] == ']') {
        sink = data[size];
    }
    return sink & 0;
}
"""


@pytest.mark.parametrize("engine", ["libfuzzer", "driver"])
def test_the_fuzzer_finds_a_planted_error(engine, tmp_path):
    if engine not in runner.engines():
        pytest.skip(f"no compiler here builds {engine}")
    target = tmp_path / "fuzz_planted.c"
    target.write_text(PLANTED)
    seed = tmp_path / "seed"
    seed.write_bytes(b"[1,")
    program = runner.build(target, engine)
    held, report = runner.fuzz(program, engine, [seed], 60)
    assert not held
    assert "heap-buffer-overflow" in report
    reproducer = bytes.fromhex(report.splitlines()[-1])
    assert reproducer.startswith(b"[1]")
