"""What a model costs on a machine: prices, measured reports and predictions.

Names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .choice import CardPrice, Choice, choose
    from .money import Money, Prices, cost_of
    from .planner import Plan, plan
    from .report import Report
    from .settings import Settings
    from .workloads import Workload

_HOME = {"Prices": "money", "Money": "money", "cost_of": "money", "Plan": "planner", "plan": "planner",
         "CardPrice": "choice", "Choice": "choice", "choose": "choice",
         "Report": "report", "Settings": "settings", "Workload": "workloads"}  # fmt: skip
__all__ = [
    "CardPrice",
    "Choice",
    "Money",
    "Plan",
    "Prices",
    "Report",
    "Settings",
    "Workload",
    "choose",
    "cost_of",
    "plan",
]


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
