"""AsyncLLM over the demo model."""

import asyncio
import inspect
import threading
import time

import pytest

from qwen_fast import LLM, AsyncLLM, EngineError, SamplingParams

QUESTION = [{"role": "user", "content": "Tell me a story about Nora the fox."}]
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=24)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True, max_tokens=3000)


@pytest.fixture(scope="module")
def llm(demo_dir, device):
    model = AsyncLLM(str(demo_dir), device=device, batch_invariant=True, kv_cache_tokens=8192, max_model_len=4096)
    yield model
    model.close()


@pytest.fixture(scope="module")
def expected(demo_dir, device):
    with LLM(str(demo_dir), device=device, batch_invariant=True, kv_cache_tokens=4096) as model:
        return model.chat(QUESTION, GREEDY)[0].outputs[0]


async def until_idle(llm, seconds=10.0):
    deadline = time.monotonic() + seconds
    while llm.stats()["num_running"] or llm.stats()["num_waiting"]:
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.01)


async def read(llm, params=GREEDY):
    increments = [one async for one in llm.stream(QUESTION, params)]
    assert increments[-1].finished
    return "".join(one.text for one in increments), sum((one.token_ids for one in increments), [])


def test_stream(llm, expected):
    assert asyncio.run(read(llm)) == (expected.text, expected.token_ids)


def test_generate_and_chat(llm, expected):
    async def main():
        prompt = llm.apply_chat_template(QUESTION)[0]
        generated = await llm.generate([prompt, llm.encode(prompt)], GREEDY)
        (chatted,) = await llm.chat(QUESTION, GREEDY)
        streamed = "".join([one.text async for one in llm.stream_chat(QUESTION, GREEDY)])
        return [output.outputs[0].text for output in (*generated, chatted)] + [streamed]

    assert asyncio.run(main()) == [expected.text] * 4


def test_chat_streams_too(llm, expected):
    async def main():
        return "".join([one.text async for one in llm.chat(QUESTION, GREEDY, stream=True)])

    assert asyncio.run(main()) == expected.text
    with pytest.raises(ValueError, match="stream=True takes one conversation, got 2"):
        llm.chat([QUESTION, QUESTION], stream=True)


def test_logits(llm, demo_dir, device):
    numpy = pytest.importorskip("numpy")

    async def main():
        return await asyncio.gather(llm.logits("One morning in June,"), llm.logits([5, 6, 7, 8], 1, 3))

    whole, part = asyncio.run(main())
    with LLM(str(demo_dir), device=device, batch_invariant=True, kv_cache_tokens=4096) as model:
        assert numpy.array_equal(whole, model.logits("One morning in June,"))
        assert numpy.array_equal(part, model.logits([5, 6, 7, 8], 1, 3)) and part.shape == (2, 8192)
    with pytest.raises(ValueError, match="no positions from 2 to 2 in 2 tokens"):
        asyncio.run(llm.logits([1, 2], 2))
    asyncio.run(until_idle(llm))


def test_the_same_methods_and_options(llm):
    public = {name for name in dir(LLM) if not name.startswith("_")}
    assert public <= set(dir(AsyncLLM))
    assert inspect.signature(AsyncLLM) == inspect.signature(LLM)
    assert "kv_cache_memory" in inspect.signature(AsyncLLM).parameters and AsyncLLM.__init__.__doc__
    chat, other = inspect.signature(LLM.chat).parameters, inspect.signature(AsyncLLM.chat).parameters
    assert set(chat) - set(other) == {"progress", "use_tqdm"}
    llm.reset_prefix_cache()
    assert llm.info()["num_layers"] == 8 and llm.stats()["num_running"] == 0


def test_cost_report(llm, expected):
    """As LLM's; the loop stays free meanwhile."""
    options = {"users": [1], "window_s": 0.01, "levers": False, "peak_gbs": 1.0, "peak_tflops": 1.0}

    async def main():
        with pytest.raises(TypeError, match="workload must be None"):
            await llm.cost_report(3)
        return await asyncio.gather(llm.cost_report("20/4", budget_seconds=0.5, **options), read(llm))

    report, while_it_ran = asyncio.run(main())
    assert report.document["model"]["name"] == llm.model and len(report.table("time-main")["rows"]) == 1
    assert while_it_ran == (expected.text, expected.token_ids)


