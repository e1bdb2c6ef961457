"""One layer: what its linears see in the calibration, and its weights to codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import Arrays
from .awq import search_scales
from .formats import linear_tensors
from .gptq import Quantized, quantize_gptq
from .grid import GridSpec, best_grid, codes_of, plain_grid, spread
from .model import INPUTS, LINEARS, NORMS, Layer, block_of
from .options import Options
from .tensors import Stored, from_array

ROWS_AT_ONCE = 4096
# Clipping is judged by a linear's own outputs. Those of q and k are only ever multiplied with each other, and the largest
# products count most: AWQ leaves their ranges whole, and on the demo model that is a little better, too.
UNCLIPPED = ("q_proj", "k_proj")


class Inputs:
    """X'X / tokens and mean |X| of one input, summed up as rows come."""

    def __init__(self, a: Arrays, k: int) -> None:
        self._a = a
        self._products, self._sizes = a.zeros(k, k), a.zeros(k)
        self._tokens = self._waiting = 0
        self._rows: list[Any] = []

    def add(self, rows: Any) -> None:
        """The engine may hand a layer's rows out in small pieces: products are taken of larger ones."""
        self._rows.append(self._a.copied(rows))
        self._waiting += rows.shape[0]
        if self._waiting >= ROWS_AT_ONCE:
            self._sum_up()

    def _sum_up(self) -> None:
        x = self._rows[0] if len(self._rows) == 1 else self._a.xp.concatenate(self._rows)
        self._rows, self._waiting = [], 0
        self._products += x.T @ x
        self._sizes += abs(x).sum(0)
        self._tokens += x.shape[0]

    def take(self) -> tuple[Any, Any]:
        """The Hessian (k, k) and the mean sizes (k)."""
        if self._rows:
            self._sum_up()
        self._products /= self._tokens
        return self._products, self._sizes / self._tokens


def collect(
    a: Arrays, layers: Any, hidden: np.ndarray, shapes: dict[str, tuple[int, int]], batch: int, keep: bool
) -> Any:
    """Runs the layer over hidden (sequences, tokens, hidden_size): {input: Inputs}. keep: hidden becomes the output."""
    found = {name: Inputs(a, shapes[name][1]) for name in INPUTS}
    run_layer(layers, hidden, batch, lambda _layer, linear, rows: found[linear].add(rows), keep)
    return found


