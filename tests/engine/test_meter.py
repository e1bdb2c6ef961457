"""What a request is said to have taken: counted by hand, added up over random batches, on the CPU and on a GPU."""

import asyncio
import dataclasses
import json
import random
import threading
import time

import pytest

from qwen_fast import LLM, AsyncLLM, SamplingParams, _engine
from qwen_fast.outputs import Usage

AMOUNTS = [
    "prompt_tokens", "cached_tokens", "output_tokens", "computed_prompt_tokens", "weight_bytes", "head_bytes",
    "embedding_bytes", "kv_read_bytes", "kv_write_bytes", "activation_bytes", "host_bytes", "flops", "device_ns",
    "prefill_device_ns", "decode_device_ns",
]  # fmt: skip
BYTES = [name for name in AMOUNTS if name.endswith("_bytes") and name != "host_bytes"]
PROMPT = list(range(1, 38))
GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=9)


@pytest.fixture(scope="module")
def llm(demo_dir, device):
    with LLM(str(demo_dir), device=device, kv_cache_tokens=2048, max_model_len=512) as model:
        yield model


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def settled(request):
    """A request's usage, once it is final."""
    wait_until(lambda: not request.usage()["energy_provisional"])
    return request.usage()


def end_of(request):
    while True:
        output = request.read(10.0)
        assert output is not None, "nothing to read in time"
        if output["finished"]:
            return output


def check_balance(meter):
    """requests + idle + unsettled = total, of everything, in a snapshot of any moment."""
    for name in AMOUNTS:
        assert meter["requests"][name] == meter["total"][name], name
    energy = [meter[account]["energy_uj"] for account in ("requests", "idle", "unsettled")]
    for source, microjoules in meter["total"]["energy_uj"].items():
        assert sum(one[source] for one in energy) == microjoules
    assert meter["total"]["device_ns"] == meter["busy_ns"]
    assert meter["idle"]["wall_ns"] == max(0, meter["wall_ns"] - meter["busy_ns"])
    assert meter["unsettled"]["device_ns"] == 0


# -- by hand -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meter", [True, False])
def test_a_request_is_counted_by_hand(tiny_config, meter):
    """2 layers of float32: 37 tokens in one step, then 8 steps of one token; 9 rows of logits."""
    options = {"load_format": "dummy", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 1024}
    engine = _engine.Engine(str(tiny_config()), **options, meter=meter)
    try:
        memory = engine.stats()["memory"]
        request = engine.submit(PROMPT, max_tokens=9, ignore_eos=True, temperature=0.0)
        usage = end_of(request)["usage"]
        stats = engine.stats()["meter"]
    finally:
        engine.close()
    expected = dict.fromkeys(AMOUNTS, 0) | {"prompt_tokens": 37, "output_tokens": 9}
    hidden, inter, q, kv, layers, vocab, head = 256, 512, 256, 128, 2, 512, 64
    tokens, rows = 37 + 8, 9
    if meter:
        contexts = range(37, 37 + 9)  # a step reads every position once
        attended = sum(range(1, tokens + 1))  # a token sees itself and all before
        linears = layers * (2 * hidden * q + 2 * hidden * kv + 3 * hidden * inter)
        words = layers * (12 * hidden + 6 * q + 4 * kv + 6 * inter + head) + 2 * hidden + head
        expected |= {
            "computed_prompt_tokens": 37,
            "weight_bytes": 9 * memory["layers_bytes"],
            "head_bytes": 9 * memory["head_bytes"],
            "embedding_bytes": tokens * memory["embedding_bytes"] // vocab,
            "kv_read_bytes": sum(contexts) * layers * 2 * kv * 4,
            "kv_write_bytes": tokens * layers * 2 * kv * 4,
            "activation_bytes": 4 * (tokens * words + rows * (5 * hidden + 2 * vocab)),
            "flops": 2 * tokens * linears + 2 * rows * hidden * vocab + 4 * attended * layers * q,
        }
    for name, value in expected.items():
        if name not in ("device_ns", "prefill_device_ns", "decode_device_ns"):
            assert usage[name] == value, name
        assert stats["total"][name] == stats["requests"][name] == usage[name], name
    assert (usage["device_ns"] > 0) is meter
    assert usage["device_ns"] == usage["prefill_device_ns"] + usage["decode_device_ns"]
    assert stats["enabled"] is meter
    assert stats["num_steps"] == (9 if meter else 0)
    assert stats["peak_kv_bytes"] == 2 * memory["kv_block_bytes"]  # 45 tokens in blocks of 32


