"""GPTQ (Frantar et al., 2022): columns are rounded one after the other, and what each rounding gets wrong is made good by
the columns that are not rounded yet, as the inputs of the calibration say.

With H = X'X / tokens (damped) and U upper triangular, U'U = H^-1, rounding column i of W with the error e = (w - q) / U[i, i]
changes the later columns by -e U[i, i+1:]. Columns go in blocks: a block's own update at once, the rest of the matrix
after the block. The weights are held transposed, (columns, rows), so that a column is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arrays import Arrays, invert_lower
from .grid import GridSpec, best_grid, codes_of

BLOCK = 128  # columns
ORDERS = ("weight", "group", "none")  # how columns are ordered: see quantize_gptq


@dataclass
class Quantized:
    """w (rows, k) is about scales[:, groups] * (codes - zeros[:, groups]). groups: (k) each column's group."""

    codes: Any
    scales: Any
    zeros: Any
    groups: Any


def inverse_factor(a: Arrays, hessian: Any, damp: float) -> tuple[Any, float]:
    """U with U'U = (H + damp * mean(diag H))^-1, and the damping that it took: more where H is too close to singular.
    hessian is overwritten."""
    xp = a.xp
    mean = float(xp.diagonal(hessian).mean())
    index = xp.arange(hessian.shape[0])
    added = 0.0
    while True:
        hessian[index, index] += (damp - added) * mean
        added = damp
        # H = R R' with R upper comes from the Cholesky factor of H with rows and columns reversed; then U = R^-1.
        lower = a.cholesky(xp.flip(hessian, (0, 1)))
        if lower is not None:
            return xp.flip(invert_lower(a, lower), (0, 1)), damp
        if damp >= 1.0:
            raise ArithmeticError("the Hessian of a linear layer is not positive definite: its inputs are not finite")
        damp = min(1.0, 2 * damp)


def quantize_gptq(
    a: Arrays, weights: Any, hessian: Any, group_size: int, spec: GridSpec, order: str = "weight", damp: float = 0.01
) -> tuple[Quantized, float]:
    """weights (rows, k); hessian (k, k), which is overwritten; group_size divides k.

    order: columns with large inputs first, which have the most to lose. "weight": groups stay runs of neighbouring
    columns, with grids taken from the weights before any update; "group": groups are formed in the new order (g_idx,
    desc_act); "none": left to right. Returns the codes and the damping used.
    """
    xp, k = a.xp, weights.shape[1]
    dead = xp.diagonal(hessian) == 0
    index = xp.arange(k)
    hessian[index, index] += xp.where(dead, 1.0, 0.0)
    weights = xp.where(dead[None, :], xp.zeros_like(weights), weights)
    fixed = best_grid(a, weights, hessian, group_size, spec) if order == "weight" or group_size == k else None
    groups = a.asarray(_range(k)) // group_size
    perm = None
    if order != "none":
        perm = a.descending(xp.diagonal(hessian))
        weights, hessian = weights[:, perm], hessian[perm][:, perm]
        if order == "group":
            groups[perm] = a.asarray(_range(k)) // group_size
    sorted_groups = a.to_numpy(groups if perm is None else groups[perm]).tolist()
    blocks = None if fixed is not None else hessian + 0  # the factor overwrites it
    factor, damp = inverse_factor(a, hessian, damp)
    codes, scales, zeros = _columns(a, weights, factor, sorted_groups, group_size, spec, fixed, blocks)
    codes = codes.T
    if perm is not None:
        restored = a.empty_like(codes)
        restored[:, perm] = codes
        codes = restored
    return Quantized(codes, scales, zeros, groups), damp


def _range(k: int) -> Any:
    import numpy as np

    return np.arange(k)


def _columns(
    a: Arrays, weights: Any, factor: Any, groups: list[int], group_size: int, spec: GridSpec, fixed: Any, hessian: Any
) -> tuple[Any, Any, Any]:
    """The loop over columns. fixed: (scales, zeros) known before, or None: each group's are found when it begins."""
    xp = a.xp
    wt = xp.ascontiguousarray(weights.T) if a.name == "numpy" else weights.T.contiguous()  # (k, rows)
    k, rows = wt.shape
    codes = a.empty_like(wt)
    if fixed is None:
        scales_t, zeros_t = a.zeros(k // group_size, rows), a.zeros(k // group_size, rows)
    else:
        scales_t, zeros_t = fixed[0].T + 0, fixed[1].T + 0
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        block, inner = wt[start:end], factor[start:end, start:end]
        wrong = a.empty_like(block)
        pivots = a.to_numpy(xp.diagonal(inner)).tolist()
        for i in range(end - start):
            if fixed is None and (start + i) % group_size == 0:
                _begin_group(a, wt, hessian, start + i, group_size, spec, scales_t, zeros_t)
            group, column = groups[start + i], block[i]
            scale, zero = scales_t[group], zeros_t[group]
            code = codes_of(a, column, scale, zero, spec)
            codes[start + i] = code
            wrong[i] = (column - (code - zero) * scale) / pivots[i]
            if i + 1 < end - start:
                block[i + 1 :] -= inner[i, i + 1 :, None] * wrong[i]
        if end < k:
            wt[end:] -= factor[start:end, end:].T @ wrong
    return codes, scales_t.T, zeros_t.T


def _begin_group(
    a: Arrays, wt: Any, hessian: Any, at: int, group_size: int, spec: GridSpec, scales_t: Any, zeros_t: Any
) -> None:
    """The grid of the group that begins at a column, from its weights as updated so far. A group longer than a block sees
    only the updates of the blocks before it."""
    end = at + group_size
    scale, zero = best_grid(a, wt[at:end].T, hessian[at:end, at:end], group_size, spec)
    scales_t[at // group_size], zeros_t[at // group_size] = scale[:, 0], zero[:, 0]
