"""How much host memory a run takes."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
INTERVAL_S = 0.02


class PeakMemory:
    """The most memory of this process, for the length of a with statement.

    own_bytes: what it allocated (RssAnon, read every 20 ms); None where the system does not say.
    resident_bytes: with the pages of mapped files, which the system takes back when it needs them; since the process began.
    """

    def __init__(self) -> None:
        self.own_bytes: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qwen_fast peak memory", daemon=True)

    @property
    def resident_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def __enter__(self) -> PeakMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        try:
            lines = STATUS.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            if line.startswith("RssAnon:"):
                self.own_bytes = max(self.own_bytes or 0, int(line.split()[1]) * 1024)
