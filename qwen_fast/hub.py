"""From what a person names (the demo, a directory, a hub id) to a checkpoint directory."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import ModelError
from .utils import DEMO_DIR

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "vocab.json", "merges.txt"]
_UNWANTED = ["*/*", "consolidated*"]


def resolve_model(
    model: str | os.PathLike[str], *, revision: str | None = None, download_dir: str | None = None
) -> str:
    """The directory of a checkpoint.

    model: "demo" (the small model inside the package), a directory with a config.json, or a Hugging Face hub id such
    as "Qwen/Qwen2.5-0.5B-Instruct", which is downloaded or found in the cache (HF_HUB_OFFLINE, HF_HOME and the
    rest of huggingface_hub's settings hold). download_dir: the hub cache to use. Raises ModelError.
    """
    name = os.fspath(model)
    if not isinstance(name, str):
        raise TypeError(f"model must be a text or a path, got {name!r}")
    if not name:
        raise ModelError("model is empty: give 'demo', a directory or a hub id")
    if name == "demo":
        return _local(DEMO_DIR, "the demo model inside the package")
    path = Path(name).expanduser()
    if path.is_dir():
        return _local(path, str(path))
    if path.is_file():
        raise ModelError(f"{name} is a file; give the directory that holds config.json and the safetensors files")
    if name.startswith(("/", ".", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1:
        raise ModelError(
            f"no such directory: {name} (and it cannot be a hub id, which looks like 'Qwen/Qwen2.5-0.5B-Instruct')"
        )
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        raise ModelError(f"{name!r} is neither a directory nor a hub id such as 'Qwen/Qwen2.5-0.5B-Instruct'")
    return _download(name, revision, download_dir)


def _local(path: Path, what: str) -> str:
    if not (path / "config.json").is_file():
        found = "it is not there" if not path.is_dir() else "the directory has none"
        raise ModelError(f"{what}: expected a config.json, {found}")
    return str(path)


def _download(repo: str, revision: str | None, download_dir: str | None) -> str:
    tried = f"{repo!r} is no directory here, and as a hub id"
    try:
        from huggingface_hub import errors as hub_errors
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(f"{tried} it needs the package huggingface_hub: pip install huggingface_hub") from None
    at = f" at revision {revision!r}" if revision else ""
    try:
        path = snapshot_download(
            repo, revision=revision, cache_dir=download_dir, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except hub_errors.GatedRepoError:
        raise ModelError(f"{tried} it is gated: accept its licence on the hub and log in (hf auth login)") from None
    except hub_errors.RepositoryNotFoundError:
        raise ModelError(f"{tried} it does not exist (or is private and no token was given)") from None
    except hub_errors.RevisionNotFoundError:
        raise ModelError(f"{tried} it has no revision {revision!r}") from None
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled):
        raise ModelError(
            f"{tried} it is not in the cache{at}, and the hub cannot be reached or HF_HUB_OFFLINE is set"
        ) from None
    except hub_errors.HFValidationError as error:
        raise ModelError(f"{tried} it is not valid: {error}") from None
    except Exception as error:  # the HTTP client's own errors differ between versions of huggingface_hub
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"{tried} it could not be downloaded{at}: {type(error).__name__}: {reason}") from error
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ModelError(f"{tried} it holds no config.json{at}")
    return path
