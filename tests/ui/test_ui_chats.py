"""Turns on the demo model, through the server's application: send, stop, edit, regenerate, undo, tools, and limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import types
from collections.abc import AsyncIterator

import pytest
from ui_helpers import LIMITS, new_owner, run

from qwen_fast.server import ServerConfig, create_app
from qwen_fast.server.metrics import PrometheusMetrics
from qwen_fast.ui.asgi_transport import StreamingASGITransport
from qwen_fast.ui.chats import Chats, View, Visitor
from qwen_fast.ui.client import Backend
from qwen_fast.ui.config import UiConfig
from qwen_fast.ui.history import new_token, open_store
from qwen_fast.ui.texts import Refusal

LONG = {"extra": '{"ignore_eos": true}', "max_tokens": 1000, "seed": 1}
ASK = {"seed": 1, "max_tokens": 12}
TOOLS = '[{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": false}}]'  # fmt: skip


@contextlib.asynccontextmanager
async def chatting(llm, keys=(), **options) -> AsyncIterator[Chats]:
    """Chats on a server's application in this event loop, with a fresh history."""
    config = ServerConfig(served_model_name=("demo",), api_key=tuple(keys))
    more = {}
    if keys:
        from qwen_fast.server.auth import keys_of

        more["auth"] = keys_of(config)
    app = create_app(llm, config, metrics=PrometheusMetrics(llm, "demo"), **more)
    store = open_store(":memory:", options.get("limits", LIMITS))
    backend = Backend("http://x/v1", transport=StreamingASGITransport(app))
    async with app.router.lifespan_context(app):
        chats = Chats(store, backend, UiConfig(history=":memory:", **{"limits": LIMITS, **options}))
        try:
            yield chats
        finally:
            await backend.aclose()
            store.close()
    for _ in range(200):
        if not llm.stats()["num_running"] and not app.state.server.in_flight:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine still writes an answer that nobody reads")


def visitor(session: str = "s") -> Visitor:
    return Visitor(new_owner(), session)


async def last(views) -> View:
    found = None
    async for view in views:
        found = view
    return found


def test_a_turn_is_streamed_kept_and_counted(slow_demo):
    async def work():
        async with chatting(slow_demo) as chats:
            me, views = visitor(), []
            async for view in chats.send(
                me, None, "Tell me a story about Nora the fox.", {"seed": 1, "max_tokens": 60}
            ):
                views.append((view.running, view.conversation.messages[-1]["content"]))
                final = view
            assert views[0] == (True, "") and not views[-1][0] and len({text for _, text in views}) > 3
            assert all(views[i + 1][1].startswith(views[i][1]) for i in range(len(views) - 1))
            assert final.error is None
            numbers = final.numbers
            assert numbers["tokens_out"] == 60 and numbers["exact"] and numbers["tokens_in"] > 8
            assert 0 < numbers["ttft_s"] < 20 and numbers["tokens_per_s"] > 1
            assert numbers["memory_bytes"] > 2**20 and 0 <= numbers["kv_use"] < 1
            kept = await chats.open(me, final.conversation.id)
            assert kept == final.conversation and kept.title == "Tell me a story about Nora the fox."
            assert kept.messages[-1]["meta"]["end"] == "length" and kept.settings["seed"] == 1
            assert [entry.id for entry in await chats.entries(me)] == [kept.id]
            assert await chats.entries(visitor()) == []

    run(work())


def test_stop_ends_the_request_and_keeps_what_is_there(slow_demo):
    async def work():
        async with chatting(slow_demo) as chats:
            me = visitor()
            async for view in chats.send(me, None, "Tell me a story.", LONG):
                if view.running and view.numbers["tokens_out"] > 20:
                    with pytest.raises(Refusal, match="being written"):
                        await last(chats.send(me, None, "again", {}))
                    chats.stop("another page")
                    chats.stop(me.session)
            message = view.conversation.messages[-1]
            assert not view.running and message["meta"]["end"] == "stopped" and 20 < view.numbers["tokens_out"] < 900
            assert (await chats.open(me, view.conversation.id)).messages[-1] == message
            for _ in range(300):  # the engine lets it go
                if not slow_demo.stats()["num_running"]:
                    break
                await asyncio.sleep(0.01)
            assert not slow_demo.stats()["num_running"]

    run(work())


