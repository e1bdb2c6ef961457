"""What the page does: conversations of a visitor, and answers that are written into them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .client import Backend, Model
from .config import UiConfig
from .history import Conversation, Entry, HistoryStore, clean_title, is_id
from .messages import AnswerParts, for_request, pending_call, turn_start, typed
from .settings import Settings, checked
from .stats import TurnStats, server_numbers, stream_options
from .texts import Refusal

_SHOWN_EVERY_S = 0.08  # between two pictures of a growing answer
_SAVED_EVERY_S = 2.0  # so much of it is lost at most if this process is killed
_METRICS_EVERY_S = 0.5
_LAST_SAVE_S = 1.0  # that the event loop waits for the store where an answer is cut off
_TITLE_CHARS = 48
T = TypeVar("T")


@dataclass(frozen=True)
class Visitor:
    """owner: see history.py. session: of one open page. api_key: what its visitor typed."""

    owner: str
    session: str
    api_key: str = ""


@dataclass(frozen=True)
class View:
    """What is to be shown now. numbers: for the panel. error: to be told beside it."""

    conversation: Conversation
    running: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)
    error: Refusal | None = None


class _Run:
    """One answer that is being written."""

    def __init__(self, owner: str, conversation_id: str) -> None:
        self.key = (owner, conversation_id)
        self.stop = asyncio.Event()


class Chats:
    """Refusal from every method for what the visitor may be told."""

    def __init__(self, store: HistoryStore, backend: Backend, config: UiConfig) -> None:
        self.store, self.backend, self.config = store, backend, config
        self._runs: dict[str, _Run] = {}  # by session
        self._models: list[Model] = []

    # -- conversations

    async def entries(self, visitor: Visitor) -> list[Entry]:
        return await self._call(self.store.entries, visitor.owner)

    async def open(self, visitor: Visitor, id: str | None) -> Conversation:
        """The visitor's conversation; a new one for None."""
        if id is None:
            return Conversation()
        found = await self._call(self.store.get, visitor.owner, id) if is_id(id) else None
        if found is None:
            raise Refusal("conversation_gone")
        return found

    async def rename(self, visitor: Visitor, id: str | None, title: str) -> None:
        clean = clean_title(title, self.config.limits.title_chars)
        if not clean:
            raise Refusal("empty_new_title")
        if id is None or not is_id(id):
            raise Refusal("conversation_gone")
        await self._call(self.store.rename, visitor.owner, id, clean)

    async def delete(self, visitor: Visitor, id: str | None) -> None:
        for run in self._runs.values():
            if run.key == (visitor.owner, id):
                run.stop.set()
        if id is not None and is_id(id):
            await self._call(self.store.delete, visitor.owner, id)

    async def preferences(self, visitor: Visitor) -> dict[str, Any]:
        return await self._call(self.store.preferences, visitor.owner)

    async def set_preferences(self, visitor: Visitor, values: dict[str, Any]) -> None:
        await self._call(self.store.set_preferences, visitor.owner, values)

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.to_thread(function, *arguments)

    # -- the server

    async def models(self, visitor: Visitor) -> list[Model]:
        """Of the server, as far as this visitor's key shows them."""
        self._models = await self.backend.models(visitor.api_key)
        return self._models

    async def numbers(self, visitor: Visitor) -> dict[str, Any]:
        return dict(server_numbers(await self.backend.metrics(visitor.api_key)))

    async def _model(self, visitor: Visitor, wanted: str) -> Model:
        name = wanted or self.config.model
        models = self._models or await self.models(visitor)
        for model in models:
            if name in ("", None, model.id):
                return model
        return Model(name or "")  # the server will say what it thinks of it

    # -- turns

    async def send(
        self, visitor: Visitor, id: str | None, content: str, form: dict[str, Any]
    ) -> AsyncGenerator[View, None]:
        """Adds what was typed and writes the answer."""
        settings = checked(form)
        if not content.strip():
            raise Refusal("empty_message")
        conversation = await self.open(visitor, id)
        conversation.messages.append(typed(conversation.messages, content))
        if not conversation.title:
            conversation.title = clean_title(content, _TITLE_CHARS)
        async with contextlib.aclosing(self._answer(visitor, conversation, settings)) as views:
            async for view in views:
                yield view

    async def edit(
        self, visitor: Visitor, id: str | None, index: int, content: str, form: dict[str, Any]
    ) -> AsyncGenerator[View, None]:
        """Replaces message `index`, which was typed, drops all that follows it, and writes a new answer."""
        settings = checked(form)
        if not content.strip():
            raise Refusal("empty_message")
        conversation = await self.open(visitor, id)
        messages = conversation.messages
        if not 0 <= index < len(messages) or messages[index]["role"] == "assistant":
            raise Refusal("conversation_gone")
        conversation.messages = [*messages[:index], {**messages[index], "content": content}]
        async with contextlib.aclosing(self._answer(visitor, conversation, settings)) as views:
            async for view in views:
                yield view

    async def retry(
        self, visitor: Visitor, id: str | None, index: int, form: dict[str, Any]
    ) -> AsyncGenerator[View, None]:
        """Writes the answer at message `index` again."""
        settings = checked(form)
        conversation = await self.open(visitor, id)
        if not 0 <= index < len(conversation.messages):
            raise Refusal("conversation_gone")
        del conversation.messages[turn_start(conversation.messages, index) + 1 :]
        async with contextlib.aclosing(self._answer(visitor, conversation, settings)) as views:
            async for view in views:
                yield view

    async def undo(self, visitor: Visitor, id: str | None, index: int) -> tuple[Conversation, str]:
        """The conversation without the turn of message `index` and what follows it, and what had been typed."""
        conversation = await self.open(visitor, id)
        if not 0 <= index < len(conversation.messages):
            raise Refusal("conversation_gone")
        if self._running(visitor.owner, conversation.id):
            raise Refusal("busy")
        start = turn_start(conversation.messages, index)
        content = str(conversation.messages[start].get("content") or "")
        del conversation.messages[start:]
        await self._call(self.store.save, visitor.owner, conversation)
        return conversation, content

    def stop(self, session: str) -> None:
        """Ends the answer that is being written for this page, if one is."""
        run = self._runs.get(session)
        if run is not None:
            run.stop.set()

    def _running(self, owner: str, id: str) -> bool:
        return any(run.key == (owner, id) for run in self._runs.values())

    def _begin(self, visitor: Visitor, id: str) -> _Run:
        if visitor.session in self._runs or self._running(visitor.owner, id):
            raise Refusal("busy")
        if len(self._runs) >= self.config.streams:
            raise Refusal("too_many_streams", limit=self.config.streams)
        run = self._runs[visitor.session] = _Run(visitor.owner, id)
        return run

    async def _answer(
        self, visitor: Visitor, conversation: Conversation, settings: Settings
    ) -> AsyncGenerator[View, None]:
        run = self._begin(visitor, conversation.id)
        try:
            conversation.settings = settings.form
            await self._call(self.store.save, visitor.owner, conversation)
            if pending_call(conversation.messages) is not None:  # more results are to be typed
                yield View(conversation)
                return
            answer = _Answer(self, visitor, conversation, settings, run)
            async with contextlib.aclosing(answer.views()) as views:
                async for view in views:
                    yield view
        finally:
            self._runs.pop(visitor.session, None)


