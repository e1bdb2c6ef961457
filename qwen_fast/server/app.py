"""create_app(llm, config): the ASGI application with all routes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from .. import __version__
from ..async_llm import AsyncLLM
from . import models, openapi
from .chat import ChatEndpoint
from .completions import CompletionEndpoint
from .config import ServerConfig
from .errors import ApiError, shortened
from .forms import Forms
from .gate import Gate
from .state import Server


def create_app(llm: AsyncLLM, config: ServerConfig | None = None, **plug_ins: Any) -> FastAPI:
    """The application for a loaded model; its `state.server` is the Server.

    plug_ins: auth, admission, audit, metrics, tracer, forms: see Server. Without forms: structured output and tool
    calls as the configuration says.
    """
    config = config or ServerConfig(model=llm.model)
    forms = plug_ins.pop("forms", None) or Forms(llm, config.tool_call_parser)
    return app_of(Server(llm, config, forms=forms, **plug_ins))


def app_of(server: Server) -> FastAPI:
    """The application around an existing Server."""
    config = server.config
    document = None if config.disable_fastapi_docs else "/openapi.json"
    # FastAPI's own telemetry asks, for each request, whether it is on; traces and metrics are ours.
    off: Any = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPI(title="qwen_fast", version=__version__, openapi_url=document, telemetry=off)
    app.state.server = server
    app.openapi = openapi.document  # type: ignore[method-assign]
    app.router.routes[:0] = routes(server)  # before FastAPI's own: they are tried in order
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_middleware(Gate, server=server)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
            expose_headers=["x-request-id"],
        )
    return app


def routes(server: Server) -> list[Route]:
    """Plain ASGI applications: between them and the socket nothing looks at a streamed token. /metrics is there where
    the server has metrics with a page."""
    pages: list[Route] = []
    if hasattr(server.metrics, "page"):
        from .metrics import MetricsPage

        pages.append(Route("/metrics", MetricsPage(server.metrics.page), methods=["GET"]))
    return [
        Route("/v1/chat/completions", ChatEndpoint(server), methods=["POST"]),
        Route("/v1/completions", CompletionEndpoint(server), methods=["POST"]),
        *pages,
        Route("/v1/models", models.Models(server), methods=["GET"]),
        Route("/v1/models/{model:path}", models.Model(server), methods=["GET"]),
        Route("/tokenize", models.Tokenize(server), methods=["POST"]),
        Route("/detokenize", models.Detokenize(server), methods=["POST"]),
        Route("/health", models.Health(server), methods=["GET"]),
        Route("/ready", models.Ready(server), methods=["GET"]),
        Route("/ping", models.Health(server), methods=["GET", "POST"]),
        Route("/version", models.Version(server), methods=["GET"]),
        Route("/load", models.Load(server), methods=["GET"]),
    ]


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    """What the router refuses, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    path = ascii(shortened(request.url.path)).strip("'")
    said = {404: f"no such route: {path}", 405: f"{path} does not take {shortened(request.method)}"}
    shown = ApiError(error.status_code, said.get(error.status_code, error.detail))
    return JSONResponse(shown.body(), shown.status, dict(error.headers or {}))
