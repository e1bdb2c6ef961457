"""The stores: both kinds behave the same, keep owners apart, hold their limits and say what is wrong."""

from __future__ import annotations

import os
import pathlib
import sqlite3
import stat
import subprocess
import sys
import threading

import pytest
from ui_helpers import LIMITS, new_owner

from qwen_fast.ui.config import HistoryLimits, UiConfig, default_history
from qwen_fast.ui.history import Conversation, HistoryStore, clean_title, is_id, new_token, open_store, owner_of
from qwen_fast.ui.texts import Refusal

HOSTILE = [
    "'; DROP TABLE conversations; --",
    "<script>alert(1)</script>",
    "a\x00b\x1b[31m\r\nc",
    "\u202eevil\u202c txt",
    "😀" * 1000,
    "\ud800 lone",
    "{owner}:*",
]


def saved(store: HistoryStore, owner: str, title: str = "t", count: int = 1) -> Conversation:
    one = Conversation(title, [{"role": "user", "content": f"question {i}"} for i in range(count)], {"seed": 1})
    store.save(owner, one)
    return one


def test_what_is_saved_is_there_after_reopening(where):
    owner = new_owner()
    first = open_store(where, LIMITS)
    one = saved(first, owner, "Füchse 狐狸", 2)
    first.set_preferences(owner, {"lang": "zh"})
    first.close()
    second = open_store(where, LIMITS)
    assert second.get(owner, one.id) == one and one.revision == 1
    assert [entry.title for entry in second.entries(owner)] == ["Füchse 狐狸"]
    assert second.preferences(owner) == {"lang": "zh"}
    second.close()


def test_owners_see_only_their_own(store):
    mine, other = new_owner(), new_owner()
    one = saved(store, mine)
    assert store.get(other, one.id) is None
    assert store.entries(other) == [] and store.preferences(other) == {}
    store.delete(other, one.id)
    with pytest.raises(Refusal, match="not there any more"):
        store.rename(other, one.id, "stolen")
    one.messages.append({"role": "user", "content": "more"})
    with pytest.raises(Refusal, match="not there any more"):
        store.save(other, one)
    kept = store.get(mine, one.id)
    assert kept is not None and kept.title == "t" and len(kept.messages) == 1


def test_two_windows_do_not_overwrite_each_other(store):
    owner = new_owner()
    one = saved(store, owner)
    here, there = store.get(owner, one.id), store.get(owner, one.id)
    here.messages.append({"role": "assistant", "content": "here"})
    store.save(owner, here)
    there.messages.append({"role": "assistant", "content": "there"})
    with pytest.raises(Refusal, match="another window"):
        store.save(owner, there)
    store.rename(owner, one.id, "new name")  # which is not in the way of an answer that is being written
    store.save(owner, here)
    assert store.get(owner, one.id).title == "new name"
    store.delete(owner, one.id)
    with pytest.raises(Refusal, match="not there any more"):
        store.save(owner, here)
    assert store.entries(owner) == []


def test_order_is_by_last_change(store):
    owner = new_owner()
    first, second = saved(store, owner, "first"), saved(store, owner, "second")
    assert [entry.id for entry in store.entries(owner)] == [second.id, first.id]
    store.save(owner, first)
    assert [entry.id for entry in store.entries(owner)] == [first.id, second.id]


def test_limits_are_named(store):
    owner = new_owner()
    for _ in range(LIMITS.conversations):
        saved(store, owner)
    with pytest.raises(Refusal, match="has 5 conversations, which is the limit"):
        saved(store, owner)
    store.delete(owner, store.entries(owner)[0].id)
    with pytest.raises(Refusal, match="would have 9 messages; the limit is 8"):
        saved(store, owner, count=9)
    with pytest.raises(Refusal, match="has 4097 bytes; the limit is 4096"):
        store.save(owner, Conversation("t", [{"role": "user", "content": "x" * 4097}]))
    with pytest.raises(Refusal, match="would have [0-9]+ bytes; the limit is 16384"):
        store.save(owner, Conversation("t", [{"role": "user", "content": "x" * 4000}] * 5))
    saved(store, owner)


@pytest.mark.parametrize("title", HOSTILE, ids=ascii)
def test_hostile_titles_stay_text(store, title):
    owner = new_owner()
    clean = clean_title(title, LIMITS.title_chars)
    assert len(clean) <= LIMITS.title_chars and clean.isprintable() and "\u202e" not in clean
    one = saved(store, owner, clean)
    store.rename(owner, one.id, clean)
    assert [entry.title for entry in store.entries(owner)] == [clean]


def test_any_text_is_kept_as_it_is(store):
    owner = new_owner()
    one = Conversation("t", [{"role": "user", "content": "\x00 \ud83d \u2028 '\" 狐 😀 \\u0000"}])
    store.save(owner, one)
    assert store.get(owner, one.id).messages == one.messages