def test_a_page_that_goes_leaves_what_was_written(slow_demo):
    async def work():
        async with chatting(slow_demo) as chats:
            me = visitor()
            views = chats.send(me, None, "Tell me a story.", LONG)
            async for view in views:
                if view.numbers["tokens_out"] > 10:
                    break
            await views.aclose()
            kept = await chats.open(me, view.conversation.id)
            assert kept.messages[-1]["meta"]["end"] == "stopped" and kept.messages[-1]["content"]
            assert (await last(chats.send(me, kept.id, "And then?", ASK))).error is None  # the page is free again

    run(work())


def test_edit_regenerate_and_undo(slow_demo):
    async def work():
        async with chatting(slow_demo) as chats:
            me = visitor()
            one = (await last(chats.send(me, None, "hello", ASK))).conversation
            two = (await last(chats.send(me, one.id, "What is two plus two?", ASK))).conversation
            assert [message["role"] for message in two.messages] == ["user", "assistant"] * 2
            again = (await last(chats.retry(me, one.id, 3, ASK))).conversation
            assert again.messages[3]["content"] == two.messages[3]["content"] and len(again.messages) == 4  # the seed
            other = (await last(chats.retry(me, one.id, 1, {**ASK, "max_tokens": 2}))).conversation
            assert len(other.messages) == 2 and other.messages[1]["meta"]["stats"]["tokens_out"] == 2
            edited = (await last(chats.edit(me, one.id, 0, "Hi there!", ASK))).conversation
            assert edited.messages[0]["content"] == "Hi there!" and len(edited.messages) == 2
            undone, typed = await chats.undo(me, one.id, 1)
            assert (undone.messages, typed) == ([], "Hi there!")
            assert (await chats.open(me, one.id)).messages == []
            for wrong in (chats.edit(me, one.id, 0, "x", {}), chats.retry(me, one.id, -1, {})):
                with pytest.raises(Refusal, match="not there any more"):
                    await last(wrong)

    run(work())


def test_tools_are_called_and_their_results_typed(slow_demo):
    async def work():
        async with chatting(slow_demo) as chats:
            me = visitor()
            form = {"tools": TOOLS, "tool_choice": "get_weather", "temperature": 0, "max_tokens": 60}
            view = await last(chats.send(me, None, "What is the weather in Oslo?", form))
            assert view.error is None
            (call,) = view.conversation.messages[-1]["tool_calls"]
            assert call["function"]["name"] == "get_weather" and "city" in json.loads(call["function"]["arguments"])
            then = {"tools": TOOLS, "temperature": 0, "max_tokens": 20}
            after = await last(chats.send(me, view.conversation.id, '{"temperature": 3}', then))
            assert [message["role"] for message in after.conversation.messages][2:] == ["tool", "assistant"]
            assert after.error is None and after.conversation.messages[2]["tool_call_id"] == call["id"]

    run(work())


def test_a_schema_is_kept_to(slow_demo):
    schema = '{"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 99}}, "required": ["n"], "additionalProperties": false}'  # fmt: skip

    async def work():
        async with chatting(slow_demo) as chats:
            view = await last(chats.send(visitor(), None, "A number?", {"schema": schema, "max_tokens": 40, "seed": 2}))
            assert 1 <= json.loads(view.conversation.messages[-1]["content"])["n"] <= 99

    run(work())


