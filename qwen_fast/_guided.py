"""Guided requests: one thread per engine reads them as their tokens come, fills the masks of a step together, and keeps
what it read for the requests' own readers. So a reader that is slow or busy delays no mask."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from ._grammars import CompiledGrammar, mask_threads
from .errors import EngineError

if TYPE_CHECKING:
    from ._engine import Engine, Output, Request

FIRST_TAG = 1 << 62  # tags from here on are guided requests'; smaller ones belong to AsyncLLM
_BATCH = 64  # masks filled together
_IDLE_S = 2.0  # without a guided request the thread ends after so long
_END_S = 5.0  # the engine ends what it has within a step, once it is being closed
# The pump answers at once, except where a stream's reader is slow: that may take as long as it likes.
_MASK_TIMEOUT_S = 7 * 86400.0


class GuidedRequest:
    """Has the methods of an engine Request, for one reader. Dropping the last reference cancels the request."""

    def __init__(
        self, pump: GuidedPump, request: Request, grammar: CompiledGrammar, max_unread_tokens: int, tag: int
    ) -> None:
        self._pump = pump
        self.request = request
        self.tag = tag
        self._matcher, self.lexer = grammar.matcher(self)
        self._max_unread = max_unread_tokens
        self._news = threading.Condition(threading.Lock())
        self._unread_output: Any = None  # what came since the last read, as one output but for its text
        self._texts: list[str] = []
        self._unread = 0
        self._finish_read = False
        self._finished = False
        self._position = -1  # the mask that the engine waits for
        self._failure: Exception | None = None

    # -- for the reader

    def read(self, timeout: float | None = None) -> Output | None:
        """As _engine.Request.read; mask_position is always -1."""
        with self._news:
            if self._unread_output is None and not self._finish_read and timeout != 0:
                self._news.wait_for(lambda: self._unread_output is not None, timeout)
            output, self._unread_output = self._unread_output, None
            if output is None:
                return None
            output["text"] = "".join(self._texts)
            held = 0 < self._max_unread <= self._unread and not output["finished"]
            self._texts, self._unread, self._finish_read = [], 0, output["finished"]
        if held:
            self._pump.wake(self.tag)
        return output

    def cancel(self) -> None:
        self.request.cancel()

    # -- for the pump

    def take(self) -> bool:
        """Reads what the engine has, in the pump's thread; True if a reader that had nothing has something now."""
        output = self.request.read(0)
        if output is None:
            return False
        if output["mask_position"] >= 0:
            self._position = output["mask_position"]
        running = self._failure is None and not output["finished"]
        if running and not self._matcher.consume_tokens(output["token_ids"]):
            self.fail(self._stuck())
        if output["finished"] and self._failure is not None:
            output["finish_reason"], output["error"] = "error", self._failure
        output["mask_position"] = -1
        if not (output["token_ids"] or output["text"] or output["finished"]):
            return False
        return self._deliver(output)

    def end(self, error: Exception | None) -> None:
        """Delivers the engine's last output; where it gives none, or where there is one, `error`."""
        self.request.cancel()
        error = self._failure or error
        output: Any = None
        with contextlib.suppress(Exception):
            while (output := self.request.read(_END_S)) is not None and not output["finished"]:
                self._deliver({**output, "mask_position": -1})
        if output is None:
            error = error or EngineError("the engine was closed while a guided request ran")
            output = {"token_ids": [], "text": "", "logprobs": None, "finished": True}
        if error is not None:
            output |= {"finish_reason": "error", "error": error}
        self._deliver({**output, "mask_position": -1})

    def _deliver(self, output: Any) -> bool:
        """Adds to what the reader finds; True if that was nothing."""
        self._finished = output["finished"]
        with self._news:
            before, self._unread_output = self._unread_output, output
            self._texts.append(output["text"])
            self._unread += len(output["token_ids"])
            if before is not None:
                output["token_ids"] = _joined(before["token_ids"], output["token_ids"])
                output["logprobs"] = _joined(before["logprobs"], output["logprobs"])
            self._news.notify_all()
            return before is None

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def wants_mask(self) -> bool:
        full = self._max_unread > 0 and self._unread >= self._max_unread
        return self._position >= 0 and not full and self._failure is None

    @property
    def matcher(self) -> Any:
        return self._matcher

    def set_mask(self, words: numpy.ndarray) -> None:
        position, self._position = self._position, -1
        if self._matcher.is_error() or not words.any():
            self.fail(self._stuck())
            return
        self.request.set_mask(position, words.data)

    def fail(self, error: Exception) -> None:
        """Ends the request with an error, when the engine has let it go."""
        self._failure = self._failure or error
        self._position = -1
        self.request.cancel()

    def _stuck(self) -> ValueError:
        said = " ".join(self._matcher.get_error().replace("<non-verbose/>", "").split())[:300]
        return ValueError(f"structured_outputs: the grammar cannot go on: {said or 'it allows no token here'}")


