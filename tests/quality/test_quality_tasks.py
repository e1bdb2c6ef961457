"""Files of rows, axes of a matrix, options of the reference."""

from __future__ import annotations

import json

import pytest
from quality_helpers import row, write_rows

from qwen_fast import cli
from qwen_fast.quality.matrix import parse_axes, spots
from qwen_fast.quality.quality_cli import reference_options, shown_command
from qwen_fast.quality.schema_check import fits
from qwen_fast.quality.scorer import check_same_ids, check_same_vocabulary, model_name, shown_options
from qwen_fast.quality.tasks import TEXT_FILE, read_rows, select

KINDS = {name.replace("-", "_"): kind for name, kind, _ in cli._ENGINE}
ASK = [{"role": "user", "content": "What?"}]


def test_the_package_has_text_and_rows():
    rows = read_rows()
    assert len(TEXT_FILE.read_text(encoding="utf-8")) > 50_000
    kinds = {one.task: {other.kind for other in rows if other.task == one.task} for one in rows}
    assert kinds["arith"] == {"number"} and kinds["needle_long"] == {"recall"} and kinds["tools"] == {"tools"}
    assert kinds["extract"] == {"json", "text"} and kinds["smalltalk"] == {"text"} and len(kinds) == 15


def test_kinds_follow_from_the_answer(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [
        {"task": "a", "messages": ASK, "answer": '{"x": 1}'}, {"task": "a", "messages": ASK, "answer": "17"},
        {"task": "b", "messages": ASK, "answer": "none", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"task": "b", "messages": ASK, "answer": "X", "kind": "recall", "distance": 70, "schema": {"type": "string"}},
    ])  # fmt: skip
    path.write_text(path.read_text() + "\n")  # an empty line is none
    rows = read_rows(path)
    assert [one.kind for one in rows] == ["json", "text", "tools", "recall"]
    assert [one.number for one in rows] == [1, 2, 3, 4] and rows[3].distance == 70


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 5}, "'answer' must be a text, got 5"),
        ({"answer": ""}, "'answer' must be a text"),
        ({"task": None}, "'task' must be a text"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": "hi"}, "'messages' must be a list"),
        ({"kind": "essay"}, "'kind' must be one of json, tools, number, recall, text, got 'essay'"),
        ({"kind": "json"}, "kind 'json', but the answer is not JSON"),
        ({"weight": 2}, "unknown key 'weight'"),
        ({"distance": -1}, "'distance' must be a number of tokens"),
        ({"distance": True}, "'distance' must be a number of tokens"),
        ({"tools": []}, "'tools' must be a list of function descriptions"),
        ({"tools": [{"name": "f"}]}, r"tools\[0\] has no function with a name"),
        ({"schema": {"allOf": []}}, "schema keyword 'allOf' is not supported"),
    ],
)
def test_wrong_rows_say_where(change, said, tmp_path):
    good = {"task": "a", "messages": ASK, "answer": "fine"}
    path = write_rows(tmp_path / "rows.jsonl", [good, good | change])
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: {said}|rows\.jsonl, line 2: schema: .*{said}"):
        read_rows(path)


def test_wrong_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    for data, said in ((b"{", "line 1: not JSON"), (b"", "no rows"), (b"\xff\xfe", "not UTF-8")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=said):
            read_rows(path)
    path.write_text("[1]")
    with pytest.raises(TypeError, match="line 1: expected an object, got list"):
        read_rows(path)
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "nothing")


def test_selection_is_spread_over_a_task():
    rows = [row(task, "?", "!", number) for number, task in enumerate("abab" * 5, 1)]
    chosen = select(rows, 3)
    assert [one.number for one in chosen] == [1, 7, 13, 2, 8, 14]
    assert [one.task for one in select(rows, None, ["b"])] == ["b"] * 10
    assert len(select(rows, 100)) == 20
    with pytest.raises(ValueError, match="no task 'c'; there are a, b"):
        select(rows, None, ["c"])


def test_axes_span_every_cell():
    axes = parse_axes(["weights=auto,w4 head=16,8", "kv=auto,int4"], KINDS)
    found = spots(axes, (), KINDS)
    assert [one.label for one in found][:3] == [
        "weights auto, head 16, kv auto", "weights auto, head 16, kv int4", "weights auto, head 8, kv auto",
    ]  # fmt: skip
    assert len(found) == 8
    assert found[-1].options == {"quantization": "w4", "lm_head_dtype": "int8", "kv_cache_dtype": "int4"}
    assert found[0].options["lm_head_dtype"] == "model"
    some = spots(axes, ["weights=w4 kv=int4", "head=16 kv=auto"], KINDS)
    assert [one.axes["kv"] for one in some] == ["auto", "auto", "int4", "int4"]
    (other,) = spots(parse_axes(["weights=demo block-size=16"], KINDS), (), KINDS)
    assert other.model == "demo" and other.options == {"block_size": 16}


