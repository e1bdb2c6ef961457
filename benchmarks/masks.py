"""What does a grammar's mask cost at the vocabulary of the real models, and does a step's work on several cores pay?

A mask says which of 151,936 tokens may come next. Two ways through a grammar are timed: the tokens of a text that fits
it, as a model writes it, and a random walk (each token drawn evenly from those allowed), which sees the rare states. Each
sequence has a matcher of its own, as requests have; sequences of one step are filled together by threads, and the time
of a mask is the step's wall time over their number. Before timing, every text is checked to be allowed token by token.
`pump` is the whole way of a mask through the package's thread: the demo model runs guided requests, and the time between
two of its tokens is compared with that of the same requests without a grammar.

    python benchmarks/masks.py --tokenizer DIRECTORY     # with a Qwen2.5 tokenizer.json
"""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy
from common import parser, save
from llguidance import LLExecutor

from qwen_fast import LLM, SamplingParams
from qwen_fast._grammars import CompiledGrammar, GrammarCompiler, mask_threads
from qwen_fast.structured import StructuredOutputsParams
from qwen_fast.tokenizer import Tokenizer
from qwen_fast.tools import tool_grammar

VOCAB_SIZE = 151_936
EOS = [151_645, 151_643]
WALK_TOKENS = 100

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["new", "vip", "blocked"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "tags", "address"],
    "additionalProperties": False,
}
ANSWER = '{"name": "Ada Lovelace", "age": 36, "email": "ada@example.com", "tags": ["vip", "new"], "address": {"street": "12 St James\'s Square, London", "zip": "10115"}}'
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "San Francisco, CA", "unit": "celsius"}}\n</tool_call>'
)
SQL = """start: "SELECT " columns " FROM " NAME (" WHERE " condition)? ";"
columns: "*" | NAME ("," " "? NAME)*
condition: NAME " " ("=" | "<" | ">") " " VALUE (" AND " condition)?
NAME: /[a-z_][a-z0-9_]{0,30}/
VALUE: /[0-9]+/ | /'[^']*'/
"""


def cases(tokenizer: Tokenizer) -> dict[str, tuple[StructuredOutputsParams, str]]:
    """Forms, and a text that fits each."""
    return {
        "json schema": (StructuredOutputsParams(json=PERSON), ANSWER),
        "json object": (StructuredOutputsParams(json_object=True), ANSWER),
        "tool call": (tool_grammar([WEATHER], tokenizer), CALL),
        "regex": (
            StructuredOutputsParams(regex=r"\(\d{3}\) \d{3}-\d{4}( ext\. \d{1,5})?: [A-Z][a-z]+ .{1,100}"),
            "(415) 555-0132 ext. 17: Grace Hopper called about the compiler.",
        ),
        "choice": (StructuredOutputsParams(choice=["positive", "negative", "neutral"]), "neutral"),
        "grammar": (
            StructuredOutputsParams(grammar=SQL),
            "SELECT id, first_name FROM customers WHERE age > 30 AND city = 'Berlin';",
        ),
    }


