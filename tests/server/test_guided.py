"""Guided requests inside: masks, lexers, the cache of grammars, readers that are slow or gone, the end of the engine."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import threading
import time

import jsonschema
import numpy
import pytest
from schemas import closed, text, whole

from qwen_fast import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams
from qwen_fast import _grammars as grammars
from qwen_fast.tokenizer import Tokenizer

PERSON = closed(name=text(12), age=whole(0, 150))


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", kv_cache_tokens=16384) as loaded:
        yield loaded


def hot(form, **more) -> SamplingParams:
    values = {"temperature": 1.5, "top_p": 1.0, "top_k": 0, "max_tokens": 400, "structured_outputs": form}
    return SamplingParams(**{**values, **more})


ENDLESS = hot({"regex": "(?s:.*)"}, max_tokens=3000, min_tokens=2900)


def only(llm, form):
    """The one output for a form."""
    (result,) = llm.generate("Once upon a time", hot(form))
    return result.outputs[0]


# -- masks


@pytest.mark.parametrize("which", ["demo", "real"])
def test_masks_are_as_wide_as_the_model_and_allow_only_what_fits(which, request, demo_dir):
    if which == "demo":
        directory, vocab_size, ends = demo_dir, 8192, [8002, 8000]
    else:
        directory, vocab_size, ends = (
            request.getfixturevalue("shared_dir") / "qwen2.5/tokenizer",
            151936,
            [151645, 151643],
        )
        if not directory.is_dir():
            pytest.skip(f"{directory} is not there")
    tokenizer = Tokenizer(directory, vocab_size)
    compiler = grammars.GrammarCompiler(tokenizer, vocab_size, ends)

    def allowed(form, prefix):
        matcher = compiler.compile(StructuredOutputsParams(**form)).matcher(compiler)[0]
        assert matcher.consume_tokens(tokenizer.encode(prefix, allow_special=False))
        bits = numpy.full(4 * compiler.num_words, 255, numpy.uint8)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        return set(numpy.flatnonzero(numpy.unpackbits(bits, bitorder="little")).tolist())

    for form, prefix, pattern in [
        ({"regex": "[0-9]{1,3}x"}, "", "[0-9]{1,3}x?"),
        ({"regex": "[0-9]{1,3}x"}, "12", "[0-9]x?|x"),
        ({"regex": "(?s:.*)"}, "any", "(?s:.*)"),
        ({"json": {"type": "string"}}, '"ab', "(?s:.*)"),
    ]:
        found = allowed(form, prefix)
        assert max(found) < len(tokenizer)
        assert all(tokenizer.token_bytes(i) for i in found)
        control = set(grammars.control_tokens(tokenizer).values()) - set(ends)
        assert not control & found
        texts = {i: tokenizer.token_bytes(i) for i in found - set(ends)}
        assert all(re.fullmatch(pattern, text.decode("utf-8", "replace")) for text in texts.values())
        if pattern != "(?s:.*)":
            expected = {i for i, data in enumerate(tokenizer.tokens) if data and re.fullmatch(pattern.encode(), data)}
            assert found - set(ends) == expected
    assert allowed({"choice": ["done"]}, "done") == set(ends)


def test_the_cache_is_bounded(llm, monkeypatch):
    compiler = grammars.GrammarCompiler(llm.tokenizer, llm.vocab_size, [8002])
    form = StructuredOutputsParams(regex="a+")
    assert compiler.compile(form) is compiler.compile(StructuredOutputsParams(regex="a+"))
    monkeypatch.setattr(grammars, "CACHE_BYTES", 10 * compiler.compile(form).size_bytes)
    for i in range(30):
        compiler.compile(StructuredOutputsParams(regex=f"a{{{i + 1}}}"))
        compiler.compile(form)  # in use: stays
        assert compiler.cached_bytes <= grammars.CACHE_BYTES
    assert compiler.cached(form) is not None
    assert compiler.cached(StructuredOutputsParams(regex="a{1}")) is None
    assert compiler.cached(StructuredOutputsParams(regex="a{30}")) is not None


def test_what_is_too_large_for_the_cache_leaves_the_others_there(llm, monkeypatch):
    """It lives as long as somebody uses it, and equal forms share it meanwhile."""
    compiler = grammars.GrammarCompiler(llm.tokenizer, llm.vocab_size, [8002])
    small = [StructuredOutputsParams(regex=f"a{{{i + 1}}}") for i in range(3)]
    for form in small:
        compiler.compile(form)
    monkeypatch.setattr(grammars, "CACHE_BYTES", 4 * compiler.compile(small[0]).size_bytes)
    monkeypatch.setattr(grammars, "_BYTES_PER_BYTE", 4096)
    large = StructuredOutputsParams(regex="b{1,40}" + "c" * 40)
    kept = compiler.compile(large)
    assert kept.size_bytes > grammars.CACHE_BYTES / 4
    assert all(compiler.cached(form) is not None for form in small)
    assert compiler.cached_bytes <= grammars.CACHE_BYTES
    assert compiler.compile(large) is kept and compiler.cached(large) is kept
    del kept
    gc.collect()
    assert compiler.cached(large) is None


def test_a_grammar_grows_to_a_quarter_of_the_cache_at_most(llm, monkeypatch):
    monkeypatch.setattr(grammars, "mask_threads", lambda: 64)
    compiler = grammars.GrammarCompiler(llm.tokenizer, llm.vocab_size, [8002])
    small = StructuredOutputsParams(regex="a+")
    one = compiler.compile(small).size_bytes
    monkeypatch.setattr(grammars, "CACHE_BYTES", 12 * one + 100 * 64)
    grown = compiler.compile(StructuredOutputsParams(regex="b+"), 50)
    assert grown.size_bytes == 3 * one and grown.lacks(50) == 0
    assert compiler.cached(small) is not None


class Slowly:
    """A compiler's build() that counts, waits until it may go on, and can fail."""

    def __init__(self, compiler: grammars.GrammarCompiler, error: Exception | None = None) -> None:
        self.calls = 0
        self.go_on = threading.Event()
        self._matcher, self._error = compiler._matcher, error

    def __call__(self, form: str, source: str):
        self.calls += 1
        assert self.go_on.wait(10)
        if self._error is not None:
            raise self._error
        return self._matcher(form, source)


