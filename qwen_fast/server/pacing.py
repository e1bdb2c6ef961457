"""How far apart the events of a stream are while the event loop is short of time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .state import Server

_PACE_WINDOW_S = 0.05  # over which the event loop's load is measured


class Pacer:
    """How long a stream waits before it reads again: nothing while the event loop has time, up to coalesce_ms as it runs
    out of it. What comes meanwhile is one event."""

    def __init__(self, coalesce_ms: float) -> None:
        self._longest = coalesce_ms / 1e3
        self._wall = time.perf_counter()
        self._cpu = time.thread_time()
        self._load = 0.0

    def delay(self) -> float:
        """Seconds; in the event loop's thread."""
        now = time.perf_counter()
        elapsed = now - self._wall
        if elapsed >= _PACE_WINDOW_S:
            cpu = time.thread_time()
            weight = 0.5 if elapsed < 10 * _PACE_WINDOW_S else 1.0
            self._load += weight * ((cpu - self._cpu) / elapsed - self._load)
            self._wall, self._cpu = now, cpu
        return self._longest * min(max(2.5 * self._load - 1.0, 0.0), 1.0)  # from 40 % to 80 %


def pacer_of(server: Server) -> Pacer:
    """The server's one Pacer, made in the thread of its event loop."""
    if server.pacer is None:
        server.pacer = Pacer(server.config.limits.coalesce_ms)
    return server.pacer
