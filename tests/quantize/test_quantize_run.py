"""Whole runs: what they refuse, what a failure leaves behind, going on after an interruption, the same bytes each time."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import files_of, log_probs, mean_kl, read_tensors, token_blocks, write_model

from qwen_fast import ModelError
from qwen_fast.cli import main
from qwen_fast.quantize import quantize
from qwen_fast.quantize import run as run_module
from qwen_fast.quantize import work as work_module
from qwen_fast.quantize.calibration import load_blocks
from qwen_fast.utils import DEMO_DIR

OPTIONS = {"device": "cpu", "progress": False, "num_threads": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("run") / "model", num_hidden_layers=3)


def make(model, out, **options):
    return quantize(model, out, calibration=token_blocks(), **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """The files of an uninterrupted run, by method."""
    found = {}
    for method in ("awq", "gptq"):
        out = tmp_path_factory.mktemp(method) / "out"
        make(model, out, method=method)
        found[method] = files_of(out)
    return found


# -- the same bytes


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_second_run_gives_the_same_bytes(model, tmp_path, expected, method):
    make(model, tmp_path / "again", method=method)
    assert files_of(tmp_path / "again") == expected[method]
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # the work directory is gone


class Stop(BaseException):
    """What no code catches by accident."""


def stop_after(monkeypatch, layer, name="save_layer"):
    """Runs end after the given step of the given layer."""
    original = getattr(work_module.Work, name)

    def step(self, index, *args):
        original(self, index, *args)
        if index == layer:
            raise Stop

    monkeypatch.setattr(work_module.Work, name, step)


@pytest.mark.parametrize(
    ("method", "layer", "step", "goes_on_at"),
    [
        ("awq", 1, "save_hidden", 1),
        ("gptq", 0, "save_layer", 0),
        ("gptq", 1, "save_hidden", 1),
        ("gptq", 2, "save_layer", 3),
    ],
)
def test_going_on_gives_the_same_bytes(model, tmp_path, expected, monkeypatch, method, layer, step, goes_on_at):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, layer, step)
        with pytest.raises(Stop):
            make(model, out, method=method)
    assert not out.exists() and (tmp_path / "out.quantizing").is_dir()
    report = make(model, out, method=method)
    assert report["resumed_at_layer"] == goes_on_at
    assert files_of(out) == expected[method]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_interrupted(model, tmp_path, expected, kind):
    """The command, killed when its first layer is there: only the work directory is left, and the next run ends well."""
    out, ids = tmp_path / "out", tmp_path / "ids.jsonl"
    ids.write_text("".join(json.dumps({"token_ids": block}) + "\n" for block in token_blocks()))
    text = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a background job of a shell ignores
        "from qwen_fast.quantize import work\n"
        "from qwen_fast.cli import main\n"
        "save = work.Work.save_hidden\n"
        "work.Work.save_hidden = lambda *a: (save(*a), print('saved', flush=True), time.sleep(60))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    # Blocks of the file are joined and cut again: 256 tokens a block gives the blocks of the list.
    options = ["--method", "gptq", "--calibration", str(ids), "--device", "cpu", "--num-threads", "2"]
    command = [sys.executable, "-c", text, "quantize", str(model), str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saved\n"
    process.send_signal(kind)
    _, said = process.communicate(timeout=60)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["ids.jsonl", "out.quantizing"]
    if kind == signal.SIGINT:
        assert process.returncode == 130 and f"goes on from {out}.quantizing" in said
    assert main(["quantize", str(model), str(out), *options]) == 0
    tensors = read_tensors(out)
    ids = list(range(200))
    assert mean_kl(log_probs(model, ids), log_probs(out, ids)) < 0.6 and "model.layers.2.mlp.up_proj.qweight" in tensors


def test_other_work_is_not_taken(model, tmp_path, monkeypatch, expected):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stop):
            make(model, out, method="awq")
    with pytest.raises(ValueError, match=r"other options\).*restart"):
        make(model, out, method="gptq")
    with pytest.raises(ValueError, match=r"other calibration\)"):
        quantize(model, out, method="awq", calibration=token_blocks(seed=2), **OPTIONS)
    other = write_model(tmp_path / "other", seed=4, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"other model\)"):
        make(other, out, method="awq")
    report = make(model, out, method="gptq", restart=True)
    assert report["resumed_at_layer"] == 0 and files_of(out) == expected["gptq"]


def test_two_runs_at_once(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    said = []

    def second(self, *args):
        try:
            make(model, out, method="rtn")
        except RuntimeError as error:
            said.append(str(error))

    monkeypatch.setattr(work_module.Work, "finish", second)
    make(model, out, method="rtn")
    assert said == [f"another run is at work in {out}.quantizing"]


# -- what is refused, with nothing left behind


REFUSED = {
    "an unknown method": ({"method": "foo"}, "method must be one of awq, gptq, rtn; got 'foo'"),
    "an unknown format": ({"method": "awq", "format": "gguf"}, "format must be one of awq, gptq, compressed-tensors"),
    "bits": ({"method": "rtn", "bits": 3}, "bits must be one of 4, 8; got 3"),
    "8 bits of AWQ's format": ({"method": "awq", "bits": 8}, "holds 4 bits only"),
    "symmetric AWQ files": ({"method": "awq", "symmetric": True}, "stores zero points"),
    "a group size": ({"method": "awq", "group_size": 48}, "group_size must be one of 32, 64, 128, -1; got 48"),
    "a head in AWQ": ({"method": "awq", "head_bits": 8}, "format='awq' knows no quantised head"),
    "a head in GPTQ": ({"method": "gptq", "head_bits": 8}, "one number of bits for all modules"),
    "head bits": ({"method": "rtn", "head_bits": 4}, "head_bits must be one of 8, 16"),
    "an order for AWQ": ({"method": "awq", "act_order": "group"}, "act_order='group' is for method='gptq'"),
    "an unknown order": ({"method": "gptq", "act_order": "desc"}, "act_order must be one of weight, group, none"),
    "desc_act in AWQ's format": ({"method": "gptq", "format": "awq", "act_order": "group"}, "cannot say which group"),
    "damp": ({"method": "gptq", "damp": 0.0}, "damp must be above 0"),
    "no samples": ({"method": "gptq", "num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
    "a device": ({"method": "rtn", "device": "tpu"}, "device must be auto, cpu, cuda"),
    "a dtype": ({"method": "rtn", "dtype": "float16"}, "dtype must be one of auto, float32, bfloat16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options(model, tmp_path, name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make(model, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_group_size_that_does_not_divide(tmp_path):
    model = write_model(tmp_path / "model", intermediate_size=192)
    with pytest.raises(
        ValueError, match="down_proj has 192 inputs, no multiple of group_size=128; 32, 64, -1 would fit"
    ):
        make(model, tmp_path / "out", method="awq")
    assert make(model, tmp_path / "out", method="rtn", group_size=64)["group_size"] == 64


def test_where_out_may_be(model, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    for out, message in (
        (there, "exists already"),
        (tmp_path / "no" / "out", "is no directory"),
        (model / "out", "inside the model's directory"),
    ):
        with pytest.raises(ValueError, match=message):
            make(model, out, method="rtn")
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(ValueError, match="inside the model's directory"):
        make(model, tmp_path / "link" / "out", method="rtn")
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("restart", [False, True])
def test_a_directory_of_somebody_else(model, tmp_path, restart):
    """OUT.quantizing that no run made is left as it is."""
    there = tmp_path / "out.quantizing"
    (there / "out").mkdir(parents=True)
    (there / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not the work of a run .it holds 'out'"):
        make(model, tmp_path / "out", method="rtn", restart=restart)
    assert files_of(tmp_path) == {"out.quantizing/out/notes.txt": b"mine"}
    (tmp_path / "two.quantizing").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match="not the work of a run .it is a link"):
        make(model, tmp_path / "two", method="rtn", restart=restart)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 5}, "model.layers.3.*missing"),
        ({"tie_word_embeddings": False}, "lm_head.weight.*missing"),
        ({"max_position_embeddings": -5}, "max_position_embeddings"),
        ({"intermediate_size": 512}, r"expected \(512, 128\)"),
    ],
)
def test_what_the_engine_would_not_load_is_refused_before_any_work(model, tmp_path, method, changes, message):
    bad = write_model(tmp_path / "bad", num_hidden_layers=3)
    (bad / "config.json").write_text(json.dumps({**json.loads((bad / "config.json").read_text()), **changes}))
    with pytest.raises(ModelError, match=message):
        make(bad, tmp_path / "out", method=method)
    with pytest.raises(ValueError, match="num_threads"):
        make(model, tmp_path / "out", method=method, num_threads=-5)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_an_unwritable_place(model, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, whom no mode stops
    with pytest.raises(ValueError, match="cannot be written"):
        make(model, tmp_path / "out", method="rtn")
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_quantised(model, tmp_path):
    make(model, tmp_path / "once", method="rtn")
    with pytest.raises(ModelError, match="quantised already .its config.json says 'compressed-tensors'"):
        make(tmp_path / "once", tmp_path / "twice", method="awq")
    with pytest.raises(ModelError, match="quantised already"):
        make(DEMO_DIR, tmp_path / "twice", method="awq")
    with pytest.raises(ModelError, match="no such directory"):
        make(str(tmp_path / "nowhere") + "/", tmp_path / "out", method="awq")
    for name, changes, message in (
        ("llama", {"model_type": "llama"}, "model_type is 'llama'"),
        ("text", {"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
    ):
        path = write_model(tmp_path / name)
        (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **changes}))
        with pytest.raises(ModelError, match=message):
            make(path, tmp_path / "out", method="awq")
    (path / "config.json").write_text((model / "config.json").read_text())  # one layer more than there are tensors for
    with pytest.raises(ModelError, match=r"model.layers.2.*missing"):
        make(path, tmp_path / "out", method="rtn")
    (path / "model.safetensors").write_bytes(b"\1" * 100)
    with pytest.raises(ModelError, match="is no safetensors file"):
        make(path, tmp_path / "out", method="rtn")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(tmp_path):
    model = write_model(tmp_path / "model")
    raw = bytearray((model / "model.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    begin, _ = json.loads(raw[8 : 8 + length])["model.layers.1.mlp.up_proj.weight"]["data_offsets"]
    raw[8 + length + begin : 8 + length + begin + 2] = b"\xc0\x7f"
    (model / "model.safetensors").write_bytes(raw)
    with pytest.raises(ModelError, match="model.layers.1.mlp.up_proj.weight' holds values that are not finite"):
        make(model, tmp_path / "out", method="gptq")
    assert not (tmp_path / "out").exists()


# -- calibration files


FILES = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n \n", "is empty"),
    "short.txt": (b"one two three", "calibration needs at least 512"),
    "binary.txt": (b"\xff\xfe" * 2000, "byte 0 is not UTF-8"),
    "zeros.txt": (b"text \0 text", "NUL at character 5"),
    "broken.jsonl": (b'{"text": "fine"}\n{"text": \n', "line 2: not JSON"),
    "list.jsonl": (b"[1, 2]\n", "line 1: expected an object with"),
    "nested.jsonl": (b'{"text": "x"}\n{"token_ids": [[1], [2, 3]]}\n', r"line 2: token ids.*got \[1\]"),
    "truth.jsonl": (b'{"token_ids": [1, true]}\n', "line 1: token ids.*got True"),
    "content.jsonl": (b'{"text": "x"}\n{"messages": [{"role": "user", "content": {}}]}\n', "line 2: messages"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "line 1: the text holds a lone surrogate"),
    "keys.jsonl": (b'{"prompt": "x"}\n', "line 1: expected an object with"),
    "ids.jsonl": (b'{"token_ids": [1, 2, 99999]}\n', "whole numbers from 0 to 8191"),
    "floats.jsonl": (b'{"token_ids": [1.5]}\n', "whole numbers from 0 to 8191"),
    "messages.jsonl": (b'{"messages": [{"role": "nobody", "content": "x"}]}\n', "role"),
}


@pytest.fixture(scope="module")
def demo_tools():
    from qwen_fast.loading import load_tokenizer

    return load_tokenizer(str(DEMO_DIR), None, 8192, None, None, None)


@pytest.mark.parametrize("name", FILES)
def test_bad_calibration_files(tmp_path, demo_tools, name):
    data, message = FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_blocks(tmp_path / name, *demo_tools, 8, 64, 8192)


def test_good_calibration(tmp_path, demo_tools):
    tokenizer, _ = demo_tools
    text = "Bees turn nectar into honey and store it in the hive. " * 100
    ids = tokenizer.encode(text)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"token_ids": ids}) + "\n")
    expected = np.array(ids[: len(ids) // 64 * 64]).reshape(-1, 64)
    for source in (tmp_path / "a.txt", str(tmp_path / "a.jsonl"), tmp_path / "b.jsonl", [text], [ids]):
        assert (load_blocks(source, *demo_tools, 1000, 64, 8192) == expected).all()
    four = load_blocks([text], *demo_tools, 4, 64, 8192)
    assert (four == expected[[0, len(expected) // 4, len(expected) // 2, 3 * len(expected) // 4]]).all()
    chat = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(chat))
    rows = load_blocks(tmp_path / "c.jsonl", *demo_tools, 1000, 64, 8192)
    assert tokenizer.encode("<|im_start|>")[0] in rows[0] and rows.shape[1] == 64
    built_in = load_blocks(None, *demo_tools, 128, 512, 8192)
    assert built_in.shape[0] > 100 and built_in.shape[1] == 512


def test_line_ends_of_a_jsonl_file(tmp_path, demo_tools):
    """A text may hold U+2028 and its like as they are; a mark at the file's beginning is no text."""
    text = "Bees turn nectar into honey.\u2028\x85 " * 100
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n"
    )
    assert (
        load_blocks(tmp_path / "a.jsonl", *demo_tools, 8, 64, 8192) == load_blocks([text], *demo_tools, 8, 64, 8192)
    ).all()


