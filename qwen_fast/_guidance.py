"""Structured output of one loaded model: where LLM and AsyncLLM meet the compiler and the masks. Imports llguidance only
when it is used."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .structured import StructuredOutputsParams

if TYPE_CHECKING:
    from ._engine import Engine
    from ._grammars import CompiledGrammar, GrammarCompiler
    from ._guided import GuidedPump, GuidedRequest
    from .tokenizer import Tokenizer

_COMPILE_THREADS = 2


class Guidance:
    """One per engine. Thread-safe.

    on_ready, pass_on: for AsyncLLM; see GuidedPump.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None
        self._pump: GuidedPump | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._compiling: dict[Any, Future[CompiledGrammar]] = {}  # in those threads
        self.on_ready: Callable[[Sequence[int]], None] | None = None
        self.pass_on: Callable[[Sequence[int]], None] | None = None

    @property
    def compiler(self) -> GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                if importlib.util.find_spec("llguidance") is None:
                    raise ImportError("structured output needs llguidance: pip install qwen_fast[server]")
                if self._tokenizer is None:
                    raise ValueError("structured output needs a tokenizer, and this checkpoint has no tokenizer.json")
                from ._grammars import GrammarCompiler

                self._compiler = GrammarCompiler(self._tokenizer, self._vocab_size, self._eos_token_ids)
            return self._compiler

    def prepare(self) -> None:
        """Starts a thread for what the first guided request would wait for: a second for a vocabulary of 152,000 tokens,
        nearly half of it with the interpreter's lock. Where structured output cannot be had nothing happens."""

        def run() -> None:
            with contextlib.suppress(ImportError, ValueError):
                self.compiler.prepare()

        threading.Thread(target=run, name="qwen_fast-vocabulary", daemon=True).start()

    @property
    def pump(self) -> GuidedPump:
        with self._lock:
            if self._pump is None:
                from ._guided import GuidedPump

                self._pump = GuidedPump(self._engine, (self._vocab_size + 31) // 32, self.pass_on)
            return self._pump

    async def compile(self, params: StructuredOutputsParams, sequences: int) -> CompiledGrammar:
        """compiler.compile() in a thread of a small pool: neither the event loop nor other work in threads waits, and
        equal forms take one thread together."""
        import asyncio  # whoever awaits has it already; `qwen-fast generate` need not load it

        compiler = self.compiler
        found = compiler.cached(params)
        if found is None:
            found = await asyncio.shield(asyncio.wrap_future(self._compiled(params)))  # others may wait for it too
        if found.lacks(sequences):
            await asyncio.get_running_loop().run_in_executor(self._pool, found.grow, sequences)
        return found

    @property
    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_COMPILE_THREADS, thread_name_prefix="qwen_fast-grammars")
            return self._threads

    def _compiled(self, params: StructuredOutputsParams) -> Future[CompiledGrammar]:
        compiler, pool = self.compiler, self._pool
        with self._lock:
            found = self._compiling.get(params.key)
            if found is None:
                found = self._compiling[params.key] = pool.submit(compiler.compile, params)
                found.add_done_callback(lambda _: self._compiling.pop(params.key, None))
            return found

    def submitter(
        self, params: StructuredOutputsParams, sequences: int, grammar: CompiledGrammar | None
    ) -> GuidedEngine:
        """What submits sequences of this form in place of the engine. grammar: compiled before, or None."""
        return GuidedEngine(self, grammar or self.compiler.compile(params, sequences))

    def wake(self, tags: Sequence[int]) -> None:
        """Tags of guided requests that somebody else took from the engine."""
        if self._pump is not None:
            self._pump.wake(*tags)


class GuidedEngine:
    """Has the submit() of an engine; its requests follow the grammar."""

    def __init__(self, guidance: Guidance, grammar: CompiledGrammar) -> None:
        self._guidance = guidance
        self._grammar = grammar

    def submit(
        self, prompt_token_ids: Sequence[int], *, notify: bool = False, tag: int = 0, **options: Any
    ) -> GuidedRequest:
        on_ready = self._guidance.on_ready if notify else None
        return self._guidance.pump.submit(self._grammar, prompt_token_ids, on_ready=on_ready, reader_tag=tag, **options)
