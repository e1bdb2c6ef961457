"""A server on the demo model whose engine fails or hangs when it gets SIGUSR1. Prints its port when it is loaded.

    python failing_server.py fail|hang|stall [seconds of the watchdog]

fail: what an engine does that reports an error: every request ends with it, and the stats say so. hang: no step ends any
more, and closing the engine never returns. stall: as hang, and the event loop is stuck too.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from typing import Any

from backends import free_port

from qwen_fast import AsyncLLM
from qwen_fast.errors import EngineError
from qwen_fast.server import ServerConfig
from qwen_fast.server.serve import run


class FailingLLM(AsyncLLM):
    mode = ""

    def _loaded(self) -> None:
        super()._loaded()
        self.broken = threading.Event()
        self.last_stats: dict[str, Any] = {}

    def break_down(self, *args: Any) -> None:
        self.last_stats = {**super().stats(), "num_running": 1}
        self.broken.set()
        if self.mode == "stall":
            time.sleep(60)

    def stats(self) -> dict[str, Any]:
        if not self.broken.is_set():
            return super().stats()
        return {**super().stats(), "failed": True} if self.mode == "fail" else self.last_stats

    async def stream(self, *args: Any, **options: Any) -> Any:
        async for output in super().stream(*args, **options):
            if self.broken.is_set():
                if self.mode == "fail":
                    raise EngineError("the device was lost")
                await asyncio.sleep(3600)
            yield output

    def close(self) -> None:
        if self.broken.is_set() and self.mode != "fail":
            time.sleep(3600)
        super().close()


def main() -> int:
    FailingLLM.mode = sys.argv[1]
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    llm = FailingLLM("demo", device="cpu", num_threads=1)
    signal.signal(signal.SIGUSR1, llm.break_down)
    port = free_port()
    print(port, flush=True)
    return run(llm, ServerConfig(port=port, watchdog_seconds=seconds))


if __name__ == "__main__":
    sys.exit(main())
