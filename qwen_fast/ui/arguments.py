"""The options of the page; importable without the extra [ui]."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from .config import LANGUAGES, HistoryLimits, UiConfig

PORT = 7860  # of `qwen-fast ui`
_HELP = {
    "conversations": "conversations of one browser",
    "messages": "messages of one conversation",
    "message_bytes": "bytes of one message",
    "conversation_bytes": "bytes of one conversation",
    "title_chars": "characters of a title",
    "file_bytes": "bytes of the SQLite file",
}
# What `ui --url` takes of the server's options, and those of every command.
_WITH_URL = frozenset(
    {"host", "port", "api_key", "root_path", "ssl_keyfile", "ssl_certfile", "log_level", "debug", "run"}
)


def add_page(parser: argparse.ArgumentParser) -> None:
    """For `serve` and `ui`."""
    group = parser.add_argument_group("chat page")
    group.add_argument("--lang", choices=LANGUAGES, default="auto", help="auto (as the browser asks), en, zh")
    group.add_argument(
        "--history",
        metavar="WHERE",
        help="SQLite file for conversations (default: in the user's data directory), or redis://HOST/DB for replicas",
    )
    for entry in dataclasses.fields(HistoryLimits):
        option = f"--history-{entry.name.replace('_', '-')}"
        text = f"{_HELP[entry.name]} (default {entry.default})"
        group.add_argument(option, type=int, metavar="N", dest=f"history_{entry.name}", help=text)
    group.add_argument("--ui-streams", type=int, metavar="N", help="answers written at once (default 64)")


def add_url(parser: argparse.ArgumentParser) -> None:
    """For `ui` alone."""
    parser.add_argument(
        "--url", metavar="URL", help="a server with OpenAI's API, such as http://host:8000/v1, in place of MODEL"
    )
    parser.set_defaults(parser=parser)


def ui_config(args: argparse.Namespace, **more: Any) -> UiConfig:
    """ValueError or TypeError name a value that is out of range."""
    limits = {
        entry.name: value
        for entry in dataclasses.fields(HistoryLimits)
        if (value := getattr(args, f"history_{entry.name}")) is not None
    }
    values: dict[str, Any] = {"lang": args.lang, "history": args.history or "", "limits": HistoryLimits(**limits)}
    if args.ui_streams is not None:
        values["streams"] = args.ui_streams
    return UiConfig(**values, **more)


def refuse_unused(args: argparse.Namespace) -> None:
    """ValueError for an option of the server or the engine that was given beside --url, where there is neither."""
    given = vars(args)
    for action in args.parser._actions:
        name = action.dest
        page = name in ("lang", "history", "ui_streams", "url", "help") or name.startswith("history_")
        if page or name in _WITH_URL or given.get(name) == action.default:
            continue
        shown = action.option_strings[0] if action.option_strings else action.metavar
        raise ValueError(f"{shown} is about a server of this process; with --url there is none")
