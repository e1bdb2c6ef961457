"""What the parts of the server share: one Server, and its plug-ins with defaults that do nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from .bodies import Bodies
from .config import ServerConfig
from .workers import Workers

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM
    from ..outputs import Usage
    from ..params import SamplingParams
    from .pacing import Pacer


@dataclass(frozen=True)
class Principal:
    """Who asks. name: for the audit log and metrics, never the key itself. cache_salt: requests share cached prompt
    beginnings only under the same salt, 0 .. 2**64 - 1."""

    name: str = "anonymous"
    cache_salt: int = 0


@dataclass(slots=True)
class RequestRecord:
    """One request, filled in as it goes; what metrics, traces and the audit log read.

    Times are time.perf_counter() seconds. outcome: "" while it runs, then "ok", "cancelled" (the client went),
    "error" or "refused" (it never started).
    """

    request_id: str
    route: str
    principal: Principal
    arrived: float = field(default_factory=time.perf_counter)
    headers: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    stream: bool = False
    num_sequences: int = 0  # prompts times n
    params: SamplingParams | None = None
    prompt_tokens: int = 0
    expected_tokens: int = 0  # of the prompts, roughly, while prompt_tokens is not known
    completion_tokens: int = 0
    cached_tokens: int = 0
    first_token: float | None = None
    finished: float | None = None
    status: int = 200
    outcome: str = ""
    error: str | None = None
    finish_reasons: list[str] = field(default_factory=list)
    timings: list[Any] = field(default_factory=list)  # qwen_fast.outputs.Timings, one per finished sequence
    metered: Usage | None = None  # of the finished sequences together; see cost
    prompt_text: Any = None  # messages or prompt as given; for an audit log that was asked for text
    output_text: dict[int, str] | None = None  # by sequence; None: not collected

    @property
    def cost(self) -> Usage | None:
        """What the whole request took. None while a sequence runs, where one was cut off (what the others took is no
        whole), and where the engine has its meter off. Each prompt's tokens count once, whatever n is."""
        if self.metered is None or not self.num_sequences or len(self.timings) < self.num_sequences:
            return None
        return replace(self.metered, prompt_tokens=self.prompt_tokens, cached_tokens=self.cached_tokens)


class Admission(Protocol):
    """Counts sequences before their prompts are tokenised. in_flight: Server.in_flight, set by the Server."""

    in_flight: Mapping[str, RequestRecord]

    def arrive(self, principal: Principal) -> None:
        """A request is there whose body is not read yet. ApiError 429 where its key's rate allows none."""
        ...

    def expect(self, principal: Principal) -> None:
        """Before the body of a generation request is read: ApiError 429 where not even one sequence has a place."""
        ...

    def slot(self, principal: Principal, n: int) -> contextlib.AbstractAsyncContextManager[None]:
        """Holds room for n sequences while entered. Entering raises ApiError 429 where there is none. n = 0: a request
        that generates nothing."""
        ...

    def priority(self, principal: Principal) -> int:
        """The engine's priority of a request whose slot was just entered; lower runs first."""
        ...

    def finished(self, record: RequestRecord) -> None:
        """The record of a request that has ended, admitted or not."""
        ...


class Auth(Protocol):
    def principal(self, headers: Mapping[str, str]) -> Principal:
        """Who asks, by lower-case header names; ApiError 401 where that is nobody."""
        ...


class Audit(Protocol):
    def write(self, record: dict[str, Any]) -> None: ...


class Metrics(Protocol):
    def request_started(self, record: RequestRecord) -> None: ...
    def first_token(self, record: RequestRecord) -> None: ...
    def finished(self, record: RequestRecord) -> None: ...


class Tracer(Protocol):
    def request(self, record: RequestRecord) -> contextlib.AbstractContextManager[None]:
        """Entered around the whole request; the record is complete when it is left."""
        ...


@dataclass(frozen=True)
class OutputWish:
    """The form that a request wants its output in.

    forms: at most one of json (a schema, or its JSON text), regex, choice, grammar, json_object. tools: as the request
    gave them, empty where none may be called. tool_choice: "none", "auto", "required" or "function", which then is
    `function`. parallel: more than one call may be made.
    """

    forms: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str = "none"
    function: str | None = None
    parallel: bool = True

    @property
    def free(self) -> bool:
        """Plain text: there is nothing to force and nothing to parse."""
        return not self.forms and self.tool_choice == "none"


class DeltaParser(Protocol):
    """Turns the text of one sequence into deltas of OpenAI's shape: {"content": ...} and {"tool_calls": [{"index", "id",
    "type", "function": {"name", "arguments"}}]}."""

    def feed(self, text: str) -> list[dict[str, Any]]: ...
    def finish(self) -> list[dict[str, Any]]:
        """What was held back; after the last feed."""
        ...