def run_layer(layers: Any, hidden: np.ndarray, batch: int, tap: Callable[..., None] | None, keep: bool) -> None:
    """In calls of `batch` sequences."""
    count, length, width = hidden.shape
    for first in range(0, count, batch):
        rows = hidden[first : first + batch].reshape(-1, width)
        rows = rows if keep else rows.copy()
        layers.forward(0, 1, rows, [length] * (len(rows) // length), tap, tuple(INPUTS) if tap else None)
    if keep and not np.isfinite(hidden).all():
        raise ArithmeticError("the layer's outputs are not finite: no calibration is possible with this checkpoint")


@dataclass
class Result:
    """tensors by what follows "model.layers.N."; notes for the report."""

    tensors: dict[str, Stored]
    notes: dict[str, Any]


def quantize_layer(
    a: Arrays,
    layer: Layer,
    inputs: dict[str, Inputs] | None,
    options: Options,
    scale_dtype: str,
    step: Callable[[], None],
) -> Result:
    """step is called after each of the four inputs."""
    notes: dict[str, Any] = {}
    statistics = {} if inputs is None else {name: inputs.pop(name).take() for name in list(inputs)}
    if options.method == "awq":
        _fold(a, layer, statistics, options, notes)
    tensors: dict[str, Stored] = {}
    for name, linears in INPUTS.items():
        hessian = statistics.pop(name)[0] if statistics else None
        stacked = a.asarray(np.concatenate([layer.weights[linear] for linear in linears]))
        plain_rows = sum(layer.weights[linear].shape[0] for linear in UNCLIPPED) if name == "q_proj" else 0
        done, damp = _round(a, stacked, hessian, options, plain_rows)
        if damp > options.damp:
            notes[f"{name} damp"] = damp
        del stacked, hessian
        _store(a, layer, linears, done, options, scale_dtype, tensors)
        step()
    for name in NORMS:
        tensors[f"{name}.weight"] = from_array(layer.norms[name], layer.dtypes[name])
    kept = {f"{block_of(linear)}.weight" for linear in LINEARS} | set(tensors)
    tensors |= {name: stored for name, stored in layer.stored.items() if name not in kept}
    return Result(tensors, notes)


def _round(a: Arrays, weights: Any, hessian: Any, options: Options, plain_rows: int) -> tuple[Quantized, float]:
    """plain_rows: of AWQ, the first so many keep their full range."""
    k = weights.shape[1]
    size = k if options.group_size == -1 else options.group_size
    if options.method == "gptq":
        return quantize_gptq(a, weights, hessian, size, options.spec, options.act_order, options.damp)
    if hessian is None:
        scales, zeros = plain_grid(a, weights, size, options.spec)
    else:
        scales, zeros = best_grid(a, weights, hessian, size, options.spec)
        if plain_rows:
            scales[:plain_rows], zeros[:plain_rows] = plain_grid(a, weights[:plain_rows], size, options.spec)
    codes = codes_of(a, weights, spread(a, scales, size), spread(a, zeros, size), options.spec)
    return Quantized(codes, scales, zeros, a.asarray(np.arange(k)) // size), 0.0


def _store(
    a: Arrays, layer: Layer, linears: tuple[str, ...], done: Quantized, options: Options, scale_dtype: str,
    tensors: dict[str, Stored],
) -> None:  # fmt: skip
    codes, zeros, scales = a.integers(done.codes), a.integers(done.zeros), a.to_numpy(done.scales)
    groups = a.to_numpy(done.groups)
    first = 0
    for linear in linears:
        rows = slice(first, first + layer.weights[linear].shape[0])
        first = rows.stop
        tensors |= linear_tensors(
            options.format, block_of(linear), codes[rows], scales[rows], zeros[rows], groups, options.bits,
            options.symmetric, options.act_order == "group", scale_dtype,
        )  # fmt: skip


# -- AWQ: scales into the layer before


def _fold(a: Arrays, layer: Layer, statistics: dict[str, Any], options: Options, notes: dict[str, Any]) -> None:
    """Scales the columns of q, k, v, of gate and up, and of down; the norms and the rows of up take it back."""
    for name, norm in (("q_proj", NORMS[0]), ("gate_proj", NORMS[1]), ("down_proj", None)):
        linears = INPUTS[name]
        hessian, sizes = statistics[name]
        stacked = a.asarray(np.concatenate([layer.weights[linear] for linear in linears]))
        size = stacked.shape[1] if options.group_size == -1 else options.group_size
        scale, gain = search_scales(a, stacked, hessian, sizes, size, options.spec)
        scale = a.to_numpy(scale).astype(np.float32)
        if norm is not None:
            scale = layer.fold_norm(norm, scale)
        else:
            layer.weights["up_proj"] /= scale[:, None]
        for linear in linears:
            layer.weights[linear] *= scale
        held = a.asarray(scale)
        hessian /= held
        hessian /= held[:, None]
        notes[f"{name} gain"] = round(float(gain), 4)


def quantize_head(a: Arrays, stored: Stored, spec: GridSpec, group_size: int, scale_dtype: str) -> dict[str, Stored]:
    """The output head to nearest, a few thousand rows at a time."""
    from .tensors import to_f32

    n, k = stored.shape
    size = k if group_size == -1 else group_size
    row_bytes = stored.size_bytes // n
    parts = []
    for first in range(0, n, 8192):
        last = min(first + 8192, n)
        piece = Stored(stored.dtype, (last - first, k), memoryview(stored.data)[first * row_bytes : last * row_bytes])
        weights = a.asarray(to_f32(piece, "lm_head.weight"))
        scales, zeros = plain_grid(a, weights, size, spec)
        codes = codes_of(a, weights, spread(a, scales, size), spread(a, zeros, size), spec)
        parts.append((a.integers(codes), a.to_numpy(scales), a.integers(zeros)))
    codes, scales, zeros = (np.concatenate(column) for column in zip(*parts))
    groups = np.arange(k) // size
    return linear_tensors(
        "compressed-tensors", "lm_head", codes, scales, zeros, groups, spec.bits, True, False, scale_dtype
    )
