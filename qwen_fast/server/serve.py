"""The command `qwen-fast serve`: loads the model, listens, and ends in order."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .arguments import model_options, server_config
from .config import ServerConfig

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM

_COLLECT_AFTER = 10_000  # objects made and not freed: Python's 700 are those of two requests
_NEEDED = ("fastapi", "prometheus_client", "uvicorn")


def run_serve(args: argparse.Namespace, around: Callable[[Any], Any] | None = None) -> int:
    """Runs until a signal ends it. The exit code is 0 after an orderly end, 1 where the engine failed. around: puts an
    application of its own around create_app()'s."""
    require_extra()
    config = server_config(args)
    from ..async_llm import AsyncLLM
    from ..cli import engine_arguments
    from .auth import keys_of

    keys_of(config)  # a mistake there is told before the model is loaded
    llm = AsyncLLM(args.model, **engine_arguments(args), **model_options(args))
    if args.override_generation_config:
        llm.override_generation_config(args.override_generation_config)
    if not llm.has_chat_template:
        print(f"qwen-fast: {args.model} has no chat template: chat needs --chat-template", file=sys.stderr)
    return run(llm, config, around)


def require_extra() -> None:
    """ModuleNotFoundError that says what to install."""
    from importlib.util import find_spec

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{' and '.join(missing)} missing: the server needs `pip install qwen_fast[server]`")


def run(llm: AsyncLLM, config: ServerConfig, around: Callable[[Any], Any] | None = None) -> int:
    """Serves a loaded model until the process is told to stop, closes it, and returns the exit code. For the main thread
    of a process of its own: it handles signals, and ends the process where the engine hangs."""
    from .connections import raise_file_limit
    from .lifecycle import end_now

    raise_file_limit(config.limits)
    try:
        code, hung = asyncio.run(_serve(llm, config, around or (lambda app: app)))
        if hung:  # closing would wait for the step that hangs
            end_now(code)
        return code
    finally:
        llm.close()


async def _serve(llm: AsyncLLM, config: ServerConfig, around: Callable[[Any], Any]) -> tuple[int, bool]:
    """The exit code, and whether the engine hangs."""
    from .app import create_app
    from .lifecycle import Lifecycle
    from .listeners import Listeners

    with plug_ins(llm, config) as parts:
        app = create_app(llm, config, **parts)
        settings = uvicorn_config(around(app), config, _logging(config))
        lifecycle = Lifecycle(app.state.server, Listeners(settings, config))
        _announce(llm, config)
        gc.collect()
        gc.freeze()  # what is loaded stays: a collection does not walk over it again while requests wait
        gc.set_threshold(_COLLECT_AFTER)
        return await lifecycle.run(), lifecycle.hung


@contextlib.contextmanager
def plug_ins(llm: AsyncLLM, config: ServerConfig) -> Iterator[dict[str, Any]]:
    """What create_app() takes beside llm and config, as the configuration says; closed at the end."""
    from .admission import QueueAdmission
    from .audit import AuditLog
    from .auth import keys_of
    from .metrics import PrometheusMetrics

    keys = keys_of(config)
    limits = keys.limits if keys is not None else {}
    admission = QueueAdmission(config.max_num_queued_reqs, config.max_num_queued_tokens, limits)
    parts: dict[str, Any] = {"auth": keys, "admission": admission}
    parts["metrics"] = PrometheusMetrics(llm, config.model_names[0])
    with contextlib.ExitStack() as stack:
        if config.audit_log is not None:
            parts["audit"] = stack.enter_context(contextlib.closing(AuditLog(config.audit_log)))
        if config.otlp_traces_endpoint is not None:
            from .tracing import OTLPTracer

            parts["tracer"] = stack.enter_context(contextlib.closing(OTLPTracer(config.otlp_traces_endpoint)))
        yield parts


def uvicorn_config(app: Any, config: ServerConfig, log_config: dict[str, Any] | None = None) -> Any:
    """uvicorn's settings. h11 parses: it bounds the size of what it has not understood yet. How many connections there
    are and how long they wait is our own concern: uvicorn would count strangers' with those of admitted requests.

    log_config: for logging.config.dictConfig; None: logging stays as it is.
    """
    import uvicorn

    from .connections import connection_class

    return uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        uds=config.uds,
        http=connection_class(config.limits),
        ws="none",
        lifespan="on",
        log_level=config.log_level,
        log_config=log_config,
        access_log=config.access_log,
        server_header=False,
        date_header=True,
        root_path=config.root_path,
        h11_max_incomplete_event_size=config.limits.header_bytes,
        timeout_graceful_shutdown=max(1, round(config.shutdown_timeout)),
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=config.ssl_cert_reqs,
    )


def _logging(config: ServerConfig) -> dict[str, Any]:
    """uvicorn's, and our own lines in its form, to standard error."""
    from uvicorn.config import LOGGING_CONFIG

    own = {"handlers": ["default"], "level": config.log_level.upper().replace("TRACE", "DEBUG"), "propagate": False}
    return {**LOGGING_CONFIG, "loggers": {**LOGGING_CONFIG["loggers"], "qwen_fast": own}}


def _announce(llm: Any, config: ServerConfig) -> None:
    log = logging.getLogger("qwen_fast.server")
    http = config.uds or f"{'https' if config.ssl_certfile else 'http'}://{config.host}:{config.port}"
    where = f"{config.fastcgi} (FastCGI)" if config.fastcgi_only else http
    log.info("serving %r as %s at %s", llm, ", ".join(config.model_names), where)