def test_threads_share_a_store(store):
    """Eight threads with a conversation each, and all on one more: no save is lost, and none is silently undone."""
    owner = new_owner()
    common = saved(store, owner)
    won, lost, wrong = [], [], []

    def work(number: int) -> None:
        try:
            mine = saved(store, f"{owner[:-1]}{number}", "own")
            for _ in range(10):
                store.save(f"{owner[:-1]}{number}", mine)
                seen = store.get(owner, common.id)
                seen.settings = {"by": number}
                try:
                    store.save(owner, seen)
                    won.append(number)
                except Refusal as refusal:
                    lost.append(refusal.name)
            assert mine.revision == 11
        except Exception as error:  # noqa: BLE001  shown below
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and set(lost) <= {"changed_elsewhere"}
    assert store.get(owner, common.id).revision == 1 + len(won) and len(won) + len(lost) == 80


def test_processes_share_a_file(tmp_path):
    path = str(tmp_path / "h.sqlite3")
    script = (
        "import sys; from qwen_fast.ui.config import HistoryLimits; from qwen_fast.ui.history import *\n"
        "s = open_store(sys.argv[1], HistoryLimits())\n"
        "for i in range(20): s.save(sys.argv[2], Conversation(str(i)))\n"
    )
    owner = new_owner()
    command = [sys.executable, "-c", script, path, owner]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    store = open_store(path, HistoryLimits())
    assert len(store.entries(owner)) == 60
    store.close()


# -- SQLite alone


def test_the_file_is_private(tmp_path):
    path = tmp_path / "new" / "folder" / "h.sqlite3"
    store = open_store(str(path), LIMITS)
    saved(store, new_owner())
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    store.close()


@pytest.mark.parametrize("kind", ["text", "cut", "scrambled"])
def test_a_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / "h.sqlite3"
    store = open_store(str(path), LIMITS)
    for _ in range(3):
        saved(store, new_owner(), count=4)
    store.close()
    whole = path.read_bytes()
    assert len(whole) > 8192
    bad = {
        "text": b"not a database " * 100,
        "cut": whole[:6000],
        "scrambled": whole[:4096] + b"\xff" * 4096 + whole[8192:],
    }
    path.write_bytes(bad[kind])
    with pytest.raises(ValueError, match="h.sqlite3' is damaged or not an SQLite file .*move it away, or name another"):
        open_store(str(path), LIMITS)
    assert path.read_bytes() == bad[kind]


def test_files_of_others_are_refused(tmp_path):
    other = tmp_path / "other.sqlite3"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE precious (x)")
    db.close()
    with pytest.raises(ValueError, match="is an SQLite file of something else"):
        open_store(str(other), LIMITS)
    newer = tmp_path / "newer.sqlite3"
    open_store(str(newer), LIMITS).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(ValueError, match="has version 9; this program knows up to 1"):
        open_store(str(newer), LIMITS)
    with pytest.raises(ValueError, match="cannot be opened"):
        open_store(str(tmp_path), LIMITS)


def test_a_full_file_says_so_and_reads_on(tmp_path):
    store = open_store(str(tmp_path / "h.sqlite3"), LIMITS)
    first = new_owner()
    saved(store, first)
    with pytest.raises(Refusal, match="cannot be read or written: .*full"):
        for _ in range(200):
            store.save(new_owner(), Conversation("t", [{"role": "user", "content": "x" * 4000}] * 3))
    assert len(store.entries(first)) == 1
    assert os.path.getsize(tmp_path / "h.sqlite3") <= LIMITS.file_bytes
    store.close()


def test_no_redis_is_named_without_its_password():
    with pytest.raises(ValueError, match=r"history: redis://127\.0\.0\.1:1/0 cannot be used") as raised:
        open_store("redis://user:secret@127.0.0.1:1/0", LIMITS)
    assert "secret" not in str(raised.value)


# -- owners, ids, options


def test_owner_comes_from_a_whole_token_only():
    token = new_token()
    assert owner_of(token) == owner_of(token) != owner_of(new_token())
    assert token not in owner_of(token)
    for bad in (None, "", token[:-1], token + "a", token[:-1] + "*", "../" + token[3:]):
        with pytest.raises(Refusal, match="cookie"):
            owner_of(bad)
    assert is_id("0" * 32) and not any(map(is_id, ("0" * 31, "g" * 32, None, 3)))


def test_options_have_ranges(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="conversations must be from 1 to 100000, got 0"):
        HistoryLimits(conversations=0)
    with pytest.raises(TypeError, match="streams must be an integer, got 1.5"):
        UiConfig(streams=1.5)
    with pytest.raises(ValueError, match="lang must be auto, en or zh, got 'fr'"):
        UiConfig(lang="fr")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert UiConfig().history == str(tmp_path / "qwen_fast" / "ui.sqlite3")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_history() == pathlib.Path.home() / ".local/share/qwen_fast/ui.sqlite3"
