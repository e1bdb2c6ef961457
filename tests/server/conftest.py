"""One server on the demo model for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from server_helpers import Serving, serving

from qwen_fast import AsyncLLM
from qwen_fast.server import ServerConfig


@pytest.fixture(scope="session")
def demo() -> Iterator[AsyncLLM]:
    llm = AsyncLLM("demo", device="cpu", num_threads=1)
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def served(demo: AsyncLLM) -> Iterator[Serving]:
    """The demo model under two names, with the default limits."""
    config = ServerConfig(port=0, log_level="warning", served_model_name=("demo", "demo-too"))
    with serving(demo, config) as running:
        yield running


@pytest.fixture(scope="session")
def client(served: Serving) -> Iterator[openai.OpenAI]:
    with served.client() as one:
        yield one


@pytest.fixture(scope="session")
def http(served: Serving) -> Iterator[httpx.Client]:
    """Plain HTTP against the same server."""
    with httpx.Client(base_url=served.url, timeout=60) as one:
        yield one
