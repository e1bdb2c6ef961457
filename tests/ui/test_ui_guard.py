"""The middleware before the page, and the command's options."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re

import httpx
import pytest
from ui_helpers import run

from qwen_fast import cli
from qwen_fast.ui.asgi_transport import StreamingASGITransport
from qwen_fast.ui.guard import COOKIE, Guard, local_only, policy
from qwen_fast.ui.history import new_token, owner_of

PAGE = (
    b'<html><head><link rel="preconnect" href="https://fonts.example"><meta content="https://x.example/a.jpg">'
    b'<link rel="stylesheet" href="./a.css"><script src="https://cdn.example/x.js"></script>'
    b'<script type="module" src="./assets/x.js"></script></head><body><script>run("a")</script></body></html>'
)


async def page(scope, receive, send):
    """Stands for Gradio: the page at /ui/, and an echo of the body's size elsewhere."""
    if scope["path"].endswith("/heartbeat/abc"):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.body", "body": b"over"})
        return
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    kind = b"text/html" if scope["path"] == "/ui/" else b"text/plain"
    body = PAGE if kind == b"text/html" else str(size).encode()
    scope["root_path"] = "/ui"  # as a mount does
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def asked(*requests, closing=lambda: False, connections=8, url="http://h"):
    async def work():
        transport = StreamingASGITransport(Guard(page, "/ui", connections, closing))
        async with httpx.AsyncClient(transport=transport, base_url=url) as client:
            return [await client.request(*request[:2], **(request[2] if request[2:] else {})) for request in requests]

    return run(work())


def test_the_page_has_a_cookie_and_a_policy_of_hashes():
    first, again, secure = *asked(("GET", "/ui/"), ("GET", "/ui/")), *asked(("GET", "/ui/"), url="https://h")
    cookie = first.headers["set-cookie"]
    found = re.fullmatch(rf"{COOKIE}=([\w-]{{43}}); Path=/ui; Max-Age=34560000; HttpOnly; SameSite=Lax", cookie)
    assert found and owner_of(found[1])
    assert "set-cookie" not in again.headers  # it was sent back
    assert secure.headers["set-cookie"].endswith("; Secure")
    rules = dict(rule.split(" ", 1) for rule in first.headers["content-security-policy"].split("; "))
    digest = base64.b64encode(hashlib.sha256(b'run("a")').digest()).decode()
    assert rules["script-src"] == f"'self' 'sha256-{digest}'"
    assert rules["default-src"] == rules["connect-src"] == "'self'" and rules["object-src"] == "'none'"
    assert b"https://" not in first.content and b'href="./a.css"' in first.content and b"assets/x.js" in first.content
    assert int(first.headers["content-length"]) == len(first.content)
    assert first.headers["x-content-type-options"] == "nosniff" and first.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("bad", ["", "short", "x" * 44, '"; Path=/'])
def test_a_cookie_that_is_not_ours_is_replaced(bad):
    (answer,) = asked(("GET", "/ui/", {"headers": {"cookie": f"{COOKIE}={bad}"}}))
    assert "set-cookie" in answer.headers
    (kept,) = asked(("GET", "/ui/", {"headers": {"cookie": f"a=b; {COOKIE}={new_token()}"}}))
    assert "set-cookie" not in kept.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/ui", 307),
        ("GET", "/ui/assets/index-Bx_1.js", 200),
        ("GET", "/ui/config", 200),
        ("GET", "/ui/gradio_api/queue/data", 200),
        ("POST", "/ui/gradio_api/queue/join", 200),
        ("POST", "/ui/gradio_api/cancel", 200),
        ("POST", "/ui/gradio_api/upload", 404),
        ("GET", "/ui/gradio_api/file=/etc/passwd", 404),
        ("GET", "/ui/gradio_api/proxy=http://x", 404),
        ("GET", "/ui/gradio_api/info", 404),
        ("POST", "/ui/gradio_api/run/predict", 404),
        ("POST", "/ui/gradio_api/call/x", 404),
        ("GET", "/ui/monitoring", 404),
        ("POST", "/ui/login", 404),
        ("GET", "/ui/assets/../../secret", 404),
        ("GET", "/ui/assets/..%2f..%2fsecret", 404),
        ("POST", "/ui/", 404),
        ("GET", "/uix", 404),
        ("DELETE", "/ui/config", 405),
    ],
)
def test_only_the_routes_of_the_page_are_open(method, path, status):
    (answer,) = asked((method, path))
    assert answer.status_code == status
    if status == 307:
        assert answer.headers["location"] == "ui/"


def test_bodies_and_connections_are_bounded():
    large, small = asked(
        ("POST", "/ui/gradio_api/queue/join", {"content": b"x" * (4 * 2**20 + 1)}),
        ("POST", "/ui/gradio_api/queue/join", {"content": b"x" * (4 * 2**20)}),
    )
    assert (large.status_code, small.status_code) == (413, 200)

    async def pieces():
        for _ in range(5):
            yield b"x" * 2**20

    (undeclared,) = asked(("POST", "/ui/gradio_api/queue/join", {"content": pieces()}))
    assert undeclared.status_code == 413

    async def full():
        guard = Guard(page, "/ui", 1, lambda: False)
        async with httpx.AsyncClient(transport=StreamingASGITransport(guard), base_url="http://h") as client:
            async with client.stream("GET", "/ui/gradio_api/heartbeat/abc"):
                refused = (await client.get("/ui/")).status_code
            await asyncio.sleep(0.05)
            return refused, (await client.get("/ui/")).status_code

    assert run(full()) == (503, 200)


def test_open_pages_do_not_hold_the_end_up():
    answer = asked(("GET", "/ui/gradio_api/heartbeat/abc"), closing=lambda: True)[0]
    assert answer.content == b"over"


def test_policy_and_cleaning_of_odd_pages():
    assert b"sha256" not in policy(b"<script src='x'></script>")
    assert policy(b"<SCRIPT\n>a</script >").count(b"sha256") == 1
    assert local_only(b"no html") == b"no html"


# -- the command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ui", "--url", "ftp://x"], "url must begin with http:// or https://"),
        (["ui", "--url", "http://x/v1", "demo"], "MODEL is about a server of this process; with --url there is none"),
        (["ui", "--url", "http://x/v1", "--audit-log", "x"], "--audit-log is about a server"),
        (["ui", "--url", "http://x/v1", "--max-model-len", "9"], "--max-model-len is about a server"),
        (["ui", "--url", "http://x/v1", "--api-key", "a", "b"], "one key is sent to the server, got 2"),
        (["ui", "--url", "http://x/v1", "--history-messages", "1"], "messages must be from 2 to 100000, got 1"),
        (["ui", "--url", "http://x/v1", "--history", "/proc/x/y"], "history: '/proc/x/y' cannot be opened"),
        (["ui", "--url", "http://x/v1", "--ui-streams", "0"], "streams must be from 1 to 4096, got 0"),
        (["serve", "--ui", "--history", "/proc/x/y"], "history: '/proc/x/y' cannot be opened"),
    ],
)
def test_wrong_options_are_told_before_anything_starts(arguments, said, capsys):
    assert cli.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else real(name))
    assert cli.main(["ui"]) == 1
    assert "gradio missing: the page needs `pip install qwen_fast[ui]`" in capsys.readouterr().err
