"""API keys: who asks, and what each key may use."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .config import ServerConfig
from .errors import ApiError
from .state import Principal

_KEY = re.compile(r"[\x21-\x7e]{1,512}")
_NAME = re.compile(r"[A-Za-z0-9_.@:-]{1,64}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_MAX_KEYS = 10_000
_MAX_LIMIT = 1e12


@dataclass(frozen=True)
class KeyLimits:
    """What one key may use; 0: no limit.

    requests_per_minute: and as many at once after a minute's silence.
    concurrency: sequences being generated or waiting at once.
    tokens_per_minute: prompt and completion tokens. They are counted when a request ends, so a key can overdraw by what
        it has running, and then waits until that is made up for.
    """

    requests_per_minute: float = 0.0
    concurrency: int = 0
    tokens_per_minute: float = 0.0

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            whole = entry.name == "concurrency"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise TypeError(f"{entry.name} must be {'an integer' if whole else 'a number'}, got {value!r}")
            if math.isnan(value) or not 0 <= value <= _MAX_LIMIT:
                raise ValueError(f"{entry.name} must be from 0 to {_MAX_LIMIT:g}, got {value}")


@dataclass(frozen=True)
class ApiKey:
    """sha256: the digest of the key, 32 bytes. name: for the audit log, metrics and limits; unique.
    share_cache: its requests reuse cached prompt beginnings of other keys that share, and show by their speed what
    those asked; otherwise each key has a prefix cache of its own."""

    name: str
    sha256: bytes
    limits: KeyLimits = KeyLimits()
    share_cache: bool = False

    @property
    def principal(self) -> Principal:
        own = hashlib.blake2b(self.name.encode(), digest_size=8, person=b"prefix-cache").digest()
        return Principal(self.name, 0 if self.share_cache else int.from_bytes(own, "little"))


class Keys:
    """Auth by `Authorization: Bearer KEY`. limits: by the key's name."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        if not keys:
            raise ValueError("there is no API key")
        if len(keys) > _MAX_KEYS:
            raise ValueError(f"there are {len(keys)} API keys; the limit is {_MAX_KEYS}")
        for what in ("name", "sha256"):
            seen: dict[Any, str] = {}
            for key in keys:
                value = getattr(key, what)
                if value in seen:
                    said = f"two API keys are named {key.name!r}"
                    raise ValueError(said if what == "name" else f"{seen[value]!r} and {key.name!r} are the same key")
                seen[value] = key.name
        self.limits = {key.name: key.limits for key in keys}
        self._keys = [(key.sha256, key.principal) for key in keys]

    def principal(self, headers: Mapping[str, str]) -> Principal:
        """Every key is compared in full, by its digest: the time tells nothing of the right ones."""
        given = headers.get("authorization", "")
        scheme, _, key = given.partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found: Principal | None = None
        for known, principal in self._keys:
            if hmac.compare_digest(known, digest):
                found = principal
        if found is None or scheme.lower() != "bearer":
            said = "the API key is not valid" if given else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, said, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return found


def keys_of(config: ServerConfig) -> Keys | None:
    """The keys of api_key, named key-1, key-2, ..., and of api_key_file. None: neither was given.

    ValueError names the key or the line that is wrong, never the key's text; OSError where the file cannot be read.
    """
    keys = [_made(key, {"name": f"key-{i}"}, f"api_key {i}") for i, key in enumerate(config.api_key, 1)]
    if config.api_key_file is not None:
        keys += read_keys(Path(config.api_key_file).read_text(encoding="utf-8"), config.api_key_file)
    return Keys(keys) if keys else None


def read_keys(text: str, source: str = "the key file") -> list[ApiKey]:
    """The keys of a file, one a line; empty lines and lines that begin with # are skipped. A line is

        {"key": "sk-1", "name": "alice", "requests_per_minute": 60, "concurrency": 8, "tokens_per_minute": 100000}

    with "sha256" (64 hexadecimal digits) in place of "key" where the file shall not hold the key itself, or the same as
    words: `sk-1 name=alice requests_per_minute=60`. Only the key is needed; without a name it is line-N.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{source}, line {number}"
        entry = _json_line(line, where) if line.startswith("{") else _word_line(line, where)
        entry.setdefault("name", f"line-{number}")
        keys.append(_made(entry.pop("key", None), entry, where))
    if not keys:
        raise ValueError(f"{source} holds no key")
    return keys


def _json_line(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({str(error).partition(':')[0]})") from None
    assert isinstance(entry, dict)  # it begins with a brace
    return entry


def _word_line(line: str, where: str) -> dict[str, Any]:
    key, *words = line.split()
    entry: dict[str, Any] = {"key": key}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{where}: after the key, words are name=value")
        try:
            entry[name] = value if name in ("name", "sha256") else json.loads(value)
        except ValueError:
            raise ValueError(f"{where}: {name} must be a number, true or false") from None
    return entry


def _made(key: Any, entry: dict[str, Any], where: str) -> ApiKey:
    name, digest = entry.pop("name"), entry.pop("sha256", None)
    share_cache = entry.pop("share_cache", False)
    if (key is None) == (digest is None):
        raise ValueError(f"{where}: one of key and sha256 is needed")
    _require(key is None or _fits(_KEY, key), where, "a key has 1 to 512 characters from ! to ~, without spaces")
    _require(digest is None or _fits(_SHA256, digest), where, "sha256 must be 64 hexadecimal digits")
    _require(_fits(_NAME, name), where, "a name has 1 to 64 of the characters A-Z a-z 0-9 _ . @ : -")
    _require(isinstance(share_cache, bool), where, "share_cache must be true or false")
    known = [one.name for one in fields(KeyLimits)]
    for field in entry:
        fields_known = f"known: key, sha256, name, share_cache, {', '.join(known)}"
        _require(field in known, where, f"unknown field {field[:40]!a}; {fields_known}")
    try:
        limits = KeyLimits(**entry)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    hashed = hashlib.sha256(key.encode()).digest() if digest is None else bytes.fromhex(digest)
    return ApiKey(name, hashed, limits, share_cache)


def _fits(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _require(right: bool, where: str, message: str) -> None:
    if not right:
        raise ValueError(f"{where}: {message}")