def test_many_streams_at_once(llm, expected):
    async def main():
        return await asyncio.gather(*(read(llm) for _ in range(40)))

    assert asyncio.run(main()) == [(expected.text, expected.token_ids)] * 40


def test_n_samples(llm):
    params = SamplingParams(n=3, temperature=1.0, top_p=1.0, top_k=0, seed=3, max_tokens=12)

    async def main():
        (whole,) = await llm.chat(QUESTION, params)
        texts = ["", "", ""]
        async for one in llm.stream(QUESTION, params):
            texts[one.index] += one.text
        return whole, texts

    whole, texts = asyncio.run(main())
    assert texts == [sample.text for sample in whole.outputs]
    assert len(set(texts)) > 1


def test_the_loop_stays_free(llm):
    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticker = asyncio.create_task(tick())
        tokens = sum(
            [len(one.token_ids) async for one in llm.stream(QUESTION, SamplingParams(ignore_eos=True, max_tokens=1000))]
        )
        ticker.cancel()
        return tokens, ticks

    tokens, ticks = asyncio.run(main())
    assert tokens == 1000 and ticks > 5


def test_cancelled_task_cancels_the_request(llm):
    async def main():
        task = asyncio.create_task(read(llm, ENDLESS))
        whole = asyncio.create_task(llm.chat([QUESTION, QUESTION], ENDLESS))
        while llm.stats()["num_running"] < 3:
            await asyncio.sleep(0.005)
        task.cancel()
        whole.cancel()
        for one in (task, whole):
            with pytest.raises(asyncio.CancelledError):
                await one
        await until_idle(llm)

    asyncio.run(main())


def test_leaving_a_stream_cancels_it(llm):
    async def main():
        stream = llm.stream(QUESTION, ENDLESS)
        await stream.__anext__()
        assert len(llm._wakeups._waiting) == 1
        await stream.aclose()  # not only once the garbage collector finds the inner generator
        assert not llm._wakeups._waiting
        await until_idle(llm)

    asyncio.run(main())


def test_timeout(llm):
    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(llm.chat(QUESTION, ENDLESS), 0.05)
        await until_idle(llm)

    asyncio.run(main())


def test_one_refused_prompt_cancels_the_rest(llm):
    async def main():
        with pytest.raises(ValueError, match="token id 9999"):
            await llm.generate(["a", [9999]], ENDLESS)
        await until_idle(llm)

    asyncio.run(main())


def test_loops_in_several_threads(llm, expected):
    results = []

    def work():
        async def main():
            return await asyncio.gather(*(read(llm) for _ in range(5)))

        results.extend(asyncio.run(main()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [(expected.text, expected.token_ids)] * 20


def test_a_loop_that_died_does_not_harm_the_next(llm, expected):
    loop = asyncio.new_event_loop()
    stream = llm.stream(QUESTION, ENDLESS)
    loop.run_until_complete(stream.__anext__())
    loop.close()
    assert asyncio.run(read(llm)) == (expected.text, expected.token_ids)
    del stream


def test_long_prompt(llm):
    async def main():
        (output,) = await llm.generate("word " * 2000, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
        return output

    output = asyncio.run(main())
    assert output.usage.prompt_tokens >= 2000 and len(output.outputs[0].token_ids) == 2


def test_close_mid_stream(demo_dir):
    async def main():
        async with AsyncLLM(str(demo_dir), kv_cache_tokens=4096) as llm:
            stream = llm.stream(QUESTION, ENDLESS)
            await stream.__anext__()
        rest = [one async for one in stream]
        with pytest.raises(EngineError, match="closed"):
            await llm.generate("x")
        return rest

    assert asyncio.run(main())[-1].finish_reason == "abort"


def test_close_wakes_those_who_wait(demo_dir):
    async def main():
        llm = AsyncLLM(str(demo_dir), kv_cache_tokens=4096)
        tasks = [asyncio.create_task(llm.chat(QUESTION, ENDLESS)) for _ in range(3)]
        while llm.stats()["num_running"] < 3:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(llm.close)
        return await asyncio.wait_for(asyncio.gather(*tasks), 10)

    assert [output.outputs[0].finish_reason for (output,) in asyncio.run(main())] == ["abort"] * 3
