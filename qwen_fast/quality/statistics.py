"""Intervals for paired measurements: the bootstrap over rows or blocks, Wilson's interval, the exact sign test.

Every interval is a two-sided 95 % one. The bootstrap draws whole rows (or blocks of text positions) with replacement; both
models' figures are taken from the same draw, so what a row makes hard for both cancels in their difference. Rows are drawn
within their task (stratified): a draw has as many rows of each task as the data. The ends are the 2.5 % and 97.5 %
percentiles of the draws (percentile method). A seed gives the same intervals on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEVEL = 0.95
Z95 = 1.959963984540054
_DRAWS_AT_ONCE = 500  # bounds the memory of the counts: rows x 500 x 8 bytes


class Bootstrap:
    """Draws of rows in strata, made anew from the seed at each use.

    strata: the number of rows of each stratum, in the order of the rows.
    """

    def __init__(self, strata: Sequence[int], draws: int, seed: int) -> None:
        if draws < 1 or any(size < 1 for size in strata) or not strata:
            raise ValueError(f"a bootstrap needs draws and rows: {draws} draws of strata {list(strata)}")
        self.strata, self.draws, self.seed = list(strata), draws, seed
        self.rows = sum(self.strata)

    def counts(self) -> Any:
        """Yields float64 (some draws, rows): how often each row is in a draw."""
        generator = np.random.Generator(np.random.PCG64(self.seed))
        left = self.draws
        while left > 0:
            some = min(left, _DRAWS_AT_ONCE)
            parts = [generator.multinomial(size, np.full(size, 1.0 / size), size=some) for size in self.strata]
            yield np.concatenate(parts, axis=1).astype(np.float64)
            left -= some

    def sums(self, values: np.ndarray) -> np.ndarray:
        """values: (rows, k). Their sums in each draw: (draws, k)."""
        values = np.asarray(values, dtype=np.float64)
        if values.shape[0] != self.rows:
            raise ValueError(f"{values.shape[0]} rows of values for a bootstrap of {self.rows}")
        return np.concatenate([counts @ values for counts in self.counts()])

    def quantiles(self, values: np.ndarray, blocks: np.ndarray, shares: Sequence[float]) -> np.ndarray:
        """Nearest-rank quantiles of values, each in the block (row of the bootstrap) that `blocks` names: (draws, shares)."""
        order = np.argsort(values, kind="stable")
        ordered, owner = np.asarray(values)[order], np.asarray(blocks)[order]
        found = []
        for counts in self.counts():
            for one in counts:
                reached = np.cumsum(one[owner])
                places = np.searchsorted(reached, np.asarray(shares) * reached[-1] - 1e-9)
                found.append(ordered[np.minimum(places, len(ordered) - 1)])
        return np.asarray(found)


def ends(draws: np.ndarray) -> tuple[float | None, float | None]:
    """The interval of a figure from its draws; draws in which it does not exist (0/0) are left out."""
    finite = draws[np.isfinite(draws)]
    if finite.size == 0:
        return None, None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def estimate(value: float | None, low: float | None, high: float | None) -> dict[str, float | None]:
    """A figure and its interval, as it stands in the JSON; what is not finite (a perplexity beyond floats) is not there."""
    ends_or_none = [one if one is not None and math.isfinite(one) else None for one in (value, low, high)]
    return dict(zip(("value", "low", "high"), ends_or_none))


Paired = tuple[Any, Any, Any, Any]  # one entry a row: numerators and denominators, measured, then of the reference


def shares(bootstrap: Bootstrap, figures: Mapping[str, Paired]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Ratios of sums, such as right fields of all fields, for two models on the same rows.

    For each figure the estimates `measured`, `reference` and `difference` (measured less reference); None where a
    denominator is zero. Where every row has the same pair in both, a bootstrap has nothing to draw: the difference's
    interval is then the bound on how many of all such rows could differ, see no_difference_bound.
    """
    columns = {
        name: np.stack([np.asarray(part, dtype=np.float64) for part in parts], axis=1)
        for name, parts in figures.items()
    }
    if not columns:
        return {}
    drawn = bootstrap.sums(np.concatenate(list(columns.values()), axis=1))
    return {name: _paired(one, drawn[:, 4 * i : 4 * i + 4]) for i, (name, one) in enumerate(columns.items())}


def _paired(columns: np.ndarray, drawn: np.ndarray) -> dict[str, dict[str, float | None]]:
    total = columns.sum(axis=0)
    if total[1] == 0 or total[3] == 0:
        nothing = estimate(None, None, None)
        return {"measured": nothing, "reference": nothing, "difference": nothing}
    with np.errstate(invalid="ignore", divide="ignore"):
        ours, theirs = drawn[:, 0] / drawn[:, 1], drawn[:, 2] / drawn[:, 3]
    value, base = float(total[0] / total[1]), float(total[2] / total[3])
    difference = estimate(value - base, *ends(ours - theirs))
    if np.array_equal(columns[:, :2], columns[:, 2:]):
        bound = no_difference_bound(int((columns[:, 1] > 0).sum()))
        difference = estimate(0.0, -bound, bound)
    return {
        "measured": _share(value, total[0], total[1], columns[:, 1], ours),
        "reference": _share(base, total[2], total[3], columns[:, 3], theirs),
        "difference": difference,
    }


def _share(value: float, top: float, bottom: float, bottoms: np.ndarray, draws: np.ndarray) -> dict[str, float | None]:
    """Wilson's interval where each row counts once (a bootstrap of 40 of 40 would claim certainty), and, with the rows as
    the units, where all or none of the parts are right; else the draws'."""
    if bottoms.max() <= 1 and 0 <= value <= 1:
        return estimate(value, *wilson(round(top), round(bottom)))
    if value in (0.0, 1.0):
        rows = int((bottoms > 0).sum())
        return estimate(value, *wilson(int(value) * rows, rows))
    return estimate(value, *ends(draws))


def wilson(right: int, rows: int) -> tuple[float, float]:
    """Wilson's score interval for `right` of `rows`."""
    if not 0 <= right <= rows or rows < 1:
        raise ValueError(f"{right} of {rows} is no share")
    share, spread = right / rows, Z95 * Z95 / rows
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    return max(0.0, middle - half), min(1.0, middle + half)


def no_difference_bound(rows: int) -> float:
    """Where none of `rows` differed: the largest share of differing rows under which that has still 2.5 % chance."""
    bound: float = 1.0 - ((1 - LEVEL) / 2) ** (1.0 / rows)
    return bound


def sign_test(fixed: int, broken: int) -> float:
    """McNemar's exact test: two-sided p of so uneven a split of the rows that changed, were both equally likely."""
    changed = fixed + broken
    if changed == 0:
        return 1.0
    tail = sum(math.comb(changed, k) for k in range(min(fixed, broken) + 1))
    return min(1.0, float(2 * tail / 2**changed))
