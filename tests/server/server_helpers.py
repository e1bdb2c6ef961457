"""A server on the demo model in a thread of its own, and clients for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import uvicorn

from qwen_fast import AsyncLLM
from qwen_fast.server import ServerConfig, create_app
from qwen_fast.server.serve import uvicorn_config


class Serving:
    """create_app() behind a real uvicorn. server: the Server of the app; url: without /v1."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig, **plug_ins: Any) -> None:
        app = create_app(llm, config, **plug_ins)
        self.server = app.state.server
        self.llm = llm
        settings = uvicorn_config(app, config)
        self._uvicorn = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._uvicorn.started:
            assert time.monotonic() < deadline and self._thread.is_alive(), "the server does not start"
            time.sleep(0.005)
        port = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        self.address = ("127.0.0.1", port)
        self.url = f"http://127.0.0.1:{port}"

    def _run(self) -> None:
        asyncio.run(self._uvicorn.serve())

    def close(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server does not end"

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "unused", "max_retries": 0, "timeout": 60, **options}
        )

    def idle(self, seconds: float = 5.0) -> bool:
        """Whether the engine has nothing to do any more, within so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            stats = self.llm.stats()
            if not (stats["num_running"] or stats["num_waiting"] or stats["num_paused"] or self.server.in_flight):
                return True
            time.sleep(0.005)
        return False


@contextlib.contextmanager
def serving(llm: AsyncLLM, config: ServerConfig | None = None, **plug_ins: Any) -> Iterator[Serving]:
    """A Serving on a free port, closed at the end. The model stays open."""
    running = Serving(llm, config or ServerConfig(port=0, log_level="warning"), **plug_ins)
    try:
        yield running
    finally:
        running.close()
