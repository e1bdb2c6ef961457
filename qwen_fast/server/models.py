"""GET /v1/models, /health, /ready, /ping, /version, /load; POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from .. import __version__
from .chat import messages_of
from .errors import ApiError
from .http_io import CONTEXT, Message, Receive, Send, send_json
from .intake import body_of, check_model, require_ready, validated
from .protocol import DetokenizeRequest, TokenizeRequest
from .state import Server
from .text import dumped_in_pieces

_QUICK_BYTES = 4096  # of a body; larger ones are answered in a thread


def model_cards(server: Server) -> dict[str, Any]:
    """The body of GET /v1/models."""
    return {"object": "list", "data": [model_card(server, name) for name in server.model_names]}


def model_card(server: Server, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": server.started,
        "owned_by": "qwen_fast",
        "root": server.config.model,
        "parent": None,
        "max_model_len": server.llm.max_model_len,
        "permission": [],
    }


class Endpoint:
    """An ASGI application with a Server."""

    def __init__(self, server: Server) -> None:
        self.server = server


class Models(Endpoint):
    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await send_json(send, 200, model_cards(self.server))


class Model(Endpoint):
    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["model"]
        check_model(self.server, name)
        await send_json(send, 200, model_card(self.server, name))


class Health(Endpoint):
    """200 while the engine lives: whoever restarts dead processes asks here."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        dead = self.server.dead
        if dead:
            raise ApiError(503, dead, code="engine_error")
        await send_json(send, 200, {"status": "ok"})


class Ready(Endpoint):
    """200 while requests are taken: whoever spreads them over servers asks here."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        require_ready(self.server)
        await send_json(send, 200, {"status": "ready"})


class Version(Endpoint):
    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await send_json(send, 200, {"version": __version__})


class Load(Endpoint):
    """Requests that this process is answering."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await send_json(send, 200, {"server_load": len(self.server.in_flight)})


class Tokenize(Endpoint):
    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        server, principal = self.server, scope[CONTEXT].principal
        async with body_of(server, scope, receive) as body, server.admission.slot(principal, 0):
            await send_json(send, 200, await server.workers.run_if(len(body) > _QUICK_BYTES, self._answer, body))

    def _answer(self, body: bytes) -> bytes:
        server, llm = self.server, self.server.llm
        limits = server.config.limits
        request = validated(server, TokenizeRequest, body)
        ids = self._ids(request)
        _check_count("the text", len(ids), limits.prompt_token_ids)
        response: dict[str, Any] = {"count": len(ids), "max_model_len": llm.max_model_len, "tokens": ids}
        if request.return_token_strs:
            _check_count("return_token_strs: the text", len(ids), limits.token_strs)
            response["token_strs"] = [llm.decode(token_id) for token_id in ids]
        return dumped_in_pieces(response).encode()

    def _ids(self, request: TokenizeRequest) -> list[int]:
        llm = self.server.llm
        if request.prompt is not None:
            return llm.encode(request.prompt)
        tools = [tool.model_dump(exclude_unset=True) for tool in request.tools or ()] or None
        _, ids = llm.apply_chat_template(
            messages_of(request.messages or []),
            tools,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=bool(request.continue_final_message),
            split_special_tokens=not self.server.config.parse_special_tokens,
        )
        return ids


def _check_count(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise ApiError(400, f"{what} has {count} tokens; the limit is {limit}")


class Detokenize(Endpoint):
    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        server, principal = self.server, scope[CONTEXT].principal
        async with body_of(server, scope, receive) as body, server.admission.slot(principal, 0):
            await send_json(send, 200, await server.workers.run_if(len(body) > _QUICK_BYTES, self._answer, body))

    def _answer(self, body: bytes) -> bytes:
        llm, ids = self.server.llm, validated(self.server, DetokenizeRequest, body).tokens
        for i, token_id in enumerate(ids):
            if token_id >= llm.vocab_size:
                message = f"tokens.{i}: token id {token_id} is not below the vocabulary's {llm.vocab_size}"
                raise ApiError(400, message, param=f"tokens.{i}")
        return dumped_in_pieces({"prompt": llm.decode(ids)}).encode()
