"""Grids: where the 2^bits levels of a group of weights lie, and which level each weight takes.

w is about scale * (q - zero), q and zero whole numbers from 0 to 2^bits - 1. A grid covers [low, high] with 0 inside;
a symmetric one has zero = 2^(bits - 1). Scales have 8 significant bits, so that files with float16 and with bfloat16 scales, and
readers that convert one to the other, all mean the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arrays import Arrays

CLIP_STEPS = 20  # ranges tried: 1, 1 - 1/40, ... of the full one
CLIP_STEP = 1 / 40
_CHUNK_VALUES = 1 << 25  # weights in one piece of the search: bounds its memory


@dataclass(frozen=True)
class GridSpec:
    """bits: 4 or 8. symmetric: zero points all alike. min_zero: 1 for files that store zero - 1 in as many bits."""

    bits: int = 4
    symmetric: bool = False
    min_zero: int = 0

    @property
    def max_code(self) -> int:
        return int(2**self.bits - 1)


def grid_of(a: Arrays, low: Any, high: Any, spec: GridSpec) -> tuple[Any, Any]:
    """Scales and zeros whose grids cover [low, high]; arrays of one shape, low <= 0 <= high."""
    xp, top = a.xp, spec.max_code
    if spec.symmetric:
        # Codes go from -2^(b-1) to 2^(b-1) - 1: the larger side decides, cut half a step short on the positive one.
        scale = 2 * xp.maximum(-low, high) / top
        zero = xp.zeros_like(scale) + 2 ** (spec.bits - 1)
    else:
        if spec.min_zero:
            low = xp.minimum(low, -high * (spec.min_zero / (top - spec.min_zero)))
        scale = (high - low) / top
        zero = None
    scale = a.round_scales(xp.where(scale > 0, scale, xp.ones_like(scale)))
    if zero is None:
        zero = xp.clip(xp.round(-low / scale), spec.min_zero, top)
    return scale, zero


def codes_of(a: Arrays, weights: Any, scale: Any, zero: Any, spec: GridSpec) -> Any:
    """The nearest levels, as float32 whole numbers. Shapes must broadcast."""
    return a.xp.clip(a.xp.round(weights / scale) + zero, 0, spec.max_code)


def round_trip(a: Arrays, weights: Any, scale: Any, zero: Any, spec: GridSpec) -> Any:
    return (codes_of(a, weights, scale, zero, spec) - zero) * scale


def range_of(a: Arrays, groups: Any) -> tuple[Any, Any]:
    """groups (rows, num_groups, group_size): its ends, with 0 inside; (rows, num_groups, 1)."""
    xp = a.xp
    low = xp.amin(groups, axis=2, keepdims=True)
    high = xp.amax(groups, axis=2, keepdims=True)
    return xp.minimum(low, xp.zeros_like(low)), xp.maximum(high, xp.zeros_like(high))


def plain_grid(a: Arrays, weights: Any, group_size: int, spec: GridSpec) -> tuple[Any, Any]:
    """Scales and zeros (rows, num_groups) over the full range of each group: round to nearest."""
    groups = weights.reshape(weights.shape[0], -1, group_size)
    scale, zero = grid_of(a, *range_of(a, groups), spec)
    return scale[:, :, 0], zero[:, :, 0]


def best_grid(a: Arrays, weights: Any, hessian: Any, group_size: int, spec: GridSpec) -> tuple[Any, Any]:
    """As plain_grid, over the part of each group's range that loses least: the error of its outputs over the calibration,
    d' H d with the group's own block H of the Hessian and d the rounding errors."""
    rows, k = weights.shape
    num_groups = k // group_size
    starts = range(0, k, group_size)
    blocks = a.xp.stack([hessian[i : i + group_size, i : i + group_size] for i in starts])
    scales, zeros = a.zeros(rows, num_groups), a.zeros(rows, num_groups)
    step = max(1, _CHUNK_VALUES // k)
    for first in range(0, rows, step):
        part = weights[first : first + step].reshape(-1, num_groups, group_size)
        scale, zero = _search(a, part, blocks, spec)
        scales[first : first + step], zeros[first : first + step] = scale, zero
    return scales, zeros


def _search(a: Arrays, groups: Any, blocks: Any, spec: GridSpec) -> tuple[Any, Any]:
    xp = a.xp
    low, high = range_of(a, groups)
    best_scale = best_zero = best = None
    for i in range(CLIP_STEPS):
        share = 1 - i * CLIP_STEP
        scale, zero = grid_of(a, low * share, high * share, spec)
        wrong = (round_trip(a, groups, scale, zero, spec) - groups).swapaxes(0, 1)  # (num_groups, rows, group_size)
        error = ((wrong @ blocks) * wrong).sum(-1).swapaxes(0, 1)
        scale, zero = scale[:, :, 0], zero[:, :, 0]
        if best is None:
            best_scale, best_zero, best = scale, zero, error
            continue
        better = error < best
        best_scale, best_zero = xp.where(better, scale, best_scale), xp.where(better, zero, best_zero)
        best = xp.where(better, error, best)
    return best_scale, best_zero


def spread(a: Arrays, per_group: Any, group_size: int) -> Any:
    """(rows, num_groups) to (rows, num_groups * group_size)."""
    rows, num_groups = per_group.shape
    wide = a.xp.broadcast_to(per_group[:, :, None], (rows, num_groups, group_size))
    return wide.reshape(rows, num_groups * group_size)
