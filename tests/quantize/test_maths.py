"""Grids, GPTQ and AWQ against small references in float64 that are written from the papers, not from the code."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qwen_fast.quantize import awq, gptq, grid
from qwen_fast.quantize.arrays import Arrays, TorchArrays, invert_lower

CPU = Arrays()
SPECS = [grid.GridSpec(4, False), grid.GridSpec(4, True), grid.GridSpec(8, False, 1), grid.GridSpec(4, False, 1)]


def problem(rows=24, k=128, tokens=400, seed=0):
    """Weights, and the Hessian of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) * 0.3 + np.eye(k)
    x = (rng.standard_normal((tokens, k)) @ mix) * np.exp(rng.standard_normal(k))
    return rng.standard_normal((rows, k)).astype(np.float32), (x.T @ x / tokens).astype(np.float32), x


def exact_in_both(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (values.astype(np.float16).astype(np.float32) == values).all() and (bits & 0xFFFF == 0).all()


# -- grids


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shift", [-5.0, -0.3, 0.0, 0.3, 5.0])
def test_plain_grid(spec, shift):
    """Codes and zeros in range, every weight within a step of its level (half a step, and what rounding the scale and the
    zero costs), scales exact in both 16-bit types."""
    weights = (np.random.default_rng(1).standard_normal((7, 96)) + shift).astype(np.float32)
    weights[2, :32] = 0
    scales, zeros = grid.plain_grid(CPU, weights, 32, spec)
    assert scales.shape == zeros.shape == (7, 3)
    assert exact_in_both(scales) and (scales > 0).all()
    assert ((zeros >= spec.min_zero) & (zeros <= spec.max_code) & (zeros == np.round(zeros))).all()
    if spec.symmetric:
        assert (zeros == 2 ** (spec.bits - 1)).all()
    wide = grid.spread(CPU, scales, 32), grid.spread(CPU, zeros, 32)
    codes = grid.codes_of(CPU, weights, *wide, spec)
    assert ((codes >= 0) & (codes <= spec.max_code)).all()
    steps = np.abs((codes - wide[1]) * wide[0] - weights) / wide[0]
    assert steps.max() < 1.1 + 0.005 * spec.max_code
    assert (grid.round_trip(CPU, weights, *wide, spec)[2, :32] == 0).all()


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_scales_of_any_size_are_exact_in_both_types(size):
    values = (np.abs(np.random.default_rng(2).standard_normal(1000)) * size).astype(np.float32)
    rounded = CPU.round_scales(values)
    assert exact_in_both(rounded)
    inside = (values > 2.0**-14) & (values < 65000)
    assert (np.abs(rounded - values)[inside] <= values[inside] * 2.0**-8).all()


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_best_grid_is_the_best_of_its_candidates(spec):
    weights, hessian, _ = problem(rows=5, k=64)
    weights[1, 3] = 9.0  # worth clipping
    scales, zeros = grid.best_grid(CPU, weights, hessian, 32, spec)
    clipped = 0
    for row, group in itertools.product(range(5), range(2)):
        part = weights[row, 32 * group : 32 * group + 32].astype(np.float64)
        block = hessian[32 * group : 32 * group + 32, 32 * group : 32 * group + 32].astype(np.float64)
        low, high = min(part.min(), 0), max(part.max(), 0)

        def loss(scale, zero, part=part, block=block):
            wrong = (np.clip(np.round(part / scale) + zero, 0, 15) - zero) * scale - part
            return wrong @ block @ wrong

        losses = []
        for i in range(20):
            share = 1 - i / 40
            scale = 2 * max(-low, high) * share / 15 if spec.symmetric else (high - low) * share / 15
            scale = float(CPU.round_scales(np.array([scale]))[0])
            losses.append(loss(scale, 8 if spec.symmetric else np.clip(np.round(-low * share / scale), 0, 15)))
        assert loss(scales[row, group], zeros[row, group]) <= min(losses) * (1 + 1e-4)
        clipped += np.argmin(losses) > 0
    assert clipped >= 3


# -- linear algebra


@pytest.mark.parametrize("n", [1, 255, 256, 257, 700])
def test_invert_lower(n):
    lower = np.tril(np.random.default_rng(n).standard_normal((n, n)) * 0.02) + np.eye(n)
    inverse = invert_lower(CPU, lower.astype(np.float32))
    assert np.abs(inverse @ lower - np.eye(n)).max() < 1e-4
    assert (np.triu(inverse, 1) == 0).all()


def test_inverse_factor_and_more_damping():
    _, hessian, _ = problem(k=96)
    damped = hessian.astype(np.float64) + 0.01 * np.diag(hessian).mean() * np.eye(96)
    factor, damp = gptq.inverse_factor(CPU, hessian.copy(), 0.01)
    assert damp == 0.01 and (np.tril(factor, -1) == 0).all()
    inverse = np.linalg.inv(damped)
    assert np.abs(factor.T.astype(np.float64) @ factor - inverse).max() < 1e-3 * np.abs(inverse).max()
    ones = np.ones((96, 96), np.float32) - 0.05 * np.eye(96, dtype=np.float32)  # not positive definite
    factor, damp = gptq.inverse_factor(CPU, ones, 0.01)
    assert 0.01 < damp <= 1 and np.isfinite(factor).all()
    with pytest.raises(ArithmeticError, match="not positive definite"):
        gptq.inverse_factor(CPU, np.full((8, 8), np.nan, np.float32), 0.01)


# -- GPTQ


def brain_surgeon(weights, hessian, scales, zeros, order, max_code, group_size):
    """The method as first written down (Optimal Brain Quantization with a fixed order): after each column the inverse of
    the Hessian over the columns that are left is taken anew."""
    w, k = weights.astype(np.float64).copy(), weights.shape[1]
    codes = np.zeros(w.shape)
    left = list(order)
    while left:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        i, group = left[0], left[0] // group_size
        codes[:, i] = np.clip(np.round(w[:, i] / scales[:, group]) + zeros[:, group], 0, max_code)
        wrong = w[:, i] - (codes[:, i] - zeros[:, group]) * scales[:, group]
        w[:, left] -= np.outer(wrong, inverse[0] / inverse[0, 0])
        left.pop(0)
    assert k == weights.shape[1]
    return codes


def output_loss(weights, approximation, x):
    return float((((approximation - weights) @ x.T) ** 2).mean())


def dequantized(found):
    return (found.codes - found.zeros[:, found.groups]) * found.scales[:, found.groups]


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_is_the_brain_surgeon(symmetric):
    weights, hessian, x = problem(rows=16, k=192, seed=4)
    spec = grid.GridSpec(4, symmetric)
    found, damp = gptq.quantize_gptq(CPU, weights, hessian.copy(), 64, spec)
    assert damp == 0.01
    damped = hessian.astype(np.float64) + 0.01 * np.diag(hessian).mean() * np.eye(192)
    order = np.argsort(-np.diag(hessian), kind="stable")
    expected = brain_surgeon(weights, damped, found.scales, found.zeros, order, 15, 64)
    same = (found.codes == expected).mean()
    theirs = (expected - found.zeros[:, found.groups]) * found.scales[:, found.groups]
    ours = output_loss(weights, dequantized(found), x)
    # One rounding that float32 decides otherwise changes what follows in its row: the loss must not notice.
    assert same > 0.9 and ours < 1.02 * output_loss(weights, theirs, x)
    plain = grid.best_grid(CPU, weights, hessian, 64, spec)
    wide = [grid.spread(CPU, one, 64) for one in plain]
    assert ours < 0.6 * output_loss(weights, grid.round_trip(CPU, weights, *wide, spec), x)


@pytest.mark.parametrize("order", gptq.ORDERS)
@pytest.mark.parametrize("group_size", [32, 128, 256])
def test_gptq_orders_and_groups(order, group_size):
    weights, hessian, x = problem(rows=8, k=256, seed=5)
    spec = grid.GridSpec(4, True)
    found, _ = gptq.quantize_gptq(CPU, weights, hessian.copy(), group_size, spec, order)
    assert found.codes.shape == (8, 256) and found.scales.shape == (8, 256 // group_size)
    assert (np.bincount(found.groups) == group_size).all()
    sorted_groups = (np.diff(found.groups) >= 0).all()
    assert sorted_groups == (order != "group" or group_size == 256)
    assert ((found.codes >= 0) & (found.codes <= 15)).all() and exact_in_both(found.scales)
    plain = [grid.spread(CPU, one, group_size) for one in grid.plain_grid(CPU, weights, group_size, spec)]
    rounded = output_loss(weights, grid.round_trip(CPU, weights, *plain, spec), x)
    assert output_loss(weights, dequantized(found), x) < 0.6 * rounded


def test_gptq_with_an_input_that_is_always_zero():
    weights, hessian, _ = problem(rows=4, k=64)
    hessian[5], hessian[:, 5] = 0, 0
    found, _ = gptq.quantize_gptq(CPU, weights, hessian, 32, grid.GridSpec(4, False))
    assert (dequantized(found)[:, 5] == 0).all() and np.isfinite(found.scales).all()


# -- AWQ


def test_awq_finds_the_scale_that_a_plain_search_finds():
    weights, hessian, x = problem(rows=12, k=64, seed=6)
    sizes = np.abs(x).mean(0).astype(np.float32)
    spec = grid.GridSpec(4, False)
    scale, gain = awq.search_scales(CPU, weights, hessian, sizes, 32, spec)
    w, best = weights.astype(np.float64), {}
    groups = np.abs(w).reshape(12, 2, 32)
    share = (groups / (groups.max(2, keepdims=True) + 1e-6)).reshape(12, 64).mean(0)
    for i, both in itertools.product(range(20), (True, False)):
        s = sizes.astype(np.float64) ** (i / 20)
        s = s / (share ** (1 - i / 20) + 1e-4) if both else s
        s = np.ones(64) if i == 0 else s / np.sqrt(s.max() * s.min())
        scaled = (w * s).astype(np.float32)
        wide = [grid.spread(CPU, one, 32) for one in grid.plain_grid(CPU, scaled, 32, spec)]
        best[output_loss(weights, grid.round_trip(CPU, scaled, *wide, spec) / s, x)] = s
    assert np.allclose(scale, best[min(best)], rtol=1e-3)
    plain = next(loss for loss, s in best.items() if (s == 1).all())
    assert gain < 0.9 and abs(gain / (min(best) / plain) - 1) < 1e-2


def test_the_loss_is_that_of_the_outputs():
    _, hessian, x = problem(rows=6, k=64)
    wrong = np.random.default_rng(3).standard_normal((6, 64)).astype(np.float32)
    expected = ((x @ wrong.T) ** 2).sum(1).mean()
    assert abs(awq.output_error(CPU, wrong, hessian) / expected - 1) < 1e-4


def test_wrong_scales_are_seen():
    """A control: the scales of other groups make the loss many times larger."""
    weights, hessian, x = problem(rows=6, k=128)
    weights *= np.repeat([1.0, 0.2, 3.0, 0.5], 32).astype(np.float32)
    found, _ = gptq.quantize_gptq(CPU, weights, hessian, 32, grid.GridSpec(4, False))
    right = output_loss(weights, dequantized(found), x)
    found.scales = found.scales[:, ::-1]
    assert output_loss(weights, dequantized(found), x) > 20 * right


# -- the same maths in torch


@pytest.mark.oracle
def test_torch_gives_what_numpy_gives():
    pytest.importorskip("torch")
    torch = TorchArrays("cpu")
    weights, hessian, x = problem(rows=16, k=256, seed=8)
    sizes = np.abs(x).mean(0).astype(np.float32)
    for order in gptq.ORDERS:
        spec = grid.GridSpec(4, order == "none")
        ours, _ = gptq.quantize_gptq(CPU, weights, hessian.copy(), 64, spec, order)
        theirs, _ = gptq.quantize_gptq(torch, torch.asarray(weights), torch.asarray(hessian.copy()), 64, spec, order)
        assert (ours.groups == torch.to_numpy(theirs.groups)).all()
        assert (torch.integers(theirs.codes) == ours.codes).mean() > 0.9
        other = gptq.Quantized(*(torch.to_numpy(getattr(theirs, n)) for n in ("codes", "scales", "zeros", "groups")))
        losses = [output_loss(weights, dequantized(one), x) for one in (ours, other)]
        assert abs(losses[1] / losses[0] - 1) < 0.03
    scale, gain = awq.search_scales(CPU, weights, hessian, sizes, 64, grid.GridSpec(4, False))
    other, other_gain = awq.search_scales(
        torch, torch.asarray(weights), torch.asarray(hessian), torch.asarray(sizes), 64, grid.GridSpec(4, False)
    )
    assert np.allclose(scale, torch.to_numpy(other), rtol=1e-4) and abs(gain - other_gain) < 1e-3
    values = np.abs(np.random.default_rng(1).standard_normal(4096)).astype(np.float32) * 1e-4
    assert (torch.to_numpy(torch.round_scales(torch.asarray(values))) == CPU.round_scales(values)).all()
