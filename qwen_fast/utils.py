"""Where the demo model is, sizes for people, and seeds. Needs no engine."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

DEMO_DIR = Path(__file__).parent / "demo"

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(value: int | str, name: str = "size") -> int:
    """A number of bytes from an int or a text such as "6GiB" (2**30) or "500 MB" (10**6)."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"{name} must be an int of bytes or a text like '6GiB', got {type(value).__name__}")
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.fullmatch(value)
        unit = match.group(2).upper() if match else None
        if match is None or unit not in _UNITS:
            raise ValueError(
                f"{name}: cannot read {value!r}; write a number and a unit: B, KiB, MiB, GiB, TiB, KB, MB, GB, TB"
            )
        size = int(float(match.group(1)) * _UNITS[unit])
    if not 0 <= size < 2**63:
        raise ValueError(f"{name} must be from 0 to 2**63 - 1 bytes, got {value!r}")
    return size


def format_bytes(size: int) -> str:
    """1536 -> '1.5 KiB'."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def format_count(count: int) -> str:
    """15740288 -> '15.7 M'."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


def fresh_seed() -> int:
    """63 random bits, so that the reported seed fits a signed 64-bit field."""
    return int.from_bytes(os.urandom(8), "little") >> 1


def derived_seed(base: int, counter: int) -> int:
    """The seed of the counter-th request without one, under LLM(seed=base): the first 63 bits of a hash of both."""
    digest = hashlib.blake2b(b"%d:%d" % (base, counter), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
