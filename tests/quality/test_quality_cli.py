"""`qwen-fast quality` on the demo model."""

from __future__ import annotations

import json
import shutil
import subprocess

import jsonschema
import pytest
from quality_helpers import write_rows

from qwen_fast.cli import main
from qwen_fast.quality import EngineScorer
from qwen_fast.quality.matrix import parse_axes, spots
from qwen_fast.quality.report import SCHEMA_PATH
from qwen_fast.quality.spool import LiveRows
from qwen_fast.quality.tasks import TEXT_FILE
from qwen_fast.quality.text import compare_text, windows_of

FEW = ["--limit", "1", "--tokens", "600", "--draws", "200", "--window", "300", "--max-new-tokens", "60"]


def run(capsys, tmp_path, *arguments):
    code = main(["quality", *arguments, "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_pair_and_a_refused_cell(capsys, tmp_path):
    matrix = [
        "--matrix",
        "head=8,16",
        "--matrix",
        "quantization=auto,gptq",
        "--cells",
        "head=8",
        "--cells",
        "head=16 quantization=auto",
    ]
    code, out, err = run(
        capsys, tmp_path, "demo", *FEW, *matrix, "--only", "arith,tools,extract,needle", "--json", "--max-kl", "0.5"
    )
    document = json.loads(out)
    jsonschema.validate(document, json.loads(SCHEMA_PATH.read_text()))
    measured, refused, close = document["cells"]
    assert code == 1 and "no KL divergence was measured" in err  # the refused cell
    assert (measured["status"], refused["status"], close["status"]) == ("measured", "refused", "measured")
    assert "gptq" in refused["why"] and measured["about"]["lm_head_dtype"] == "int8"
    assert measured["text"]["positions"] == 598 and 0 < close["text"]["kl_mean"]["value"] < 0.05
    assert measured["text"]["same_top"]["value"] > 0.85
    assert document["reference"]["lm_head_dtype"] == "model" and document["reference"]["dtype"] == "float32"
    assert "float32 logits (exact)" in document["reference"]["logits"]
    assert measured["tasks"]["all"]["rows"] == 4
    written = {one.name: one.read_text() for one in (tmp_path / "out").iterdir()}
    assert set(written) == {"report.json", "report.html"} and json.loads(written["report.json"]) == document
    assert str(tmp_path) not in written["report.json"] + written["report.html"]
    code, out, _ = run(capsys, tmp_path, "--render", str(tmp_path / "out" / "report.json"))
    assert code == 0 and "Exact match by task" in out and "refused" in out


def test_own_text_and_rows_and_no_difference(capsys, tmp_path):
    """The same options on both sides: the instrument's zero."""
    text = tmp_path / "own.txt"
    text.write_text(TEXT_FILE.read_text(encoding="utf-8")[:900], encoding="utf-8")
    rows = write_rows(
        tmp_path / "own.jsonl",
        [{"task": "mine", "messages": [{"role": "user", "content": "What is 3 + 4?"}], "answer": "3 + 4 = 7"}],
    )
    same = [
        "--against-dtype",
        "auto",
        "--against-activation-dtype",
        "auto",
        "--against-lm-head-dtype",
        "auto",
        "--against-kv-cache-dtype",
        "auto",
    ]
    code, out, err = run(
        capsys,
        tmp_path,
        "demo",
        "--text",
        str(text),
        "--tasks",
        str(rows),
        "--draws",
        "200",
        *same,
        "--json",
        "--max-kl",
        "0",
    )
    document = json.loads(out)
    (cell,) = document["cells"]
    assert code == 0 and cell["text"]["identical"] and cell["text"]["kl_max"] == 0 and not cell["tasks"]["differences"]
    assert cell["tasks"]["outcomes"] == {"mine": "1"} and document["settings"]["text"] == "own.txt"
    assert "both models loaded at once" in document["reference"]["logits"] and "measuring demo" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--kv-cache-dtype", "int3"], "int3"),
        (["demo", "--window", "1"], "window must be an integer of at least 2"),
        (["demo", "--cells", "kv=int4"], "--cells chooses among the cells of --matrix"),
        (["demo", "--matrix", "colour=red"], "unknown axis 'colour'"),
        (["demo", "--only", "poetry"], "no task 'poetry'"),
        (["demo", "--no-text", "--no-tasks"], "nothing to measure"),
        (["demo", "--reference-logits", "disk"], "reference_logits must be one of"),
    ],
)
def test_wrong_arguments(arguments, said, capsys, tmp_path):
    code, _, err = run(
        capsys, tmp_path, *arguments, "--tokens", "100", *([] if "--only" in arguments else ["--no-tasks"])
    )
    assert code == 2 and said in err and "Traceback" not in err


def test_unknown_options_and_bad_files(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["quality", "demo", "--against-colour", "red"])
    assert stop.value.code == 2 and "--against-colour" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"task": "x"}')
    code, _, err = run(capsys, tmp_path, "demo", "--tasks", str(bad))
    assert code == 2 and "bad.jsonl, line 1: 'answer' must be a text, got None" in err
    bad.write_bytes(b"\xff\xff")
    code, _, err = run(capsys, tmp_path, "demo", "--text", str(bad))
    assert code == 2 and "bad.jsonl: not UTF-8" in err
    code, _, err = run(capsys, tmp_path, "demo", "--text", str(tmp_path / "none.txt"))
    assert code == 1 and "none.txt" in err


