"""Ten thousand random requests over a pool of 64 blocks, a third of them cancelled or dropped: every one ends as it
should, every block comes back, and memory does not grow. On a GPU it is twenty thousand, with the demo model, and the
GPU's memory must not grow by a byte."""

import gc
import os
import random
import time

import pytest
from model_helpers import _engine, finish, open_engine, write_dummy

PROMPT_IDS = 320  # prompts and stop tokens are below this; the least vocabulary of the models here
NUM_BLOCKS = 64
BLOCK_SIZE = 16
MAX_MODEL_LEN = 400
IN_FLIGHT = 24


def rss_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Client:
    """One request and what its client means to do with it."""

    def __init__(self, engine, rng, leader=None):
        self.vocab_size = engine.info()["vocab_size"]
        if leader is None:
            length = rng.choice((1, 2, 15, 16, 17, 40, 90, 160, 250))
            start = rng.randrange(4)
            self.prompt = [(start + 7 * i) % PROMPT_IDS for i in range(length)]
        else:
            self.prompt = leader.prompt
        self.max_tokens = rng.choice((0, 1, 2, 5, 16, 33, 64, 120)) if leader is None else leader.max_tokens
        self.stop = rng.sample(["<1", "7><", "<25>", "3>", "<319><"], rng.randrange(3))
        self.stop_token_ids = rng.sample(range(PROMPT_IDS), rng.choice((0, 0, 1, 20)))
        self.text, self.token_ids = "", []
        self.output = None
        self.cancelled = False
        # An unread stream of max_unread_tokens pauses; reading goes on later.
        self.unread = rng.choice((0, 0, 1, 4))
        self.idle_reads = rng.randrange(12)
        fate = rng.random()
        self.reads_before_cancel = rng.randrange(6) if fate < 0.2 else None
        self.reads_before_drop = rng.randrange(6) if 0.2 <= fate < 0.33 else None
        self.reads = 0
        self.request = engine.submit(
            self.prompt,
            max_tokens=self.max_tokens,
            temperature=rng.choice((0.0, 0.7, 1.5)),
            top_p=rng.choice((1.0, 0.9)),
            top_k=rng.choice((0, 5)),
            seed=rng.randrange(1000),
            sample_index=0 if leader is None else 1,
            leader=None if leader is None else leader.request,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            logprobs=rng.choice((None, None, 2)),
            priority=rng.randrange(3),
            cache_salt=rng.choice((0, 0, 9)) if leader is None else 0,
            max_unread_tokens=self.unread,
        )

    def poll(self):
        """One look. True when this client is done."""
        if self.idle_reads > 0:
            self.idle_reads -= 1
            return False
        self.reads += 1
        if self.reads_before_cancel is not None and self.reads > self.reads_before_cancel and not self.cancelled:
            self.request.cancel()
            self.cancelled = True
        if self.reads_before_drop is not None and self.reads > self.reads_before_drop:
            self.request = None  # dropping the last reference cancels
            return True
        output = self.request.read(timeout=0)
        if output is None:
            return False
        self.text += output["text"]
        self.token_ids += output["token_ids"]
        if not output["finished"]:
            return False
        self.output = output
        self.check()
        return True

    def check(self):
        output = self.output
        reason = output["finish_reason"]
        assert output["error"] is None, output["error"]
        assert output["num_prompt_tokens"] == len(self.prompt)
        assert output["num_output_tokens"] == len(self.token_ids) <= self.max_tokens
        assert all(0 <= token < self.vocab_size for token in self.token_ids)
        if reason == "length":
            assert len(self.token_ids) == self.max_tokens
        elif reason == "stop":
            by_token = output["stop_reason"] in self.stop_token_ids
            assert by_token or output["stop_reason"] in self.stop
            if by_token:
                assert self.token_ids[-1] == output["stop_reason"]
        else:
            assert reason == "abort" and self.cancelled
        assert not any(stop in self.text for stop in self.stop)  # text ends before a stop string
        assert self.request.read(timeout=0) is None


