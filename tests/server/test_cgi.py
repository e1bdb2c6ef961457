"""`qwen-fast cgi`: a process as a web server starts it, between pipes and a FastCGI server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from backends import EXAMPLES, replaced
from fastcgi_peer import App

from qwen_fast.server import fastcgi_records as fcgi
from qwen_fast.server.fastcgi import listen

COMMAND = [sys.executable, "-m", "qwen_fast.server.cgi"]


class Served:
    """App behind FastCGI, on an event loop in a thread."""

    def __init__(self, path: pathlib.Path) -> None:
        self.address = f"unix:{path}"
        self.app: App
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._thread.start()
        assert self._ready.wait(5)

    async def _serve(self) -> None:
        self.app, self._stop = App(), asyncio.Event()
        server = await listen(self.app, self.address)
        self._ready.set()
        await self._stop.wait()
        assert await server.drain(2)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)
        assert not self._thread.is_alive()
        self._loop.close()


@pytest.fixture
def served(tmp_path):
    served = Served(tmp_path / "fastcgi.sock")
    yield served
    served.stop()


def environment(path: str, **variables: str) -> dict[str, str]:
    return {
        **os.environ,
        "REQUEST_METHOD": "POST",
        "SCRIPT_NAME": "/cgi-bin/qwen.cgi",
        "PATH_INFO": path,
        "SERVER_PROTOCOL": "HTTP/1.1",
        **variables,
    }


@contextlib.contextmanager
def cgi(address: str, path: str, **variables: str):
    """The process, with pipes for its standard streams."""
    pipe = subprocess.PIPE
    command = [*COMMAND, "--connect", address]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment(path, **variables)) as process:
        try:
            yield process
        finally:
            process.kill()


def head_and_body(output: bytes) -> tuple[dict[str, str], bytes]:
    head, _, body = output.partition(b"\r\n\r\n")
    return dict(line.split(": ", 1) for line in head.decode().split("\r\n")), body


def eventually(condition, seconds=2.0):
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.01)


def test_a_request(served):
    with cgi(
        served.address,
        "/echo",
        QUERY_STRING="a=1",
        CONTENT_LENGTH="3",
        CONTENT_TYPE="text/plain",
        HTTP_AUTHORIZATION="Bearer k",
        REMOTE_ADDR="192.0.2.7",
        HTTPS="on",
        SECRET_OF_THE_SERVER="no",
    ) as process:
        process.stdin.write(b"abc")
        process.stdin.flush()  # left open, as web servers do
        headers, body = head_and_body(process.stdout.read())
        assert process.wait(5) == 0
        assert process.stderr.read() == b""
    told = json.loads(body)
    assert headers == {"Status": "200", "content-type": "application/json"}
    assert (told["path"], told["query_string"], told["body"]) == ("/echo", "a=1", "abc")
    assert (told["scheme"], told["client"]) == ("https", ["192.0.2.7", 0])
    assert sorted(told["headers"]) == [
        ["authorization", "Bearer k"],
        ["content-length", "3"],
        ["content-type", "text/plain"],
    ]


@pytest.mark.parametrize("length", [0, 1, 5_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies(served, length, chunked):
    """With CONTENT_LENGTH no more than that is read; a body that came in chunks ends with standard input."""
    body = os.urandom(length)
    variables = {"HTTP_TRANSFER_ENCODING": "chunked"} if chunked else {"CONTENT_LENGTH": str(length)}
    with cgi(served.address, "/echo", **variables) as process:
        output, errors = process.communicate(body if chunked else body + b"not of this request")
        assert (process.returncode, errors) == (0, b"")
    assert json.loads(head_and_body(output)[1])["body"].encode("latin-1") == body


def test_a_response_is_streamed(served):
    with cgi(served.address, "/stream", QUERY_STRING="20") as process:
        arrivals = []
        while part := os.read(process.stdout.fileno(), 1000):
            arrivals.append((time.monotonic(), part))
        assert process.wait(5) == 0
    assert b"".join(part for _, part in arrivals).endswith(
        b"\r\n\r\n" + b"".join(b"data: %d\n\n" % i for i in range(20))
    )
    assert len(arrivals) > 10
    assert arrivals[-1][0] - arrivals[0][0] > 0.1


@pytest.mark.parametrize("end", ["nobody reads", "terminated"])
def test_a_client_that_goes_away(served, end):
    with cgi(served.address, "/stream") as process:
        process.stdout.read(10)
        if end == "nobody reads":
            process.stdout.close()
        else:
            process.send_signal(signal.SIGTERM)
        eventually(lambda: served.app.disconnects == 1 and not served.app.running)
        assert process.wait(5) == (1 if end == "nobody reads" else -signal.SIGTERM)


def test_a_client_that_goes_away_before_the_answer(served):
    with cgi(served.address, "/echo", CONTENT_LENGTH="100") as process:
        eventually(lambda: served.app.running == 1)
        process.stdout.close()
        eventually(lambda: served.app.disconnects == 1)
        assert process.wait(5) == 1


def test_a_slow_client_is_waited_for(served):
    with cgi(served.address, "/flood") as process:
        first = process.stdout.read(10)
        time.sleep(0.3)
        assert served.app.flooded < 50
        assert len(head_and_body(first + process.stdout.read())[1]) == 1000 * 65536
        assert process.wait(5) == 0


def test_a_response_that_breaks_off(served):
    with cgi(served.address, "/broken") as process:
        output, errors = process.communicate()
        assert output.endswith(b"half")
        assert b"closed the connection" in errors
        assert process.returncode == 1


def test_no_server(tmp_path):
    with cgi(f"unix:{tmp_path}/none.sock", "/echo") as process:
        output, errors = process.communicate(b"")
        assert process.returncode == 0
    headers, body = head_and_body(output)
    assert (headers["Status"], headers["Retry-After"]) == ("503", "1")
    assert json.loads(body)["error"]["code"] == 503
    assert b"no FastCGI server" in errors


@pytest.mark.parametrize(
    "answer", [b"", b"nonsense", fcgi.end_request(1, fcgi.OVERLOADED), fcgi.record(fcgi.END_REQUEST, 1, b"short")]
)
def test_a_server_that_gives_no_answer(tmp_path, answer):
    path = tmp_path / "fastcgi.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with cgi(f"unix:{path}", "/echo") as process:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            output, errors = process.communicate()
            connection.close()
    headers, body = head_and_body(output)
    assert headers["Status"] == "502"
    assert json.loads(body)["error"]["code"] == 502
    assert errors.startswith(b"qwen-fast: error: ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "usage: qwen-fast cgi"),
        (["--connect"], "usage: qwen-fast cgi"),
        (["--connect", "a", "b"], "usage: qwen-fast cgi"),
        (["--connect", "192.0.2.1:9000"], "not of this machine"),
        (["--connect=unix:"], "names no socket"),
    ],
)
def test_wrong_arguments(arguments, message):
    run = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert run.returncode == 2
    assert message in run.stderr
    assert run.stdout == ""


def test_both_commands(served):
    for command in (COMMAND, [sys.executable, "-m", "qwen_fast", "cgi"]):
        run = subprocess.run(
            [*command, "--connect", served.address],
            env=environment("/echo"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=20,
            check=True,
        )
        assert run.stdout.startswith(b"Status: 200\r\n")


def test_the_example_script(served, tmp_path):
    """examples/qwen.cgi, with the places of this test; what the web server makes of a query string does no harm."""
    script = tmp_path / "qwen.cgi"
    places = {
        "/opt/qwen-fast/bin/qwen-fast": f"{sys.executable} -m qwen_fast",
        "unix:/run/qwen-fast/8000/fastcgi.sock": served.address,
    }
    script.write_text(replaced((EXAMPLES / "qwen.cgi").read_text(), places))
    script.chmod(0o755)
    run = subprocess.run(
        [script, "--connect", "unix:/elsewhere"],
        env=environment("/echo"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=20,
        check=True,
    )
    assert run.stdout.startswith(b"Status: 200\r\n")


def test_it_starts_light():
    """Every request pays for the imports."""
    code = "import sys; before = set(sys.modules); import qwen_fast.server.cgi; print(*set(sys.modules) - before)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    others = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"qwen_fast"}
    assert not others
    assert not {"asyncio", "json", "argparse", "ssl", "http"} & set(modules)
    assert [name for name in modules if name.startswith("qwen_fast.")] and "qwen_fast._engine" not in modules
