"""What of benchmarks/gpu_meter.py needs no GPU: reading ncu's table, the integral of power, whole windows of a counter."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu_meter

REPORT = """==PROF== Connected to process 7
{"steps": 1}
==PROF== Disconnected from process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","linear","dram__bytes_read.sum","byte","1,234,567"
"0","7","linear","dram__bytes_write.sum","byte","33"
"2","7","linear(qf_linear_args)","dram__bytes_read.sum","byte","1234567"
"2","7","linear(qf_linear_args)","dram__bytes_write.sum","byte","3"
"1","7","norm","dram__bytes_read.sum","byte","400"
"1","7","norm","sm__cycles.sum","cycle","5"
"1","7","norm","dram__bytes_write.sum","byte","0"
"""


def test_dram_bytes_are_added_up():
    assert gpu_meter.dram_bytes(REPORT) == {"linear": (2, 2_469_134, 36), "norm": (1, 400, 0)}


def test_other_units_and_missing_tables_are_refused():
    with pytest.raises(RuntimeError, match="Kbyte"):
        gpu_meter.dram_bytes(REPORT.replace('"byte","400"', '"Kbyte","400"'))
    with pytest.raises(RuntimeError, match="no table"):
        gpu_meter.dram_bytes("==ERROR== no permission")


def power(samples):
    found = gpu_meter.Power.__new__(gpu_meter.Power)  # without NVML
    found.samples = samples
    return found


def test_the_integral_of_power():
    steady = power([(0.02 * i, 250.0) for i in range(600)])
    assert steady.joules(1.0, 11.0) == pytest.approx(2500.0)
    rising = power([(0.02 * i, 100.0 + 10 * 0.02 * i) for i in range(600)])
    assert rising.joules(0.0, 10.0) == pytest.approx(1000 + 500, rel=1e-3)
    with pytest.raises(RuntimeError, match="samples of power"):
        steady.joules(20.0, 30.0)


def test_windows_begin_and_end_where_the_counter_moves():
    seen = [(0.05 * i, i // 2 * 100) for i in range(41)]
    first, last = gpu_meter.moves(seen)
    assert (first, last) == ((0.05 * 2, 100), (0.05 * 40, 2000))
    with pytest.raises(RuntimeError, match="moved 0 times"):
        gpu_meter.moves([(0.0, 5), (1.0, 5)])


def test_a_verdict_has_a_limit(capsys):
    assert gpu_meter.verdict("bytes", -0.05, 0.1)["agrees"] and not gpu_meter.verdict("bytes", 0.11, 0.1)["agrees"]
    assert "NOT within 10 %" in capsys.readouterr().out
