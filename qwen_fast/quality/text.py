"""Two models' next-token distributions over a text: perplexity, Kullback-Leibler divergence, the same most likely token.

The text is cut into windows without overlap; each is teacher forced through both models, and every position but the last
of a window is compared, over the whole vocabulary. Rows of logits come and go in pieces of at most PIECE_BYTES a model, so
memory does not grow with the text: about twelve pieces at once, 200 MB for any vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .statistics import Bootstrap, ends, estimate

PIECE_BYTES = 16 << 20
BLOCK = 128  # positions that the bootstrap draws together: neighbours are not independent
QUANTILES = (0.5, 0.99)
QUANTILE_DRAWS = 1000
CURVE = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)

# (window, start, stop) -> float32 (stop - start, vocabulary): logits after these positions of the window.
Rows = Callable[[int, int, int], np.ndarray]


@dataclass
class Positions:
    """What was found at each compared position, in order."""

    nll: np.ndarray  # of the token that follows, under the measured model; nats
    nll_reference: np.ndarray
    kl: np.ndarray  # of the measured model's distribution from the reference's, sum p_ref ln(p_ref / p); nats
    same_top: np.ndarray  # bool: the same most likely token
    block: np.ndarray  # int: which BLOCK of its window it is in, numbered through

    def __len__(self) -> int:
        return len(self.kl)


def windows_of(ids: Sequence[int], length: int, most: int | None = None) -> list[list[int]]:
    """Windows of `length` tokens; the last may be shorter, and is left out below two tokens. most: tokens in all."""
    if length < 2:
        raise ValueError(f"a window needs at least 2 tokens, got {length}")
    ids = list(ids[:most])
    return [ids[at : at + length] for at in range(0, len(ids), length) if len(ids) - at >= 2]


def pieces(length: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) over the compared positions of a window of `length` tokens."""
    step = max(1, PIECE_BYTES // (4 * vocab_size))
    for start in range(0, length - 1, step):
        yield start, min(start + step, length - 1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, along the last axis."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    return rows


def compare_rows(
    reference: np.ndarray, measured: np.ndarray, following: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """nll, nll_reference, kl, same_top of rows of logits. following: the token after each row's position."""
    for name, logits in (("reference", reference), ("measured model", measured)):
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(axis=-1))[0])
            raise FloatingPointError(f"the {name}'s logits are not finite at row {row} of {len(logits)}")
    at = np.arange(len(following))
    targets = np.asarray(following)
    base, ours = log_softmax(reference), log_softmax(measured)
    nll_reference, nll = -base[at, targets], -ours[at, targets]
    same = reference.argmax(axis=-1) == measured.argmax(axis=-1)
    np.subtract(base, ours, out=ours)
    np.exp(base, out=base)
    # What rounding leaves below zero is zero: a divergence is not negative.
    kl = np.maximum(np.einsum("rv,rv->r", base, ours), 0.0)
    return nll, nll_reference, kl, same


def compare_text(windows: Sequence[Sequence[int]], vocab_size: int, reference: Rows, measured: Rows) -> Positions:
    """Every position of every window. vocab_size: the rows that both vocabularies have; others are left out."""
    found: list[tuple[Any, ...]] = []
    first_block = 0
    for index, window in enumerate(windows):
        for start, stop in pieces(len(window), vocab_size):
            rows = [source(index, start, stop)[:, :vocab_size] for source in (reference, measured)]
            blocks = first_block + np.arange(start, stop) // BLOCK
            found.append((*compare_rows(rows[0], rows[1], window[start + 1 : stop + 1]), blocks))
        first_block += -(-(len(window) - 1) // BLOCK)
    if not found:
        raise ValueError("the text has no position to compare: it needs at least two tokens")
    return Positions(*(np.concatenate(parts) for parts in zip(*found)))


def summary(found: Positions, draws: int, seed: int) -> dict[str, Any]:
    """The figures with their intervals, plain JSON. Blocks of BLOCK positions are drawn."""
    blocks = int(found.block[-1]) + 1
    delta = np.exp(-found.nll) - np.exp(-found.nll_reference)
    columns = [np.ones(len(found)), found.nll, found.nll_reference, found.kl, found.same_top, delta * delta]
    sums = np.stack([np.bincount(found.block, weights=one, minlength=blocks) for one in columns], axis=1)
    drawn = Bootstrap([blocks], draws, seed).sums(sums)
    few = Bootstrap([blocks], min(draws, QUANTILE_DRAWS), seed).quantiles(found.kl, found.block, QUANTILES)
    figures = _figures(sums.sum(axis=0)[None])
    spread = _figures(drawn)
    result: dict[str, Any] = {
        "positions": len(found), "blocks": blocks,
        **{name: estimate(float(value[0]), *ends(spread[name])) for name, value in figures.items()},
    }  # fmt: skip
    for share, name, column in zip(QUANTILES, ("kl_median", "kl_p99"), few.T):
        result[name] = estimate(quantile(found.kl, share), *ends(column))
    result["kl_max"] = float(found.kl.max())
    result["kl_curve"] = [[share, quantile(found.kl, share)] for share in CURVE]
    return result


def _figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    count, nll, nll_reference, kl, same, squares = sums.T
    with np.errstate(over="ignore"):
        return {
            "perplexity": np.exp(nll / count),
            "perplexity_reference": np.exp(nll_reference / count),
            "perplexity_ratio": np.exp((nll - nll_reference) / count),
            "kl_mean": kl / count,
            "same_top": same / count,
            "rms_delta_p": np.sqrt(squares / count),
        }


def quantile(values: np.ndarray, share: float) -> float:
    """By nearest rank: the smallest value that at least `share` of the values do not exceed."""
    place = max(0, int(np.ceil(share * len(values) - 1e-9)) - 1)
    return float(np.partition(values, place)[place])


def worst(found: Positions, windows: Sequence[Sequence[int]], count: int) -> list[dict[str, Any]]:
    """The positions of the largest divergence: window, position in it, figures."""
    places = [(index, at) for index, window in enumerate(windows) for at in range(len(window) - 1)]
    order = np.argsort(-found.kl, kind="stable")[:count]
    return [
        {"window": places[i][0], "position": places[i][1], "kl": float(found.kl[i]),
         "p": float(np.exp(-found.nll[i])), "p_reference": float(np.exp(-found.nll_reference[i]))}
        for i in order
    ]  # fmt: skip


def same_positions(found: Positions) -> bool:
    """Whether both models gave the same distributions, to the last bit of these figures."""
    return bool(not found.kl.any() and np.array_equal(found.nll, found.nll_reference))


NAMES = tuple(field.name for field in fields(Positions))