class OutputForms(Protocol):
    """Structured output and tool calls."""

    def structured_outputs(self, wish: OutputWish) -> Any:
        """The value for SamplingParams.structured_outputs, None where the text is free. ApiError 400 for a form that is
        wrong."""
        ...

    def parser(self, wish: OutputWish) -> DeltaParser | None:
        """A fresh parser for one sequence; None: the text is the content."""
        ...


def default_forms(llm: AsyncLLM, config: ServerConfig) -> OutputForms:
    """All forms, with the configured parser of tool calls."""
    from .forms import Forms

    return Forms(llm, config.tool_call_parser)


class OpenDoor:
    """Auth without keys: everybody is "anonymous"."""

    _NOBODY = Principal()

    def principal(self, headers: Mapping[str, str]) -> Principal:
        return self._NOBODY


class Unlimited:
    """Admission that counts and refuses nothing. `admitted`: sequences inside."""

    def __init__(self) -> None:
        self.admitted = 0
        self.in_flight: Mapping[str, RequestRecord] = {}

    def arrive(self, principal: Principal) -> None:
        return None

    def expect(self, principal: Principal) -> None:
        return None

    @contextlib.asynccontextmanager
    async def slot(self, principal: Principal, n: int) -> AsyncIterator[None]:
        self.admitted += n
        try:
            yield
        finally:
            self.admitted -= n

    def priority(self, principal: Principal) -> int:
        return 0

    def finished(self, record: RequestRecord) -> None:
        return None


class NoAudit:
    def write(self, record: dict[str, Any]) -> None:
        return None


class NoMetrics:
    def request_started(self, record: RequestRecord) -> None:
        return None

    def first_token(self, record: RequestRecord) -> None:
        return None

    def finished(self, record: RequestRecord) -> None:
        return None


class NoTracer:
    @contextlib.contextmanager
    def request(self, record: RequestRecord) -> Iterator[None]:
        yield


class Server:
    """The state of one server process.

    llm: the loaded model. config: see ServerConfig. model_names: what requests may give as "model".
    started: Unix time, seconds. ready: requests are taken; False while draining, with `not_ready_reason` saying why.
    in_flight: requests that are running, by a key of their own. bodies: the bytes of their bodies. workers: threads for
    what would hold up the event loop. failure: why the process is about to end, by whoever
    watches the engine; engine_error: what a failed engine itself said.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        config: ServerConfig,
        *,
        auth: Auth | None = None,
        admission: Admission | None = None,
        audit: Audit | None = None,
        metrics: Metrics | None = None,
        tracer: Tracer | None = None,
        forms: OutputForms | None = None,
    ) -> None:
        for name, given in (("api_key", auth), ("api_key_file", auth), ("audit_log", audit)):
            if getattr(config, name) and given is None:  # never to be ignored in silence
                raise NotImplementedError(f"{name} is set, and this server has nothing that looks at it")
        self.llm = llm
        self.config = config
        self.model_names = config.model_names
        self.started = int(time.time())
        self.auth: Auth = auth or OpenDoor()
        self.admission: Admission = admission or Unlimited()
        self.audit: Audit = audit or NoAudit()
        self.metrics: Metrics = metrics or NoMetrics()
        self.tracer: Tracer = tracer or NoTracer()
        self.forms: OutputForms = forms or default_forms(llm, config)
        self.ready = True
        self.not_ready_reason = ""
        self.in_flight: dict[str, RequestRecord] = {}
        self.admission.in_flight = self.in_flight
        self.bodies = Bodies(config.limits.pending_body_bytes, tuple(getattr(self.auth, "limits", ())))
        self.workers = Workers()
        self.failure = ""
        self.engine_error = ""
        self.pacer: Pacer | None = None  # made by the event loop that serves
        self._interruption: asyncio.Future[tuple[str, str]] | None = None  # likewise

    @property
    def dead(self) -> str:
        """Why the engine cannot serve any more; empty while it can."""
        if self.llm.closed:
            return "the engine is closed"
        failed = self.llm.stats()["failed"]
        reason = self.failure or ("the engine failed" if failed else "")
        return f"{reason}: {self.engine_error}" if failed and self.engine_error else reason

    def interruption(self) -> asyncio.Future[tuple[str, str]]:
        """Done when running requests must end: with the message and the code of their error 503."""
        if self._interruption is None:
            self._interruption = asyncio.get_running_loop().create_future()
        return self._interruption

    def interrupt(self, message: str, code: str) -> None:
        """Ends every running generation request with an error. In the event loop's thread; there is no way back."""
        if not self.interruption().done():
            self.interruption().set_result((message, code))
