"""What fewer bits cost in quality: text and tasks, a model against a reference. `qwen-fast quality` is the command.

Names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Report
    from .run import Cell, Runner, Settings
    from .scorer import Answer, EngineScorer, Scorer
    from .tasks import Row, read_rows

_HOME = {"Report": "report", "Cell": "run", "Runner": "run", "Settings": "run", "Answer": "scorer",
         "EngineScorer": "scorer", "Scorer": "scorer", "Row": "tasks", "read_rows": "tasks"}  # fmt: skip
__all__ = ["Answer", "Cell", "EngineScorer", "Report", "Row", "Runner", "Scorer", "Settings", "read_rows"]


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
