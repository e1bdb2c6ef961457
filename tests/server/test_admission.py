"""Who gets in: places, rates and turns."""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from server_helpers import serving

from qwen_fast import AsyncLLM
from qwen_fast.server import ServerConfig
from qwen_fast.server.admission import Bucket, QueueAdmission
from qwen_fast.server.auth import KeyLimits
from qwen_fast.server.errors import ApiError
from qwen_fast.server.serve import plug_ins
from qwen_fast.server.state import Principal, RequestRecord

ALICE, BOB = Principal("alice"), Principal("bob")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Hall:
    """Enters slots and leaves them, one after the other."""

    def __init__(self, *args, **options) -> None:
        self.clock = Clock()
        self.admission = QueueAdmission(*args, clock=self.clock, **options)
        self.loop = asyncio.new_event_loop()
        self.inside: list = []

    def enter(self, principal: Principal, n: int = 1) -> None:
        self.admission.arrive(principal)
        slot = self.admission.slot(principal, n)
        self.loop.run_until_complete(slot.__aenter__())
        self.inside.append(slot)

    def leave(self, index: int = 0) -> None:
        self.loop.run_until_complete(self.inside.pop(index).__aexit__(None, None, None))

    def refused(self, principal: Principal, n: int = 1) -> ApiError:
        with pytest.raises(ApiError) as caught:
            self.enter(principal, n)
        return caught.value


