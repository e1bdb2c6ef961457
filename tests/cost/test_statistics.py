"""Intervals, percentiles and knees against cases worked out by hand or by a table."""

from __future__ import annotations

import math
import random

import pytest

from qwen_fast.cost.statistics import difference, interval, knee, line, percentile, student_t95


def test_student_t_is_the_table_and_goes_on_smoothly():
    for degrees, expected in ((1, 12.706), (4, 2.776), (30, 2.042), (40, 2.021), (60, 2.000), (120, 1.980)):
        assert student_t95(degrees) == pytest.approx(expected, abs=6e-4)
    with pytest.raises(ValueError, match="degrees must be at least 1"):
        student_t95(0)


def test_interval_by_hand():
    """2, 4, 6: mean 4, variance 4, so 4.303 x sqrt(4 / 3) = 4.969 to each side."""
    found = interval([2.0, 4.0, 6.0])
    assert (found.mean, found.n) == (4.0, 3)
    assert found.high - found.mean == pytest.approx(4.303 * math.sqrt(4 / 3))
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert interval([]) is None
    assert interval([5.0]).low is None and interval([5.0]).mean == 5.0


def test_intervals_cover_as_often_as_they_say():
    draw = random.Random(1)
    hits = 0
    for _ in range(2000):
        found = interval([draw.gauss(10, 3) for _ in range(4)])
        hits += found.low <= 10 <= found.high
    assert 0.93 < hits / 2000 < 0.97


def test_welch_by_hand():
    """1, 3 and 10, 14: means 2 and 12, variances 2 and 8 over 2 each are 1 and 4; 5^2 / (1 + 16) = 1.47 -> 1 degree."""
    found = difference([10.0, 14.0], [1.0, 3.0])
    assert found.mean == 10.0
    assert found.high - found.mean == pytest.approx(12.706 * math.sqrt(5))
    assert difference([1.0], [2.0, 3.0]).low is None
    assert difference([], [1.0]) is None
    same = difference([2.0, 2.0], [1.0, 1.0])
    assert (same.low, same.mean, same.high) == (1.0, 1.0, 1.0)


def test_percentiles_are_values_that_came():
    values = [float(i) for i in range(1, 101)]
    assert percentile(values, 0.99) == 99.0
    assert percentile(values, 0.5) == 50.0
    assert percentile(values, 1.0) == 100.0
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    for share in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match="share must be above 0"):
            percentile(values, share)
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_line_and_knee():
    intercept, slope, residual = line([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)])
    assert (intercept, slope) == (pytest.approx(1.0), pytest.approx(2.0)) and residual == pytest.approx(0.0)
    with pytest.raises(ValueError, match="two different x"):
        line([(1.0, 1.0), (1.0, 2.0)])
    bent = [
        (float(x), 10.0 + 0.01 * x if x <= 1000 else 20.0 + 0.1 * (x - 1000)) for x in (100, 400, 700, 1000, 2000, 4000)
    ]
    found = knee(bent)
    assert found.at == pytest.approx(1000, rel=0.01)
    assert (found.before, found.after) == (pytest.approx(0.01), pytest.approx(0.1))
    assert knee([(float(x), 3.0 + 0.5 * x) for x in range(8)]) is None  # one line fits
    assert knee([(float(x), min(x, 4.0)) for x in range(8)]) is None  # it flattens: no knee in this sense
    assert knee(bent[:4]) is None  # too few points
