"""AsyncLLM: the engine for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ._group import Group
from ._logits import logits_array, start_logits
from .base import STREAM_UNREAD_TOKENS, BaseLLM
from .errors import EngineError
from .outputs import RequestOutput, StreamOutput
from .params import SamplingParams
from .prompts import conversation_list, one_conversation, params_list, prompt_list
from .structured import structured_outputs

if TYPE_CHECKING:
    import numpy

    from ._engine import Engine
    from ._grammars import CompiledGrammar
    from .cost.report import Report

_LONG_TEXT = 4096  # characters; a longer prompt is tokenised in a thread


class _Wakeups:
    """One descriptor of the engine wakes every event loop that waits for it; whichever loop comes first takes the list
    of ready requests and passes on what belongs to other loops. A loop is watched while it has a request open."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # A descriptor of our own: the engine closes its one, and the number would soon be another file's.
        self._fd = os.dup(engine.event_fd())
        weakref.finalize(self, os.close, self._fd)
        self._tags = itertools.count(1)
        self._waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Event, bool]] = {}
        self._open: dict[asyncio.AbstractEventLoop, int] = {}
        self._lock = threading.Lock()
        self.pass_on: Callable[[list[int]], None] = lambda tags: None  # given tags that are nobody's here

    def add(self, watch: bool = True) -> tuple[int, asyncio.Event]:
        """A tag for Engine.submit(notify=True), and the event that is set when the request has something to read.
        watch=False: somebody else reads the engine's descriptor for it, and calls wake()."""
        loop = asyncio.get_running_loop()
        event = asyncio.Event()
        with self._lock:
            tag = next(self._tags)
            if loop not in self._open:  # a good moment to forget loops that were closed with requests open
                for dead in [known for known in self._open if known.is_closed()]:
                    del self._open[dead]
                    self._waiting = {i: entry for i, entry in self._waiting.items() if entry[0] is not dead}
            self._waiting[tag] = (loop, event, watch)
            if watch:
                self._open[loop] = self._open.get(loop, 0) + 1
            first = watch and self._open[loop] == 1
        if first:
            loop.add_reader(self._fd, self._ready)
        return tag, event

    def remove(self, tag: int) -> None:
        with self._lock:
            loop, _, watched = self._waiting.pop(tag, (None, None, False))
            if loop is None or not watched:
                return
            self._open[loop] -= 1
            last = self._open[loop] == 0
            if last:
                del self._open[loop]
        if last and not loop.is_closed():
            loop.remove_reader(self._fd)

    def _ready(self) -> None:
        here = asyncio.get_running_loop()
        try:
            tags = self._engine.take_ready()
        except EngineError:  # closed
            here.remove_reader(self._fd)
            self.wake_all()
            return
        self._wake(tags, here)

    def wake_all(self) -> None:
        """After the engine was closed: every request has ended and can be read to its end."""
        with self._lock:
            tags = list(self._waiting)
        self._wake(tags, None)

    def wake(self, tags: Sequence[int]) -> None:
        """These have something to read. From any thread."""
        self._wake(tags, None)

    def _wake(self, tags: Sequence[int], here: asyncio.AbstractEventLoop | None) -> None:
        elsewhere: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
        unknown = []
        for tag in tags:
            entry = self._waiting.get(tag)
            if entry is None:
                unknown.append(tag)
            elif entry[0] is here:
                entry[1].set()
            else:
                elsewhere.setdefault(entry[0], []).append(entry[1])
        for loop, events in elsewhere.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(_set_all, events)
        if unknown:
            self.pass_on(unknown)


