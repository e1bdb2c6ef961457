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
    ids = [token for item in items for token in _ids(name, item, tokenizer, templates, vocab)]
    if len(ids) < MIN_TOKENS:
        raise ValueError(f"{name} holds {len(ids)} tokens; calibration needs at least {MIN_TOKENS}, better 50,000")
    size = min(block_tokens, len(ids))
    blocks = np.array(ids[: len(ids) // size * size], np.int32).reshape(-1, size)
    if len(blocks) > num_blocks:
        blocks = blocks[np.arange(num_blocks) * len(blocks) // num_blocks]
    return blocks


def _items(source: Any) -> tuple[str, list[Any]]:
    """What to call the source in messages, and its texts, conversations and lists of ids."""
    if not isinstance(source, (str, Path)):
        if not isinstance(source, Sequence) or not source:
            raise ValueError("calibration must be a path, a list of texts or a list of lists of token ids, not empty")
        return "the calibration list", list(source)
    path = Path(source).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"calibration file {path}: {error.strerror}") from None
    if not data.strip():
        raise ValueError(f"calibration file {path} is empty")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration file {path} is no text: byte {error.start} is not UTF-8") from None
    if "\0" in text:
        raise ValueError(f"calibration file {path} is no text: it holds a NUL at character {text.index(chr(0))}")
    if path.suffix.lower() not in (".jsonl", ".json"):
        return str(path), [text]
    return str(path), [_record(path, i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _record(path: Path, number: int, line: str) -> Any:
    where = f"calibration file {path}, line {number}"
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
        ids = np.asarray(item)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.size and not 0 <= ids.min() <= ids.max() < vocab):
            raise ValueError(f"{name}: token ids must be whole numbers from 0 to {vocab - 1}")
        return [int(token) for token in ids]
    if tokenizer is None:
        raise ValueError(f"{name} is text, and the checkpoint has no tokenizer.json; give token ids")
    if isinstance(item, dict):
        template = templates.get("default")
        if template is None:
            raise ValueError(f'{name} has "messages", and the checkpoint has no chat template')
        item = template.render(item["messages"], add_generation_prompt=False)[0]
    if not isinstance(item, str):
        raise ValueError(f"{name}: expected texts or lists of token ids, got {type(item).__name__}")
    return list(tokenizer.encode(item))