class Steps:
    """Times the masks of `width` sequences that walk side by side."""

    def __init__(self, compiler: GrammarCompiler, width: int, executor: Any) -> None:
        self.width = width
        self.rows = numpy.zeros((width, compiler.num_words), numpy.uint32)
        self._executor = executor

    def _matchers(self, compiled: CompiledGrammar) -> list[Any]:
        self._owners = [threading.Event() for _ in range(self.width)]  # anything that lives
        compiled.grow(self.width)
        made = sorted((compiled.matcher(owner) for owner in self._owners), key=lambda one: one[1])
        return [matcher for matcher, _ in made]

    def fill(self, matchers: list[Any]) -> float:
        """Seconds for one mask of each."""
        begin = time.perf_counter()
        if len(matchers) == 1:
            matchers[0].unsafe_compute_mask_ptr(self.rows.ctypes.data, 4 * self.rows.shape[1])
        else:
            pairs = [(matcher, row) for row, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(pairs, self.rows.ctypes.data, 4 * self.rows.shape[1], self.width)
        return time.perf_counter() - begin

    def allowed(self, row: int, token_id: int) -> bool:
        return bool(self.rows[row, token_id // 32] >> (token_id % 32) & 1)

    def text(self, compiled: Any, ids: list[int]) -> list[float]:
        """Seconds per mask, for each token of the text and the end."""
        matchers = self._matchers(compiled)
        times = []
        for token_id in [*ids, EOS[0]]:
            times.append(self.fill(matchers) / self.width)
            for row, matcher in enumerate(matchers):
                if not self.allowed(row, token_id) or not matcher.consume_token(token_id):
                    raise RuntimeError(f"token {token_id} is not allowed: {matcher.get_error()}")
        return times

    def walk(self, compiled: Any, seed: int) -> list[float]:
        random = numpy.random.default_rng(seed)
        matchers = self._matchers(compiled)
        times = []
        for _ in range(WALK_TOKENS):
            times.append(self.fill(matchers) / self.width)
            for row, matcher in enumerate(matchers):
                bits = numpy.unpackbits(self.rows[row].view(numpy.uint8), bitorder="little")
                bits[EOS] = 0
                choices = numpy.flatnonzero(bits)
                if not len(choices) or not matcher.consume_token(int(choices[random.integers(len(choices))])):
                    matchers[row] = compiled.matcher(self._owners[row])[0]
        return times


def pump(width: int, tokens: int) -> dict[str, float]:
    """Milliseconds per step of the demo model with `width` sequences, free and guided."""
    found = {}
    with LLM("demo") as llm:
        for name, form in (("free", None), ("guided", {"regex": "(?s:.*)"})):
            params = SamplingParams(max_tokens=tokens, min_tokens=tokens - 1, structured_outputs=form, seed=1)
            llm.generate(["Hello"] * width, params, progress=False)
            begin = time.perf_counter()
            llm.generate(["Hello"] * width, params, progress=False)
            found[f"{name}_step_ms"] = (time.perf_counter() - begin) / tokens * 1e3
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tokenizer", type=Path, required=True, help="a directory with Qwen2.5's tokenizer.json")
    args = arguments.parse_args()
    tokenizer = Tokenizer(args.tokenizer, VOCAB_SIZE)
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, EOS)
    begin = time.perf_counter()
    compiler.prepare()
    print(f"the vocabulary as a trie: {time.perf_counter() - begin:.2f} s, once; {mask_threads()} threads fill masks")
    executor = LLExecutor(mask_threads())
    rows: list[dict[str, Any]] = []
    for name, (form, text) in cases(tokenizer).items():
        begin = time.perf_counter()
        compiled = compiler.compile(form)
        compile_ms = (time.perf_counter() - begin) * 1e3
        ids = tokenizer.encode(text)
        for width in (1, 8, 32):
            steps = Steps(compiler, width, executor)
            ways = {"text": [], "walk": []}
            for repeat in range(args.repeats):
                ways["text"] += steps.text(compiled, ids)
                ways["walk"] += steps.walk(compiled, repeat) if width == 1 else []
            for way, times in ways.items():
                if times:
                    us = sorted(1e6 * one for one in times)
                    row = {"form": name, "way": way, "sequences": width, "compile_ms": compile_ms, "masks": len(us)}
                    row |= {"mean_us": statistics.mean(us), "median_us": statistics.median(us)}
                    row |= {"p99_us": us[int(0.99 * len(us))], "worst_us": us[-1]}
                    rows.append(row)
                    print(
                        f"{name:12s} {way} x {width:2d}: {row['mean_us']:6.1f} us a mask on average, median {row['median_us']:5.1f}, 99 % below "
                        f"{row['p99_us']:6.1f}, worst {row['worst_us']:7.1f}; compiled in {compile_ms:5.2f} ms"
                    )
    for width in (1, 8, 32):
        row = {"form": "any text", "way": "pump", "sequences": width, **pump(width, 100)}
        rows.append(row)
        print(f"demo model x {width}: {row['free_step_ms']:.2f} ms a step, guided {row['guided_step_ms']:.2f} ms")
    texts = [row["mean_us"] for row in rows if row["way"] == "text"]
    print(f"mean over forms and widths, texts: {statistics.mean(texts):.1f} us a mask")
    save("masks", rows, args.save)


if __name__ == "__main__":
    main()
