"""The OpenAI-compatible server behind `qwen-fast serve`. Needs the extra: pip install qwen_fast[server].

create_app(llm, config) gives the ASGI application, run_serve(args) is the command. Importing this package costs nothing;
FastAPI and uvicorn are imported when one of the two is first used.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ServerConfig", "create_app", "run_serve"]

_HOME = {"ServerConfig": "config", "create_app": "app", "run_serve": "serve"}


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{module}", __name__), name)
