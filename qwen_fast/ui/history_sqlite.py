"""Conversations in an SQLite file; several processes of one machine may share it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Any

from .config import HistoryLimits
from .history import Conversation, Entry, document, preferences_document
from .texts import Refusal

_APPLICATION_ID = 0x71776675  # marks the file as ours
_VERSION = 1
_WAIT_S = 10.0  # for another process to finish writing
_SCHEMA = """
CREATE TABLE conversations (
    owner TEXT NOT NULL,
    id TEXT NOT NULL,
    title TEXT NOT NULL,
    created REAL NOT NULL,
    updated REAL NOT NULL,
    revision INTEGER NOT NULL,
    document TEXT NOT NULL,
    PRIMARY KEY (owner, id)
);
CREATE INDEX by_time ON conversations (owner, updated DESC, id, title);
CREATE TABLE preferences (owner TEXT PRIMARY KEY, document TEXT NOT NULL);
"""


class SQLiteHistory:
    """path: of a file, made with its directory where there is none, readable for its owner alone; or ":memory:".
    ValueError where it is not a history, or one of a later version."""

    def __init__(self, path: str, limits: HistoryLimits) -> None:
        self._path = path
        self._limits = limits
        self._lock = threading.Lock()
        try:
            if path != ":memory:":
                _make_private(pathlib.Path(path))
            self._db = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"history: {path!r} cannot be opened: {error}") from None
        try:
            self._prepare()
        except sqlite3.OperationalError as error:
            self._db.close()
            raise ValueError(f"history: {path!r} cannot be opened: {error}") from None
        except sqlite3.DatabaseError as error:
            self._db.close()
            advice = "move it away, or name another with --history"
            said = " ".join(str(error).split())
            raise ValueError(f"history: {path!r} is damaged or not an SQLite file ({said}); {advice}") from None
        except ValueError:
            self._db.close()
            raise

    def _prepare(self) -> None:
        """Makes the tables in a new file, and refuses one that is not ours."""
        db = self._db
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        page_bytes = db.execute("PRAGMA page_size").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {self._limits.file_bytes // page_bytes}")
        db.execute("BEGIN IMMEDIATE")
        try:
            mark = db.execute("PRAGMA application_id").fetchone()[0]
            tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if mark != _APPLICATION_ID and tables:
                raise ValueError(f"history: {self._path!r} is an SQLite file of something else; name another")
            if version > _VERSION:
                raise ValueError(f"history: {self._path!r} has version {version}; this program knows up to {_VERSION}")
            if not tables:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {_VERSION}")
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise
        said = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if said != "ok":
            raise sqlite3.DatabaseError(said)

    @contextlib.contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute(begin)
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise Refusal("history_failed", reason=str(error)) from error

    def entries(self, owner: str) -> list[Entry]:
        with self._transaction("BEGIN") as db:
            rows = db.execute(
                "SELECT id, title, updated FROM conversations WHERE owner = ? ORDER BY updated DESC LIMIT ?",
                (owner, self._limits.conversations),
            ).fetchall()
        return [Entry(*row) for row in rows]

    def get(self, owner: str, id: str) -> Conversation | None:
        with self._transaction("BEGIN") as db:
            row = db.execute(
                "SELECT title, created, updated, revision, document FROM conversations WHERE owner = ? AND id = ?",
                (owner, id),
            ).fetchone()
        if row is None:
            return None
        title, created, updated, revision, text = row
        content = json.loads(text)
        return Conversation(title, content["messages"], content["settings"], id, created, updated, revision)

    def save(self, owner: str, conversation: Conversation) -> None:
        text = document(conversation, self._limits)
        now = time.time()
        with self._transaction() as db:
            if conversation.revision == 0:
                self._insert(db, owner, conversation, now, text)
            else:
                changed = db.execute(
                    "UPDATE conversations SET updated = ?, revision = revision + 1, document = ? "
                    "WHERE owner = ? AND id = ? AND revision = ?",
                    (now, text, owner, conversation.id, conversation.revision),
                ).rowcount
                if not changed:
                    there = _exists(db, owner, conversation.id)
                    raise Refusal("changed_elsewhere" if there else "conversation_gone")
        conversation.revision += 1
        conversation.updated = now

    def _insert(self, db: sqlite3.Connection, owner: str, new: Conversation, now: float, text: str) -> None:
        if _exists(db, owner, new.id):
            raise Refusal("changed_elsewhere")
        count = db.execute("SELECT count(*) FROM conversations WHERE owner = ?", (owner,)).fetchone()[0]
        if count >= self._limits.conversations:
            raise Refusal("too_many_conversations", limit=self._limits.conversations)
        row = (owner, new.id, new.title, new.created, now, 1, text)
        db.execute("INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def rename(self, owner: str, id: str, title: str) -> None:
        with self._transaction() as db:
            values = (title, owner, id)
            if not db.execute("UPDATE conversations SET title = ? WHERE owner = ? AND id = ?", values).rowcount:
                raise Refusal("conversation_gone")

    def delete(self, owner: str, id: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM conversations WHERE owner = ? AND id = ?", (owner, id))

    def preferences(self, owner: str) -> dict[str, Any]:
        with self._transaction("BEGIN") as db:
            row = db.execute("SELECT document FROM preferences WHERE owner = ?", (owner,)).fetchone()
        values: dict[str, Any] = {} if row is None else json.loads(row[0])
        return values

    def set_preferences(self, owner: str, values: dict[str, Any]) -> None:
        text = preferences_document(values)
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO preferences VALUES (?, ?)", (owner, text))

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _exists(db: sqlite3.Connection, owner: str, id: str) -> bool:
    found = db.execute("SELECT 1 FROM conversations WHERE owner = ? AND id = ?", (owner, id)).fetchone()
    return found is not None


def _make_private(path: pathlib.Path) -> None:
    """The file with mode 0600, so that SQLite's files beside it get that too."""
    missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