class _Answer:
    """Writes one answer at the end of a conversation."""

    def __init__(
        self, chats: Chats, visitor: Visitor, conversation: Conversation, settings: Settings, run: _Run
    ) -> None:
        self._chats, self._visitor, self._settings, self._run = chats, visitor, settings, run
        self._conversation = conversation
        self._asked = list(conversation.messages)
        self._stats = TurnStats()
        self._parts = AnswerParts(chats.config.limits.message_bytes)
        self._server: dict[str, Any] = {}
        self._saved = time.monotonic()
        self._ended = self._kept = False
        self._saving = threading.Lock()

    async def views(self) -> AsyncGenerator[View, None]:
        pump = asyncio.create_task(self._pump())
        measuring = asyncio.create_task(self._measure())
        stopping = asyncio.create_task(self._run.stop.wait())
        try:
            yield self._view(running=True)
            shown = 0
            while not (pump.done() or stopping.done()):
                await asyncio.wait({pump, stopping}, timeout=_SHOWN_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
                if shown != self._parts.size and not pump.done():
                    shown = self._parts.size
                    yield self._view(running=True)
                    await self._checkpoint()
            error = await self._joined(pump)
            self._close("failed" if error else "stopped" if not pump_finished(pump) else "")
            with contextlib.suppress(Refusal):
                self._server = await self._chats.numbers(self._visitor)
            refused = await self._save_end()
            yield self._view(running=False, error=error or refused)
        finally:
            for task in (pump, measuring, stopping):
                task.cancel()
            if not self._kept:  # the page has gone, or this process ends
                if not self._ended:
                    self._close("stopped")
                self._save_at_last()

    async def _pump(self) -> None:
        """Reads the answer. Ends early where it grows over its limit."""
        model = await self._chats._model(self._visitor, self._settings.model)
        body = {
            "model": model.id,
            "messages": for_request(self._asked, self._settings.system),
            "stream_options": stream_options(model),
            **self._settings.request,
        }
        chunks = self._chats.backend.chat(body, self._visitor.api_key)
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                try:
                    fits = all(self._parts.add(delta) for delta in self._stats.chunk(chunk))
                except (TypeError, AttributeError) as error:
                    raise Refusal("server_broke_off", reason=str(error)) from None
                if not fits:
                    raise Refusal("answer_too_long", limit=self._chats.config.limits.message_bytes)

    async def _measure(self) -> None:
        """Asks the server for its numbers every now and then, for as long as it has some."""
        with contextlib.suppress(Refusal):
            found = True
            while found:
                await asyncio.sleep(_METRICS_EVERY_S)
                self._server = await self._chats.numbers(self._visitor)
                found = bool(self._server)

    async def _joined(self, pump: asyncio.Task[None]) -> Refusal | None:
        if not pump.done():
            pump.cancel()
        try:
            await pump
        except Refusal as error:
            return error
        except asyncio.CancelledError:
            if not pump.cancelled():
                raise
        return None

    def _close(self, end: str) -> None:
        """The answer as it will stay. end: "", "stopped" or "failed"."""
        self._ended = True
        message = self._parts.message()
        reason = end or ("length" if self._stats.finish_reason == "length" else "")
        message["meta"] = {"end": reason, "stats": self._stats.numbers()}
        has_something = message["content"] or message.get("tool_calls") or not end
        self._conversation.messages = [*self._asked, message] if has_something else self._asked

    def _view(self, running: bool, error: Refusal | None = None) -> View:
        if running:
            self._conversation.messages = [*self._asked, self._parts.message()]
        return View(self._conversation, running, {**self._server, **self._stats.numbers()}, error)

    async def _checkpoint(self) -> None:
        if time.monotonic() - self._saved < _SAVED_EVERY_S:
            return
        await self._chats._call(self._save)
        self._saved = time.monotonic()

    def _save(self) -> None:
        """In a thread. One after another: a task that was cancelled leaves its save behind, still running."""
        with self._saving:
            self._chats.store.save(self._visitor.owner, self._conversation)

    async def _save_end(self) -> Refusal | None:
        refused = None
        try:
            await self._chats._call(self._save)
        except Refusal as error:
            refused = error
        self._kept = True
        return refused

    def _save_at_last(self) -> None:
        """Where the event loop may be about to end, so that nothing can be awaited. The save goes on after the wait."""

        def work() -> None:
            with contextlib.suppress(Refusal):
                self._save()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(_LAST_SAVE_S)


def pump_finished(pump: asyncio.Task[None]) -> bool:
    return pump.done() and not pump.cancelled()