class GuidedPump:
    """The thread, and the guided requests of one engine. It runs while there are any.

    pass_on: is given the tags below FIRST_TAG that the engine reported here.
    """

    def __init__(self, engine: Engine, num_words: int, pass_on: Callable[[Sequence[int]], None] | None = None) -> None:
        self._engine = engine
        self._pass_on = pass_on
        self._num_words = num_words
        self._tags = itertools.count(FIRST_TAG)
        self._open: dict[int, tuple[weakref.ref[GuidedRequest], Callable[[Sequence[int]], None] | None, int]] = {}
        self._inbox: deque[int] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._buffer = numpy.zeros((0, num_words), numpy.uint32)
        self._executor: Any = None
        # A descriptor of our own: the engine closes its one.
        self._event_fd = os.dup(engine.event_fd())
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        for fd in (self._event_fd, self._wake_read, self._wake_write):
            weakref.finalize(self, os.close, fd)

    def submit(
        self,
        grammar: CompiledGrammar,
        prompt_token_ids: Sequence[int],
        *,
        leader: GuidedRequest | None = None,
        max_unread_tokens: int = 0,
        on_ready: Callable[[Sequence[int]], None] | None = None,
        reader_tag: int = 0,
        **options: Any,
    ) -> GuidedRequest:
        """As Engine.submit. on_ready: called in the pump's thread with the reader_tag of each request that has
        something to read now and had nothing before."""
        tag = next(self._tags)
        request = self._engine.submit(
            prompt_token_ids,
            **options,
            leader=None if leader is None else leader.request,
            guided=True,
            mask_timeout=_MASK_TIMEOUT_S,
            notify=True,
            tag=tag,
        )
        guided = GuidedRequest(self, request, grammar, max_unread_tokens, tag)
        with self._lock:
            self._open[tag] = (weakref.ref(guided, lambda _: self._forget(tag)), on_ready, reader_tag)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="qwen_fast-masks", daemon=True)
                self._thread.start()
        self.wake(tag)
        return guided

    def wake(self, *tags: int) -> None:
        """Has the pump look at requests. From any thread."""
        self._inbox.extend(tags)
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:  # it has been woken often enough
            pass

    def _forget(self, tag: int) -> None:
        self._open.pop(tag, None)

    # -- the thread

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._event_fd, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        busy = time.monotonic()
        while True:
            try:
                poll.poll(_IDLE_S * 1000)
                self._round()
            except EngineError:  # closed, or failed: every request has ended and can be read to its end
                self._end_all(None)
                busy = -_IDLE_S
            except Exception as error:  # noqa: BLE001 - no request may wait for ever
                self._end_all(EngineError(f"the masks of guided requests failed: {type(error).__name__}: {error}"))
            now = time.monotonic()
            if self._open:
                busy = now
            elif now - busy >= _IDLE_S or self._engine.closed:
                with self._lock:
                    if not self._open:
                        self._thread = None
                        return

    def _round(self) -> None:
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            pass
        tags = self._engine.take_ready()
        others = [tag for tag in tags if tag < FIRST_TAG]
        if others and self._pass_on is not None:
            self._pass_on(others)
        own = [tag for tag in tags if tag >= FIRST_TAG]
        while self._inbox:
            own.append(self._inbox.popleft())
        waiting: list[GuidedRequest] = []
        told: dict[Callable[[Sequence[int]], None], list[int]] = {}
        for tag in dict.fromkeys(own):
            reference, on_ready, reader_tag = self._open.get(tag, (None, None, 0))
            guided = reference() if reference is not None else None
            if guided is None:
                continue
            try:
                if guided.take() and on_ready is not None:
                    told.setdefault(on_ready, []).append(reader_tag)
            except EngineError:
                raise
            except Exception as error:  # noqa: BLE001 - one request fails, not all
                guided.fail(error)
            if guided.finished:
                self._forget(tag)
            elif guided.wants_mask:
                waiting.append(guided)
        for start in range(0, len(waiting), _BATCH):
            self._fill(waiting[start : start + _BATCH])
        for on_ready, reader_tags in told.items():
            on_ready(reader_tags)

    def _fill(self, waiting: list[GuidedRequest]) -> None:
        count = len(waiting)
        if len(self._buffer) < count:
            self._buffer = numpy.zeros((count, self._num_words), numpy.uint32)
        row_bytes = 4 * self._num_words
        if count == 1:
            waiting[0].matcher.unsafe_compute_mask_ptr(self._buffer.ctypes.data, row_bytes)
        else:
            if self._executor is None:
                from llguidance import LLExecutor

                self._executor = LLExecutor(mask_threads())
            waiting.sort(key=lambda guided: guided.lexer)  # a thread takes neighbours: let them share what has a lock
            matchers = [(guided.matcher, row) for row, guided in enumerate(waiting)]
            self._executor.unsafe_compute_mask_ptr(matchers, self._buffer.ctypes.data, row_bytes, count)
        for row, guided in enumerate(waiting):
            try:
                guided.set_mask(self._buffer[row])
            except EngineError:
                raise
            except Exception as error:  # noqa: BLE001 - one request fails, not all
                guided.fail(error)

    def _end_all(self, error: Exception | None) -> None:
        """After the engine ended or this thread failed: what the engine still has is read, and what then has not
        finished ends with `error`."""
        for tag, (reference, on_ready, reader_tag) in list(self._open.items()):
            guided = reference()
            if guided is not None:
                guided.end(error)
                if on_ready is not None:
                    on_ready([reader_tag])
            self._forget(tag)


def _joined(before: list[Any] | None, more: list[Any] | None) -> list[Any] | None:
    """The first list, made longer."""
    if before is None or more is None:
        return before or more
    before += more
    return before
