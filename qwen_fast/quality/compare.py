"""Two models' answers to the same rows: scores of both, their difference with its interval, rows fixed and broken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .score import METRICS
from .scorer import Answer
from .statistics import Bootstrap, Paired, estimate, shares, sign_test
from .tasks import Row

# Ends of the buckets of distance, in tokens between the value and the end of the prompt; the last has no end.
DISTANCES = (0, 256, 512, 1024, 2048, 4096)
_TEXT_CHARACTERS = 2000  # of an answer in the list of differences

Counts = dict[str, int]


def compare_answers(
    rows: Sequence[Row],
    distances: Sequence[int | None],
    reference: Sequence[Counts],
    measured: Sequence[Counts],
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """`all`, `by_task` and `recall`: see _group. Rows lie task by task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    places = {task: [i for i, row in enumerate(rows) if row.task == task] for task in tasks}

    def group(chosen: Sequence[int], strata: Sequence[int]) -> dict[str, Any]:
        return _group([reference[i] for i in chosen], [measured[i] for i in chosen], strata, draws, seed)

    return {
        "all": group(range(len(rows)), [len(one) for one in places.values()]),
        "by_task": {task: group(one, [len(one)]) for task, one in places.items()},
        "recall": [
            {"low": low, "high": high, **group(chosen, [len(chosen)])}
            for low, high, chosen in _by_distance(rows, distances)
        ],
    }


def _by_distance(
    rows: Sequence[Row], distances: Sequence[int | None]
) -> list[tuple[int | None, int | None, list[int]]]:
    """(low, high, rows) of every bucket with rows; low None: those whose distance is not known."""
    recalled = [i for i, row in enumerate(rows) if row.kind == "recall"]
    found: list[tuple[int | None, int | None, list[int]]] = []
    for low, high in zip(DISTANCES, (*DISTANCES[1:], None)):
        chosen = [i for i in recalled if (at := distances[i]) is not None and low <= at and (high is None or at < high)]
        found.append((low, high, chosen))
    found.append((None, None, [i for i in recalled if distances[i] is None]))
    return [one for one in found if one[2]]


def _group(
    reference: Sequence[Counts], measured: Sequence[Counts], strata: Sequence[int], draws: int, seed: int
) -> dict[str, Any]:
    """rows, fixed, broken, p (McNemar's exact test), and `metrics`: estimates of each figure that the rows have."""
    fixed = sum(ours["exact"] > theirs["exact"] for theirs, ours in zip(reference, measured))
    broken = sum(ours["exact"] < theirs["exact"] for theirs, ours in zip(reference, measured))
    figures: dict[str, Paired] = {}
    for name, (_, top, bottom, _) in METRICS.items():
        parts = [np.array([one.get(key, 0) for one in side]) for side in (measured, reference) for key in (top, bottom)]
        if parts[1].any() or parts[3].any():
            figures[name] = (parts[0], parts[1], parts[2], parts[3])
    return {
        "rows": len(reference), "fixed": fixed, "broken": broken, "p": sign_test(fixed, broken),
        "metrics": shares(Bootstrap(strata, draws, seed), figures),
    }  # fmt: skip


def outcomes(rows: Sequence[Row], counts: Sequence[Counts]) -> dict[str, str]:
    """By task: "1" for each row answered exactly, "0" for each other, in order."""
    found: dict[str, str] = {}
    for row, one in zip(rows, counts):
        found[row.task] = found.get(row.task, "") + str(one["exact"])
    return found


def compare_outcomes(
    reference: dict[str, str], measured: dict[str, str], draws: int = 10_000, seed: int = 1
) -> dict[str, Any]:
    """The exact matches of any two cells of one report, from their outcomes: as `exact` of compare_answers, for `all`
    rows and `by_task`."""
    if {task: len(one) for task, one in reference.items()} != {task: len(one) for task, one in measured.items()}:
        raise ValueError("the two were not asked the same rows")

    def group(tasks: Sequence[str]) -> dict[str, Any]:
        sides = [
            [{"rows": 1, "exact": int(bit)} for task in tasks for bit in side[task]] for side in (reference, measured)
        ]
        return _group(sides[0], sides[1], [len(reference[task]) for task in tasks], draws, seed)

    return {"all": group(list(reference)), "by_task": {task: group([task]) for task in reference}}


def differences(
    rows: Sequence[Row],
    answers: tuple[Sequence[Answer], Sequence[Answer]],
    counts: tuple[Sequence[Counts], Sequence[Counts]],
    most_texts: int,
) -> list[dict[str, Any]]:
    """Every row whose answer is another text: which, and how it changed; with the texts for the first `most_texts` that
    were broken or fixed, or, where there are fewer, that changed otherwise. answers, counts: reference, measured."""
    found: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        theirs, ours = answers[0][index], answers[1][index]
        if theirs.text == ours.text:
            continue
        step = counts[1][index]["exact"] - counts[0][index]["exact"]
        change = {1: "fixed", -1: "broken", 0: "changed"}[step]
        found.append(
            {"task": row.task, "row": row.number, "change": change, "texts": (row.answer, theirs.text, ours.text)}
        )
    found.sort(key=lambda one: one["change"] == "changed")
    for position, one in enumerate(found):
        texts = one.pop("texts")
        if position < most_texts:
            names = ("answer", "reference", "measured")
            one |= {name: text[:_TEXT_CHARACTERS] for name, text in zip(names, texts)}
    return found


NOTHING = estimate(None, None, None)
