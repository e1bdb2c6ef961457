"""The one place where requests meet AsyncLLM: admission, rendering, submission, increments to events, the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import EngineError
from ..outputs import Logprob, StreamOutput
from ..params import SamplingParams
from .audit import audit_entry
from .bounds import check_limits, check_logprobs, too_long
from .errors import ApiError, from_exception
from .http_io import (
    CONTEXT,
    ClientGone,
    Message,
    Receive,
    Send,
    route_path,
    send_json,
    send_last_words,
    while_connected,
)
from .intake import QUICK_BODY_BYTES, body_of, note_unknown_fields, validated
from .pacing import pacer_of
from .protocol import GenerationRequest
from .state import RequestRecord, Server
from .text import dumped_in_pieces

_LONG_TEXT = 4096  # characters; longer ones are tokenised in a thread; log-probabilities of an event: written in one
_LONG_ANSWER = 1024  # tokens of prompts and completions; longer answers are written in a thread
_STARTED_TOGETHER = 4  # prompts of a request
_CHARS_PER_TOKEN = 4  # roughly
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Prompt:
    text: str | None
    token_ids: list[int]


@dataclass(slots=True)
class Sequence:
    """One finished sequence: sample `index % n` of prompt `index // n`."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    last: StreamOutput | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Answer(ABC):
    """How one request is rendered, and the shape of its answer. Made before admission: it may refuse the request, and
    must not tokenise."""

    route: str
    stream: bool
    include_usage: bool
    params: SamplingParams
    num_prompts: int
    salt: int
    id: str

    @abstractmethod
    def render(self) -> list[Prompt]:
        """Tokenises; may be called in a thread."""

    @abstractmethod
    def begin(self, prompts: list[Prompt]) -> str:
        """The events before the first increment."""

    @abstractmethod
    def events(self, output: StreamOutput) -> str:
        """The events of an increment, possibly none."""

    @abstractmethod
    def usage_event(self, usage: dict[str, Any]) -> str: ...

    @abstractmethod
    def whole(self, prompts: list[Prompt], sequences: list[Sequence], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole response."""

    @property
    @abstractmethod
    def text_length(self) -> int:
        """Characters to tokenise, roughly; a token id that was given counts as four."""


def usage_of(server: Server, record: RequestRecord) -> dict[str, Any]:
    """OpenAI's usage, and under "cost" what the meter says, where it is on and the configuration does not leave it out."""
    usage: dict[str, Any] = {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }
    if server.config.usage_cost and (cost := record.cost) is not None:
        usage["cost"] = cost.as_dict()
    return usage


async def handle(
    server: Server,
    scope: Message,
    receive: Receive,
    send: Send,
    kind: type[GenerationRequest],
    make: Callable[[Server, Any, RequestRecord], Answer],
) -> None:
    """A whole generation request. make: turns the validated request into an Answer."""
    context = scope[CONTEXT]
    record = RequestRecord(context.request_id, route_path(scope), context.principal, headers=context.headers)
    record.model = server.model_names[0]
    reply = _Reply(send)
    with server.tracer.request(record), _recorded(server, record):
        try:
            server.admission.expect(context.principal)
            async with body_of(server, scope, receive) as body:
                large = len(body) > QUICK_BODY_BYTES
                answer = await server.workers.run_if(large, _prepared, server, record, kind, make, body)
                del body
                limit = server.config.limits.request_seconds
                left = max(limit - (time.perf_counter() - record.arrived), 0.001)
                running = _run(server, answer, record, reply)
                await while_connected(running, receive, left, limit, server.interruption())
        except ClientGone:
            record.outcome = "cancelled"
            raise
        except Exception as error:  # noqa: BLE001 - every failure gets its answer
            if isinstance(error, EngineError):
                server.engine_error = str(error)
            shown = from_exception(error, record.request_id)
            record.status, record.error = shown.status, shown.message
            record.outcome = "error" if record.prompt_tokens or shown.status >= 500 else "refused"
            if not reply.started:
                raise shown from None
            await send_last_words(send, b"data: " + shown.body_bytes() + b"\n\n" + DONE)


def _prepared(
    server: Server,
    record: RequestRecord,
    kind: type[GenerationRequest],
    make: Callable[[Server, Any, RequestRecord], Answer],
    body: bytes,
) -> Answer:
    request = validated(server, kind, body)
    check_limits(request, server.config.limits)
    note_unknown_fields(request)
    record.request_id = request.request_id or record.request_id
    answer = make(server, request, record)
    record.stream, record.params = answer.stream, answer.params
    record.num_sequences = answer.num_prompts * answer.params.n
    return answer


@contextlib.contextmanager
def _recorded(server: Server, record: RequestRecord) -> Iterator[None]:
    """Metrics and the audit log around a request."""
    key = f"{record.request_id} {id(record)}"  # clients may give two requests the same id
    server.in_flight[key] = record
    server.metrics.request_started(record)
    try:
        yield
        record.outcome = record.outcome or "ok"
    finally:
        server.in_flight.pop(key, None)
        record.outcome = record.outcome or "cancelled"
        record.finished = time.perf_counter()
        server.admission.finished(record)
        server.metrics.finished(record)
        server.audit.write(audit_entry(record))


class _Reply:
    def __init__(self, send: Send) -> None:
        self.send = send
        self.started = False

    async def start_events(self) -> None:
        self.started = True
        await self.send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})


