"""AWQ (Lin et al., 2023): input channels that carry large activations get finer steps.

Multiplying column k of W by s[k] and dividing channel k of its input by it changes nothing but the rounding: the column's
error shrinks by s[k] as long as it does not set its group's range. s is searched on one curve through the mean
activations and the mean weights; the loss of a candidate is that of the layer's outputs over the calibration,
tr(d H d') with H = X'X / tokens and d the rounding errors, so that no activations need to be kept.
"""

from __future__ import annotations

from typing import Any

from .arrays import Arrays
from .grid import GridSpec, plain_grid, round_trip, spread

RATIOS = 20
_ROWS = 4096  # of d at a time


def output_error(a: Arrays, wrong: Any, hessian: Any) -> float:
    """The mean squared error of the outputs that weight errors (rows, k) cause, summed over rows."""
    total = 0.0
    for first in range(0, wrong.shape[0], _ROWS):
        part = wrong[first : first + _ROWS]
        total += float(((part @ hessian) * part).sum())
    return total


def mean_weights(a: Arrays, weights: Any, group_size: int) -> Any:
    """(k): how large a column is in its groups, 0 to 1, averaged over rows."""
    groups = abs(weights).reshape(weights.shape[0], -1, group_size)
    top = a.xp.amax(groups, axis=2, keepdims=True)
    return (groups / (top + 1e-6)).reshape(weights.shape).mean(0)


def candidate(a: Arrays, mean_inputs: Any, mean_weight: Any, ratio: float, both: bool) -> Any:
    """One point of the curve, scaled so that its largest and smallest values are reciprocal."""
    xp = a.xp
    scale = mean_inputs**ratio
    if both:
        scale = scale / (mean_weight ** (1 - ratio) + 1e-4)
    scale = xp.clip(scale, 1e-4, 1e4)
    return scale / float((xp.amax(scale) * xp.amin(scale)) ** 0.5)


def search_scales(
    a: Arrays, weights: Any, hessian: Any, mean_inputs: Any, group_size: int, spec: GridSpec
) -> tuple[Any, float]:
    """The best s (k) for weights (rows, k), the rows of all layers with this input, and its loss over that of s = 1."""
    mean_weight = mean_weights(a, weights, group_size)
    ones = a.xp.ones_like(mean_inputs)
    best, best_error = ones, plain_error(a, weights, ones, hessian, group_size, spec)
    first_error = best_error
    for i in range(1, RATIOS):
        for both in (True, False):
            scale = candidate(a, mean_inputs, mean_weight, i / RATIOS, both)
            error = plain_error(a, weights, scale, hessian, group_size, spec)
            if error < best_error:
                best, best_error = scale, error
    return best, best_error / first_error if first_error > 0 else 1.0


def plain_error(a: Arrays, weights: Any, scale: Any, hessian: Any, group_size: int, spec: GridSpec) -> float:
    scaled = weights * scale
    grid_scale, zero = plain_grid(a, scaled, group_size, spec)
    levels = spread(a, grid_scale, group_size), spread(a, zero, group_size)
    return output_error(a, round_trip(a, scaled, *levels, spec) / scale - weights, hessian)
