"""`qwen-fast serve --fastcgi`: beside HTTP and in its place, with one lifespan and one orderly end."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys

import pytest
import uvicorn
from backends import free_port
from fastcgi_peer import App, Peer, request_bytes, response_of

from qwen_fast.server.config import Limits, ServerConfig
from qwen_fast.server.fastcgi_scope import response_head
from qwen_fast.server.listeners import Listeners, fastcgi_limits


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fastcgi": "0.0.0.0:9000"}, "is not of this machine"),
        ({"fastcgi": "/run/x.sock"}, "neither unix:/path nor"),
        ({"fastcgi_only": True}, "fastcgi_only needs fastcgi"),
        ({"fastcgi": "unix:/x", "fastcgi_mode": 0o1000}, "fastcgi_mode must be from 0 to 511"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ServerConfig(**options)


def test_limits_follow_the_servers():
    limits = fastcgi_limits(Limits(connections=10, header_bytes=5000, header_count=20, body_seconds=3.0))
    assert (limits.connections, limits.params_bytes, limits.body_seconds) == (20, 5000, 3.0)
    assert limits.params > 20


class WithLifespan(App):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "lifespan":
            self.events.append(scope["state"]["name"])
            await super().__call__(scope, receive, send)
            return
        scope["state"]["name"] = "of the lifespan"
        for event in ("startup", "shutdown"):
            await receive()
            self.events.append(event)
            await send({"type": f"lifespan.{event}.complete"})


def listeners(app, port: int, **options) -> Listeners:
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical", lifespan="on")
    return Listeners(config, ServerConfig(**options))


async def started(server: Listeners) -> asyncio.Task:
    task = asyncio.create_task(server.serve())
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    return task


def can_connect(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def listens(path: pathlib.Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@pytest.mark.parametrize("only", [False, True])
def test_beside_http_and_in_its_place(tmp_path, only):
    path, port = tmp_path / "fastcgi.sock", free_port()

    async def main() -> None:
        app = WithLifespan()
        server = listeners(app, port, fastcgi=f"unix:{path}", fastcgi_only=only, fastcgi_mode=0o600)
        task = await started(server)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert can_connect(port) != only
        async with await Peer.connect(str(path)) as busy, await Peer.connect(str(path)) as idle:
            idle.send(request_bytes(keep=True))
            assert response_of(await idle.until_end())[0] == 200
            busy.send(request_bytes(b"/stream", QUERY_STRING=b"30"))
            await busy.record()
            server.should_exit = True
            assert await idle.closed()
            tail = await busy.until_end()
            assert b"".join(record.content for record in tail[:-2]).endswith(b"data: 29\n\n")
            await asyncio.wait_for(task, 5)
        assert app.events == ["startup", "of the lifespan", "of the lifespan", "shutdown"]
        assert not path.exists()

    asyncio.run(main())


def test_a_port_in_use_leaves_no_socket(tmp_path):
    path = tmp_path / "fastcgi.sock"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit):
            asyncio.run(listeners(App(), taken.getsockname()[1], fastcgi=f"unix:{path}").serve())
    assert not path.exists()


def test_a_socket_in_use_is_told_at_once(tmp_path):
    path = tmp_path / "fastcgi.sock"
    app = WithLifespan()
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        with pytest.raises(OSError, match="another process listens"):
            asyncio.run(listeners(app, free_port(), fastcgi=f"unix:{path}").serve())
    assert app.events == []


def test_the_command_drains_a_stream(tmp_path):
    """SIGTERM amid a streamed chat over FastCGI: the chat ends as it would have, then the process."""
    path = tmp_path / "fastcgi.sock"
    command = [sys.executable, "-m", "qwen_fast", "serve", "demo", "--fastcgi", f"unix:{path}", "--fastcgi-only"]
    process = subprocess.Popen([*command, "--fastcgi-mode", "0600"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    fields = {"max_tokens": 1500, "seed": 1, "ignore_eos": True, "stream": True}
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Tell me a story."}], **fields})

    async def main() -> None:
        while not listens(path):  # the file is there before, and for a moment with other permissions
            assert process.poll() is None
            await asyncio.sleep(0.05)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        async with await Peer.connect(str(path)) as peer:
            peer.send(request_bytes(b"/v1/chat/completions", body.encode(), CONTENT_TYPE=b"application/json"))
            first = await peer.record()
            assert first is not None and first.content.startswith(response_head(200, [])[:-2])
            process.send_signal(signal.SIGTERM)
            _, headers, data = response_of([first, *await peer.until_end()])
        assert headers["content-type"].startswith("text/event-stream")
        assert data.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in data

    try:
        asyncio.run(asyncio.wait_for(main(), 30))
        process.wait(10)
        assert not path.exists()
    finally:
        process.kill()