async def _run(server: Server, answer: Answer, record: RequestRecord, reply: _Reply) -> None:
    async with server.admission.slot(record.principal, record.num_sequences):
        record.expected_tokens = answer.text_length // _CHARS_PER_TOKEN
        answer.params.priority = server.admission.priority(record.principal)
        words = sum(map(len, answer.params.bad_words or ()))
        long = answer.text_length + words > _LONG_TEXT
        prompts = await server.workers.run_if(long, _rendered, server, answer)
        record.prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        async with contextlib.aclosing(_increments(server, answer, prompts, record)) as outputs:
            if answer.stream:
                await _stream(server, answer, prompts, outputs, record, reply)
            else:
                await _whole(server, answer, prompts, outputs, record, reply)


def _rendered(server: Server, answer: Answer) -> list[Prompt]:
    """The prompts, which fit; bad_words become token ids, once for all prompts."""
    params, llm = answer.params, server.llm
    prompts = answer.render()
    for prompt in prompts:
        check_room(server, prompt, params)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    check_logprobs(params, lengths, llm.max_model_len, answer.stream, server.config.limits)
    if params.bad_words:
        words = llm._bad_word_ids(params.bad_words)
        params.bad_words = [array("i", word) for word in words]  # type: ignore[misc]
    return prompts


def check_room(server: Server, prompt: Prompt, params: SamplingParams) -> None:
    """ApiError where prompt and output cannot fit into the context."""
    length, most = len(prompt.token_ids), server.llm.max_model_len
    if not length:
        raise ApiError(400, "the prompt is empty: it has no tokens", param="prompt")
    asked = params.max_tokens or 0
    if length + asked > most or (length == most and params.max_tokens != 0):
        raise too_long(f"{length} tokens in the prompt" + (f" and {asked} in the completion" if asked else ""), most)


async def _stream(
    server: Server,
    answer: Answer,
    prompts: list[Prompt],
    outputs: AsyncGenerator[StreamOutput, None],
    record: RequestRecord,
    reply: _Reply,
) -> None:
    send = reply.send
    head = answer.begin(prompts)
    async for output in outputs:
        entries = 0 if answer.params.logprobs is None else len(output.token_ids) * (answer.params.logprobs + 1)
        text = await server.workers.run_if(entries > _LONG_TEXT, answer.events, output)
        if not reply.started:  # only now: what the engine refuses still gets its status
            await reply.start_events()
            text = head + text
        if text:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
    tail = answer.usage_event(usage_of(server, record)) if answer.include_usage else ""
    await send({"type": "http.response.body", "body": tail.encode() + DONE})


