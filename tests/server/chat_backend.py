"""A small chat server on the demo model, for tests of what stands in front of one: HTTP and FastCGI, one process.

    python chat_backend.py unix:/path/of/fastcgi.sock

Prints its HTTP port when it is ready. GET /stats is the engine's counters, /ticks
ten events 50 ms apart; any other path tells what the web server passed on.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvicorn

from qwen_fast import AsyncLLM, SamplingParams
from qwen_fast.server.fastcgi import listen


async def read_body(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client has gone")
        body, more = body + message["body"], message["more_body"]
    return body


class ChatBackend:
    def __init__(self) -> None:
        self.llm = AsyncLLM("demo")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["path"] == "/v1/chat/completions":
            await self.chat(json.loads(await read_body(receive)), receive, send)
        elif scope["path"] == "/ticks":
            await self.start(send, b"text/event-stream")
            for i in range(10):
                await send({"type": "http.response.body", "body": b"data: %d\n\n" % i, "more_body": i < 9})
                await asyncio.sleep(0.05)
        elif scope["path"] == "/stats":
            await self.answer(send, self.llm.stats())
        else:
            body = await read_body(receive)
            headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
            told = {"method": scope["method"], "path": scope["path"], "query": scope["query_string"].decode()}
            await self.answer(send, {**told, "headers": headers, "client": scope["client"], "body_bytes": len(body)})

    async def answer(self, send: Any, value: Any) -> None:
        await self.start(send, b"application/json")
        await send({"type": "http.response.body", "body": json.dumps(value).encode()})

    async def start(self, send: Any, kind: bytes) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})

    async def chat(self, request: Any, receive: Any, send: Any) -> None:
        fields = {key: request[key] for key in ("max_tokens", "seed", "ignore_eos", "temperature") if key in request}
        writing = asyncio.create_task(self.write(request["messages"], SamplingParams(**fields), send))
        gone = asyncio.create_task(receive())
        await asyncio.wait([writing, gone], return_when=asyncio.FIRST_COMPLETED)
        for task in (writing, gone):
            task.cancel()
        await asyncio.gather(writing, gone, return_exceptions=True)

    async def write(self, messages: Any, params: SamplingParams, send: Any) -> None:
        await self.start(send, b"text/event-stream")
        async for output in self.llm.chat(messages, params, stream=True):
            choice = {"index": 0, "delta": {"content": output.text}, "finish_reason": output.finish_reason}
            event = b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


class Server(uvicorn.Server):
    """uvicorn, and FastCGI beside it."""

    fastcgi_address = ""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        state = self.server_state
        fastcgi = await listen(
            self.config.loaded_app, self.fastcgi_address, connections=state.connections, tasks=state.tasks
        )
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)
        self.servers.append(fastcgi)


def main() -> None:
    (address,) = sys.argv[1:]
    server = Server(uvicorn.Config(ChatBackend(), host="127.0.0.1", port=0, log_level="warning"))
    server.fastcgi_address = address
    server.run()


if __name__ == "__main__":
    main()
