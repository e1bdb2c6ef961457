"""The audit log: whole lines, rotation, and never a text that was not asked for."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading

import httpx
import pytest
from server_helpers import serving

from qwen_fast.server import ServerConfig, audit
from qwen_fast.server.audit import AuditLog
from qwen_fast.server.serve import plug_ins


def lines(path) -> list[dict]:
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def log(tmp_path):
    made = AuditLog(str(tmp_path / "audit.log"))
    yield made
    made.close()


def test_one_write_for_each_record(log, tmp_path, monkeypatch):
    writes = []
    real = os.write

    def write(fd, data):
        writes.append(data)
        return real(fd, data)

    monkeypatch.setattr(audit.os, "write", write)
    log.write({"a": "ä\n\udc80", "b": 1})
    assert len(writes) == 1
    assert lines(tmp_path / "audit.log") == [{"a": "ä\n\udc80", "b": 1}]
    assert stat.S_IMODE((tmp_path / "audit.log").stat().st_mode) == 0o600


def test_threads_and_two_logs_do_not_mix_lines(log, tmp_path):
    other = AuditLog(str(tmp_path / "audit.log"))
    threads = [
        threading.Thread(target=lambda one=one, i=i: [one.write({"i": i, "x": "y" * 3000}) for _ in range(50)])
        for i, one in enumerate((log, other, log, other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert sorted(record["i"] for record in lines(tmp_path / "audit.log")) == [0] * 50 + [1] * 50 + [2] * 50 + [3] * 50


def test_rotation(log, tmp_path):
    path = tmp_path / "audit.log"
    log.write({"i": 0})
    path.rename(tmp_path / "old")
    log.write({"i": 1})  # another name: a new file
    assert (lines(tmp_path / "old"), lines(path)) == ([{"i": 0}], [{"i": 1}])
    path.unlink()
    path.write_text("")  # another file
    log.write({"i": 2})
    assert lines(path) == [{"i": 2}]
    path.rename(tmp_path / "older")
    log.reopen()
    assert path.read_text() == ""
    log.write({"i": 3})
    assert lines(path) == [{"i": 3}]


def test_a_full_disk_loses_a_record_and_no_other(log, tmp_path, monkeypatch, caplog):
    real, broken = os.write, [True]
    monkeypatch.setattr(audit.os, "write", lambda fd, data: real(fd, data[:5] if broken[0] else data))
    monkeypatch.setattr(logging.getLogger("qwen_fast"), "propagate", True)
    log.write({"i": 0})
    log.write({"i": 1})
    assert [record.message for record in caplog.records] == [
        f"the audit log {tmp_path / 'audit.log'} cannot be written: 5 of 8 bytes were written"
    ]
    broken[0] = False
    log.write({"i": 2})
    assert (tmp_path / "audit.log").read_text().splitlines()[-1] == '{"i":2}'


def test_a_path_that_cannot_be_opened(tmp_path):
    with pytest.raises(OSError):
        AuditLog(str(tmp_path / "no" / "audit.log"))


@pytest.mark.parametrize("text", [False, True])
def test_requests(demo, tmp_path, text):
    path = tmp_path / "audit.log"
    config = ServerConfig(port=0, log_level="warning", api_key=("sk-secret",), audit_log=str(path), audit_log_text=text)
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 5, "seed": 3, "ignore_eos": True}
    with plug_ins(demo, config) as parts, serving(demo, config, **parts) as running:
        headers = {"authorization": "Bearer sk-secret", "x-request-id": "mine"}
        with httpx.Client(base_url=running.url, headers=headers) as client:
            answer = client.post("/v1/completions", json=body).json()
            assert running.idle()  # a record is written after its answer was sent
            assert client.post("/v1/completions", json={**body, "temperature": -1}).status_code == 400
            assert running.idle()
            assert client.post("/v1/completions", json={**body, "model": "other"}).status_code == 404
        assert running.idle()
    good, bad, unknown = lines(path)
    assert (good["principal"], good["request_id"], good["route"]) == ("key-1", "mine", "/v1/completions")
    assert (good["outcome"], good["status"], good["finish_reasons"]) == ("ok", 200, ["length"])
    assert (good["prompt_tokens"], good["completion_tokens"]) == (answer["usage"]["prompt_tokens"], 5)
    assert 0 < good["ttft_s"] <= good["seconds"]
    assert (bad["outcome"], bad["status"], unknown["status"]) == ("refused", 400, 404)
    assert "sk-secret" not in path.read_text()
    written = path.read_text()
    assert ("Once upon" in written) == text
    if text:
        assert good["output"] == [answer["choices"][0]["text"]]
