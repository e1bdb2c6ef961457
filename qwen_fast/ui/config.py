"""The options of the page, with their defaults and ranges."""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass, field, fields

LANGUAGES = ("auto", "en", "zh")


def _number(default: int, low: int, high: int) -> int:
    value: int = field(default=default, metadata={"range": (low, high)})
    return value


@dataclass(frozen=True)
class HistoryLimits:
    """What is kept. Values outside the ranges given here raise ValueError.

    conversations: of one browser. messages: of one conversation. message_bytes: UTF-8 bytes of one message, typed or
    answered. conversation_bytes: of one conversation as JSON. title_chars: of a title. file_bytes: of the SQLite file.
    """

    conversations: int = _number(200, 1, 100_000)
    messages: int = _number(400, 2, 100_000)
    message_bytes: int = _number(256 * 1024, 1024, 2**26)
    conversation_bytes: int = _number(2 * 2**20, 4096, 2**28)
    title_chars: int = _number(120, 8, 1000)
    file_bytes: int = _number(2**30, 2**20, 2**40)

    def __post_init__(self) -> None:
        _check_ranges(self)


@dataclass(frozen=True)
class UiConfig:
    """lang: "auto" (what the browser asks for), "en" or "zh". history: an SQLite file, ":memory:", or redis://, rediss://
    or unix:// for Redis. model: the name to ask for; None: the first that the server lists. api_key: sent with every
    request to the server; None: each visitor may type a key of their own. streams: answers at once. connections: open
    at once.
    """

    lang: str = "auto"
    history: str = ""
    model: str | None = None
    api_key: str | None = None
    streams: int = _number(64, 1, 4096)
    connections: int = _number(512, 8, 65536)
    limits: HistoryLimits = field(default_factory=HistoryLimits)

    def __post_init__(self) -> None:
        _check_ranges(self)
        if self.lang not in LANGUAGES:
            raise ValueError(f"lang must be auto, en or zh, got {self.lang!r}")
        if not self.history:
            object.__setattr__(self, "history", str(default_history()))


def default_history() -> pathlib.Path:
    """ui.sqlite3 in the user's data directory."""
    base = os.environ.get("XDG_DATA_HOME", "")
    folder = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".local" / "share"
    return folder / "qwen_fast" / "ui.sqlite3"


def _check_ranges(config: HistoryLimits | UiConfig) -> None:
    for entry in fields(config):
        if "range" not in entry.metadata:
            continue
        value = getattr(config, entry.name)
        low, high = entry.metadata["range"]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{entry.name} must be an integer, got {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{entry.name} must be from {low} to {high}, got {value}")
