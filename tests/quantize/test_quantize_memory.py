"""What a run says of the memory it took."""

from __future__ import annotations

import mmap

import pytest

from qwen_fast.quantize import memory
from qwen_fast.quantize.memory import PeakMemory


def test_sees_what_is_allocated_and_given_back():
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:  # pages that nobody had
            block.write(b"\1" * (64 << 20))
            memory.threading.Event().wait(10 * memory.INTERVAL_S)
    if before.own_bytes is None:
        pytest.skip("this system does not say what a process allocated")
    assert peak.own_bytes >= before.own_bytes + (48 << 20)
    assert peak.resident_bytes >= peak.own_bytes // 2


def test_says_nothing_where_the_system_does_not(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "absent")
    with PeakMemory() as peak:
        pass
    assert peak.own_bytes is None
    assert peak.resident_bytes > 0