def test_what_the_server_refuses_is_told_and_the_question_stays(slow_demo):
    async def work():
        async with chatting(slow_demo) as chats:
            me = visitor()
            view = await last(chats.send(me, None, "hi", {"top_p": 0}))
            assert "top_p" in str(view.error) and "status 400" in str(view.error) and not view.running
            assert [message["role"] for message in view.conversation.messages] == ["user"]
            after = await last(chats.retry(me, view.conversation.id, 0, ASK))
            assert after.error is None and len(after.conversation.messages) == 2
            unknown = await last(chats.send(me, None, "hi", {"model": "gpt"}))
            assert "status 404" in str(unknown.error) and "gpt" in str(unknown.error)

    run(work())


def test_keys_are_the_visitors_own(slow_demo):
    async def work():
        async with chatting(slow_demo, keys=["secret-key"]) as chats:
            nobody, known = visitor("a"), Visitor(new_owner(), "b", "secret-key")
            assert "status 401" in str((await last(chats.send(nobody, None, "hi", ASK))).error)
            with pytest.raises(Refusal, match="status 401"):
                await chats.models(nobody)
            assert (await last(chats.send(known, None, "hi", ASK))).error is None
            assert "status 401" in str((await last(chats.send(nobody, None, "hi", ASK))).error)
            saved = json.dumps(
                [one.messages for one in [await chats.open(known, e.id) for e in await chats.entries(known)]]
            )
            assert "secret-key" not in saved

    run(work())


def test_limits_and_strangers(slow_demo):
    async def work():
        async with chatting(slow_demo, streams=1) as chats:
            me, other = visitor("a"), visitor("b")
            for content, form, said in (
                ("  ", {}, "message is empty"),
                ("x" * 4097, {}, "has 4097 bytes; the limit is 4096"),
                ("x", {"temperature": 9}, "temperature must be from 0 to 2"),
            ):
                with pytest.raises(Refusal, match=said):
                    await last(chats.send(me, None, content, form))
            assert await chats.entries(me) == []
            async for view in chats.send(me, None, "Tell me a story.", LONG):
                if view.numbers.get("tokens_out", 0) > 2 and view.running:
                    with pytest.raises(Refusal, match="1 answers are being written, which is the limit"):
                        await last(chats.send(other, None, "hi", ASK))
                    with pytest.raises(Refusal, match="being written"):
                        await chats.undo(me, view.conversation.id, 0)
                    chats.stop(me.session)
            id = view.conversation.id
            for theirs in (chats.open(other, id), chats.rename(other, id, "x"), last(chats.retry(other, id, 0, ASK))):
                with pytest.raises(Refusal, match="not there any more"):
                    await theirs
            await chats.delete(other, id)
            await chats.rename(me, id, " new\nname ")
            assert [entry.title for entry in await chats.entries(me)] == ["new name"]
            with pytest.raises(Refusal, match="title is empty"):
                await chats.rename(me, id, "\u200b ")
            async for _ in chats.send(me, id, "More.", LONG):
                await chats.delete(me, id)  # while it is being answered
            assert await chats.entries(me) == []

    run(work())


def test_an_answer_ends_at_its_limit(slow_demo):
    limits = type(LIMITS)(message_bytes=1024)

    async def work():
        async with chatting(slow_demo, limits=limits) as chats:
            view = await last(chats.send(visitor(), None, "Tell me a story.", LONG))
            assert "1024 bytes, the limit" in str(view.error)
            assert 900 < len(view.conversation.messages[-1]["content"].encode()) <= 1024

    run(work())


# -- without an engine: a server that says what the test says, and a slow store


class Scripted:
    """Stands for a Backend."""

    def __init__(self, *chunks, endless=False) -> None:
        self.chunks, self.endless = chunks, endless

    async def models(self, api_key=""):
        return []

    async def metrics(self, api_key=""):
        return ""

    async def chat(self, body, api_key=""):
        for chunk in self.chunks:
            yield chunk
        if self.endless:
            await asyncio.sleep(60)


