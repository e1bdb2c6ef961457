"""Starts chat servers and nginx for the tests, and talks to them as a client that notes when what arrives."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"


def tool(name: str, package: str) -> str:
    """The path of a program; without it the test is skipped, or fails under CI=true."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        reason = f"no {name}: apt-get install {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


class Backend:
    """A server in a process of its own, on HTTP and on FastCGI: the small one of chat_backend.py."""

    def __init__(self, name: str, folder: pathlib.Path) -> None:
        self.socket = folder / f"{name}.sock"
        self.process = subprocess.Popen(self.command(), stdout=subprocess.PIPE, text=True, cwd=folder)
        self.port = self.wait_for_port()

    def command(self) -> list[str]:
        return [sys.executable, str(pathlib.Path(__file__).with_name("chat_backend.py")), f"unix:{self.socket}"]

    def wait_for_port(self) -> int:
        assert self.process.stdout is not None
        port = int(self.process.stdout.readline() or 0)
        assert port, "the server did not start"
        return port

    @property
    def addresses(self) -> set[str]:
        """As nginx calls this backend."""
        return {f"127.0.0.1:{self.port}", f"unix:{self.socket}"}

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    def stats(self) -> dict[str, Any]:
        return json.loads(self.get("/stats")[1])

    def active(self) -> int:
        """Requests that run, wait, or pause because their client does not read."""
        stats = self.stats()
        return stats["num_running"] + stats["num_waiting"] + stats["num_paused"]

    def idle(self) -> bool:
        """Whether no request is left and every KV block is free again."""
        stats = self.stats()
        return not self.active() and stats["num_free_blocks"] == stats["memory"]["num_blocks"]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=10)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


class ServeBackend(Backend):
    """`qwen-fast serve`."""

    def command(self) -> list[str]:
        self._port = free_port()
        command = [sys.executable, "-m", "qwen_fast", "serve", "demo", "--port", str(self._port)]
        return [*command, "--fastcgi", f"unix:{self.socket}", "--uvicorn-log-level", "warning"]

    def wait_for_port(self) -> int:
        self.port = self._port
        for _ in range(300):
            with contextlib.suppress(OSError):
                if self.get("/ready")[0] == 200 and self.socket.exists():
                    return self._port
            assert self.process.poll() is None, "the server did not start"
            time.sleep(0.05)
        raise AssertionError("the server is not ready")

    def active(self) -> int:
        return json.loads(self.get("/load")[1])["server_load"]

    def idle(self) -> bool:
        return self.active() == 0


@contextlib.contextmanager
def running_backends(folder: pathlib.Path, kind: type[Backend] = Backend, count: int = 2) -> Iterator[list[Any]]:
    backends: list[Any] = []
    try:
        for i in range(count):
            backends.append(kind(f"b{i}", folder))
        yield backends
    finally:
        for backend in backends:
            if backend.process.poll() is None:
                backend.stop()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def nginx_configuration(way: str, folder: pathlib.Path, port: int, backends: list[str]) -> pathlib.Path:
    """A whole nginx.conf around the example for "http" or "fastcgi", which gets this port and these two backends."""
    example = EXAMPLES / {"http": "nginx.conf", "fastcgi": "nginx-fastcgi.conf"}[way]
    names = {
        "http": ["127.0.0.1:8000 max", "127.0.0.1:8001 max"],
        "fastcgi": ["unix:/run/qwen-fast/8000/fastcgi.sock max", "unix:/run/qwen-fast/8001/fastcgi.sock max"],
    }[way]
    changes = {old: f"{new} max" for old, new in zip(names, backends)}
    changes["listen 80;"] = f"listen 127.0.0.1:{port};"
    (folder / "site.conf").write_text(replaced(example.read_text(), changes))
    if not (folder / "fastcgi_params").exists():
        (folder / "fastcgi_params").symlink_to("/etc/nginx/fastcgi_params")
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = folder / "nginx.conf"
    main.write_text(
        f"daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log info;\n"
        f"events {{ worker_connections 512; }}\nhttp {{ access_log off; add_header X-Backend $upstream_addr; {temporary}\n include {folder}/site.conf; }}\n"
    )
    return main


@contextlib.contextmanager
def running_nginx(way: str, folder: pathlib.Path, backends: list[Backend]) -> Iterator[int]:
    """nginx with the example for `way` in front of two backends; its port."""
    port = free_port()
    folder.mkdir(exist_ok=True)
    places = [f"127.0.0.1:{b.port}" if way == "http" else f"unix:{b.socket}" for b in backends]
    main = nginx_configuration(way, folder, port, places)
    command = [tool("nginx", "nginx"), "-c", str(main), "-e", f"{folder}/error.log"]
    process = subprocess.Popen(command)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, (folder / "error.log").read_text()
            time.sleep(0.02)
        else:
            raise AssertionError("nginx does not listen")
        yield port
    finally:
        process.terminate()
        process.wait(timeout=10)


class Stream:
    """A streamed chat as its client sees it."""

    def __init__(self, port: int, max_tokens: int, seed: int = 1, **headers: str) -> None:
        messages = [{"role": "user", "content": "Tell me a story about Nora the fox."}]
        fields = {"messages": messages, "max_tokens": max_tokens, "seed": seed, "ignore_eos": True, "stream": True}
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.started = time.monotonic()
        body = json.dumps({"model": "demo", **fields})
        self.connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json", **headers})
        self.response = self.connection.getresponse()
        self.backend = (self.response.headers["x-backend"] or "").split(", ")[-1]  # nginx names those it tried
        self.arrivals: list[float] = []  # seconds after the request, of each read that gave something
        self.data = b""

    def read(self) -> bool:
        """Reads what has arrived, waiting for something; False at the end. An answer that breaks off raises."""
        part = self.response.read1(65536)
        if part:
            self.arrivals.append(time.monotonic() - self.started)
            self.data += part
        return bool(part)

    def read_all(self) -> str:
        while self.read():
            pass
        assert self.data.endswith(b"data: [DONE]\n\n"), self.data[-200:]
        return self.text

    @property
    def text(self) -> str:
        lines = self.data.decode().split("\n\n")[:-1]
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
        return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])

    def close(self) -> None:
        self.response.close()
        self.connection.close()