def _set_all(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        event.set()


class AsyncLLM(BaseLLM):
    """A loaded model, for asyncio: what computes in LLM is a coroutine or an async generator here; info(), stats(),
    encode(), decode(), apply_chat_template() and reset_prefix_cache() are the same.

    Loading blocks. Methods may be called from several event loops in several threads; each call belongs to the loop
    that runs it. Cancelling the task, or closing the generator, cancels the request. For the options see __init__.
    """

    def _loaded(self) -> None:
        self._wakeups = _Wakeups(self._engine)
        self._guidance.on_ready = self._guidance.pass_on = self._wakeups.wake
        self._wakeups.pass_on = self._guidance.wake

    def close(self) -> None:
        super().close()
        self._wakeups.wake_all()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self.close)

    async def stream(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: int = 0,
    ) -> AsyncIterator[StreamOutput]:
        """`async for out in llm.stream(prompt, params)`: increments as LLM.stream() yields them. The request starts
        with the first step of the loop."""
        ready = await self._in_thread(prompt, self._prompt)
        limits = {"max_unread_tokens": STREAM_UNREAD_TOKENS, "cache_salt": cache_salt}
        async with contextlib.aclosing(self._iterate(ready, sampling_params, request_id, **limits)) as outputs:
            async for output in outputs:
                yield output

    async def generate(
        self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """All outputs in the order of the prompts, as LLM.generate(). One failure cancels the rest."""
        prompts = prompt_list(prompts)
        many = params_list(sampling_params, len(prompts))
        return await self._gather([self._whole(prompt, self._prompt, params) for prompt, params in zip(prompts, many)])

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        stream: bool = False,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        split_special_tokens: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """generate() for conversations, as LLM.chat(): `outputs = await llm.chat(messages)`.

        stream: `async for out in llm.chat(messages, stream=True)`, for one conversation: what stream_chat() yields.
        """
        options: dict[str, Any] = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "split_special_tokens": split_special_tokens,
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
        }
        if stream:
            (params,) = params_list(sampling_params, 1)
            return self.stream_chat(one_conversation(messages), params, **options)
        return self._chat(messages, sampling_params, options)

    async def _chat(self, messages: Any, sampling_params: Any, options: Mapping[str, Any]) -> list[RequestOutput]:
        def render(conversation: Any) -> tuple[str, list[int]]:
            return self.apply_chat_template(conversation, **options)

        conversations = conversation_list(messages)
        many = params_list(sampling_params, len(conversations))
        return await self._gather([self._whole(one, render, params) for one, params in zip(conversations, many)])

    async def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        request_id: str | None = None,
        cache_salt: int = 0,
        **template_options: Any,
    ) -> AsyncIterator[StreamOutput]:
        """stream() for one conversation; template_options: see apply_chat_template."""
        ready = await self._in_thread(messages, lambda one: self.apply_chat_template(one, tools, **template_options))
        limits = {"max_unread_tokens": STREAM_UNREAD_TOKENS, "cache_salt": cache_salt}
        async with contextlib.aclosing(self._iterate(ready, sampling_params, request_id, **limits)) as outputs:
            async for output in outputs:
                yield output

    async def logits(self, token_ids: Any, start: int = 0, stop: int | None = None) -> numpy.ndarray:
        """As LLM.logits()."""
        _, ids = await self._in_thread(token_ids, self._prompt)
        tag, event = self._wakeups.add()
        group: Group | None = None
        try:
            group = start_logits(self, ids, start, stop, notify=True, tag=tag)
            while True:
                await event.wait()
                event.clear()
                output = group.requests[0].read(0)
                if output is not None and output["finished"]:
                    return logits_array(output, self.vocab_size)
        finally:
            if group is not None:
                group.cancel()
            self._wakeups.remove(tag)

    async def cost_report(self, workload: Any = None, **options: Any) -> Report:
        """As LLM.cost_report(), in a thread; it takes minutes where options do not say otherwise. Cancelling the task does
        not end the thread: budget_seconds bounds it."""
        from .cost.api import cost_report

        return await asyncio.to_thread(cost_report, self, workload, **options)

    async def _iterate(
        self,
        prompt: tuple[str | None, list[int]],
        params: SamplingParams | None,
        request_id: str | None = None,
        **extra: Any,
    ) -> AsyncGenerator[StreamOutput, None]:
        grammar = await self._compiled(params)
        tag, event = self._wakeups.add(watch=grammar is None)
        group: Group | None = None
        large = params is not None and params.prompt_logprobs is not None  # a read may bring millions of them
        try:
            group = self._start(prompt, params, request_id, grammar, notify=True, tag=tag, **extra)
            pending = list(range(len(group.requests)))
            while pending:
                await event.wait()
                event.clear()  # before reading: what comes after the read sets it again
                for index in tuple(pending):
                    output = await asyncio.to_thread(group.read, index, 0) if large else group.read(index, 0)
                    if output is not None:
                        if output.finished:
                            pending.remove(index)
                        yield output
        finally:
            if group is not None:
                group.cancel()
            self._wakeups.remove(tag)

    async def _whole(self, prompt: Any, make: Callable[[Any], Any], params: SamplingParams) -> RequestOutput:
        ready = await self._in_thread(prompt, make)
        grammar = await self._compiled(params)
        tag, event = self._wakeups.add(watch=grammar is None)
        group: Group | None = None
        try:
            group = self._start(ready, params, None, grammar, notify=True, tag=tag)
            completions = group.completions()
            while not all(completion.finished for completion in completions):
                await event.wait()
                event.clear()
                for completion in completions:
                    if not completion.finished and (output := group.read(completion.index, 0)) is not None:
                        group.collect(completions, output)
            return group.result(completions)
        finally:
            if group is not None:
                group.cancel()
            self._wakeups.remove(tag)

    async def _compiled(self, params: SamplingParams | None) -> CompiledGrammar | None:
        """The grammar of structured_outputs, compiled in another thread."""
        form = structured_outputs(params.structured_outputs) if isinstance(params, SamplingParams) else None
        if form is None or params is None:
            return None
        return await self._guidance.compile(form, params.n)

    async def _in_thread(self, prompt: Any, make: Callable[[Any], Any]) -> Any:
        """make(prompt), in a thread where the text is long: the event loop stays free."""
        return await asyncio.to_thread(make, prompt) if _length(prompt) > _LONG_TEXT else make(prompt)

    @staticmethod
    async def _gather(calls: Sequence[Any]) -> list[RequestOutput]:
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise


def _length(prompt: Any) -> int:
    """Characters to tokenise, roughly."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, Mapping):
        ids = prompt.get("prompt_token_ids")
        if isinstance(ids, (list, tuple)):
            return len(ids)  # each of them is checked
        return _length(prompt.get("content") or prompt.get("prompt") or "")
    if isinstance(prompt, (list, tuple)) and prompt and not isinstance(prompt[0], int):
        return sum(map(_length, prompt))
    return 0
