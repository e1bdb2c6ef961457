"""The middleware before the page, and the command's options."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import types

import httpx
import pytest
from ui_helpers import run

from qwen_fast import cli
from qwen_fast.server.http_io import CONNECTION
from qwen_fast.ui.asgi_transport import StreamingASGITransport
from qwen_fast.ui.config import UiConfig
from qwen_fast.ui.guard import COOKIE, Guard, is_loopback, local_only, policy
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
    "other", ["valueless", "a=two words", 'j={"k": [1, "x"]}', "n=Stra\u00dfe", 'q="open', "a[1]=2", "="]
)
def test_other_cookies_of_the_host_do_not_hide_ours(other):
    ours = f"{COOKIE}={new_token()}"
    for cookie in (f"{other}; {ours}", f"{ours}; {other}", f"{other}; {ours}; {other}"):
        (answer,) = asked(("GET", "/ui/", {"headers": {"cookie": cookie.encode("latin-1")}}))
        assert answer.status_code == 200 and "set-cookie" not in answer.headers


def over_http(guard, admitted, address="192.0.2.1"):
    """The guard behind a connection that notes which requests it is told to admit."""

    async def app(scope, receive, send):
        class Connection:
            def admit(self):
                admitted.append(scope["path"])

        await guard({**scope, CONNECTION: Connection(), "client": (address, 1)}, receive, send)

    return httpx.AsyncClient(transport=StreamingASGITransport(app), base_url="http://h")


def test_a_made_up_cookie_lifts_bounded_streams_alone_out_of_the_limits():
    async def work():
        admitted, long = [], "/ui/gradio_api/heartbeat/abc"
        guard = Guard(page, "/ui", 100, lambda: False)
        same, other = over_http(guard, admitted), over_http(guard, admitted, "2001:db8::1")
        token = {"cookie": f"{COOKIE}={new_token()}"}
        async with contextlib.AsyncExitStack() as stack:
            for client in (same, other):
                await stack.enter_async_context(client)

            async def hold(client, headers):
                return (await stack.enter_async_context(client.stream("GET", long, headers=headers))).status_code

            assert (await same.get("/ui/config", headers=token)).status_code == 200 and admitted == []
            assert [await hold(same, token) for _ in range(33)] == [200] * 32 + [429]
            assert admitted == [long] * 32
            assert [await hold(same, {}) for _ in range(19)] == [200] * 18 + [429]  # half of 100 for one address
            assert len(admitted) == 32 and await hold(other, {}) == 200
        for _ in range(100):
            if not guard._streams:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("streams that have ended are still counted")

    run(work())


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost:7860", True),
        ("LOCALHOST.", True),
        ("ui.localhost", True),
        ("127.0.0.1", True),
        ("127.8.9.1:80", True),
        ("[::1]:7860", True),
        ("evil.example:7860", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("0.0.0.0", False),
        ("", False),
    ],
)
def test_a_page_of_this_machine_answers_to_its_names_alone(host, local):
    async def status(guard):
        async with over_http(guard, []) as client:
            return (await client.get("/ui/", headers={"host": host})).status_code

    assert run(status(Guard(page, "/ui", 8, lambda: False, local=True))) == (200 if local else 421)
    assert run(status(Guard(page, "/ui", 8, lambda: False))) == 200
    assert is_loopback("127.0.0.1") and is_loopback("::1") and not is_loopback("0.0.0.0") and not is_loopback("")


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
        (["ui", "--url", "http://["], "url: 'http://[' is no address such as http://127.0.0.1:8000/v1"),
        (["ui", "--url", "http://x:port"], "url: 'http://x:port' is no address such as"),
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


@pytest.mark.parametrize(
    ("options", "local"),
    [([], True), (["--host", "localhost"], True), (["--host", "0.0.0.0"], False), (["--api-key", "k"], True)],
)
def test_a_page_for_a_url_has_the_server_s_deadlines(options, local, monkeypatch):
    import uvicorn

    from qwen_fast.server.config import Limits
    from qwen_fast.server.connections import Connection

    built = {}

    class Stop(Exception):
        pass

    def config(app, **given):
        built.update(given)
        raise Stop

    monkeypatch.setattr(uvicorn, "Config", config)
    monkeypatch.setattr("qwen_fast.ui.mount.PageApp", lambda *parts, local: built.update(local=local))
    with pytest.raises(Stop):
        cli.main(["ui", "--debug", "--url", "http://x/v1", "--history", ":memory:", *options])
    assert issubclass(built["http"], Connection) and built["http"].limits == Limits() and built["local"] is local


@pytest.mark.parametrize(
    ("options", "local"),
    [({}, True), ({"host": "0.0.0.0"}, False), ({"api_key": ("k",)}, False), ({"uds": "/x/s"}, False)],
)
def test_a_page_beside_a_server_is_local_as_the_server_is(options, local, monkeypatch):
    from qwen_fast.server import ServerConfig
    from qwen_fast.ui import mount

    api = types.SimpleNamespace(
        state=types.SimpleNamespace(server=types.SimpleNamespace(config=ServerConfig(**options)))
    )
    monkeypatch.setattr(mount, "PageApp", lambda *parts: parts[-1])
    assert mount.beside(api, UiConfig(history=":memory:"), None) is local


def test_a_missing_extra_is_named(monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else real(name))
    assert cli.main(["ui"]) == 1
    assert "gradio missing: the page needs `pip install qwen_fast[ui]`" in capsys.readouterr().err
