"""The native engine, or an ImportError that says why it is not there and what to do."""

from __future__ import annotations

from pathlib import Path


def _advice(error: ImportError) -> str:
    from importlib.util import find_spec

    folder = Path(__file__).resolve().parent
    if find_spec(f"{__package__}._engine") is not None:
        return f"the native engine in {folder} cannot be loaded: {error}; build it again with `pip install`"
    if (folder.parent / "setup.py").is_file():
        return (
            f"the native engine is not built in this folder, {folder.parent}: build it there with `pip install -e .` "
            "(it needs a C compiler), or leave the source folder so that Python finds an installed qwen_fast"
        )
    return f"the native engine is not built: {folder} holds no qwen_fast._engine; install qwen_fast again"


try:
    from . import _engine
except ImportError as error:
    raise ImportError(_advice(error), name=f"{__package__}._engine") from error

__all__ = ["_engine"]
