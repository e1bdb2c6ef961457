"""Means with confidence intervals, percentiles, straight lines and knees, without numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1, 2, 3 ... degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval; low and high are None where there is one value only."""

    mean: float
    low: float | None
    high: float | None
    n: int


def student_t95(degrees: int) -> float:
    """Two-sided 95 % quantile; from 31 degrees on within 0.1 % by a series around the normal one."""
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1, got {degrees}")
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def interval(values: Sequence[float]) -> Interval | None:
    """Student's t over independent values; None where there are none."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = student_t95(n - 1) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half, n)


def difference(after: Sequence[float], before: Sequence[float]) -> Interval | None:
    """Mean of `after` less mean of `before`, with Welch's interval; None where either is empty."""
    a, b = interval(after), interval(before)
    if a is None or b is None:
        return None
    gap = a.mean - b.mean
    if a.n < 2 or b.n < 2:
        return Interval(gap, None, None, min(a.n, b.n))
    spreads = []
    for values, mean in ((after, a.mean), (before, b.mean)):
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        spreads.append(variance / len(values))
    total = sum(spreads)
    if total == 0:
        return Interval(gap, gap, gap, min(a.n, b.n))
    degrees = total**2 / (spreads[0] ** 2 / (a.n - 1) + spreads[1] ** 2 / (b.n - 1))
    half = student_t95(max(1, math.floor(degrees))) * math.sqrt(total)
    return Interval(gap, gap - half, gap + half, min(a.n, b.n))


def percentile(values: Sequence[float], share: float) -> float:
    """By nearest rank: the smallest value that at least `share` (above 0, at most 1) of the values do not exceed."""
    if not values:
        raise ValueError("percentile of no values")
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Least squares: intercept, slope, and the sum of squared residuals. At least two different x."""
    n = len(points)
    mean_x, mean_y = math.fsum(x for x, _ in points) / n, math.fsum(y for _, y in points) / n
    across = math.fsum((x - mean_x) ** 2 for x, _ in points)
    if across == 0:
        raise ValueError("a line needs at least two different x")
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in points) / across
    intercept = mean_y - slope * mean_x
    return intercept, slope, math.fsum((y - intercept - slope * x) ** 2 for x, y in points)


@dataclass(frozen=True)
class Knee:
    """Where two lines meet. before, after: their slopes."""

    at: float
    before: float
    after: float


def knee(points: Sequence[tuple[float, float]], factor: float = 1.5, gain: float = 0.5) -> Knee | None:
    """The x from which y rises faster: the best fit of two lines, each over two points at least, that are continuous to
    the reader's eye: their crossing lies between the points that they part. None where two lines leave more than `gain`
    of the squared residuals of one, or where the second is not `factor` times as steep."""
    ordered = sorted(points)
    if len(ordered) < 5:
        return None
    whole = line(ordered)[2]
    best: tuple[float, Knee] | None = None
    for cut in range(2, len(ordered) - 1):
        left, right = line(ordered[:cut]), line(ordered[cut:])
        if right[1] == left[1]:
            continue
        at = (left[0] - right[0]) / (right[1] - left[1])
        if not ordered[cut - 2][0] <= at <= ordered[min(cut + 1, len(ordered) - 1)][0]:
            continue
        residual = left[2] + right[2]
        if best is None or residual < best[0]:
            best = residual, Knee(at, left[1], right[1])
    if best is None or best[0] > gain * whole or whole == 0:
        return None
    found = best[1]
    return found if found.after > factor * max(found.before, 0.0) and found.after > 0 else None