@pytest.mark.parametrize("fails", [False, True])
def test_equal_forms_at_once_are_compiled_once(llm, monkeypatch, fails):
    compiler = grammars.GrammarCompiler(llm.tokenizer, llm.vocab_size, [8002])
    slowly = Slowly(compiler, ValueError("no such form") if fails else None)
    monkeypatch.setattr(compiler, "_matcher", slowly)
    outcomes = []

    def run() -> None:
        try:
            outcomes.append(compiler.compile(StructuredOutputsParams(regex="a+")))
        except ValueError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    slowly.go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(outcomes) == 5 and slowly.calls == 1
    assert len(set(outcomes)) == 1 and ("no such form" in outcomes) == fails


def test_equal_forms_at_once_leave_a_thread_to_others(monkeypatch):
    """Two threads compile; many requests of one form hold one of them. Who leaves takes nobody along."""

    async def main() -> None:
        async with AsyncLLM("demo", kv_cache_tokens=4096) as llm:
            compiler = llm._guidance.compiler
            compiler.prepare()
            slowly, quickly = Slowly(compiler), compiler._matcher
            by_form = {"regex": slowly, "choice": quickly}
            monkeypatch.setattr(compiler, "_matcher", lambda form, source: by_form[form](form, source))
            form = StructuredOutputsParams(regex="a+")
            tasks = [asyncio.create_task(llm._guidance.compile(form, 1)) for _ in range(6)]
            other = await asyncio.wait_for(llm._guidance.compile(StructuredOutputsParams(choice=["b"]), 1), 5)
            assert other.size_bytes and not any(task.done() for task in tasks)
            tasks.pop(0).cancel()
            await asyncio.sleep(0)
            slowly.go_on.set()
            assert len(set(await asyncio.wait_for(asyncio.gather(*tasks), 10))) == 1 and slowly.calls == 1

    asyncio.run(main())