def test_cached_tokens_cost_nothing(llm):
    engine = llm._engine
    engine.reset_prefix_cache()
    prompt = list(range(2, 102))
    first = engine.submit(prompt, max_tokens=1, temperature=0.0)
    end_of(first)
    second = engine.submit(prompt, max_tokens=1, temperature=0.0)
    end_of(second)
    one, two = settled(first), settled(second)
    assert (one["cached_tokens"], one["computed_prompt_tokens"]) == (0, 100)
    assert (two["cached_tokens"], two["computed_prompt_tokens"]) == (96, 4)
    assert two["kv_write_bytes"] * 25 == one["kv_write_bytes"]
    assert two["kv_read_bytes"] == one["kv_read_bytes"]  # the context is read whether it was computed or not
    assert two["flops"] < one["flops"] / 5


# -- added up ----------------------------------------------------------------------------------------------------


def random_requests(engine, rng, count, kept):
    """Submits, cancels some at once or later, and reads the others to their end."""
    running = []
    for _ in range(count):
        prompt = [rng.randrange(1, 60) for _ in range(rng.randrange(1, 150))]
        tokens = rng.randrange(0, 40)
        extra = {"prompt_logprobs": 0} if rng.random() < 0.1 else {}
        request = engine.submit(prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True, **extra)
        kept.append(request)
        if rng.random() < 0.2:
            request.cancel()
        running.append(request)
        if len(running) > 6:
            end_of(running.pop(rng.randrange(len(running))))
        if rng.random() < 0.1:
            rng.choice(running).cancel()
    for request in running:
        end_of(request)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_requests_add_up_to_the_engine(demo_dir, device, steps_in_flight):
    """Random batches with cancels, preemptions and shared prefixes, from two threads; every snapshot balances."""
    options = {"device": device, "kv_cache_tokens": 512, "max_model_len": 256, "max_num_batched_tokens": 128}
    engine = _engine.Engine(str(demo_dir), **options, max_num_seqs=8, max_steps_in_flight=steps_in_flight)
    try:
        kept = []
        threads = [
            threading.Thread(target=random_requests, args=(engine, random.Random(seed), 40, kept)) for seed in (1, 2)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            check_balance(engine.stats()["meter"])
            time.sleep(0.01)
        usages = [settled(request) for request in kept]
        stats = engine.stats()
        meter = stats["meter"]
    finally:
        engine.close()
    check_balance(meter)
    assert len(usages) == 80 and stats["num_preemptions"] > 0 and stats["num_finished_abort"] > 0
    for name in AMOUNTS:
        assert sum(usage[name] for usage in usages) == meter["total"][name], name
    for source, microjoules in meter["requests"]["energy_uj"].items():
        assert sum(usage["energy_uj"][source] for usage in usages) == microjoules
    assert meter["total"]["output_tokens"] == stats["num_generated_tokens"]
    assert meter["total"]["weight_bytes"] == meter["num_steps"] * stats["memory"]["layers_bytes"]
    assert meter["num_steps"] == stats["num_steps"] and meter["busy_ns"] == stats["busy_ns"]


def test_a_snapshot_may_be_taken_before_anything_ran(demo_dir, device):
    with LLM(str(demo_dir), device=device, kv_cache_tokens=512) as model:
        meter = model.stats()["meter"]
        check_balance(meter)
        assert meter["num_steps"] == meter["busy_ns"] == 0 and meter["wall_ns"] > 0
        json.dumps(meter)


# -- energy ------------------------------------------------------------------------------------------------------


def test_energy_is_measured_or_a_reason_is_given(llm):
    (output,) = llm.generate([PROMPT], GREEDY)
    sources = llm.stats()["meter"]["sources"]
    assert sources and len({source["name"] for source in sources}) == len(sources)
    for source in sources:
        assert source["kind"] in (("nvml", "rapl") if source["measured"] else ("none",))
        assert source["note"]
    measured = {source["name"] for source in sources if source["measured"]}
    assert output.usage.energy_uj.keys() == measured
    assert bool(output.usage.energy_note) == (not measured)
    if not measured:
        assert output.usage.energy_note == sources[0]["note"] and not output.usage.energy_provisional


@pytest.mark.gpu
def test_a_gpu_has_a_counter(demo_dir):
    with LLM(str(demo_dir), device="cuda", kv_cache_tokens=4096) as model:
        source = model.stats()["meter"]["sources"][0]
        assert (source["name"], source["kind"], source["measured"]) == ("gpu0", "nvml", True), source["note"]
        wait_until(lambda: model.stats()["meter"]["sources"][0]["idle_watts"], 20.0)
        request = model._engine.submit(PROMPT, max_tokens=1500, ignore_eos=True, temperature=0.0)
        end_of(request)
        assert settled(request)["energy_uj"]["gpu0"] > 0
        check_balance(model.stats()["meter"])


# -- what LLM returns --------------------------------------------------------------------------------------------


def test_usage_of_n_samples(llm):
    before = llm.stats()["meter"]["total"]
    (output,) = llm.generate([PROMPT], SamplingParams(n=3, temperature=1.0, seed=1, ignore_eos=True, max_tokens=9))
    wait_until(lambda: llm.stats()["num_running"] == 0)
    after = llm.stats()["meter"]["total"]
    usage = output.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.output_tokens) == (37, 27, 27)
    assert usage.total_tokens == 64
    for name in (*BYTES, "flops", "device_ns", "computed_prompt_tokens"):
        assert getattr(usage, name) == after[name] - before[name], name
    assert usage.total_bytes == sum(after[name] - before[name] for name in BYTES)
    assert usage.device_ns == usage.prefill_device_ns + usage.decode_device_ns
    plain = json.loads(json.dumps(usage.as_dict()))
    assert plain["output_tokens"] == 27 and plain["total_bytes"] == usage.total_bytes
    with pytest.raises(dataclasses.FrozenInstanceError):
        usage.flops = 0


