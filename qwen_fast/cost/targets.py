"""Goals as text: "16 users, P99<3s, tokens/s>1000". Read strictly: what is not understood is an error, never left out."""

from __future__ import annotations

import re
from dataclasses import dataclass

FORMS = (
    '"16 users", "P99<3s" (time to the first token when all users ask at once), "TTFT<500ms" (alone), "TPOT<50ms", '
    '"latency<30s" (whole answer), "tokens/s>1000" (all users together), "tokens/s/user>20"'
)
_USERS = re.compile(r"(\d{1,7}) ?users?")
_BOUND = re.compile(r"([a-z][a-z0-9/ ]*?) ?(<=|>=|<|>) ?(\d+(?:\.\d+)?) ?(us|ms|s|min)?")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_TIMES = {
    "p99": "ttft_p99_s", "p99 ttft": "ttft_p99_s", "ttft p99": "ttft_p99_s", "ttft": "ttft_s", "tpot": "tpot_s",
    "latency": "latency_s",
}  # fmt: skip
_RATES = {"tokens/s": "tokens_per_s", "tokens/s/user": "user_tokens_per_s"}
MAX_USERS = 65536


@dataclass(frozen=True)
class Bound:
    """field: of Speed. most: True where the value must not be above `limit` (seconds), False where not below."""

    text: str
    field: str
    most: bool
    limit: float

    def met(self, value: float) -> bool:
        return value <= self.limit if self.most else value >= self.limit


@dataclass(frozen=True)
class Target:
    """users: at once; None: not said. bounds: all must be met."""

    text: str
    users: int | None
    bounds: tuple[Bound, ...]


def parse_target(text: str) -> Target:
    """Reads a goal. ValueError says which part, and the forms that there are."""
    if not isinstance(text, str):
        raise TypeError(f"target must be a text, got {type(text).__name__}")
    users: int | None = None
    bounds: list[Bound] = []
    parts = [" ".join(part.split()) for part in text.split(",")]
    for part in parts:
        if not part:
            raise ValueError(f"target {text!r}: an empty part between commas; forms: {FORMS}")
        match = _USERS.fullmatch(part.lower())
        if match:
            if users is not None:
                raise ValueError(f"target {text!r}: users are given twice")
            users = int(match[1])
            if not 1 <= users <= MAX_USERS:
                raise ValueError(f"target {text!r}: users must be 1 to {MAX_USERS}, got {users}")
            continue
        bounds.append(_bound(part, text))
    fields = [bound.field for bound in bounds]
    twice = next((bound for i, bound in enumerate(bounds) if bound.field in fields[:i]), None)
    if twice is not None:
        raise ValueError(f"target {text!r}: {twice.text!r} bounds what another part bounds already")
    return Target(", ".join(parts), users, tuple(bounds))


def _bound(part: str, text: str) -> Bound:
    match = _BOUND.fullmatch(part.lower())
    if match is None:
        raise ValueError(f"target {text!r}: cannot read {part!r}; forms: {FORMS}")
    name, sign, number, unit = match.groups()
    value, most = float(number), sign[0] == "<"
    if name in _TIMES:
        if not most:
            raise ValueError(f"target {text!r}: {part!r} asks for a slow answer; times are bounded with <")
        if unit is None:
            raise ValueError(f"target {text!r}: {part!r} needs a unit: us, ms, s or min")
        field, limit = _TIMES[name], value * _SECONDS[unit]
    elif name in _RATES:
        if most:
            raise ValueError(f"target {text!r}: {part!r} asks for a low rate; rates are bounded with >")
        if unit is not None:
            raise ValueError(f"target {text!r}: {part!r}: a rate is a number of tokens per second, without {unit!r}")
        field, limit = _RATES[name], value
    else:
        raise ValueError(f"target {text!r}: {name!r} is not known; forms: {FORMS}")
    if limit <= 0:
        raise ValueError(f"target {text!r}: {part!r}: the limit must be above 0")
    return Bound(part, field, most, limit)
