"""The work directory beside OUT: finished layers, and the hidden states that go into the next one. A run that was cut off
goes on from it with the same bits; a run that asks for something else does not touch it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .tensors import Stored, read_file, sync_folder, write_file, write_parts

if TYPE_CHECKING:
    from typing_extensions import Self

SUFFIX = ".quantizing"
VERSION = 2  # of what a layer's file holds: raised by every change that gives other bits


def check_out(out: Path, model: Path) -> Path:
    """The directory to make: not there, in a folder that is there and can be written, and not inside the model."""
    out = Path(os.path.abspath(out.expanduser()))
    if os.path.lexists(out):
        raise ValueError(f"{out} exists already; give a directory that does not")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no directory; {out.name} cannot be made in it")
    if out.parent.resolve() == model or model in out.parent.resolve().parents:
        raise ValueError(f"{out} is inside the model's directory {model}; give a place outside")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{out.parent} cannot be written; {out.name} cannot be made in it")
    return out


# The files that a run keeps in its directory: one that holds anything else is somebody's, and is left alone.
_OURS = re.compile(r"lock|(state\.json|layer-\d+\.safetensors|hidden-\d+\.npy)(\.part)?")


class Work:
    """The directory OUT.quantizing, locked. A context manager; leaving it keeps the files unless finish() was called."""

    def __init__(self, out: Path, identity: Mapping[str, Any], restart: bool) -> None:
        self.out = out
        self.path = out.with_name(out.name + SUFFIX)
        try:
            self.path.mkdir(exist_ok=True)
            self._check_ours()
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OSError(error.errno, f"cannot make the work directory {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            here = os.stat(self.path / "lock").st_ino == os.fstat(self._lock).st_ino
        except OSError:
            here = False
        if not here:  # held, or removed by a run that ended between our opening and locking it
            os.close(self._lock)
            raise RuntimeError(f"another run is at work in {self.path}")
        try:
            self._open(identity, restart)
        except BaseException:
            os.close(self._lock)
            raise

    def _check_ours(self) -> None:
        folders = ("slice", "out") if (self.path / "state.json").is_file() else ()  # made only after state.json
        names = sorted(path.name for path in self.path.iterdir())
        foreign = [name for name in names if not _OURS.fullmatch(name) and name not in folders]
        if foreign or self.path.is_symlink():
            what = f"it holds {foreign[0]!r}" if foreign else "it is a link"
            raise ValueError(f"{self.path} is not the work of a run ({what}); move it away, or give another OUT")

    def _open(self, identity: Mapping[str, Any], restart: bool) -> None:
        wanted = {"version": VERSION, **identity}
        state = self.path / "state.json"
        if restart:
            self._clear()
        if state.is_file():
            try:
                found = json.loads(state.read_text())
            except ValueError:
                found = {}
            differs = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
            if differs:
                raise ValueError(
                    f"{self.path} holds the work of another run (other {', '.join(differs)}); give restart "
                    "(--restart) to begin anew, or another OUT"
                )
        else:
            self._clear()
            write_parts(state, [json.dumps(wanted).encode()])

    def _clear(self) -> None:
        # state.json last: what lies beside it is known as ours until then.
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == "state.json"):
            if path.name == "lock":
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._lock)

    # -- layers

    def layer_path(self, layer: int) -> Path:
        return self.path / f"layer-{layer:05d}.safetensors"

    def hidden_path(self, layer: int) -> Path:
        return self.path / f"hidden-{layer:05d}.npy"

    def resume_at(self, num_layers: int, with_hidden: bool) -> int:
        """The first layer to do."""
        done = 0
        while done < num_layers and self.layer_path(done).is_file():
            done += 1
        if with_hidden:
            while 0 < done < num_layers and not self.hidden_path(done).is_file():
                done -= 1
        return done

    def save_layer(self, layer: int, tensors: Mapping[str, Stored]) -> None:
        write_file(self.layer_path(layer), tensors)

    def load_layer(self, layer: int) -> dict[str, Stored]:
        return read_file(self.layer_path(layer))[1]

    def save_hidden(self, layer: int, hidden: np.ndarray) -> None:
        """What goes into `layer`; the one before is not needed any more."""
        header = json.dumps(hidden.shape).encode().ljust(64)
        write_parts(self.hidden_path(layer), [header, hidden.data.cast("B")])
        self.hidden_path(layer - 1).unlink(missing_ok=True)

    def load_hidden(self, layer: int) -> np.ndarray:
        with self.hidden_path(layer).open("rb") as file:
            shape = json.loads(file.read(64))
            return np.fromfile(file, np.float32).reshape(shape)

    # -- the end

    @property
    def new(self) -> Path:
        """Where the checkpoint is put together."""
        return self.path / "out"

    def finish(self) -> None:
        """Makes the new checkpoint OUT, and removes the rest."""
        sync_folder(self.new)
        if os.path.lexists(self.out):
            raise ValueError(f"{self.out} has come into being meanwhile; the new checkpoint is in {self.new}")
        self.new.rename(self.out)
        sync_folder(self.out.parent)
        shutil.rmtree(self.path, ignore_errors=True)


def array_hash(array: np.ndarray | None) -> str:
    return "" if array is None else hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