def test_streams_have_it_too(demo_dir, device, llm):
    last = list(llm.stream(PROMPT, GREEDY))[-1]
    assert last.usage.output_tokens == 9 and last.usage.weight_bytes > 0

    async def ask():
        model = AsyncLLM(str(demo_dir), device=device, kv_cache_tokens=1024)
        try:
            return [increment async for increment in model.stream(PROMPT, GREEDY)][-1].usage
        finally:
            model.close()

    usage = asyncio.run(ask())
    assert (usage.output_tokens, usage.computed_prompt_tokens) == (9, 37)
    assert usage.flops >= last.usage.flops  # that one found its prompt in the cache, perhaps


def test_samples_are_added():
    one = Usage(10, 3, 2, weight_bytes=5, energy_uj={"gpu0": 7}, energy_note="")
    two = Usage(10, 4, 9, weight_bytes=6, host_bytes=1, energy_uj={"gpu0": 1, "cpu0": 2}, energy_provisional=True)
    both = one.plus(two)
    assert (both.prompt_tokens, both.completion_tokens, both.cached_tokens, both.weight_bytes) == (10, 7, 2, 11)
    assert both.energy_uj == {"gpu0": 8, "cpu0": 2} and both.energy_provisional and both.total_bytes == 11
    assert one.energy_uj == {"gpu0": 7}
    apart = one.plus(two, same_prompt=False)
    assert (apart.prompt_tokens, apart.completion_tokens, apart.cached_tokens) == (20, 7, 11)


def test_the_option_is_checked(demo_dir):
    with pytest.raises(TypeError, match="meter"):
        LLM(str(demo_dir), meter="yes")
