"""Conversations that are kept: what they are, their limits, and where they can be.

A history belongs to an owner: the SHA-256 of a random token that only one browser has (its cookie). Every method of a
store takes the owner, and finds nothing of another one's.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
import unicodedata
from dataclasses import dataclass, field
from typing import Any, Protocol

from .config import HistoryLimits
from .texts import Refusal

_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")  # 256 bits in base 64
_ID = re.compile(r"[0-9a-f]{32}")
_MAX_PREFERENCES_BYTES = 4096


def new_token() -> str:
    """For a browser's cookie: 256 random bits."""
    return secrets.token_urlsafe(32)


def owner_of(token: str | None) -> str:
    """The owner that a cookie stands for; stores never see the cookie. Refusal where it is none of ours."""
    if token is None or not _TOKEN.fullmatch(token):
        raise Refusal("no_cookie")
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass
class Conversation:
    """messages: see messages.py. settings: what the form held when it was last saved. created, updated: Unix times,
    seconds. revision: counts the saves; 0: never saved."""

    title: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: float = field(default_factory=time.time)
    updated: float = 0.0
    revision: int = 0


@dataclass(frozen=True)
class Entry:
    """A conversation in a list."""

    id: str
    title: str
    updated: float


class HistoryStore(Protocol):
    """Safe to call from several threads, and several processes. Refusal for what a user may be told; every other
    exception of a store is turned into Refusal("history_failed")."""

    def entries(self, owner: str) -> list[Entry]:
        """Last changed first."""
        ...

    def get(self, owner: str, id: str) -> Conversation | None: ...

    def save(self, owner: str, conversation: Conversation) -> None:
        """Creates it (revision 0) or replaces messages and settings, and counts the revision on. The title is taken at
        creation only. Refusal "changed_elsewhere" where another has saved since it was read, "conversation_gone" where
        it was deleted."""
        ...

    def rename(self, owner: str, id: str, title: str) -> None: ...

    def delete(self, owner: str, id: str) -> None:
        """Nothing happens where it is not there."""
        ...

    def preferences(self, owner: str) -> dict[str, Any]: ...

    def set_preferences(self, owner: str, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_store(where: str, limits: HistoryLimits) -> HistoryStore:
    """A Redis for redis://, rediss:// and unix://, else an SQLite file. ValueError where it cannot be used."""
    if where.startswith(("redis://", "rediss://", "unix://")):
        from .history_redis import RedisHistory

        return RedisHistory(where, limits)
    from .history_sqlite import SQLiteHistory

    return SQLiteHistory(where, limits)


def is_id(text: object) -> bool:
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def clean_title(text: str, limit: int) -> str:
    """One line without control, formatting (right-to-left overrides among them) and surrogate characters, of at most
    `limit` characters; may be empty."""
    spaced = " ".join(text[: 16 * limit].split())
    plain = "".join(one for one in spaced if unicodedata.category(one) not in ("Cc", "Cf", "Cs", "Co"))
    return plain if len(plain) <= limit else plain[: limit - 1].rstrip() + "…"


def document(conversation: Conversation, limits: HistoryLimits) -> str:
    """Messages and settings as JSON in ASCII, within the limits."""
    count = len(conversation.messages)
    if count > limits.messages:
        raise Refusal("too_many_messages", count=count, limit=limits.messages)
    for message in conversation.messages:
        size = message_bytes(message)
        if size > limits.message_bytes:
            raise Refusal("message_too_long", size=size, limit=limits.message_bytes)
    whole = json.dumps({"messages": conversation.messages, "settings": conversation.settings}, allow_nan=False)
    if len(whole) > limits.conversation_bytes:
        raise Refusal("conversation_too_long", size=len(whole), limit=limits.conversation_bytes)
    return whole


def message_bytes(message: dict[str, Any]) -> int:
    """UTF-8 bytes of a message's texts."""
    calls = message.get("tool_calls") or ()
    return utf8_bytes(message.get("content") or "") + sum(utf8_bytes(str(call)) for call in calls)


def utf8_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def preferences_document(values: dict[str, Any]) -> str:
    whole = json.dumps(values, allow_nan=False)
    if len(whole) > _MAX_PREFERENCES_BYTES:
        raise ValueError(f"preferences have {len(whole)} bytes; the limit is {_MAX_PREFERENCES_BYTES}")
    return whole
