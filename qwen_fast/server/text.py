"""JSON texts and log-probabilities as answers carry them."""

from __future__ import annotations

import json
from json.encoder import encode_basestring
from typing import Any

from ..outputs import Logprob
from ..tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's stand-in
_TOGETHER = 4096
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
# Line ends to some readers of event streams, beside those that JSON escapes anyway.
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def quoted(text: str) -> str:
    """text as a JSON string that is safe inside an event's line."""
    encoded = encode_basestring(text)
    return encoded if encoded.isascii() else encoded.translate(_LINE_ENDS)


def dumped(value: Any) -> str:
    """value as JSON that is safe inside an event's line."""
    encoded = "null" if value is None else _ENCODER.encode(value)
    return encoded if encoded.isascii() else encoded.translate(_LINE_ENDS)


def dumped_in_pieces(value: Any) -> str:
    """value as JSON. json writes a value in one go and lets no other thread run meanwhile; here it writes entry by entry,
    and of lists of plain values some thousands together."""
    pieces: list[str] = []
    _dump(value, pieces)
    return "".join(pieces)


def _dump(value: Any, pieces: list[str]) -> None:
    if isinstance(value, dict) and len(value) > 0 and any(isinstance(one, (dict, list)) for one in value.values()):
        mark = "{"
        for key, entry in value.items():
            pieces.append(f"{mark}{encode_basestring(key)}:")
            _dump(entry, pieces)
            mark = ","
        pieces.append("}")
    elif isinstance(value, list) and len(value) > 0 and isinstance(value[-1], (dict, list)):
        mark = "["
        for entry in value:
            pieces.append(mark)
            _dump(entry, pieces)
            mark = ","
        pieces.append("]")
    elif isinstance(value, list) and len(value) > _TOGETHER:
        parts = (value[i : i + _TOGETHER] for i in range(0, len(value), _TOGETHER))
        pieces.append("[" + ",".join(_ENCODER.encode(part)[1:-1] for part in parts) + "]")
    else:
        pieces.append(_ENCODER.encode(value))


def finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def likeliest(row: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The `count` likeliest of a position, best first; the sampled token is among them only if it is one."""
    ranked = [(token_id, entry) for token_id, entry in row.items() if entry.rank <= count]
    return sorted(ranked, key=lambda pair: pair[1].rank)


def prompt_logprobs_json(rows: list[dict[int, Logprob] | None] | None) -> list[Any] | None:
    """vLLM's shape: for each position null or {token id: {"logprob", "rank", "decoded_token"}}."""
    if rows is None:
        return None
    return [
        None
        if row is None
        else {
            str(token_id): {
                "logprob": finite(entry.logprob),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in row.items()
        }
        for row in rows
    ]


class TokenNames:
    """How log-probabilities name tokens: by their text, or as "token_id:N"."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token_id: int, entry: Logprob) -> str:
        return f"token_id:{token_id}" if self._as_ids else entry.decoded_token

    def text(self, token_id: int) -> str:
        """The text of one token; bytes that are no character become U+FFFD."""
        return self._tokenizer.decode(token_id)

    def entry(self, token_id: int, entry: Logprob) -> dict[str, Any]:
        """A chat answer's {"token", "logprob", "bytes"}."""
        name = self.name(token_id, entry)
        exact = name.encode() if self._as_ids else self._tokenizer.token_bytes(token_id)
        return {"token": name, "logprob": finite(entry.logprob), "bytes": list(exact)}
