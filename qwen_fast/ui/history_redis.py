"""Conversations in a Redis, for several replicas of the page behind one address."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from typing import Any

from .config import HistoryLimits
from .history import Conversation, Entry, document, preferences_document
from .texts import Refusal

_PREFIX = "qwen_fast:ui"
_TIMEOUT_S = 10.0

# Each script sees one owner's three hashes, by conversation id: titles, heads ("revision created updated"), documents.
_SAVE = """
local head = redis.call('HGET', KEYS[2], ARGV[1])
if head then
    if string.match(head, '^%d+') ~= ARGV[2] then return -1 end
elseif ARGV[2] ~= '0' then return -2
elseif redis.call('HLEN', KEYS[2]) >= tonumber(ARGV[6]) then return -3
else redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[4])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[5])
return 0
"""
_RENAME = """
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return -2 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 0
"""
_DELETE = "for i = 1, 3 do redis.call('HDEL', KEYS[i], ARGV[1]) end return 0"
_GET = "return {redis.call('HGET', KEYS[1], ARGV[1]), redis.call('HGET', KEYS[2], ARGV[1]), redis.call('HGET', KEYS[3], ARGV[1])}"
_REFUSED = {-1: "changed_elsewhere", -2: "conversation_gone"}


class RedisHistory:
    """url: redis://, rediss:// or unix://. ValueError where there is no Redis that answers. What may be written in all is
    for the Redis itself to bound (maxmemory, with the policy noeviction)."""

    def __init__(self, url: str, limits: HistoryLimits) -> None:
        try:
            import redis
        except ModuleNotFoundError:
            raise ModuleNotFoundError("redis missing: a history there needs `pip install qwen_fast[redis]`") from None
        self._limits = limits
        self._error = redis.RedisError
        try:
            self._db: Any = redis.Redis.from_url(
                url, decode_responses=True, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S
            )
            self._db.ping()
        except (redis.RedisError, ValueError, OSError) as error:
            raise ValueError(f"history: {_without_password(url)} cannot be used: {error}") from None
        scripts = {"save": _SAVE, "rename": _RENAME, "delete": _DELETE, "get": _GET}
        self._scripts = {name: self._db.register_script(text) for name, text in scripts.items()}

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise Refusal("history_failed", reason=str(error)) from error

    def _run(self, name: str, owner: str, *arguments: Any) -> Any:
        keys = [f"{_PREFIX}:{{{owner}}}:{kind}" for kind in ("titles", "heads", "documents")]
        with self._told():
            return self._scripts[name](keys=keys, args=arguments)

    def entries(self, owner: str) -> list[Entry]:
        with self._told():
            pipe = self._db.pipeline(transaction=True)
            pipe.hgetall(f"{_PREFIX}:{{{owner}}}:titles")
            pipe.hgetall(f"{_PREFIX}:{{{owner}}}:heads")
            titles, heads = pipe.execute()
        found = [Entry(id, titles.get(id, ""), float(head.split()[2])) for id, head in heads.items()]
        return sorted(found, key=lambda entry: -entry.updated)

    def get(self, owner: str, id: str) -> Conversation | None:
        title, head, text = self._run("get", owner, id)
        if head is None or text is None:
            return None
        revision, created, updated = head.split()
        content = json.loads(text)
        values = (content["messages"], content["settings"], id, float(created), float(updated), int(revision))
        return Conversation(title or "", *values)

    def save(self, owner: str, conversation: Conversation) -> None:
        text = document(conversation, self._limits)
        now = time.time()
        head = f"{conversation.revision + 1} {conversation.created!r} {now!r}"
        arguments = (conversation.id, conversation.revision, conversation.title, head, text, self._limits.conversations)
        code = self._run("save", owner, *arguments)
        if code == -3:
            raise Refusal("too_many_conversations", limit=self._limits.conversations)
        if code:
            raise Refusal(_REFUSED[code])
        conversation.revision += 1
        conversation.updated = now

    def rename(self, owner: str, id: str, title: str) -> None:
        code = self._run("rename", owner, id, title)
        if code:
            raise Refusal(_REFUSED[code])

    def delete(self, owner: str, id: str) -> None:
        self._run("delete", owner, id)

    def preferences(self, owner: str) -> dict[str, Any]:
        with self._told():
            text = self._db.get(f"{_PREFIX}:{{{owner}}}:preferences")
        values: dict[str, Any] = {} if text is None else json.loads(text)
        return values

    def set_preferences(self, owner: str, values: dict[str, Any]) -> None:
        with self._told():
            self._db.set(f"{_PREFIX}:{{{owner}}}:preferences", preferences_document(values))

    def close(self) -> None:
        self._db.close()


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)
