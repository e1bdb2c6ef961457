"""From StructuredOutputsParams to matchers of llguidance, which say after each token which tokens may come next."""

from __future__ import annotations

import json
import os
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy

from .structured import StructuredOutputsParams
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CACHE_BYTES = 64 * 2**20
_LARGEST_PART = 4  # of CACHE_BYTES: one grammar has no more than this part of it

# Of a compiled grammar, generously: what is fixed, per byte of source, and per millisecond that compiling took beyond
# the first few. Measured: 4 to 900 KiB for schemas of 0.2 to 13 KiB, 0.1 to 0.4 MiB a millisecond for what is hard.
# Use adds the states of the lexer: nothing to speak of for most, and at most some 300 bytes for each of max_lexer_states.
_FIXED_BYTES = 256 * 1024
_BYTES_PER_BYTE = 64
_BYTES_PER_MS = 512 * 1024
_FREE_MS = 5

# llguidance's own: they bound the time of compiling (tenths of a second) and of a mask (about 10 ms), and the memory.
_LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 150_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
_QUICK_MS = 50  # what takes longer to compile gets one lexer
_SHOWN_CHARS = 300  # of the compiler's message


class _Vocabulary:
    """The tokenizer as llguidance reads one."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_ids[0]
        self.tokens = tokenizer.tokens + [b""] * (vocab_size - len(tokenizer.tokens))  # those are never allowed
        self.special_token_ids = sorted(control_tokens(tokenizer).values())

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, allow_special=False)


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Added tokens that are no part of ordinary text: special ones, and others in angle brackets, such as <tool_call>.
    A grammar allows them only where it names them."""
    return {
        text: token_id
        for text, token_id in tokenizer.added_tokens.items()
        if token_id in tokenizer.special_ids or re.fullmatch(r"<[^<>\s]+>", text)
    }


