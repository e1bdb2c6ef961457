"""Calibration text: from a file, a list or the package to blocks of token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..utils import DEMO_DIR

BUILT_IN = DEMO_DIR / "calib.txt"
MIN_TOKENS = 512


def load_blocks(source: Any, tokenizer: Any, templates: Any, num_blocks: int, block_tokens: int, vocab: int) -> Any:
    """int32 (blocks, tokens): at most num_blocks of block_tokens ids, taken evenly from all that there are.

    source: None (the package's text), a path (.txt, or .jsonl of objects with "text", "messages" or "token_ids"), a
    list of texts, or a list of lists of token ids. What is left of the text after the last whole block is not used; a text
    shorter than one block is one shorter block. ValueError where there are fewer than 512 tokens.
    """
    name, items = _items(BUILT_IN if source is None else source)
    ids = [token for where, item in items for token in _ids(where, item, tokenizer, templates, vocab)]
    if len(ids) < MIN_TOKENS:
        raise ValueError(f"{name} holds {len(ids)} tokens; calibration needs at least {MIN_TOKENS}, better 50,000")
    size = min(block_tokens, len(ids))
    blocks = np.array(ids[: len(ids) // size * size], np.int32).reshape(-1, size)
    if len(blocks) > num_blocks:
        blocks = blocks[np.arange(num_blocks) * len(blocks) // num_blocks]
    return blocks


def _items(source: Any) -> tuple[str, list[tuple[str, Any]]]:
    """What to call the source in messages, and its texts, conversations and lists of ids, each with what to call it."""
    if not isinstance(source, (str, Path)):
        if not isinstance(source, Sequence) or not source:
            raise ValueError("calibration must be a path, a list of texts or a list of lists of token ids, not empty")
        return "the calibration list", [(f"the calibration list, entry {i}", item) for i, item in enumerate(source)]
    path = Path(source).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"calibration file {path}: {error.strerror}") from None
    if not data.strip():
        raise ValueError(f"calibration file {path} is empty")
    try:
        text = data.decode("utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration file {path} is no text: byte {error.start} is not UTF-8") from None
    if "\0" in text:
        raise ValueError(f"calibration file {path} is no text: it holds a NUL at character {text.index(chr(0))}")
    if path.suffix.lower() not in (".jsonl", ".json"):
        return str(path), [(str(path), text)]
    # At line feeds alone: JSON's texts may hold the other characters that splitlines() cuts at.
    lines = [(f"calibration file {path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return str(path), [(where, _record(where, line)) for where, line in lines]


def _record(where: str, line: str) -> Any:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error} (a .jsonl file has one JSON object a line)") from None
    if isinstance(record, dict):
        for key, kind in (("text", str), ("messages", list), ("token_ids", list)):
            if isinstance(record.get(key), kind):
                return record if key == "messages" else record[key]
    raise ValueError(f'{where}: expected an object with "text", "messages" or "token_ids", got {line.strip()[:60]!r}')


def _ids(name: str, item: Any, tokenizer: Any, templates: Any, vocab: int) -> list[int]:
    if isinstance(item, (list, tuple, np.ndarray)):
        for token in item:
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocab:
                raise ValueError(
                    f"{name}: token ids must be whole numbers from 0 to {vocab - 1}, got {repr(token)[:40]}"
                )
        return [int(token) for token in item]
    if tokenizer is None:
        raise ValueError(f"{name} is text, and the checkpoint has no tokenizer.json; give token ids")
    if isinstance(item, dict):
        template = templates.get("default")
        if template is None:
            raise ValueError(f'{name} has "messages", and the checkpoint has no chat template')
        try:
            item = template.render(item["messages"], add_generation_prompt=False)[0]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None
    if not isinstance(item, str):
        raise ValueError(f"{name}: expected texts or lists of token ids, got {type(item).__name__}")
    try:
        return list(tokenizer.encode(item))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