def said(**delta):
    return {"choices": [{"index": 0, "delta": delta}]}


def scripted(*chunks, **options) -> Chats:
    config = UiConfig(history=":memory:", limits=LIMITS)
    return Chats(open_store(":memory:", LIMITS), Scripted(*chunks, **options), config)


@pytest.mark.parametrize(
    "odd",
    [
        {"choices": [{"delta": ["x"]}]},
        {"choices": 7},
        said(tool_calls=["call"]),
        said(tool_calls=7),
        said(tool_calls=[{"index": None, "function": {"name": "f"}}]),
        said(tool_calls=[{"index": [0], "function": {"name": "f"}}]),
        said(tool_calls=[{"index": 0, "function": {"name": 5}}]),
        said(tool_calls=[{"index": 0, "function": "f"}]),
        said(tool_calls=[{"index": 0, "id": 5, "function": {"name": "f", "arguments": {}}}]),
    ],
)
def test_odd_chunks_break_the_answer_off_and_keep_what_came(odd):
    async def work():
        chats, me = scripted(said(content="Hel"), said(content="lo"), odd), visitor()
        view = await last(chats.send(me, None, "hi", {}))
        assert view.error is not None and view.error.name == "server_broke_off"
        kept = (await chats.open(me, view.conversation.id)).messages[-1]
        assert kept["content"] == "Hello" and kept["meta"]["end"] == "failed" and "tool_calls" not in kept

    run(work())


def slowed(chats: Chats, seconds: float) -> threading.Event:
    """Makes every save take so long; the event: one has begun."""
    begun, save = threading.Event(), chats.store.save

    def slow(owner, conversation):
        begun.set()
        time.sleep(seconds)
        save(owner, conversation)

    chats.store.save = slow
    return begun


def test_a_slow_store_does_not_hold_the_event_loop_up():
    async def work():
        chats = scripted(said(content="Hello"))
        slowed(chats, 0.4)
        answering = asyncio.create_task(last(chats.send(visitor(), None, "hi", {})))
        longest, before = 0.0, time.monotonic()
        while not answering.done():
            await asyncio.sleep(0.01)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
        assert answering.result().error is None and longest < 0.3

    run(work())


@pytest.mark.parametrize("endless", [True, False], ids=["during a checkpoint", "during the last save"])
def test_cancelling_during_a_save_loses_nothing(endless, monkeypatch):
    monkeypatch.setattr("qwen_fast.ui.chats._SAVED_EVERY_S", 0.0 if endless else 60.0)

    async def work():
        chats, me = scripted(said(content="Hello"), endless=endless), visitor()
        first = asyncio.Event()
        ids = []

        async def reading():
            async for view in chats.send(me, None, "hi", {}):
                ids.append(view.conversation.id)
                first.set()

        task = asyncio.create_task(reading())
        await first.wait()
        begun = slowed(chats, 0.2)
        while not begun.is_set():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        kept = (await chats.open(me, ids[0])).messages[-1]
        assert kept["content"] == "Hello" and kept["meta"]["end"] == ("stopped" if endless else "")

    run(work())


def test_a_store_that_fails_while_the_page_loads_is_told():
    from qwen_fast.ui.events import Events
    from qwen_fast.ui.guard import COOKIE
    from qwen_fast.ui.page import Page

    chats = scripted()
    page = Page(chats, chats.config)
    request = types.SimpleNamespace(cookies={COOKIE: new_token()}, session_hash="s", headers={})
    entries, asked = chats.store.entries, []

    def fails_the_second_time(owner):
        asked.append(owner)
        if len(asked) > 1:
            raise Refusal("history_failed", reason="the disk is full")
        return entries(owner)

    chats.store.entries = fails_the_second_time
    shown = run(Events(page, chats, chats.config).load(request, ""))
    assert len(asked) == 2 and "the disk is full" in str(shown[page.notice]) and shown[page.lang] == "en"
