"""Clients in a process of their own: python load_clients.py PORT COUNT SAMPLES PAUSE.

Each streams completions of SAMPLES samples, one after the other; after a 429 it waits PAUSE seconds and asks again. SIGTERM
ends it, with what came as one JSON object on standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time

STREAM = {"prompt": "Once upon a time", "temperature": 1.0, "ignore_eos": True, "stream": True}


class Clients:
    def __init__(self, port: int, samples: int, pause: float) -> None:
        self.port, self.samples, self.pause = port, samples, pause
        self.streamed = self.others = self.events = 0
        self.refusals: list[float] = []  # seconds from the request to the 429
        self.without_retry_after = 0

    async def run(self, number: int) -> None:
        chance = random.Random(number)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        while True:
            own = {"n": self.samples, "max_tokens": chance.randrange(100, 400), "seed": chance.randrange(2**31)}
            body = json.dumps({**STREAM, **own}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            began = time.perf_counter()
            writer.write(head.encode() + body)
            head_lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
            status = int(head_lines[0].split()[1])
            if status == 200:
                while (await reader.readuntil(b"\n")) != b"data: [DONE]\n":
                    self.events += 1
                await reader.readuntil(b"0\r\n\r\n")
                self.streamed += 1
                continue
            fields = dict(line.split(b": ", 1) for line in head_lines[1:] if line)
            await reader.readexactly(int(fields[b"content-length"]))
            if status != 429:
                self.others += 1
                continue
            self.refusals.append(time.perf_counter() - began)
            self.without_retry_after += b"retry-after" not in fields
            await asyncio.sleep(self.pause * chance.uniform(0.5, 1.5))


async def main(port: int, count: int, samples: int, pause: float) -> None:
    clients = Clients(port, samples, pause)
    running = asyncio.gather(*(clients.run(number + 1000 * os.getpid()) for number in range(count)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await running
    refusals = sorted(clients.refusals) or [0.0]
    said = {"streamed": clients.streamed, "others": clients.others, "refused": len(clients.refusals)}
    said["without_retry_after"] = clients.without_retry_after
    said |= {f"p{share}_ms": 1e3 * refusals[len(refusals) * share // 100] for share in (50, 99)}
    print(json.dumps(said))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
