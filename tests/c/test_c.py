"""Every C test as a pytest test: one for each file and sanitizer. See run.py for how they are built."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys

import pytest

_spec = importlib.util.spec_from_file_location("qf_c_tests_run", pathlib.Path(__file__).with_name("run.py"))
runner = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = runner  # dataclasses look their module up by name
_spec.loader.exec_module(runner)

VARIANTS = [variant for name in runner.test_names() for variant in runner.variants(name)]


def test_there_are_c_tests():
    assert VARIANTS


@pytest.fixture(scope="module")
def finished(ahead):
    """{variant: the future of its status and output}: as many are built and run at once as there are CPUs."""
    return ahead("finished", "variant", lambda variant: runner.run(variant, runner.build(variant)))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.label)
def test_c(variant, finished):
    prefix, reason = runner.launcher(variant.sanitizer)
    if prefix is None:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    status, output = finished[variant].result()
    assert status == 0, output
