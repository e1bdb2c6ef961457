"""`qwen-fast ui MODEL` and `qwen-fast ui --url` as processes."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(port: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "qwen_fast", "ui", "--port", str(port), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        try:
            while True:
                assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}/ui/", timeout=30).status_code == 200:
                        break
                time.sleep(0.1)
            yield process
        finally:
            process.kill()


@pytest.mark.long
def test_both_ways_serve_the_page_and_end_in_order(tmp_path):
    first, second = free_port(), free_port()
    history = ["--history", str(tmp_path / "h.sqlite3")]
    with running(first, "demo", "--device", "cpu", "--api-key", "k", *history) as serving:
        url = f"http://127.0.0.1:{first}/v1"
        with running(second, "--url", url, "--api-key", "k", *history) as alone:
            assert httpx.get(f"{url}/models").status_code == 401  # the API keeps its key, the page is open
            to = httpx.get(f"http://127.0.0.1:{second}/")
            assert (to.status_code, to.headers["location"]) == (307, "ui/")
            assert httpx.get(f"http://127.0.0.1:{second}/v1/models").status_code == 404
            for process in (alone, serving):
                process.send_signal(signal.SIGTERM)
                _, said = process.communicate(timeout=60)
                assert process.returncode == 0 and b"Traceback" not in said, said
                assert b"the chat page is at http://127.0.0.1:" in said and b"h.sqlite3" in said
