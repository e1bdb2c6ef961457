"""From the first signal, or the engine's failure, to the end of the process."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import EngineError
from .state import Server

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM

_LOG = logging.getLogger("qwen_fast.server")
_LOOK_S = 0.25  # between two looks at the engine
_LONGEST_LOOK_S = 1.0  # more than that and this process, too, was not running
_OWN_END_S = 1.0  # for requests of a failed engine to end with its own message
_LAST_WORDS_S = 2.0  # for errors to reach the clients
_SHOWN_S = 2.0  # that /health at least tells of a failure
_HARD_END_S = 8.0  # from a failure to the end of the process, whatever hangs
WATCHDOG_GPU_S, WATCHDOG_CPU_S = 120.0, 1800.0  # a CPU may compute minutes at a step of a long prompt
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Watchdog:
    """Decides from the engine's stats whether it can still serve. seconds: the longest time without a step while
    sequences run, 0: any. A step of a long prompt on a slow device may take tens of seconds, and a sequence with
    structured output may wait for its mask as long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._steps = -1
        self._last = math.inf
        self._stuck_s = 0.0

    def look(self, stats: dict[str, Any], now: float) -> str:
        """What is wrong, "" where nothing is. now: seconds, monotonic."""
        if stats["failed"]:
            return "the engine failed"
        # Sequences that wait while others are paused have no room: that is the clients' doing.
        active = stats["num_running"] > 0 or (stats["num_waiting"] > 0 and stats["num_paused"] == 0)
        passed = min(max(0.0, now - self._last), _LONGEST_LOOK_S)
        self._last = now
        if stats["num_steps"] != self._steps or not active:
            self._steps, self._stuck_s = stats["num_steps"], 0.0
            return ""
        self._stuck_s += passed
        if not self._seconds or self._stuck_s < self._seconds:
            return ""
        what = f"{stats['num_running']} sequences run and {stats['num_waiting']} wait"
        return f"no step has finished for {self._stuck_s:.1f} s while {what}"


def watch(llm: AsyncLLM, watchdog: Watchdog, said: Callable[[str, bool], None], stop: threading.Event) -> None:
    """Looks at the engine until something is wrong, then calls said(reason, hung) once; for a thread of its own."""
    while not stop.wait(_LOOK_S):
        if llm.closed:
            return
        try:
            stats = llm.stats()
        except EngineError:  # closed meanwhile
            return
        reason = watchdog.look(stats, time.monotonic())
        if reason:
            said(reason, not stats["failed"])
            return


class Lifecycle:
    """Runs a uvicorn server to its end.

    SIGTERM or SIGINT: /ready and new requests get 503, running ones have config.shutdown_timeout seconds, then they end
    with an error; the exit code is 0. A second signal ends the process at once, with 128 and the signal's number.
    SIGHUP: the audit log is reopened.

    An engine that failed, or hangs by the watchdog: /health and new requests get 503 with the reason, every running one
    an error, and the process ends with exit code 1 within _HARD_END_S seconds, if need be without cleaning up.
    """

    def __init__(self, server: Server, uvicorn_server: Any) -> None:
        self.exit_code = 0
        self.hung = False  # the engine's threads may never come back: do not wait for them
        self._server = server
        self._uvicorn = uvicorn_server
        self._ending: asyncio.Task[None] | None = None
        self._stop = threading.Event()

    async def run(self) -> int:
        """The exit code, once everything has ended. SystemExit where uvicorn cannot listen."""
        loop = asyncio.get_running_loop()
        self._uvicorn.capture_signals = contextlib.nullcontext  # they are ours

        def said(reason: str, hung: bool) -> None:
            _end_hard_after(_HARD_END_S, self._stop)
            loop.call_soon_threadsafe(self._failed, reason, hung)

        config = self._server.config
        llm = self._server.llm
        seconds = config.watchdog_seconds
        if seconds is None:
            seconds = WATCHDOG_CPU_S if llm.info()["backend"] == "cpu" else WATCHDOG_GPU_S
        arguments = (llm, Watchdog(seconds), said, self._stop)
        watcher = threading.Thread(target=watch, args=arguments, name="qwen_fast-watchdog", daemon=True)
        with self._signals(loop):
            watcher.start()
            try:
                await self._uvicorn.serve()
                if self._ending is not None:
                    await self._ending
            finally:
                if not self.exit_code:  # else the hard end stays armed until the process is gone
                    self._stop.set()
        return self.exit_code if self._uvicorn.started else 1

    # -- signals

    @contextlib.contextmanager
    def _signals(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self._stop_asked, loop, number)
        reopen = getattr(self._server.audit, "reopen", None)
        if reopen is not None:
            loop.add_signal_handler(signal.SIGHUP, reopen)
        try:
            yield
        finally:
            for number in (*_STOP_SIGNALS, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _stop_asked(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        for one in _STOP_SIGNALS:  # handlers of the interpreter's own: they work whatever the event loop is doing
            loop.remove_signal_handler(one)
            signal.signal(one, _stop_now)
        self.drain(signal.Signals(number).name)

    # -- ends

    def drain(self, why: str) -> None:
        """Begins the orderly end. In the event loop's thread."""
        server = self._server
        if self._ending is not None:
            return
        server.ready, server.not_ready_reason = False, "the server is shutting down"
        seconds = server.config.shutdown_timeout
        _LOG.info("%s: %d requests have %g s to finish", why, len(server.in_flight), seconds)
        self._ending = asyncio.get_running_loop().create_task(self._drained(seconds))

    async def _drained(self, seconds: float) -> None:
        server = self._server
        if not await self._idle(seconds):
            count = len(server.in_flight)
            _LOG.warning("%d requests are ended: they did not finish within %g s", count, seconds)
            server.interrupt("the server is shutting down", "shutting_down")
            await self._idle(_LAST_WORDS_S)
        self._close()

    def _failed(self, reason: str, hung: bool) -> None:
        server = self._server
        server.failure = reason
        server.ready, server.not_ready_reason = False, reason
        self.exit_code, self.hung = 1, hung
        if hung:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # where standard error is no file
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        _LOG.critical("%s; the process ends", server.dead)
        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.get_running_loop().create_task(self._end_failed())

    async def _end_failed(self) -> None:
        server = self._server
        shown_until = time.monotonic() + _SHOWN_S
        if self.hung or not await self._idle(_OWN_END_S):
            server.interrupt(server.dead, "engine_error")
            await self._idle(_LAST_WORDS_S)
        await asyncio.sleep(max(0.0, shown_until - time.monotonic()))
        self._close()

    async def _idle(self, seconds: float) -> bool:
        """Whether no request is left, after so long at most."""
        deadline = time.monotonic() + seconds
        while self._server.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self._server.in_flight

    def _close(self) -> None:
        self._uvicorn.config.timeout_graceful_shutdown = round(_LAST_WORDS_S)
        self._uvicorn.should_exit = True


def _stop_now(number: int, frame: object) -> None:
    os._exit(128 + number)


def _end_hard_after(seconds: float, stop: threading.Event) -> None:
    """Ends the process with exit code 1 after so long, unless `stop` is set before: for the case that an orderly end
    waits for what never comes."""

    def wait() -> None:
        if not stop.wait(seconds):
            os._exit(1)

    threading.Thread(target=wait, name="qwen_fast-end", daemon=True).start()


def end_now(code: int) -> None:
    """Ends the process without waiting for any thread."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
