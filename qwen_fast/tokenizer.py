"""Text to token ids (Hugging Face `tokenizers`), and the table of token bytes that the engine makes text from."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import ModelError

_LONG_TEXT = 4096  # characters
_TOKENIZER_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. ModelError names the file and what is wrong."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's byte-level alphabet, inverted: code point of a vocabulary character -> byte. Printable bytes stand for
    themselves; the other 68 are numbered upwards from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {**{byte: byte for byte in printable}, **{256 + i: byte for i, byte in enumerate(hidden)}}


class Tokenizer:
    """A checkpoint's tokenizer. Thread-safe.

    vocab_size: rows of the model's embedding; a token id at or beyond it is a ModelError.
    """

    def __init__(self, directory: str | Path, vocab_size: int | None = None) -> None:
        from tokenizers import Tokenizer as Backend

        directory = Path(directory)
        path = directory / "tokenizer.json"
        try:
            self._json = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ModelError(
                f"{path}: {error.strerror} (only tokenizers with a tokenizer.json are supported)"
            ) from None
        except UnicodeDecodeError as error:
            raise ModelError(f"{path}: not UTF-8: {error}") from None
        try:
            self._backend = Backend.from_str(self._json)
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{path}: {str(error).strip()}") from None
        config_path = directory / "tokenizer_config.json"
        self.config: dict[str, Any] = read_json_object(config_path) if config_path.is_file() else {}
        self._path = path
        self._add_configured_tokens(config_path)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_tokens = {key: text for key in _TOKENIZER_KEYS if (text := self._text_of(self.config.get(key)))}
        self.tokens, self.special_ids = self._token_table(vocab_size)
        self._plain: Any = None
        self._lock = threading.Lock()

    # -- text to ids

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Token ids of text; nothing is put before or after it. Added tokens written out in the text ("<|im_end|>")
        become that token, as in Hugging Face; with allow_special=False they are ordinary text."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        backend = self._backend if allow_special else self._plain_backend()
        try:
            if len(text) > _LONG_TEXT:  # encode() lets no other thread run until it is done
                return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return backend.encode(text, add_special_tokens=False).ids
        except TypeError:  # what tokenizers says to a text that UTF-8 cannot hold
            pass
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds a lone surrogate at position {error.start}, which is no text") from None
        raise ValueError("the tokenizer refuses the text")

    def encode_rendered(self, text: str, quoted: dict[str, str]) -> list[int]:
        """Token ids of a rendered chat in which `quoted` stands for text that must stay text: each key of it is
        replaced by its value after the control tokens were found."""
        ids: list[int] = []
        for part in self.added_pattern.split(text):
            if part in self._added:
                ids.append(self._added[part])
            elif part:
                for mark, content in quoted.items():
                    part = part.replace(mark, content)
                ids += self.encode(part, allow_special=False)
        return ids

    def token_id(self, token: str) -> int | None:
        """The id of one token by its text in the vocabulary, or None."""
        return self._backend.token_to_id(token)

    # -- ids to text

    def decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        skipped = self.special_ids if skip_special_tokens else ()
        return b"".join(self.token_bytes(i) for i in ids if i not in skipped).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; unused ids below the vocabulary's end have none."""
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        return self.tokens[token_id] if token_id < len(self.tokens) else b""

    @property
    def eos_token_id(self) -> int | None:
        """The id of tokenizer_config.json's eos_token, or None."""
        token = self.special_tokens.get("eos_token")
        return None if token is None else self.token_id(token)

    def __len__(self) -> int:
        """The highest token id, plus one."""
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"<Tokenizer {str(self._path)!r}: {len(self)} ids, {len(self._added)} added tokens>"

    # -- inside

    @cached_property
    def _added(self) -> dict[str, int]:
        return {token.content: i for i, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def added_tokens(self) -> dict[str, int]:
        """Added tokens by their text, special or not."""
        return dict(self._added)

    @cached_property
    def added_pattern(self) -> re.Pattern[str]:
        """Matches an added token written out, the longest first."""
        longest_first = sorted(self._added, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else re.compile("(?!)")

    def _plain_backend(self) -> Any:
        with self._lock:
            if self._plain is None:
                from tokenizers import Tokenizer as Backend

                self._plain = Backend.from_str(json.dumps({**json.loads(self._json), "added_tokens": []}))
                self._plain.no_truncation()
                self._plain.no_padding()
            return self._plain

    def _add_configured_tokens(self, config_path: Path) -> None:
        """tokenizer_config.json may name added tokens that tokenizer.json lacks."""
        from tokenizers import AddedToken

        listed = self.config.get("added_tokens_decoder") or {}
        if not isinstance(listed, dict):
            raise ModelError(f"{config_path}: added_tokens_decoder: expected an object, got {type(listed).__name__}")
        known = self._backend.get_added_tokens_decoder()
        for key, value in sorted(listed.items(), key=lambda item: (len(item[0]), item[0])):
            text = self._text_of(value)
            if not key.isdigit() or text is None:
                raise ModelError(f"{config_path}: added_tokens_decoder[{key!r}]: expected a token id and a token")
            if int(key) in known:
                continue
            flags = {
                name: bool(value.get(name, False))
                for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            self._backend.add_tokens([AddedToken(text, **flags)])
            if self._backend.token_to_id(text) != int(key):
                raise ModelError(
                    f"{config_path}: added_tokens_decoder[{key!r}]: {text!r} has id "
                    f"{self._backend.token_to_id(text)} in tokenizer.json"
                )

    @staticmethod
    def _text_of(token: Any) -> str | None:
        """A token is written as a text or as an object with "content"."""
        if isinstance(token, dict):
            token = token.get("content")
        return token if isinstance(token, str) else None

    def _token_table(self, vocab_size: int | None) -> tuple[list[bytes], frozenset[int]]:
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        added = self._backend.get_added_tokens_decoder()
        ids = [*vocabulary.values(), *added]
        if not ids:
            raise ModelError(f"{self._path}: the vocabulary is empty")
        highest = max(ids)
        if vocab_size is not None and highest >= vocab_size:
            raise ModelError(f"{self._path}: token id {highest} does not fit config.json's vocab_size {vocab_size}")
        if highest >= 2**24:
            raise ModelError(f"{self._path}: token id {highest} is beyond the limit, {2**24 - 1}")
        tokens = [b""] * (highest + 1)
        for token_id, data in zip(vocabulary.values(), self._unmapped(vocabulary)):
            tokens[token_id] = data
        for token_id, token in added.items():
            tokens[token_id] = token.content.encode()
        return tokens, frozenset(i for i, token in added.items() if token.special)

    def _unmapped(self, vocabulary: Iterable[str]) -> list[bytes]:
        """The bytes of byte-level tokens. One pass over all of them: a loop per character takes a second."""
        separator = "\u2028"  # not in the byte-level alphabet
        translated = separator.join(vocabulary).translate({**_byte_alphabet(), 0x2028: separator})
        try:
            return [text.encode("latin-1") for text in translated.split(separator)]
        except UnicodeEncodeError as error:
            raise ModelError(
                f"{self._path}: the token {error.object!r} is not written in the byte-level alphabet "
                f"(character {error.start})"
            ) from None


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """Token ids as a list of ints below vocab_size; numpy arrays and tensors are taken too."""
    if isinstance(token_ids, (bytes, bytearray)):
        raise TypeError(f"token ids must be a list of ints, got {type(token_ids).__name__}")
    if hasattr(token_ids, "tolist"):
        token_ids = token_ids.tolist()
    ids = list(token_ids)
    if ids and set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
        return ids
    for position, token_id in enumerate(ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise TypeError(f"token id at position {position} must be an int, got {token_id!r}")
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"token id {token_id} at position {position} is not in the vocabulary (0 to {vocab_size - 1})"
            )
    return ids