@pytest.mark.parametrize(
    ("texts", "chosen", "said"),
    [
        (["weights"], (), "an axis is NAME=VALUE"), (["kv="], (), "an axis is NAME=VALUE"), (["colour=red"], (), "unknown axis 'colour'"),
        (["kv=a kv=b"], (), "'kv' is given twice"), (["kv=a,a"], (), "has a value twice"), (["kv=a kv-cache-dtype=b"], (), "one option"),
        (["weights=w5"], (), "neither one of .* nor a checkpoint"), (["block-size=big"], (), "block-size=big: not a value of int"),
        (["kv=int4"], ["kv=int8"], "no cell has kv=int8; the matrix has kv=int4"), (["kv=int4"], ["head=8"], "no cell has head=8"),
    ],
)  # fmt: skip
def test_wrong_axes(texts, chosen, said):
    with pytest.raises(ValueError, match=said):
        spots(parse_axes(texts, KINDS), chosen, KINDS)


def test_the_reference_has_16_bits_and_the_rest_as_asked():
    options = {
        "device": "cpu",
        "quantization": "w4",
        "kv_cache_dtype": "int4",
        "num_threads": 2,
        "tokenizer": "t",
        "kv_cache_tokens": 9,
    }
    base = reference_options(options, {}, same_checkpoint=True)
    assert base == {"device": "cpu", "num_threads": 2, "tokenizer": "t", "kv_cache_tokens": 9, "dtype": "float32", "activation_dtype": "float32",
                    "lm_head_dtype": "model", "kv_cache_dtype": "bfloat16"}  # fmt: skip
    other = reference_options(options, {"kv_cache_dtype": "int8", "memory": "1GiB"}, same_checkpoint=False)
    assert other["kv_cache_dtype"] == "int8" and "tokenizer" not in other and "kv_cache_tokens" not in other
    gpu = reference_options({"device": "cuda:1"}, {}, same_checkpoint=True)
    assert gpu["dtype"] == "bfloat16" and "activation_dtype" not in gpu


def test_reports_name_no_folders(tmp_path):
    assert (
        model_name(tmp_path) == tmp_path.name
        and model_name("demo") == "demo"
        and model_name("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"
    )
    assert shown_options({"tokenizer": "/a/b/c", "dtype": "float32"}) == {"dtype": "float32", "tokenizer": "c"}
    command = [
        "/usr/bin/qwen-fast",
        "quality",
        "/home/me/model",
        "--out=/x/y",
        "--matrix",
        "weights=auto,/home/me/awq kv=int4",
    ]
    assert shown_command(command) == "qwen-fast quality model --out=y --matrix 'weights=auto,awq kv=int4'"


def test_vocabularies_and_ids_must_agree():
    check_same_vocabulary([b"a", b"b"], [b"a", b"b"])
    with pytest.raises(ValueError, match="the reference's has 2 token ids, the measured model's 1"):
        check_same_vocabulary([b"a", b"b"], [b"a"])
    with pytest.raises(ValueError, match="token id 1 is b'b' in the reference and b'c' in the measured model"):
        check_same_vocabulary([b"a", b"b"], [b"a", b"c"])
    check_same_ids([1, 2], [1, 2])
    with pytest.raises(
        ValueError, match="3 tokens for the reference and 2 for the measured model, and they part at token 1"
    ):
        check_same_ids([1, 2, 3], [1, 3])
    with pytest.raises(ValueError, match="part at token 2"):
        check_same_ids([1, 2, 3], [1, 2])


def test_axes_are_told_as_json_texts():
    json.dumps([one.axes for one in spots(parse_axes(["num-threads=1,2"], KINDS), (), KINDS)])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        *[
            ({"schema": schema}, message)
            for schema, message in (
                ({"type": {"a": 1}}, "unknown type"),
                ({"properties": [1]}, "properties must be an object"),
                ({"anyOf": 5}, "anyOf must be a list"),
                ({"enum": 5}, "enum must be a list"),
                ({"required": "ab"}, "required must be a list of names"),
                ({"minimum": "5"}, "minimum must be a number"),
                ({"minimum": float("nan")}, "NaN is no JSON value"),
            )
        ],
        ({"task": "\ud800"}, "lone surrogate"),
    ],
)
def test_rows_that_would_fail_only_when_scored(tmp_path, more, message):
    row = {"task": "a", "messages": [{"role": "user", "content": "Hi"}], "answer": "x", **more}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=f"rows.jsonl, line 1: .*{message}"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_whole_number_of_any_length_fits():
    assert fits(10**400, {"type": "integer"}) and fits(2.0, {"type": "integer"}) and not fits(2.5, {"type": "integer"})
