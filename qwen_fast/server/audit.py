"""The audit log: a file of JSON lines that only grows."""

from __future__ import annotations

import json
import logging
import os
import threading
from typing import Any

_LOG = logging.getLogger("qwen_fast.server")


class AuditLog:
    """Appends each record as one line with one write, so that several processes may share the file, and what was written
    is the kernel's when a request ends. The file is made with mode 0600. After a rotation (another file at the path, or
    none, or reopen()) a new one is begun. A record that cannot be written is reported to the server's log, and the
    request goes on.

    From any thread. OSError where the file cannot be opened at the start.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._broken_line = False
        self._failing = False
        self._fd = -1
        self._fd = self._opened()

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
        with self._lock:
            try:
                if self._moved():
                    self._swap()
                if self._broken_line:  # a full disk took half a record
                    line = b"\n" + line
                written = os.write(self._fd, line)
                self._broken_line = written < len(line)
                if self._broken_line:
                    raise OSError(f"{written} of {len(line)} bytes were written")
            except OSError as error:
                if not self._failing:  # once, not for every request
                    _LOG.error("the audit log %s cannot be written: %s", self._path, error)
                self._failing = True
            else:
                self._failing = False

    def reopen(self) -> None:
        """Begins a new file where the old one was moved; for SIGHUP."""
        with self._lock:
            try:
                self._swap()
            except OSError as error:
                _LOG.error("the audit log %s cannot be opened: %s", self._path, error)

    def close(self) -> None:
        """Records after this are reported as lost."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _swap(self) -> None:
        fresh = self._opened()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._broken_line = fresh, False

    def _moved(self) -> bool:
        if self._fd < 0:
            raise OSError("it is closed")
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return True
        ours = os.fstat(self._fd)
        return (there.st_ino, there.st_dev) != (ours.st_ino, ours.st_dev)