def test_text_without_a_tokenizer(model, tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        quantize(model, tmp_path / "out", method="awq", **OPTIONS)
    with pytest.raises(ValueError, match="must be a path, a list"):
        quantize(model, tmp_path / "out", method="awq", calibration=[], **OPTIONS)


# -- disks


def test_a_full_disk(model, tmp_path):
    """A limit on the size of files, set in a process of its own, in place of a disk without space."""
    text = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from qwen_fast.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", text, "quantize", str(model), str(tmp_path / "out"), "--method", "rtn"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "cannot write" in done.stderr and os.strerror(errno.EFBIG) in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.quantizing"]
    assert not list(tmp_path.rglob("*.part"))
    make(model, tmp_path / "out", method="rtn", restart=True)


def test_a_disk_that_fills_at_the_end(model, tmp_path, monkeypatch):
    """While the new checkpoint is put together: the layers are kept, and the next run has little to do."""

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_write_shards", fail)
        with pytest.raises(OSError, match="No space left"):
            make(model, tmp_path / "out", method="rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["out.quantizing"]
    assert make(model, tmp_path / "out", method="rtn")["resumed_at_layer"] == 3
    make(model, tmp_path / "again", method="rtn")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")


# -- the command


def test_the_command(model, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", str(model), str(out), "--method", "rtn", "--group-size", "32", "--asymmetric"]) == 0
    said = capsys.readouterr().out
    assert "rtn, 4 bits, groups of 32, asymmetric, format compressed-tensors" in said and "peak memory" in said
    assert main(["quantize", str(model), str(out), "--method", "rtn"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["quantize", str(model), str(tmp_path / "two"), "--method", "rtn", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "two")
    assert main(["quantize", str(model), str(tmp_path / "three"), "--method", "nearest"]) == 2
    assert "method must be one of" in capsys.readouterr().err