@pytest.fixture
def hall():
    made = []

    def make(*args, **options) -> Hall:
        made.append(Hall(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.loop.close()


def test_bucket():
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert bucket.seconds_until(1) == pytest.approx(1)
    clock.now += 0.5
    assert bucket.seconds_until(1) == pytest.approx(0.5)
    bucket.take(100)  # overdrawn: it is made up for
    assert bucket.seconds_until(1) == pytest.approx(100.5)
    clock.now += 1e6
    assert bucket.seconds_until(60) == 0
    assert bucket.seconds_until(61) > 0


def test_places(hall):
    room = hall(4)
    room.enter(ALICE, 3)
    room.enter(ALICE)
    error = room.refused(ALICE)
    assert error.status == 429
    assert error.message == "4 sequences run or wait and 1 more are asked for; the limit is 4"
    assert int(error.headers["retry-after"]) >= 1
    room.enter(ALICE, 0)  # generates nothing
    assert room.admission.admitted == 4
    room.leave()
    room.enter(ALICE, 2)
    assert room.refused(ALICE, 2).status == 429
    assert (room.refused(ALICE, 5).status, room.admission.admitted) == (400, 3)
    while room.inside:
        room.leave()
    assert room.admission.admitted == 0


def test_an_error_inside_gives_the_places_back(hall):
    room = hall(4)

    async def fail() -> None:
        async with room.admission.slot(ALICE, 4):
            raise KeyError

    with pytest.raises(KeyError):
        room.loop.run_until_complete(fail())
    assert room.admission.admitted == 0


def test_no_key_takes_all_places(hall):
    """Two keys, 8 places: 2 are kept for each."""
    room = hall(8, limits={"alice": KeyLimits(), "bob": KeyLimits()})
    for _ in range(6):
        room.enter(ALICE)
    assert "of which 2 are kept for other keys" in room.refused(ALICE).message
    room.enter(BOB)
    assert room.refused(ALICE).status == 429
    room.enter(BOB)
    assert room.refused(BOB).status == 429
    room.leave()
    room.enter(BOB)  # one of those that belong to all


def keys_named(count: int) -> dict[str, KeyLimits]:
    return {f"k{i}": KeyLimits() for i in range(count)}


def test_every_key_gets_in_however_many_there_are(hall):
    """600 keys, 100 places: one key that takes what it can leaves a place for each of the others."""
    room = hall(100, limits=keys_named(600))
    greedy = Principal("k0")
    for _ in range(50):
        room.enter(greedy)
    error = room.refused(greedy)
    assert error.status == 429 and "of which 50 are kept for other keys" in error.message
    for i in range(1, 600):
        room.enter(Principal(f"k{i}"))
    assert room.admission.admitted == 649  # more than 100: one for each of them


def test_nobody_gets_more_than_its_share_while_another_waits(hall):
    """10 places, two keys: alice took 8, bob wants four at once. What alice gives back goes to him."""
    room = hall(10, limits={"alice": KeyLimits(), "bob": KeyLimits()})
    for _ in range(8):
        room.enter(ALICE)
    room.refused(BOB, 4)
    room.leave()
    said = room.refused(ALICE).message
    assert said == "alice has 7 sequences and asks for 1 more; its share is 5 while other keys wait"
    room.leave()
    room.enter(BOB, 4)
    for _ in range(2):
        room.leave()  # alice's: now 4, as many as bob
    room.enter(ALICE, 2)  # nobody waits any more


def test_who_does_not_come_back_is_waited_for_no_longer(hall):
    room = hall(10, limits={"alice": KeyLimits(), "bob": KeyLimits()})
    for _ in range(8):
        room.enter(ALICE)
    room.refused(BOB, 4)
    room.leave()
    assert "its share is 5" in room.refused(ALICE).message
    room.clock.now += 5.1
    room.enter(ALICE)


def test_waiting_tokens_of_one_key_do_not_shut_out_another(hall):
    room = hall(100, 1000, limits={"alice": KeyLimits(), "bob": KeyLimits()})
    records = [RequestRecord("1", "/", ALICE, prompt_tokens=600), RequestRecord("2", "/", ALICE, expected_tokens=600)]
    room.admission.in_flight = {record.request_id: record for record in records}
    error = room.refused(ALICE)
    assert error.message == "1200 prompt tokens wait; the limit is 1000, of which 1000 are the share of alice"
    room.enter(BOB)
    records.append(RequestRecord("3", "/", BOB, prompt_tokens=499))
    room.admission.in_flight = {record.request_id: record for record in records}
    room.enter(BOB)  # below 500, its half
    records[2].prompt_tokens = 500
    assert "of which 500 are the share of bob" in room.refused(BOB).message
    assert "of which 500 are the share of alice" in room.refused(ALICE).message


def test_a_single_key_has_all_places(hall):
    room = hall(8, limits={"alice": KeyLimits()})
    for _ in range(8):
        room.enter(ALICE)


def test_rate_of_requests(hall):
    room = hall(100, limits={"alice": KeyLimits(requests_per_minute=2), "bob": KeyLimits()})
    room.enter(ALICE, 0)  # /tokenize counts too
    room.enter(ALICE)
    error = room.refused(ALICE)
    assert error.message == "alice sent more than 2 requests a minute"
    assert error.headers["retry-after"] == "30"
    room.enter(BOB)
    room.clock.now += 30
    room.enter(ALICE)
    assert room.refused(ALICE, 0).status == 429


def test_rate_of_tokens(hall):
    room = hall(100, limits={"alice": KeyLimits(tokens_per_minute=600)})
    for tokens in (500, 300):
        room.enter(ALICE)
        room.admission.finished(RequestRecord("1", "/", ALICE, prompt_tokens=tokens - 1, completion_tokens=1))
        room.leave()
    error = room.refused(ALICE)
    assert error.message == "alice used more than 600 tokens a minute"
    assert error.headers["retry-after"] == "21"  # 200 overdrawn, and one
    room.clock.now += 21
    room.enter(ALICE)


def test_concurrency(hall):
    room = hall(100, limits={"alice": KeyLimits(concurrency=3), "bob": KeyLimits()})
    room.enter(ALICE, 2)
    assert room.refused(ALICE, 2).message == "alice has 2 sequences open and asks for 2 more; the limit is 3"
    room.enter(ALICE)
    assert room.refused(ALICE).status == 429
    assert room.refused(ALICE, 4).status == 400  # never possible
    room.enter(BOB, 8)
    room.leave()
    room.enter(ALICE, 2)


def test_waiting_prompt_tokens(hall):
    room = hall(100, 1000)
    waiting = RequestRecord("1", "/", ALICE, prompt_tokens=999)
    room.admission.in_flight = {"1": waiting}
    room.enter(ALICE)
    waiting.prompt_tokens = 1000
    assert room.refused(ALICE).message == "1000 prompt tokens wait; the limit is 1000"
    waiting.first_token = 1.0
    room.enter(ALICE)


def test_turns(hall):
    room = hall(100, limits={"alice": KeyLimits(), "bob": KeyLimits()})
    order = []
    for principal in (ALICE, ALICE, ALICE, BOB, BOB):
        room.enter(principal)
        order.append(room.admission.priority(principal))
    assert order == [0, 1, 2, 0, 1]


def test_nobody_is_overtaken_for_ever(hall):
    room = hall(100, limits={"alice": KeyLimits(), "bob": KeyLimits(), "carol": KeyLimits()})
    for _ in range(4):
        room.enter(ALICE)  # the last has turn 3
    turns = []
    for _ in range(6):  # one after the other
        room.enter(BOB)
        turns.append(room.admission.priority(BOB))
        room.leave(-1)
    assert turns == [0, 1, 2, 3, 4, 5]
    room.enter(Principal("carol"), 2)  # an idle key has saved up nothing
    assert room.admission.priority(Principal("carol")) == 5
    room.enter(Principal("carol"))
    assert room.admission.priority(Principal("carol")) == 7  # n samples are n turns


def test_a_single_key_is_served_in_order(hall):
    room = hall(100, limits={"alice": KeyLimits()})
    for _ in range(3):
        room.enter(ALICE)
        assert room.admission.priority(ALICE) == 0


# -- over HTTP


def chat(client: openai.OpenAI, max_tokens: int, **more):
    message = {"role": "user", "content": "Tell me a story."}
    return client.chat.completions.create(
        model="demo", messages=[message], max_tokens=max_tokens, seed=1, extra_body={"ignore_eos": True}, **more
    )


@contextlib.contextmanager
def limited(llm: AsyncLLM, **options):
    config = ServerConfig(port=0, log_level="warning", **options)
    with plug_ins(llm, config) as parts, serving(llm, config, **parts) as running:
        yield running


def test_a_full_server_says_when_to_come_back(demo):
    with limited(demo, max_num_queued_reqs=3) as running, running.client() as client:
        stream = chat(client, 3000, n=2, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client, 1, n=2)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.body["code"] == "rate_limit_exceeded"
        assert len(chat(client, 1).choices) == 1
        stream.close()
        assert running.idle()
        assert len(chat(client, 1, n=3).choices) == 3
        assert running.idle()
        assert running.server.admission.admitted == 0


def test_refused_before_tokenisation(demo, monkeypatch):
    with limited(demo, max_num_queued_reqs=1) as running, running.client() as client:
        stream = chat(client, 3000, stream=True)
        next(iter(stream))
        monkeypatch.setattr(demo, "apply_chat_template", lambda *a, **b: pytest.fail("rendered"))
        with pytest.raises(openai.RateLimitError):
            chat(client, 1)
        stream.close()
        assert running.idle()


def test_tokenize_counts_for_the_rate_of_its_key(demo, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sk-a name=a requests_per_minute=2\n")
    with limited(demo, api_key_file=str(keys)) as running:
        headers = {"authorization": "Bearer sk-a"}
        with httpx.Client(base_url=running.url, headers=headers) as client:
            asked = [client.post("/tokenize", json={"prompt": "a"}).status_code for _ in range(3)]
            assert asked == [200, 200, 429]
            assert client.post("/detokenize", json={"tokens": [1]}).status_code == 429


def test_prompt_tokens_that_wait(demo):
    with limited(demo, max_num_queued_tokens=1) as running, running.client() as client:
        record = RequestRecord("0", "/v1/completions", ALICE, prompt_tokens=1)
        running.server.in_flight["0"] = record
        with pytest.raises(openai.RateLimitError, match="1 prompt tokens wait; the limit is 1"):
            chat(client, 1)
        record.first_token = 1.0
        assert len(chat(client, 1).choices) == 1
        del running.server.in_flight["0"]


def test_not_ready(demo):
    with limited(demo) as running, running.client() as client:
        running.server.ready = False
        with pytest.raises(openai.InternalServerError) as caught:
            chat(client, 1)
        assert (caught.value.status_code, caught.value.body["code"]) == (503, "not_ready")


def test_a_busy_key_does_not_delay_another():
    """One sequence at a time: the second key's request goes first, though it came last."""
    ended: list[str] = []
    with contextlib.ExitStack() as stack:
        llm = AsyncLLM("demo", device="cpu", num_threads=1, max_num_seqs=1)
        stack.enter_context(contextlib.closing(llm))
        running = stack.enter_context(limited(llm, api_key=("sk-busy", "sk-calm")))
        pool = stack.enter_context(ThreadPoolExecutor(9))

        def ask(key: str) -> None:
            with running.client(api_key=key) as client:
                chat(client, 10)
                ended.append(key)

        first = stack.enter_context(running.client(api_key="sk-busy"))
        stream = chat(first, 4000, stream=True)
        next(iter(stream))
        tasks = [pool.submit(ask, "sk-busy") for _ in range(6)]
        until_waiting(llm, 6)
        tasks.append(pool.submit(ask, "sk-calm"))
        until_waiting(llm, 7)
        assert not ended
        stream.close()
        for task in tasks:
            task.result(60)
    assert len(ended) == 7
    assert "sk-calm" in ended[:2], ended


def until_waiting(llm: AsyncLLM, count: int) -> None:
    deadline = time.monotonic() + 20
    while llm.stats()["num_waiting"] < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)