class CompiledGrammar:
    """A grammar for one vocabulary. Thread-safe; each sequence gets a matcher of its own.

    Matchers copied from one another share a lexer, which knows what it has seen, behind a lock: their masks are filled
    one after the other. So sequences that run at once get copies of several, up to the number of threads, and to a
    quarter of CACHE_BYTES.

    build: compiles the grammar. source_bytes: its size.
    """

    def __init__(self, build: Callable[[], LLMatcher], source_bytes: int) -> None:
        self._build = build
        self._lock = threading.Lock()
        self._growing = threading.Lock()
        began = time.thread_time()
        self._lexers: list[tuple[LLMatcher, weakref.WeakSet[Any]]] = [(build(), weakref.WeakSet())]
        taken_ms = 1e3 * (time.thread_time() - began)
        hard_bytes = int(_BYTES_PER_MS * max(0.0, taken_ms - _FREE_MS))
        self._lexer_bytes = _FIXED_BYTES + _BYTES_PER_BYTE * source_bytes + hard_bytes
        room = max(1, _largest_bytes() // self._lexer_bytes)
        self._most = min(room, mask_threads()) if taken_ms < _QUICK_MS else 1

    @property
    def size_bytes(self) -> int:
        """An estimate."""
        return self._lexer_bytes * len(self._lexers)

    def lacks(self, sequences: int) -> int:
        """How many lexers should be built before so many more sequences start."""
        with self._lock:
            return max(0, min(self._most, self._num_owners() + sequences) - len(self._lexers))

    def grow(self, sequences: int) -> None:
        """Builds them; milliseconds each."""
        with self._growing:
            for _ in range(self.lacks(sequences)):
                built = self._build()
                with self._lock:
                    self._lexers.append((built, weakref.WeakSet()))

    def matcher(self, owner: Any) -> tuple[LLMatcher, int]:
        """A matcher at the beginning, and the number of its lexer; microseconds. The owner's life is the matcher's."""
        with self._lock:
            number = min(range(len(self._lexers)), key=lambda number: len(self._lexers[number][1]))
            matcher, owners = self._lexers[number]
            owners.add(owner)
        return matcher.deep_copy(), number

    def _num_owners(self) -> int:
        return sum(len(owners) for _, owners in self._lexers)


class GrammarCompiler:
    """Compiles, and keeps what was compiled: the least recently used goes when CACHE_BYTES are exceeded. A grammar that
    would take more than a quarter of them is not kept beyond the requests that use it. Equal forms that are asked for
    at once are compiled once. Thread-safe. The first use takes a second for a vocabulary of 152,000 tokens.

    vocab_size: bits of a mask. Ids that the tokenizer lacks are never allowed. eos_token_ids: may come where the grammar
    is complete, and end the text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        if not eos_token_ids:
            raise ValueError("structured output needs an end-of-text token, and this checkpoint names none")
        self.vocab_size = vocab_size
        self.num_words = (vocab_size + 31) // 32
        self._make: Callable[[], _Vocabulary] = lambda: _Vocabulary(tokenizer, vocab_size, eos_token_ids)
        self._eos = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._cache: OrderedDict[Any, CompiledGrammar] = OrderedDict()
        self._alive: weakref.WeakValueDictionary[Any, CompiledGrammar] = weakref.WeakValueDictionary()  # cached or not
        self._compiling: dict[Any, Future[CompiledGrammar | None]] = {}
        self._lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()

    def prepare(self) -> None:
        """What the first request would wait for: the vocabulary as a trie, and the first walk over it."""
        from llguidance import LLMatcher

        with self._tokenizer_lock:
            if self._tokenizer is not None:
                return
            from llguidance import LLTokenizer

            tokenizer = LLTokenizer(self._make(), eos_token=self._eos)  # type: ignore[arg-type]
            first = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema('{"type":"object"}'), log_level=0)
            first.compute_bitmask()
            self._tokenizer = tokenizer

    def cached(self, params: StructuredOutputsParams) -> CompiledGrammar | None:
        with self._lock:
            if params.key in self._cache:
                self._cache.move_to_end(params.key)
            return self._alive.get(params.key)

    def compile(self, params: StructuredOutputsParams, sequences: int = 1) -> CompiledGrammar:
        """The grammar, for so many sequences more. ValueError where it is wrong, not supported or beyond llguidance's
        limits. Takes milliseconds, at worst tenths of a second, mostly without the interpreter's lock."""
        found = self.cached(params)
        while found is None:
            own: Future[CompiledGrammar | None] = Future()
            with self._lock:
                found = self._alive.get(params.key)  # meanwhile
                other = self._compiling.setdefault(params.key, own) if found is None else own
            if found is None:
                found = self._compile(params, own) if other is own else other.result()
        found.grow(sequences)
        self._keep(params.key, found)
        return found

    def _compile(self, params: StructuredOutputsParams, shared: Future[CompiledGrammar | None]) -> CompiledGrammar:
        """shared: gets the same outcome."""
        outcome: CompiledGrammar | None = None
        try:
            self.prepare()
            source = _grammar(params)
            outcome = CompiledGrammar(lambda: self._matcher(params.form, source), len(source))
            self._keep(params.key, outcome)
            return outcome
        except Exception as error:
            shared.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._compiling[params.key]
            if not shared.done():
                shared.set_result(outcome)  # None after an interruption: whoever waits compiles it

    def _matcher(self, form: str, source: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        assert self._tokenizer is not None
        limits = LLParserLimits(**_LIMITS)  # type: ignore[arg-type]
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if not matcher.is_error():
            # Kept after its first mask: sequences start with the lexer's states that this made.
            mask = numpy.frombuffer(matcher.compute_bitmask(), numpy.uint32)
            if not matcher.is_error() and not mask.any():
                raise ValueError(f"structured_outputs.{form}: no text at all has this form")
        if matcher.is_error():
            raise ValueError(f"structured_outputs.{form}: {_shortened(matcher.get_error())}")
        return matcher

    def _keep(self, key: Any, compiled: CompiledGrammar) -> None:
        with self._lock:
            self._alive[key] = compiled
            if compiled.size_bytes > _largest_bytes():
                return
            self._cache[key] = compiled
            self._cache.move_to_end(key)
            while self._cached_bytes() > CACHE_BYTES:
                self._cache.popitem(last=False)

    def _cached_bytes(self) -> int:
        return sum(compiled.size_bytes for compiled in self._cache.values())

    @property
    def cached_bytes(self) -> int:
        """An estimate from the sizes of the sources."""
        with self._lock:
            return self._cached_bytes()


def _largest_bytes() -> int:
    """Of one grammar in the cache."""
    return CACHE_BYTES // _LARGEST_PART


def mask_threads() -> int:
    """Threads that fill masks."""
    return max(1, min(16, len(os.sched_getaffinity(0))))


def _grammar(params: StructuredOutputsParams) -> str:
    """What LLMatcher takes."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if params.form == "regex":
        return LLMatcher.grammar_from_regex(params.source)
    if params.form == "choice":
        texts = dict.fromkeys(json.loads(params.source))
        # A terminal: its automaton takes thousands of texts, a rule's parser does not.
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(lark_text, texts)))
    if params.form == "grammar":
        try:
            return LLMatcher.grammar_from_lark(any_to_lark(params.source))
        except Exception as error:  # noqa: BLE001 - the converter raises bare ones
            raise ValueError(f"structured_outputs.grammar: {_shortened(str(error) or type(error).__name__)}") from None
    try:
        return LLMatcher.grammar_from_json_schema(params.source, defaults=json_options(params))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"structured_outputs.{params.form}: {_shortened(str(error))}") from None


def json_options(params: StructuredOutputsParams | None = None) -> dict[str, Any]:
    """llguidance's options for JSON: see StructuredOutputsParams. Whitespace is bounded: free whitespace is what a model
    at a high temperature never leaves again."""
    if params is not None and params.whitespace_pattern is not None:
        return {"whitespace_pattern": params.whitespace_pattern}
    if params is not None and params.disable_any_whitespace:
        return {"whitespace_flexible": False}
    return {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def lark_text(text: str) -> str:
    """A text literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False) if text else '""'


def _shortened(message: str) -> str:
    message = " ".join(message.replace("<non-verbose/>", "").split())
    return message if len(message) <= _SHOWN_CHARS else message[: _SHOWN_CHARS - 3] + "..."
