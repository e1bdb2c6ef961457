"""Intervals and tests against other ways to come to them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from qwen_fast.quality.statistics import Bootstrap, ends, estimate, no_difference_bound, shares, sign_test, wilson


@pytest.mark.parametrize(("right", "rows"), [(0, 1), (1, 1), (0, 40), (40, 40), (37, 40), (1, 3), (592, 600)])
def test_wilsons_ends_solve_its_equation(right, rows):
    """The ends are the shares p0 from which the found one is 1.96 standard errors (of p0) away."""
    share = right / rows
    for end in wilson(right, rows):
        error = math.sqrt(end * (1 - end) / rows)
        assert abs(share - end) == pytest.approx(1.959964 * error, rel=1e-5, abs=1e-12) or end in (0.0, 1.0)
    low, high = wilson(right, rows)
    assert 0 <= low <= share <= high <= 1
    assert (low == 0) == (right == 0) and (high > 1 - 1e-12) == (right == rows)


def test_wilson_of_a_textbook():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I, method 3


@pytest.mark.parametrize("changed", [0, 1, 2, 5, 8, 33])
def test_the_sign_test_counts_all_splits(changed):
    """Two-sided by summing every split that is at most as likely as the one found, in exact fractions."""
    for fixed in range(changed + 1):
        weights = [Fraction(math.comb(changed, k), 2**changed) for k in range(changed + 1)]
        expected = sum(one for one in weights if one <= weights[fixed])
        assert sign_test(fixed, changed - fixed) == pytest.approx(float(expected), rel=1e-12)


def test_the_bound_where_nothing_differs_is_clopper_pearsons():
    for rows in (1, 4, 40, 600):
        bound = no_difference_bound(rows)
        assert (1 - bound) ** rows == pytest.approx(0.025)


def test_draws_keep_the_strata_and_the_seed():
    bootstrap = Bootstrap([3, 5], 1300, seed=7)
    counts = np.concatenate(list(bootstrap.counts()))
    assert counts.shape == (1300, 8)
    assert (counts[:, :3].sum(axis=1) == 3).all() and (counts[:, 3:].sum(axis=1) == 5).all()
    assert np.array_equal(counts, np.concatenate(list(Bootstrap([3, 5], 1300, seed=7).counts())))
    assert not np.array_equal(counts, np.concatenate(list(Bootstrap([3, 5], 1300, seed=8).counts())))
    assert counts.mean(axis=0) == pytest.approx(np.ones(8), abs=0.1)
    assert counts.var(axis=0)[3:] == pytest.approx(np.full(5, 5 * 0.2 * 0.8), abs=0.12)  # binomial


def test_sums_and_quantiles_are_those_of_the_drawn_rows():
    generator = np.random.default_rng(0)
    values, blocks = generator.normal(size=50), np.repeat(np.arange(10), 5)
    bootstrap = Bootstrap([10], 40, seed=3)
    sums = bootstrap.sums(np.bincount(blocks, values)[:, None])
    found = bootstrap.quantiles(values, blocks, (0.5, 0.9))
    for index, counts in enumerate(np.concatenate(list(bootstrap.counts()))):
        drawn = np.sort(
            np.concatenate([values[blocks == block].repeat(int(count)) for block, count in enumerate(counts)])
        )
        assert sums[index, 0] == pytest.approx(drawn.sum())
        assert found[index].tolist() == [drawn[math.ceil(0.5 * 50) - 1], drawn[math.ceil(0.9 * 50) - 1]]


def test_a_paired_difference_against_a_plain_loop():
    generator = np.random.default_rng(1)
    ours, theirs = generator.integers(0, 2, 60), generator.integers(0, 2, 60)
    ones = np.ones(60)
    found = shares(Bootstrap([60], 4000, seed=5), {"exact": (ours, ones, theirs, ones)})["exact"]
    assert found["measured"]["value"] == ours.mean() and found["reference"]["value"] == theirs.mean()
    assert found["difference"]["value"] == pytest.approx(ours.mean() - theirs.mean())
    draws = []
    for _ in range(4000):
        chosen = generator.integers(0, 60, 60)
        draws.append((ours[chosen] - theirs[chosen]).mean())
    assert (found["difference"]["low"], found["difference"]["high"]) == pytest.approx(
        np.quantile(draws, [0.025, 0.975]), abs=0.02
    )
    assert (found["measured"]["low"], found["measured"]["high"]) == wilson(int(ours.sum()), 60)


def test_a_pair_is_narrower_than_two_separate_samples():
    """Rows that are hard for both cancel: 300 rows, of which both miss the same 150, and one model three more."""
    theirs = np.repeat([0, 1], 150)
    ours = theirs.copy()
    ours[-3:] = 0
    ones = np.ones(300)
    gap = shares(Bootstrap([300], 2000, 1), {"x": (ours, ones, theirs, ones)})["x"]["difference"]
    alone = 2 * 1.96 * math.sqrt(2 * 0.25 / 300)
    assert gap["value"] == pytest.approx(-0.01) and gap["high"] <= 0 and gap["high"] - gap["low"] < alone / 5


def test_what_cannot_differ_and_what_is_not_there():
    ones, nothing = np.ones(40), np.zeros(40)
    found = shares(
        Bootstrap([40], 200, 1), {"same": (ones, ones, ones, ones), "none": (nothing, nothing, nothing, nothing)}
    )
    bound = no_difference_bound(40)
    assert found["same"]["difference"] == {"value": 0.0, "low": -bound, "high": bound}
    assert found["same"]["measured"]["value"] == 1 and found["same"]["measured"]["low"] == pytest.approx(
        0.912, abs=1e-3
    )
    assert found["none"]["difference"] == {"value": None, "low": None, "high": None}
    # All of several fields right in every row: the rows are the units, not the fields.
    many = shares(Bootstrap([40], 200, 1), {"fields": (5 * ones, 5 * ones, 5 * ones, 5 * ones)})["fields"]
    assert many["measured"]["low"] == pytest.approx(wilson(40, 40)[0])


def test_intervals_cover_what_is_true():
    """Of 300 samples of 150 rows, about 95 % of the intervals hold the true difference, -0.05."""
    generator = np.random.default_rng(11)
    ones = np.ones(150)
    inside = 0
    for index in range(300):
        luck = generator.random(150)
        theirs = luck < 0.8
        ours = (luck < 0.7) | ((luck > 0.9) & (generator.random(150) < 0.5))  # paired, and fixed rows too
        gap = shares(Bootstrap([150], 400, index), {"x": (ours, ones, theirs, ones)})["x"]["difference"]
        inside += gap["low"] <= -0.05 <= gap["high"]
    assert 272 <= inside <= 297  # 95 % is 285; three standard errors and a little for the percentiles


def test_ends_leave_out_what_does_not_exist_and_estimates_are_finite():
    assert ends(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
    assert ends(np.array([np.nan])) == (None, None)
    assert estimate(math.inf, 1.0, math.nan) == {"value": None, "low": 1.0, "high": None}


@pytest.mark.parametrize(("strata", "draws"), [([], 10), ([3, 0], 10), ([3], 0)])
def test_no_bootstrap_of_nothing(strata, draws):
    with pytest.raises(ValueError, match="a bootstrap needs"):
        Bootstrap(strata, draws, 1)
