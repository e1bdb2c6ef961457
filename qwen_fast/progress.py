"""A progress display: a bar in a notebook, rich's where rich is installed, else one line on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

_DELAY_S = 0.5  # what is over sooner shows nothing
_INTERVAL_S = 0.1


def in_notebook() -> bool:
    """Whether the code runs under a Jupyter kernel. Imports nothing."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class Progress:
    """`with Progress("Loading", total) as bar: bar.update(done)`.

    enabled: None shows it in a notebook or where stderr is a terminal; True and False decide.
    text: what is said about (done, total), such as sizes.
    """

    def __init__(
        self, title: str, total: int, *, enabled: bool | None = None, text: Callable[[int, int], str] | None = None
    ) -> None:
        self._title = title
        self._total = total
        self._text = text or (lambda done, total: f"{done}/{total}")
        self._notebook = in_notebook()
        if enabled is None:
            enabled = self._notebook or (sys.stderr is not None and sys.stderr.isatty())
        self.enabled = enabled
        self._started = self._drawn = time.monotonic()
        self._done = 0
        self._display: Any = None
        self._width = 0

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Cheap: draws at most ten times a second."""
        self._done = done
        if total is not None:
            self._total = total
        if not self.enabled:
            return
        now = time.monotonic()
        if now - self._started < _DELAY_S or now - self._drawn < _INTERVAL_S:
            return
        self._drawn = now
        self._draw(note)

    def close(self) -> None:
        if self._display is not None:
            self._draw("")
            finish = getattr(self._display, "stop", None)
            if finish is not None:
                finish()
        elif self._width:
            self._draw("")
            sys.stderr.write("\n")
            sys.stderr.flush()
        self.enabled = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _draw(self, note: str) -> None:
        said = self._text(self._done, self._total) + (f" · {note}" if note else "")
        if self._notebook:
            self._draw_notebook(said)
        elif not self._draw_rich(said):
            share = self._done / self._total if self._total else 0.0
            line = f"{self._title} {share:4.0%} {said}"
            sys.stderr.write("\r" + line.ljust(self._width))
            sys.stderr.flush()
            self._width = len(line)

    def _draw_notebook(self, said: str) -> None:
        from html import escape

        from IPython.display import HTML, display

        bar = HTML(
            f'{escape(self._title)} <progress value="{self._done}" max="{max(self._total, 1)}"></progress> '
            f"{escape(said)}"
        )
        if self._display is None:
            self._display = display(bar, display_id=True)
        else:
            self._display.update(bar)

    def _draw_rich(self, said: str) -> bool:
        if self._width or not sys.stderr.isatty():
            return False
        if self._display is None:
            try:
                from rich.console import Console
                from rich.progress import BarColumn, TextColumn
                from rich.progress import Progress as RichProgress
            except ImportError:
                return False
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
            self._display = RichProgress(*columns, console=Console(stderr=True), auto_refresh=False)
            self._display.start()
            self._task = self._display.add_task(self._title, total=self._total, said="")
        self._display.update(self._task, completed=self._done, total=self._total, said=said, refresh=True)
        return True
