"""The page as an ASGI application: inside a server's, or alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

from .asgi_transport import StreamingASGITransport
from .chats import Chats
from .client import Backend
from .config import UiConfig
from .guard import Guard, Message, Receive, Send, is_loopback
from .history import HistoryStore

PREFIX = "/ui"


class PageApp:
    """One ASGI application: the page under /ui, and `rest` for all else; without `rest`, / leads to the page. Its
    lifespan opens and closes both, the backend and the store. local: see Guard."""

    def __init__(
        self,
        config: UiConfig,
        store: HistoryStore,
        backend: Backend,
        closing: Callable[[], bool],
        rest: Any = None,
        local: bool = False,
    ) -> None:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing is reported
        import gradio
        from fastapi import FastAPI

        from .page import Page
        from .style import CSS, HEAD, theme

        self.chats = Chats(store, backend, config)
        self._rest = rest
        gradio_app = gradio.mount_gradio_app(
            FastAPI(openapi_url=None),
            Page(self.chats, config).blocks,
            PREFIX,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            show_error=False,
            max_file_size=1,
            theme=theme(),
            css=CSS,
            head=HEAD,
        )
        self._opened = gradio_app.router.lifespan_context
        self._gradio = gradio_app
        self._guard = Guard(gradio_app, PREFIX, config.connections, closing, local)
        if rest is not None:
            inner = rest.router.lifespan_context

            @contextlib.asynccontextmanager
            async def both(app: Any) -> AsyncIterator[Any]:
                async with inner(app) as state, self._lifespan():
                    yield state

            rest.router.lifespan_context = both
        else:
            gradio_app.router.lifespan_context = self._alone

    @contextlib.asynccontextmanager
    async def _lifespan(self) -> AsyncIterator[None]:
        try:
            async with self._opened(self._gradio):
                yield
        finally:
            await self.chats.backend.aclose()
            self.chats.store.close()

    @contextlib.asynccontextmanager
    async def _alone(self, app: Any) -> AsyncIterator[None]:
        async with self._lifespan():
            yield

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await (self._rest or self._gradio)(scope, receive, send)
            return
        path, root = scope.get("path", ""), scope.get("root_path", "").rstrip("/")
        inner = path[len(root) :] if root and path.startswith(root + "/") else path
        if self._rest is None and inner in ("", "/"):
            there = f"{PREFIX[1:]}/".encode()
            await send({"type": "http.response.start", "status": 307, "headers": [(b"location", there)]})
            await send({"type": "http.response.body", "body": b""})
        elif self._rest is None or inner == PREFIX or inner.startswith(PREFIX + "/"):
            await self._guard(scope, receive, send)
        else:
            await self._rest(scope, receive, send)


def beside(api: Any, config: UiConfig, store: HistoryStore) -> PageApp:
    """The page beside a server's application (create_app()), which it talks to without a socket."""
    server = api.state.server
    backend = Backend("http://127.0.0.1/v1", config.api_key, StreamingASGITransport(api))
    bound = server.config
    local = is_loopback(bound.host) and not (bound.uds or bound.api_key or bound.api_key_file)
    return PageApp(config, store, backend, lambda: not server.ready and not server.in_flight, api, local)
