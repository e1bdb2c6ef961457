"""Workloads: the studies' lengths, files of prompts, access logs, and what is scaled down says so."""

from __future__ import annotations

import itertools
import json

import pytest

from qwen_fast.cost.workloads import (
    STUDY_A,
    STUDY_A_USERS,
    STUDY_B,
    STUDY_B_USERS,
    Workload,
    fixed,
    from_access_log,
    from_jsonl,
    parse_lengths,
    scaled,
)


def take(workload: Workload, count: int, limit: int = 1000) -> list[list[int]]:
    return [ids for ids, _, _ in itertools.islice(workload.requests(limit), count)]


def test_the_studies():
    assert [(one.items[0].prompt_tokens, one.items[0].output_tokens) for one in STUDY_A] == [
        (120, 280),
        (1850, 620),
        (310, 1100),
    ]
    assert (STUDY_B.items[0].prompt_tokens, STUDY_B.items[0].output_tokens) == (2048, 512)
    assert STUDY_A_USERS == (1, 16, 32) and STUDY_B_USERS == (1, 2, 4, 8, 16)


def test_made_up_prompts_differ_from_their_beginning_and_repeat():
    first = take(STUDY_A[0], 50)
    assert all(len(ids) == 120 for ids in first)
    assert len({tuple(ids[:8]) for ids in first}) == 50  # nothing for a prefix cache to find
    assert take(STUDY_A[0], 50) == first
    assert all(0 <= token < 1000 for ids in first for token in ids)
    shared = take(fixed("s", "s", 20, 5, shared_tokens=15), 10)
    assert len({tuple(ids[:15]) for ids in shared}) == 1 and len({tuple(ids) for ids in shared}) == 10
    assert all(len(ids) == 20 for ids in shared)


@pytest.mark.parametrize("text", ["", "512", "512/", "/128", "a/b", "1/2/3", "-1/5", "1.5/2"])
def test_lengths_that_are_none(text):
    with pytest.raises(ValueError, match="lengths must be IN/OUT such as 512/128"):
        parse_lengths(text)


def test_lengths():
    assert parse_lengths("512/128").label == "own lengths, 512 in / 128 out"
    with pytest.raises(ValueError, match="output_tokens must be at least 1, got 0"):
        parse_lengths("5/0")
    with pytest.raises(TypeError, match="prompt_tokens must be an integer"):
        fixed("x", "x", 1.5, 2)


def test_scaling_keeps_the_ratio_and_says_so():
    found = scaled(STUDY_B, 640, "max_model_len is 640")
    assert (found.items[0].prompt_tokens, found.items[0].output_tokens) == (512, 128)
    assert found.notes == ("scaled down from 2,048 in / 512 out to 512 / 128: max_model_len is 640",)
    assert scaled(STUDY_B, 2560, "why") == STUDY_B
    assert scaled(fixed("x", "x", 1000, 1), 10, "why").items[0].output_tokens == 1


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        '"a text"',
        '{"prompt": "b", "max_tokens": 7}',
        "",
        '{"prompt_token_ids": [1, 2]}',
        '{"messages": [{"role": "user", "content": "c"}]}',
    ]
    path.write_text("\n".join(lines))
    found = from_jsonl(path, 11)
    assert [item.output_tokens for item in found.items] == [11, 7, 11, 11]
    assert all(item.ends for item in found.items)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", r":1: not JSON"),
        ('"a"\n{"prompt": 3}', r":2: a prompt must be a text, messages or token ids, got 3"),
        ('{"prompt": "a", "max_tokens": 0}', r":1: max_tokens must be an integer of at least 1, got 0"),
        ('{"prompt": "a", "max_tokens": true}', r"max_tokens must be an integer"),
        ('{"text": "a"}', r":1: needs one of prompt, messages and prompt_token_ids, has \['text'\]"),
        ('{"prompt": "a", "messages": []}', r"needs one of"),
        ('""', r"a prompt must be"),
        ("", r"no prompts in it"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        from_jsonl(path)


def record(**changes):
    return {"time": 100.0, "seconds": 2.0, "prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 6, "sequences": 1,
            "outcome": "ok", **changes}  # fmt: skip


def test_an_access_log(tmp_path):
    """Four requests of 2 s over 4 s: two at once. n = 2 counts as two sequences of half the tokens."""
    path = tmp_path / "audit.jsonl"
    entries = [record(), record(time=101.0), record(time=102.0, sequences=2, completion_tokens=12),
               record(outcome="cancelled"), record(completion_tokens=0)]  # fmt: skip
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = from_access_log(path)
    assert [(item.prompt_tokens, item.output_tokens) for item in found.items] == [(10, 6)] * 4
    assert found.users == 2
    assert any("2 records left out" in note for note in found.notes)
    assert any("30 % of the recorded prompt tokens came from the prefix cache" in note for note in found.notes)


def test_access_logs_that_are_wrong(tmp_path):
    path = tmp_path / "audit.jsonl"
    for entry, message in (
        ({"a": 1}, ":1: no record of an audit log"),
        ([], ":1: no record of an audit log"),
        (record(prompt_tokens="3"), ":1: token counts must be integers"),
        (record(outcome="error"), "no request in it ended well"),
    ):
        path.write_text(json.dumps(entry))
        with pytest.raises(ValueError, match=message):
            from_access_log(path)


def test_the_log_is_the_servers(tmp_path):
    """What the server writes is what is read here."""
    state = pytest.importorskip("qwen_fast.server.state")
    from qwen_fast.server.audit import AuditLog
    from qwen_fast.server.generate import audit_entry

    path = tmp_path / "audit.jsonl"
    log = AuditLog(str(path))
    made = state.RequestRecord(request_id="1", principal=state.Principal("someone"), route="/v1/completions")
    made.prompt_tokens, made.completion_tokens, made.outcome, made.num_sequences = 33, 7, "ok", 1
    log.write(audit_entry(made))
    log.close()
    (item,) = from_access_log(path).items
    assert (item.prompt_tokens, item.output_tokens) == (33, 7)