def test_sequences_side_by_side_get_lexers_of_their_own(llm, monkeypatch):
    monkeypatch.setattr(grammars, "mask_threads", lambda: 4)
    compiler = grammars.GrammarCompiler(llm.tokenizer, llm.vocab_size, [8002])
    form = StructuredOutputsParams(regex="a+")
    compiled = compiler.compile(form)
    one = compiled.size_bytes
    owners = [threading.Event() for _ in range(9)]
    matchers = []
    for i, owner in enumerate(owners):
        assert compiler.compile(form) is compiled
        matcher, number = compiled.matcher(owner)
        assert number == i % 4
        matchers.append(matcher)
        assert compiled.size_bytes == min(i + 1, 4) * one
    assert compiled.lacks(1) == 0
    assert all(matcher.consume_tokens(llm.encode("aa")) for matcher in matchers)
    del owner
    owners.clear()
    assert compiler.compile(form, 3).size_bytes == 4 * one  # what is there stays
    assert compiler.compile(StructuredOutputsParams(regex="b+"), 3).size_bytes == 3 * one


# -- readers


def test_a_reader_that_pauses_delays_nobody_and_is_not_cut_off(llm):
    slow = llm.stream("Once", hot({"regex": "(?s:.*)"}, max_tokens=None, seed=1, min_tokens=600))
    next(slow)
    assert json.loads(only(llm, {"json": PERSON}).text)
    deadline = time.monotonic() + 20
    while llm.stats()["num_running"] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    previous = -1
    while (count := llm.stats()["num_generated_tokens"]) != previous and time.monotonic() < deadline:
        previous = count
        time.sleep(0.3)
    assert time.monotonic() < deadline, "generation does not pause"
    tokens = sum(len(output.token_ids) for _, output in zip(range(1000), slow))
    assert tokens > 512
    slow.close()


def test_leaving_a_stream_cancels_it(llm):
    stream = llm.stream("Once", ENDLESS)
    next(stream)
    stream.close()
    del stream
    gc.collect()
    deadline = time.monotonic() + 10
    while (llm.stats()["num_running"] or llm.stats()["num_waiting"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert llm.stats()["num_running"] == 0
    assert llm.stats()["num_waiting"] == 0


@pytest.mark.parametrize("_", range(5))
def test_closing_ends_guided_requests_and_the_thread(_):
    with LLM("demo", kv_cache_tokens=4096) as llm:
        stream = llm.stream("Once", ENDLESS)
        next(stream)
        llm.close()
        *_, last = stream
        assert last.finish_reason == "abort"
        pump = llm._guidance.pump
    deadline = time.monotonic() + 10
    while pump._thread is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pump._thread is None
    assert not pump._open


def test_async():
    async def main():
        async with AsyncLLM("demo", kv_cache_tokens=16384) as llm:
            free = asyncio.create_task(llm.generate(["Hello"] * 4, SamplingParams(max_tokens=60, seed=2)))
            guided = await llm.generate(["Hello"] * 12, [hot({"json": PERSON}, seed=i) for i in range(12)])
            for output in guided:
                jsonschema.validate(json.loads(output.outputs[0].text), PERSON)
            assert all(len(output.outputs[0].token_ids) > 0 for output in await free)
            parts = ["", ""]
            async for output in llm.stream("Hello", hot({"regex": "[0-9]{4}"}, n=2)):
                parts[output.index] += output.text
            assert all(re.fullmatch("[0-9]{4}", part) for part in parts)
            with pytest.raises(ValueError, match="structured_outputs.regex"):
                await llm.generate("Hello", hot({"regex": "(a"}))
            task = asyncio.create_task(llm.generate("Hello", ENDLESS))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            deadline = time.monotonic() + 10
            while (llm.stats()["num_running"] or llm.stats()["num_waiting"]) and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            assert llm.stats()["num_running"] == llm.stats()["num_waiting"] == 0
            assert not llm._wakeups._waiting

    asyncio.run(main())


def test_compiling_leaves_the_event_loop_free():
    """A first use at which the trie is built, and a schema that takes a while: the loop's other work goes on."""
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(250)}}

    async def main():
        async with AsyncLLM("demo", kv_cache_tokens=4096) as llm:
            longest = 0.0
            task = asyncio.create_task(llm.generate("Hello", hot({"json": schema}, max_tokens=5)))
            while not task.done():
                began = time.monotonic()
                await asyncio.sleep(0.001)
                longest = max(longest, time.monotonic() - began)
            await task
            return longest

    assert asyncio.run(main()) < 0.5
