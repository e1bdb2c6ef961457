"""Threads for what takes long in Python: decoding bodies, tokenising, writing long answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
# Each thread that computes takes the interpreter's lock for up to 5 ms at a time: more of them would make the event loop
# wait longer, and finish nothing earlier.
_THREADS = 2


class Workers:
    """A pool of two threads, started when they are needed. What waits for them is bounded by Bodies."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="qwen_fast-worker")

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """call(*arguments) in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)

    async def run_if(self, long: bool, call: Callable[..., T], *arguments: Any) -> T:
        """In one of the threads where it takes long, else here and at once."""
        return await self.run(call, *arguments) if long else call(*arguments)
