"""LLM.cost_report: a report of an engine that is loaded already."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .money import Prices
from .report import Report
from .run import Runner
from .settings import Settings
from .workloads import Workload, fixed, from_jsonl, parse_lengths


def cost_report(
    llm: Any,
    workload: Any = None,
    *,
    users: Sequence[int] | None = None,
    quick: bool = True,
    prices: Prices | None = None,
    budget_seconds: float | None = None,
    levers: bool = True,
    **settings: Any,
) -> Report:
    """See LLM.cost_report."""
    asked = Settings(
        workloads=as_workloads(workload),
        users=None if users is None else tuple(users),
        quick=quick,
        prices=prices or Prices(),
        budget_s=budget_seconds,
        with_levers=levers,
        **settings,
    )

    def load(options: Any) -> Any:
        raise NotImplementedError("a report of a loaded engine loads no other one")

    return Report.from_measurements(Runner({}, asked, load, llm=llm).run())


def as_workloads(given: Any) -> tuple[Workload, ...] | None:
    """None (the studies'), a Workload, "512/128", (512, 128), the path of a JSONL file of prompts, or a list of these."""
    if given is None:
        return None
    if isinstance(given, list):
        return tuple(one for entry in given for one in as_workloads(entry) or ())
    if isinstance(given, Workload):
        return (given,)
    if isinstance(given, tuple) and len(given) == 2:
        return (fixed(f"{given[0]}-{given[1]}", "own lengths", *given),)
    if isinstance(given, os.PathLike) or (isinstance(given, str) and given.endswith((".jsonl", ".json"))):
        return (from_jsonl(os.fspath(given)),)
    if isinstance(given, str):
        return (parse_lengths(given),)
    raise TypeError(f"workload must be None, a Workload, 'IN/OUT', (in, out), a JSONL path or a list, got {given!r}")
