"""The client of OpenAI's API, and the transport into an application of the same loop."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
import pytest
from ui_helpers import run

from qwen_fast.ui.asgi_transport import StreamingASGITransport
from qwen_fast.ui.client import Backend, events, refusal_of
from qwen_fast.ui.texts import Refusal


def sse(*chunks: object) -> bytes:
    return b"".join(b"data: " + (c if isinstance(c, bytes) else json.dumps(c).encode()) + b"\n\n" for c in chunks)


def served(status: int, body: bytes, seen: list | None = None) -> Backend:
    def answer(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(request)
        return httpx.Response(status, content=body)

    return Backend("http://x/v1/", transport=httpx.MockTransport(answer))


async def all_of(backend: Backend, **options: str) -> list[dict]:
    return [chunk async for chunk in backend.chat({"model": "m", "messages": []}, **options)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_however_they_are_cut(size):
    text = "data: a\u2028b\x85c\r\n\r\n: comment\n\ndata:1\ndata: 2\n\nevent: x\n\n狐 ignored\ndata: 狐\n\ndata: unfinished"
    raw = text.encode()

    async def parts():
        for start in range(0, len(raw), size):
            yield raw[start : start + size]

    async def found():
        return [event async for event in events(parts())]

    assert run(found()) == ["a\u2028b\x85c", "1\n2", "狐"]


def test_a_stream_is_read_to_done():
    seen: list[httpx.Request] = []
    chunks = run(all_of(served(200, sse({"a": 1}, {"b": 2}, b"[DONE]", {"c": 3}), seen), api_key=" key "))
    assert chunks == [{"a": 1}, {"b": 2}]
    assert str(seen[0].url) == "http://x/v1/chat/completions" and seen[0].headers["authorization"] == "Bearer key"
    assert json.loads(seen[0].content) == {"model": "m", "messages": [], "stream": True}


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, sse({"a": 1}), r"broke the answer off: the stream ended without \[DONE\]"),
        (200, sse(b"{bad"), "broke the answer off: not JSON"),
        (200, sse([1]), "broke the answer off: not an object"),
        (200, sse({"error": {"message": "engine died"}}), "broke the answer off: engine died"),
        (200, b"data: " + b"x" * (9 * 2**20), "a line of more than 8388608 bytes"),
        (400, b'{"error": {"message": "temperature is 9"}}', r"refused: temperature is 9 \(status 400\)"),
        (500, b"<html>oops", r"refused: <html>oops \(status 500\)"),
        (502, b"", r"refused: no reason given \(status 502\)"),
        (302, b"", "status 302"),
    ],
)
def test_what_goes_wrong_is_told(status, body, said):
    with pytest.raises(Refusal, match=said):
        run(all_of(served(status, body)))


def test_models_and_metrics():
    card = {"id": "m", "owned_by": "qwen_fast", "max_model_len": 4096}
    models = run(served(200, json.dumps({"data": [card, {"id": "other"}]}).encode()).models())
    assert models[0].counts_as_it_goes and models[0].max_model_len == 4096 and not models[1].counts_as_it_goes
    for bad in (b"[]", b'{"data": [3]}', b"no", b'{"data": 3}'):
        with pytest.raises(Refusal, match="list of models is not OpenAI's"):
            run(served(200, bad).models())
    seen: list[httpx.Request] = []
    assert run(served(200, b"a 1\n", seen).metrics()) == "a 1\n" and str(seen[0].url) == "http://x/metrics"
    assert run(served(404, b"").metrics()) == ""


def test_no_server_bad_url_bad_key():
    with pytest.raises(Refusal, match="does not answer"):
        run(all_of(Backend("http://127.0.0.1:1/v1")))
    for url in ("host:8000", "ftp://x/v1", "", "/v1"):
        with pytest.raises(ValueError, match="url must begin with http://"):
            Backend(url)
    for key in ("a\nb", "ключ"):
        with pytest.raises(Refusal, match="API key holds characters"):
            run(all_of(served(200, b""), api_key=key))
    assert len(str(refusal_of(500, b"x" * 10000))) < 600


# -- the transport


def test_parts_arrive_when_they_are_sent_and_a_reader_who_leaves_is_noticed():
    steps: list[str] = []

    async def app(scope, receive, send):
        assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/p", b"q=1")
        assert (await receive())["body"] == b"body"
        await send({"type": "http.response.start", "status": 201, "headers": [(b"x-a", b"b")]})
        for index in range(3):
            steps.append(f"sent {index}")
            await send({"type": "http.response.body", "body": str(index).encode(), "more_body": True})
            await asyncio.sleep(0.02)
        steps.append((await receive())["type"])

    async def work():
        client = httpx.AsyncClient(transport=StreamingASGITransport(app))
        async with client, client.stream("POST", "http://h/p?q=1", content=b"body") as response:
            assert response.status_code == 201 and response.headers["x-a"] == "b"
            async for part in response.aiter_raw():
                steps.append(f"got {part.decode()}")
                if part == b"2":
                    break

    run(work())
    assert steps == ["sent 0", "got 0", "sent 1", "got 1", "sent 2", "got 2", "http.disconnect"]


def test_an_application_that_fails_is_an_error_of_the_connection():
    async def fails_first(scope, receive, send):
        raise RuntimeError("no")

    async def fails_late(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise RuntimeError("late")

    async def silent(scope, receive, send):
        return None

    async def floods(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100_000):
            await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})

    async def get(app):
        async with httpx.AsyncClient(transport=StreamingASGITransport(app)) as client:
            return await client.get("http://h/")

    async def leave(app):
        before = len(asyncio.all_tasks())
        async with httpx.AsyncClient(transport=StreamingASGITransport(app)) as client:
            with contextlib.suppress(asyncio.CancelledError):
                async with client.stream("GET", "http://h/") as response:
                    async for _ in response.aiter_raw():
                        break
        assert len(asyncio.all_tasks()) == before

    for app in (fails_first, fails_late, silent):
        with pytest.raises(httpx.RemoteProtocolError):
            run(get(app))
    run(leave(floods))
