"""What a report is asked to measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import parallel
from .measure import FULL, QUICK, Effort
from .money import Prices
from .workloads import Workload


@dataclass(frozen=True)
class Settings:
    """What a report is asked to measure.

    workloads: None: the three of study A and the one of study B. users: None: 1, 16 and 32 for study A and own workloads
    (quick: 1, 4, 16), 1 to 16 for study B. quick: short windows, and requests cut to QUICK_TOKENS tokens. budget_s: no
    stage begins later than so many seconds after the start (None: no limit). peak_gbs, peak_tflops: a GPU's measured
    peaks. tokens_per_day: your volume of output tokens, for money per day and month. p99_s: the bound that concurrency is
    found for. wall_watts: what a meter at the wall showed, by the number of users of the first workload. with_levers, with_sweep: False
    leaves the levers, or the prompt lengths, out. window_s: shortest length of a window (None: 2 s, quick 0.25 s); windows: how many
    (None: 5, quick 3). gpus: the numbers of devices that the last workload is compared on (None: see parallel.compared; on the CPU
    ranks of threads, only where they are given); gpus_users: by how many users (None: 1, 16, 32, 64, 128).
    """

    workloads: tuple[Workload, ...] | None = None
    users: tuple[int, ...] | None = None
    quick: bool = False
    budget_s: float | None = None
    peak_gbs: float | None = None
    peak_tflops: float | None = None
    peak_source: str = "given on the command line"
    tokens_per_day: float = 5e6
    p99_s: float = 3.0
    wall_watts: Mapping[int, float] = field(default_factory=dict)
    with_levers: bool = True
    with_sweep: bool = True
    window_s: float | None = None
    windows: int | None = None
    gpus: tuple[int, ...] | None = None
    gpus_users: tuple[int, ...] | None = None
    prices: Prices = field(default_factory=Prices)

    def __post_init__(self) -> None:
        for name in ("budget_s", "peak_gbs", "peak_tflops", "tokens_per_day", "p99_s", "window_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, got {value}")
        for users, watts in self.wall_watts.items():
            if users < 1 or not 0 < watts < float("inf"):
                raise ValueError(f"wall_watts must be watts above 0 by users of at least 1, got {users}: {watts}")
        for name in ("users", "gpus_users"):
            given = getattr(self, name)
            if given is not None and (not given or min(given) < 1):
                raise ValueError(f"{name} must be numbers of at least 1, got {given}")
        if self.gpus is not None and not all(1 <= count <= parallel.MOST for count in self.gpus):
            raise ValueError(f"gpus must be numbers from 1 to {parallel.MOST}, got {self.gpus}")
        if self.windows is not None and self.windows < 1:
            raise ValueError(f"windows must be at least 1, got {self.windows}")
        if self.workloads is not None and not self.workloads:
            raise ValueError("workloads must be None or at least one")

    @property
    def effort(self) -> Effort:
        effort = QUICK if self.quick else FULL
        effort = effort if self.window_s is None else replace(effort, window_s=self.window_s)
        return effort if self.windows is None else replace(effort, windows=self.windows)

    @property
    def lever_effort(self) -> Effort:
        """Levers are many: fewer and shorter windows."""
        return replace(self.effort, windows=min(3, self.effort.windows), window_s=0.6 * self.effort.window_s)


def plain(settings: Settings) -> dict[str, Any]:
    """As JSON, without workloads and prices."""
    shown = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    for name in ("workloads", "prices"):
        del shown[name]
    shown["wall_watts"] = {str(users): watts for users, watts in settings.wall_watts.items()}
    return {**shown, "effort": asdict(settings.effort)}