def soak(engine, rng, count):
    """Runs `count` requests; returns how they ended."""
    ends, active, submitted = {}, [], 0
    deadline = time.monotonic() + 30 + count * 0.1
    while submitted < count or active:
        assert time.monotonic() < deadline, f"{len(active)} requests are stuck: {engine.stats()}"
        while submitted < count and len(active) < IN_FLIGHT:
            active.append(Client(engine, rng))
            submitted += 1
            if rng.random() < 0.15:
                active.append(Client(engine, rng, leader=active[-1]))
                submitted += 1
        progress = False
        remaining = []
        for client in active:
            if client.poll():
                reason = client.output["finish_reason"] if client.output else "dropped"
                ends[reason] = ends.get(reason, 0) + 1
                progress = True
            else:
                remaining.append(client)
        active = remaining
        if not progress:
            time.sleep(0.0005)
    return ends


def idle(engine):
    """The stats once nothing runs."""
    deadline = time.monotonic() + 30
    while True:
        stats = engine.stats()
        if stats["num_running"] + stats["num_waiting"] + stats["num_paused"] == 0:
            return stats
        assert time.monotonic() < deadline, f"the engine does not come to rest: {stats}"
        time.sleep(0.01)


def gpu_bytes(model, options):
    """What NVML counts for this process (0 where it cannot tell), and the free memory of each GPU."""
    held = _engine.estimate(str(model), **options)["device_overhead_bytes"]
    return [held, *(gpu["free_bytes"] for gpu in _engine.device_info())]


def make_graphs(engine):
    """Batches of every size that is captured, greedy and not: which of them chance brings late would take memory late."""
    for temperature in (0.0, 1.0):
        for count in (1, 2, 4, 8, 16, 24, IN_FLIGHT + 1):
            prompts = [[(11 * i) % PROMPT_IDS] for i in range(count)]
            options = {"max_tokens": 14, "temperature": temperature, "ignore_eos": True}
            for request in [engine.submit(prompt, **options) for prompt in prompts]:
                assert finish(request)["num_output_tokens"] == 14


# The device, how many requests, and how far the process may grow. The GPU's driver has pools of its own.
CASES = [
    pytest.param("cpu", 500, 2 << 20, id="cpu-500"),
    pytest.param("cpu", 10_000, 2 << 20, marks=pytest.mark.long, id="cpu-10000"),
    pytest.param("cuda", 500, 16 << 20, marks=pytest.mark.gpu, id="cuda-500"),
    pytest.param("cuda", 20_000, 16 << 20, marks=[pytest.mark.gpu, pytest.mark.long], id="cuda-20000"),
]


@pytest.mark.parametrize("device, count, most_growth", CASES)
def test_soak(tmp_path, demo, device, count, most_growth):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
    options = {"device": device, "kv_cache_tokens": NUM_BLOCKS * BLOCK_SIZE, "block_size": BLOCK_SIZE}
    options |= {"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": 128}
    if device == "cuda":
        model = demo
        options |= {"dtype": "auto", "kv_cache_dtype": "auto"}
    else:
        model = write_dummy(tmp_path, **shape, vocab_size=PROMPT_IDS)
        options["load_format"] = "dummy"
    rng = random.Random(count)
    with open_engine(model, **options) as engine:
        assert engine.stats()["memory"]["num_blocks"] == NUM_BLOCKS
        make_graphs(engine)
        warm_up = soak(engine, rng, count // 2)
        idle(engine)
        gc.collect()
        before, on_gpu = rss_bytes(), gpu_bytes(model, options) if device == "cuda" else []
        ends = soak(engine, rng, count - count // 2)
        stats = idle(engine)
        gc.collect()
        growth = rss_bytes() - before
        assert not on_gpu or gpu_bytes(model, options) == on_gpu
    total = sum(warm_up.values()) + sum(ends.values())
    print(
        f"{total} requests in {stats['num_steps']} steps, {stats['num_preemptions']} preemptions; of the second half {ends}"
    )
    print(f"RSS grew by {growth / 1024:.0f} KiB; GPU: held and free {on_gpu}")
    assert total >= count
    for reason in ("stop", "length", "abort", "dropped"):
        assert ends.get(reason, 0) > 0
    assert stats["num_free_blocks"] == NUM_BLOCKS
    assert stats["num_preemptions"] > 0
    assert stats["num_finished_error"] == 0 and not stats["failed"]
    assert growth < most_growth
