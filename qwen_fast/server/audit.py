"""The audit log: a file of JSON lines that only grows."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import Any

from .state import RequestRecord

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


def audit_entry(record: RequestRecord) -> dict[str, Any]:
    """Who, when, how much, how it ended. Never text, except what record.prompt_text and output_text hold."""
    ended, cost = record.finished or time.perf_counter(), record.cost
    entry: dict[str, Any] = {
        "time": time.time() - (time.perf_counter() - record.arrived),
        "request_id": record.request_id,
        "principal": record.principal.name,
        "route": record.route,
        "model": record.model,
        "stream": record.stream,
        "sequences": record.num_sequences,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "ttft_s": None if record.first_token is None else record.first_token - record.arrived,
        "seconds": ended - record.arrived,
        "status": record.status,
        "outcome": record.outcome,
        "finish_reasons": record.finish_reasons,
        "error": record.error,
        "cost": None if cost is None else cost.as_dict(),
    }
    if record.output_text is not None:
        entry["prompt"] = record.prompt_text
        entry["output"] = [record.output_text[index] for index in sorted(record.output_text)]
    return entry
