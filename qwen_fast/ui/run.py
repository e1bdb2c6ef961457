"""The commands `qwen-fast ui` and `qwen-fast serve --ui`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .arguments import PORT, refuse_unused, ui_config
from .client import Backend
from .config import UiConfig
from .history import HistoryStore, open_store

if TYPE_CHECKING:
    from .mount import PageApp

_LAST_WORDS_S = 2


def require_extra() -> None:
    """ModuleNotFoundError that says what to install."""
    from importlib.util import find_spec

    missing = [name for name in ("gradio", "httpx") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{' and '.join(missing)} missing: the page needs `pip install qwen_fast[ui]`")


def run_ui(args: argparse.Namespace) -> int:
    """A page for --url, or with a server of its own for MODEL."""
    require_extra()
    if args.port is None:
        args.port = PORT
    if args.url is None:
        args.model = args.model_name or args.model
        return run_beside(args)
    refuse_unused(args)
    keys = args.api_key or []
    if len(keys) > 1:
        raise ValueError(f"--api-key: one key is sent to the server, got {len(keys)}")
    config = ui_config(args, api_key=keys[0] if keys else None)
    backend = Backend(args.url, config.api_key)
    store = open_store(config.history, config.limits)
    return asyncio.run(_serve_page(args, config, store, backend))


def run_beside(args: argparse.Namespace) -> int:
    """A server with the page at /ui."""
    require_extra()
    from ..server.serve import run_serve
    from .mount import beside

    config = ui_config(args)
    store = open_store(config.history, config.limits)

    def around(api: Any) -> PageApp:
        server = api.state.server.config
        if not server.uds and not server.fastcgi_only:
            scheme = "https" if server.ssl_certfile else "http"
            _announce(scheme, server.host, server.port, config)
        return beside(api, config, store)

    return run_serve(args, around)


async def _serve_page(args: argparse.Namespace, config: UiConfig, store: HistoryStore, backend: Backend) -> int:
    import uvicorn

    from ..server.config import Limits
    from ..server.connections import connection_class, raise_file_limit
    from .guard import is_loopback
    from .mount import PageApp

    limits = Limits()
    raise_file_limit(limits)
    closing: Callable[[], bool] = lambda: server.should_exit
    host = args.host or "127.0.0.1"
    server = uvicorn.Server(
        uvicorn.Config(
            PageApp(config, store, backend, closing, local=is_loopback(host)),
            host=host,
            port=args.port,
            http=connection_class(limits),
            h11_max_incomplete_event_size=limits.header_bytes,
            root_path=args.root_path or "",
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            log_level=args.log_level or "warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=_LAST_WORDS_S,
        )
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]  # which raises them again

    def stop() -> None:
        server.force_exit = server.should_exit  # at the second signal
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    _announce("https" if args.ssl_certfile else "http", host, args.port, config)
    await server.serve()
    return 0 if server.started else 1


def _announce(scheme: str, host: str, port: int, config: UiConfig) -> None:
    where = f"{scheme}://{host}:{port or '(any free port)'}/ui/"
    shown = config.history if "://" not in config.history else config.history.partition("://")[0] + "://"
    print(f"qwen-fast: the chat page is at {where}; conversations are kept in {shown}", file=sys.stderr, flush=True)