def test_tokenizers_that_differ(capsys, tmp_path, demo_dir):
    other = tmp_path / "other"
    other.mkdir()
    for path in demo_dir.iterdir():
        if path.suffix in (".json", ".safetensors"):
            shutil.copy(path, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    code, _, err = run(capsys, tmp_path, "demo", "--against", str(other), *FEW, "--no-tasks")
    assert code == 2 and "the tokenizers differ: token id 300 is" in err


def test_the_engine_gives_the_same_rows_however_they_are_asked_for(monkeypatch):
    """Pieces of a window come from the prefix cache: the same bits as one request, and as LLM's own prompt_logprobs."""
    from qwen_fast import SamplingParams
    from qwen_fast.quality import text as texts

    options = {"kv_cache_tokens": 4096}
    sides = [EngineScorer("demo", options), EngineScorer("demo", options | {"lm_head_dtype": "model"})]
    try:
        windows = windows_of(sides[0].encode(TEXT_FILE.read_text(encoding="utf-8"))[:300], 200)

        def found():
            return compare_text(windows, sides[0].vocab_size, *(LiveRows(side, windows) for side in sides))

        whole = found()
        monkeypatch.setattr(texts, "PIECE_BYTES", 4 * 8192 * 23)
        cut = found()
        assert all((getattr(whole, name) == getattr(cut, name)).all() for name in texts.NAMES)
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        (output,) = sides[1].llm.generate({"prompt_token_ids": windows[0]}, params, progress=False)
        logprobs = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], windows[0][1:])]
        assert -whole.nll[:199] == pytest.approx(logprobs, abs=2e-5)
    finally:
        for side in sides:
            side.close()


def test_a_checkpoint_without_a_tokenizer(tiny_config):
    with pytest.raises(ValueError, match="quality needs a tokenizer"):
        EngineScorer(tiny_config(), {"load_format": "dummy", "kv_cache_tokens": 256})


@pytest.mark.long
def test_the_whole_set_and_in_chromium(capsys, tmp_path, shared_dir):
    """The reference answers what it is known to, and its perplexity is the one in the model's description."""
    arguments = ["demo", "--against", str(shared_dir / "demo-model"), "--window", "2048", "--json"]
    code, out, _ = run(capsys, tmp_path, *arguments)
    document = json.loads(out)
    (cell,) = document["cells"]
    assert code == 0 and cell["text"]["perplexity_reference"]["value"] == pytest.approx(1.9340, abs=2e-4)
    assert sum(one.count("1") for one in document["reference"]["outcomes"].values()) >= 590
    assert (
        0.0005 < cell["text"]["kl_mean"]["value"] < 0.01
        and cell["tasks"]["all"]["metrics"]["exact"]["difference"]["low"] > -0.03
    )
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    page = (tmp_path / "out" / "report.html").as_uri()
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dump = subprocess.run(
        [*command, "--dump-dom", page], check=True, timeout=120, capture_output=True, text=True
    ).stdout
    assert dump.count("<table") >= 9 and dump.count("<svg") >= 3
    shot = tmp_path / "shot.png"
    subprocess.run(
        [*command, "--window-size=1280,2400", f"--screenshot={shot}", page],
        check=True,
        timeout=120,
        capture_output=True,
    )
    assert shot.stat().st_size > 50_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-kl", "nan"], "--max-kl must be a number of at least 0"),
        (["--bootstrap-seed", "-1"], "seed must be an integer of at least 0"),
        (["--spool-folder", "/no/such/folder"], "spool_folder is no directory"),
        (["--matrix", ""], "no axis is given"),
        (["--text", "EMPTY"], "empty.txt is empty"),
        (["--out", "EMPTY"], "is no directory"),
        (["--out", "EMPTY/report"], "is no directory"),
    ],
)
def test_refused_before_anything_is_loaded(capsys, tmp_path, monkeypatch, options, message):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("qwen_fast.quality.scorer.EngineScorer.__init__", load)
    (tmp_path / "empty.txt").touch()
    given = [one.replace("EMPTY", str(tmp_path / "empty.txt")) for one in options]
    out = [] if "--out" in options else ["--out", str(tmp_path / "report")]
    assert main(["quality", "demo", "--device", "cpu", *out, *given]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize("rest", [{}, {"cells": 5, "sections": 3, "notes": 1, "reference": [], "definitions": {}}])
def test_a_report_in_part_is_not_shown(capsys, tmp_path, rest):
    (tmp_path / "report.json").write_text(json.dumps({"schema": "qwen_fast quality report, version 1", **rest}))
    assert main(["quality", "--render", str(tmp_path / "report.json"), "--out", str(tmp_path / "out")]) == 2
    assert "report.json: not a whole report" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_one_name_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "same").mkdir(parents=True)
    kinds = {"quantization": str}
    axes = parse_axes([f"weights=w4,{tmp_path}/a/same,{tmp_path}/b/same"], kinds)
    assert [one.label for one in spots(axes, (), kinds)] == ["weights w4", "weights same", "weights same (2)"]
