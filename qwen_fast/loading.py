"""From the files of a checkpoint to a tokenizer, end tokens and an engine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .chat import ChatTemplate, load_chat_template
from .errors import ModelError
from .hub import resolve_model
from .native import _engine
from .progress import Progress
from .tokenizer import Tokenizer, read_json_object
from .utils import format_bytes


def read_generation_config(model_dir: str, source: Any) -> dict[str, Any]:
    """source: "auto" (the checkpoint's generation_config.json, if it has one), "vllm" (ignore it), or a dict in its
    place. ValueError for anything else."""
    if isinstance(source, Mapping):
        return dict(source)
    if source not in ("auto", "vllm"):
        raise ValueError(f"generation_config must be 'auto', 'vllm' or a dict, got {source!r}")
    path = Path(model_dir, "generation_config.json")
    return read_json_object(path) if source == "auto" and path.is_file() else {}


def load_tokenizer(
    model_dir: str,
    source: Any,
    vocab_size: int | None,
    chat_template: Any,
    revision: str | None,
    download_dir: str | None,
) -> tuple[Tokenizer | None, dict[str, ChatTemplate]]:
    """The tokenizer and its chat templates, from source (a directory or hub id) or, if that is None, the checkpoint;
    (None, {}) where the checkpoint has no tokenizer.json."""
    directory = model_dir if source is None else os.path.expanduser(os.fspath(source))
    if not os.path.isdir(directory):
        directory = resolve_model(directory, revision=revision, download_dir=download_dir)
    if source is None and not os.path.isfile(os.path.join(directory, "tokenizer.json")):
        return None, {}
    tokenizer = Tokenizer(directory, vocab_size)
    return tokenizer, load_chat_template(directory, tokenizer, chat_template)


def end_tokens(
    generation_config: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer | None
) -> list[int]:
    """Both files may name end tokens, and they differ between base and Instruct repositories: stop on any."""
    found: list[int] = []
    for name, source in (("generation_config.json", generation_config), ("config.json", config)):
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is None:
                continue
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise ModelError(f"{name}: eos_token_id: expected a token id or a list of them, got {value!r}")
            if token_id not in found:
                found.append(token_id)
    if not found and tokenizer is not None and tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return found


def find_nccl() -> str | None:
    """libnccl.so.2 of NVIDIA's package, which the system's loader does not look into."""
    try:
        package = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return None
    folders = package.submodule_search_locations if package is not None else None
    files = [Path(folder, "lib", "libnccl.so.2") for folder in folders or ()]
    return next((str(file) for file in files if file.is_file()), None)


def load_engine(
    model: str, model_dir: str, options: Mapping[str, Any], tokenizer: Tokenizer | None, progress: bool | None
) -> _engine.Engine:
    """An engine of the checkpoint in model_dir, with the tokenizer's vocabulary. model: its name on the progress bar."""

    def said(done: int, total: int) -> str:
        return f"{format_bytes(done)} of {format_bytes(total)}"

    if options.get("tensor_parallel_size") not in (None, 1):
        options = {**options, "nccl_library": find_nccl()}
    with Progress(f"Loading {model}", 0, enabled=progress, text=said) as bar:
        # Python runs at every report, so Ctrl-C ends a load even where no bar is shown.
        engine = _engine.Engine(model_dir, **options, progress=lambda done, total: bar.update(done, total))
    if tokenizer is not None:
        engine.set_vocabulary(tokenizer.tokens, sorted(tokenizer.special_ids))
    return engine
