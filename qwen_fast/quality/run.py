"""A measurement: the reference once, then every cell against it. Knows scorers only, not how they come to be."""

from __future__ import annotations

import datetime
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from . import text as texts
from .compare import compare_answers, differences, outcomes
from .fields import occurrences
from .score import prompt_text, score
from .scorer import Answer, Scorer, check_same_ids, check_same_vocabulary
from .spool import EXACT_BYTES, LiveRows, SpooledRows, file_bytes
from .tasks import Row

LOGITS = ("auto", "both", "file", "file16")
_REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError, MemoryError, OSError, ArithmeticError)
_FOLDERS = re.compile(r"(?<![\w.~-])~?/(?:[^\s/:,;'\"]+/)+")  # of absolute paths: reports are passed on
_LEAST_ANSWER = 16  # tokens that must be left for an answer


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    window: tokens of a window of text. tokens: of the text, at most (None: all). limit: rows of a task, at most. only: these
    tasks. max_new_tokens: of an answer. draws, seed: of the bootstrap. reference_logits: "both" models loaded at once,
    "file" (float32) or "file16", "auto". spool_folder: where that file lies. budget_s: no cell is begun after so long.
    texts: differing rows whose answers are kept.
    """

    window: int = 1024
    tokens: int | None = None
    limit: int | None = None
    only: tuple[str, ...] | None = None
    max_new_tokens: int = 1200
    draws: int = 10_000
    seed: int = 1
    reference_logits: str = "auto"
    spool_folder: str | None = None
    budget_s: float | None = None
    texts: int = 50
    quick: bool = False

    def __post_init__(self) -> None:
        for name, low in (
            ("window", 2),
            ("tokens", 2),
            ("limit", 1),
            ("max_new_tokens", 1),
            ("draws", 100),
            ("texts", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        if self.reference_logits not in LOGITS:
            raise ValueError(f"reference_logits must be one of {', '.join(LOGITS)}, got {self.reference_logits!r}")
        if self.budget_s is not None and not self.budget_s > 0:
            raise ValueError(f"budget_s must be above 0, got {self.budget_s!r}")
        if self.spool_folder is not None and not os.path.isdir(self.spool_folder):
            raise ValueError(f"spool_folder is no directory: {self.spool_folder!r}")


@dataclass(frozen=True)
class Cell:
    """What is measured against the reference. load: raises where the engine refuses."""

    label: str
    axes: dict[str, str]
    load: Callable[[], Scorer]


@dataclass
class Baseline:
    """What is kept of the reference."""

    about: dict[str, Any]
    tokens: Sequence[bytes]
    vocab_size: int
    ids: list[int]
    windows: list[list[int]]
    rows: list[Row]
    prompts: list[list[int]]
    distances: list[int | None]
    answers: list[Answer] = field(default_factory=list)
    counts: list[dict[str, int]] = field(default_factory=list)


class Runner:
    """run() measures. text, rows: what with; None or empty leaves that half out. fits: whether reference and cell can be
    loaded at once. alone: one cell only was asked for, so what it refuses is raised. say: told what goes on."""

    def __init__(
        self,
        reference: Callable[[], Scorer],
        cells: Sequence[Cell],
        settings: Settings,
        text: str | None,
        rows: Sequence[Row],
        *,
        fits: bool = True,
        alone: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        if not text and not rows:
            raise ValueError("nothing to measure: neither a text nor task rows")
        if not cells:
            raise ValueError("nothing to measure: no cell")
        self._load, self._cells, self._settings = reference, list(cells), settings
        self._text, self._rows = text, list(rows)
        self._live = settings.reference_logits == "both" or (
            settings.reference_logits == "auto" and fits and len(self._cells) == 1
        )
        self._alone, self._say = alone, say
        self.notes: list[str] = []

    def run(self) -> dict[str, Any]:
        """The measurements, plain JSON."""
        began = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        start = time.monotonic()
        self._say("loading the reference")
        reference = self._load()
        try:
            base = self._baseline(reference)
            source = self._source(reference, base)
            try:
                if not self._live:
                    reference.close()
                cells = [self._cell(cell, base, source, start) for cell in self._cells]
            finally:
                source.close()
        finally:
            reference.close()
        return {
            "began": began,
            "seconds": time.monotonic() - start,
            "settings": asdict(self._settings),
            "reference": base.about | {"logits": source.how if base.windows else "no text was measured"},
            "cells": cells,
            "notes": self.notes,
        }

    # -- the reference

    def _baseline(self, reference: Scorer) -> Baseline:
        settings = self._settings
        ids = reference.encode(self._text)[: settings.tokens] if self._text else []
        window = min(settings.window, reference.max_model_len)
        windows = texts.windows_of(ids, window) if ids else []
        if self._text and not windows:
            raise ValueError(f"the text has {len(ids)} tokens; at least 2 are needed")
        rows, prompts, distances = self._prompts(reference)
        if not windows and not rows:
            raise ValueError(f"nothing to measure: {self.notes[-1]}")
        base = Baseline({}, reference.tokens, reference.vocab_size, ids, windows, rows, prompts, distances)
        base.about = reference.describe() | {"text_tokens": len(ids), "windows": len(windows), "rows": len(rows)}
        if rows:
            self._say(f"the reference answers {len(rows)} rows")
            base.answers = _answers(reference, prompts, settings.max_new_tokens)
            base.counts = [score(row, prompt_text(row), one.text) for row, one in zip(rows, base.answers)]
            base.about["outcomes"] = outcomes(rows, base.counts)
        return base

    def _prompts(self, reference: Scorer) -> tuple[list[Row], list[list[int]], list[int | None]]:
        rows, prompts, distances = [], [], []
        too_long = 0
        for row in self._rows:
            try:
                rendered, ids = reference.render(row.messages, row.tools)
            except (ValueError, TypeError) as error:
                raise ValueError(f"task {row.task}, row {row.number}: {error}") from None
            if len(ids) + _LEAST_ANSWER > reference.max_model_len:
                too_long += 1
                continue
            rows.append(row)
            prompts.append(ids)
            distances.append(_distance(reference, row, rendered) if row.kind == "recall" else None)
        if too_long:
            self.notes.append(
                f"{too_long} rows are left out: with {_LEAST_ANSWER} tokens for the answer they do not fit the reference's "
                f"max_model_len of {reference.max_model_len}."
            )
        return rows, prompts, distances

    def _source(self, reference: Scorer, base: Baseline) -> LiveRows | SpooledRows:
        if self._live or not base.windows:
            return LiveRows(reference, base.windows)
        wanted = self._settings.reference_logits
        half = wanted == "file16" or (
            wanted == "auto" and file_bytes(base.windows, base.vocab_size, False) > EXACT_BYTES
        )
        self._say(f"the reference reads {len(base.ids)} tokens of text")
        return SpooledRows(reference, base.windows, half, self._settings.spool_folder)

    # -- a cell

    def _cell(self, cell: Cell, base: Baseline, source: LiveRows | SpooledRows, start: float) -> dict[str, Any]:
        found: dict[str, Any] = {"label": cell.label, "axes": cell.axes, "status": "measured", "why": None}
        spent = time.monotonic() - start
        if self._settings.budget_s is not None and spent > self._settings.budget_s:
            return found | {"status": "not begun", "why": f"the budget of {self._settings.budget_s:g} s was spent"}
        self._say(f"measuring {cell.label}")
        stage = "refused"
        scorer = None
        began = time.monotonic()
        try:
            scorer = cell.load()
            stage = "failed"
            return found | self._measured(scorer, base, source) | {"seconds": time.monotonic() - began}
        except _REFUSALS as error:
            if self._alone:
                raise
            why = _FOLDERS.sub("", " ".join(str(error).split())) or type(error).__name__
            self._say(f"{cell.label}: {stage}: {why}")
            return found | {"status": stage, "why": why}
        finally:
            if scorer is not None:
                scorer.close()

    def _measured(self, scorer: Scorer, base: Baseline, source: LiveRows | SpooledRows) -> dict[str, Any]:
        settings = self._settings
        check_same_vocabulary(base.tokens, scorer.tokens)
        found: dict[str, Any] = {"about": scorer.describe()}
        if base.windows and self._text:
            check_same_ids(base.ids, scorer.encode(self._text)[: settings.tokens])
            vocab_size = min(base.vocab_size, scorer.vocab_size)
            positions = texts.compare_text(base.windows, vocab_size, source, LiveRows(scorer, base.windows))
            found["text"] = texts.summary(positions, settings.draws, settings.seed) | {
                "vocab_rows": vocab_size,
                "identical": texts.same_positions(positions),
                "worst": texts.worst(positions, base.windows, 10),
            }
        if base.rows:
            found["tasks"] = self._tasks(scorer, base)
        return found

    def _tasks(self, scorer: Scorer, base: Baseline) -> dict[str, Any]:
        settings = self._settings
        longest = max(map(len, base.prompts))
        if longest + _LEAST_ANSWER > scorer.max_model_len:
            raise ValueError(f"a prompt of {longest} tokens does not fit the max_model_len of {scorer.max_model_len}")
        first = base.rows[0]
        try:
            same = scorer.render(first.messages, first.tools)[1] == base.prompts[0]
        except (ValueError, TypeError):  # no chat template, or one that refuses these messages
            same = False
        if not same:
            note = "The chat templates differ; every model was given the prompts of the reference's."
            self.notes += [] if note in self.notes else [note]
        answers = _answers(scorer, base.prompts, settings.max_new_tokens)
        counts = [score(row, prompt_text(row), one.text) for row, one in zip(base.rows, answers)]
        found = compare_answers(base.rows, base.distances, base.counts, counts, settings.draws, settings.seed)
        cut = sum(one.finish_reason == "length" for one in answers)
        changed = differences(base.rows, (base.answers, answers), (base.counts, counts), settings.texts)
        return found | {"outcomes": outcomes(base.rows, counts), "cut_off": cut, "differences": changed}


def _answers(scorer: Scorer, prompts: Sequence[Sequence[int]], most: int) -> list[Answer]:
    room = [max(1, min(most, scorer.max_model_len - len(ids))) for ids in prompts]
    return scorer.generate(prompts, room)


def _distance(scorer: Scorer, row: Row, rendered: str) -> int | None:
    """Tokens between the value and the end of the prompt; None where the value stands in it never, or more than once."""
    if row.distance is not None:
        return row.distance
    places = list(occurrences(row.answer, rendered))
    if len(places) != 1:
        return None
    return len(scorer.encode(rendered[places[0] + len(row.answer) :]))