async def _whole(
    server: Server,
    answer: Answer,
    prompts: list[Prompt],
    outputs: AsyncGenerator[StreamOutput, None],
    record: RequestRecord,
    reply: _Reply,
) -> None:
    sequences = [Sequence(index) for index in range(record.num_sequences)]
    async for output in outputs:
        sequence = sequences[output.index]
        sequence.texts.append(output.text)
        sequence.token_ids += output.token_ids
        if output.logprobs:
            sequence.logprobs += output.logprobs
        if output.finished:
            sequence.last = output

    def written() -> bytes:
        return dumped_in_pieces(answer.whole(prompts, sequences, usage_of(server, record))).encode()

    body = await server.workers.run_if(record.prompt_tokens + record.completion_tokens > _LONG_ANSWER, written)
    reply.started = True
    await send_json(reply.send, 200, body)


async def _increments(
    server: Server, answer: Answer, prompts: list[Prompt], record: RequestRecord
) -> AsyncGenerator[StreamOutput, None]:
    """Every increment of every sequence as it comes; output.index counts through all prompts."""
    if len(prompts) == 1:
        outputs = _of_prompt(server, answer, prompts[0], 0, record)
    else:
        outputs = _merged([_of_prompt(server, answer, prompt, i, record) for i, prompt in enumerate(prompts)])
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            if record.first_token is None and output.token_ids:
                record.first_token = time.perf_counter()
                server.metrics.first_token(record)
            record.completion_tokens += len(output.token_ids)
            if record.output_text is not None:
                record.output_text[output.index] = record.output_text.get(output.index, "") + output.text
            if output.finish_reason is not None:
                _note_finish(record, output)
            yield output


def _note_finish(record: RequestRecord, output: StreamOutput) -> None:
    if output.finish_reason not in ("stop", "length"):
        raise ApiError(503, f"the request was ended by the server ({output.finish_reason})", code="aborted")
    record.finish_reasons.append(str(output.finish_reason))
    record.timings.append(output.timings)
    usage = output.usage
    if usage is None:
        return
    if output.index % (record.params.n if record.params else 1) == 0:
        record.cached_tokens += usage.cached_tokens
    if usage.flops:  # the meter is on: every request computes something
        record.metered = usage if record.metered is None else record.metered.plus(usage)


async def _of_prompt(
    server: Server, answer: Answer, prompt: Prompt, number: int, record: RequestRecord
) -> AsyncGenerator[StreamOutput, None]:
    params, pacer = answer.params, pacer_of(server)
    guided = getattr(params, "structured_outputs", None) is not None
    first = number * params.n
    unfinished = list(range(first, first + params.n))
    outputs: Any = server.llm.stream(
        {"prompt_token_ids": prompt.token_ids}, params, request_id=record.request_id, cache_salt=answer.salt
    )
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            output.index += first
            pause = output.index == unfinished[-1] and not guided  # all samples advance in the same steps
            if output.finish_reason is not None:
                unfinished.remove(output.index)
            yield output
            if pause and unfinished and (delay := pacer.delay()) > 0.001:
                await asyncio.sleep(delay)


async def _merged(streams: list[AsyncGenerator[StreamOutput, None]]) -> AsyncGenerator[StreamOutput, None]:
    """The outputs of several streams as they come. The first failure ends them all."""
    queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=2 * len(streams))
    end = object()

    async def drain(stream: AsyncGenerator[StreamOutput, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for output in stream:
                    await queue.put(output)
            await queue.put(end)
        except Exception as error:  # noqa: BLE001 - raised again by the reader
            await queue.put(error)

    tasks: list[asyncio.Future[None]] = []
    try:
        for stream in streams:
            tasks.append(asyncio.ensure_future(drain(stream)))
            if len(tasks) % _STARTED_TOGETHER == 0:
                await asyncio.sleep(0)  # submitting takes time: not all of them in one turn of the event loop
        left = len(streams)
        while left:
            item = await queue.get()
            if item is end:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
