"""What a run takes up from an earlier one, what it does where a stage fails, and how large it makes the KV cache."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cost_helpers import load

from qwen_fast import EngineError
from qwen_fast.cost import run
from qwen_fast.cost.identity import earlier_run, model_stamp, workload_stamp
from qwen_fast.cost.measure import device_indices
from qwen_fast.cost.money import Prices
from qwen_fast.cost.report import Report
from qwen_fast.cost.run import Runner, Settings, repriced
from qwen_fast.cost.workloads import Item, Workload, fixed, from_jsonl
from qwen_fast.utils import DEMO_DIR

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def hurried(options, settings, path, loader=load):
    """The stages that a run takes up, with no time to measure more; and what it says."""
    said = []
    return Runner(options, replace(settings, budget_s=1e-6), loader, path, said.append).run(), said


def test_another_question_takes_up_nothing_and_says_so(measured, settings, tmp_path):
    data, _ = measured
    path = tmp_path / "measurements.json"

    def again(options, changed):
        path.write_text(json.dumps(data, default=str))
        return hurried(options, changed, path)

    taken, said = again({}, settings)
    assert set(taken["stages"]) == set(data["stages"]) and said == []
    others = (*settings.workloads[:2], fixed("chat", "chat", 30, 7))
    for options, changed, name in (
        ({"block_size": 16}, settings, "options"),
        ({}, replace(settings, workloads=others), "workloads"),
        ({}, replace(settings, users=(1, 2)), "workloads"),
        ({}, replace(settings, window_s=0.03), "window_s"),
    ):
        taken, said = again(options, changed)
        assert not taken["stages"] and said[0] == f"{path} is of another run ({name} differ); it is begun anew"


@pytest.mark.parametrize("given", [{"peak_gbs": 5.0}, {"peak_tflops": 7.0}])
def test_peaks_that_are_given_are_not_those_of_the_earlier_run(measured, settings, tmp_path, given):
    data, _ = measured
    path = tmp_path / "measurements.json"
    path.write_text(json.dumps(data, default=str))
    taken, _ = hurried({}, replace(settings, **given), path)
    assert set(data["stages"]) - set(taken["stages"]) == {"peaks", "peaks-after"}
    once_given = {**data, "settings": {**data["settings"], **given}}
    path.write_text(json.dumps(once_given, default=str))
    taken, _ = hurried({}, settings, path)
    assert set(data["stages"]) - set(taken["stages"]) == {"peaks", "peaks-after"}


def test_every_request_counts(tmp_path):
    items = tuple(Item(10, 4, prompt=f"prompt {number}") for number in range(20))
    changed = (*items[:19], Item(10, 4, prompt="another"))
    stamps = {workload_stamp(Workload("x", "x", one)) for one in (items, changed, items[:19])}
    assert len(stamps) == 3
    assert workload_stamp(Workload("x", "x", tuple(items))) in stamps


def test_a_model_is_its_files_wherever_they_lie(tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(DEMO_DIR, moved)
    assert model_stamp(moved, False) == model_stamp(DEMO_DIR, False)
    with open(next(moved.glob("*.safetensors")), "ab") as file:
        file.write(b"x")
    assert model_stamp(moved, False) != model_stamp(DEMO_DIR, False)
    assert model_stamp(moved, True) == model_stamp(DEMO_DIR, True)  # random weights: config.json alone
    with open(moved / "config.json", "a") as file:
        file.write(" ")
    assert model_stamp(moved, True) != model_stamp(DEMO_DIR, True)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"identity": 3}', '{"identity": {}, "stages": 3}'])
def test_a_file_that_is_no_file_of_measurements_is_begun_anew(tmp_path, text):
    path = tmp_path / "measurements.json"
    path.write_text(text)
    said = []
    assert earlier_run(path, {}, False, said.append) is None
    assert said == [f"{path} is no file of measurements; it is begun anew"]


def test_measurements_of_an_older_identity_are_begun_anew(llm, settings, measured):
    paths = sorted(RESULTS.glob("*-cost-*/measurements.json"))
    if not paths:
        pytest.skip("no committed measurements here")
    for path in paths:
        said = []
        assert earlier_run(path, measured[0]["identity"], False, said.append) is None
        assert len(said) == 1 and said[0].endswith("differ); it is begun anew") and "model" in said[0]


@pytest.mark.parametrize("error", [EngineError("the device was lost"), ValueError("a wrong\nvalue"), MemoryError()])
def test_a_stage_that_fails_leaves_its_reason(llm, settings, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(run, "run_load", fail)
    short = replace(settings, workloads=settings.workloads[:1])
    data = Runner({}, short, None, llm=llm).run()
    reason = "not measured: " + (" ".join(str(error).split()) or "MemoryError")
    assert data["skipped"]["load:short:1"] == data["skipped"]["sweep:32"] == reason
    assert "idle" in data["stages"] and "load:short:1" not in data["stages"]
    assert Report.from_measurements(data).table("time-main")["rows"][0]["cells"]["tokens"]["why"] == reason


def test_an_interrupt_ends_the_run(llm, settings, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Runner({}, settings, None, llm=llm).run()


def test_the_cache_is_sized_by_the_tokens_of_prompts_given_as_text(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "one two three " * 20, "max_tokens": 5}) + "\n")
    asked = []

    def recording(options):
        asked.append(options["kv_cache_tokens"])
        return load({**options, "kv_cache_tokens": 4096})

    workload = from_jsonl(path)
    with load({"kv_cache_tokens": 4096}) as llm:
        length = len(llm.encode("one two three " * 20)) + 5
    settings = Settings(workloads=(workload,), users=(999,), with_levers=False)
    data, _ = hurried({}, settings, None, recording)
    assert asked == [1000 * (5 + 128), 1000 * (length + 128)]
    assert data["identity"]["workloads"][0]["requests"] == 1
    asked.clear()
    hurried(
        {"max_model_len": 20},
        settings,
        None,
        lambda options: recording({"kv_cache_tokens": options["kv_cache_tokens"]}),
    )
    assert asked == [1000 * (5 + 128), 1000 * (20 + 128)]  # no request is longer than the engine takes
    asked.clear()
    hurried({}, replace(settings, users=(1,)), None, recording)
    assert asked == [65536]  # room enough: loaded once


@pytest.mark.parametrize(
    "device, count, expected",
    [("cuda:1", None, [1]), ("cuda:2", 2, [2, 3]), ("cuda", 2, [0, 1]), ("auto", None, [0])],
)
def test_gpus_are_those_of_the_option_device(device, count, expected):
    class OnGpu:
        _device = device

        def info(self):
            return {"backend": "cuda", "tensor_parallel_size": count}

    assert device_indices(OnGpu()) == expected


def test_an_engine_knows_its_option_device(llm):
    assert llm._device == "auto" and device_indices(llm) == []


def test_the_default_tariff_is_called_so(measured, tmp_path, capsys):
    from qwen_fast.cli import main

    path = tmp_path / "measurements.json"
    path.write_text(json.dumps(measured[0], default=str))
    arguments = ["cost", "--render", str(path), "--out", str(tmp_path), "--wall-watts", "3=100"]
    for more, said in (([], "¥0.6/kWh (default)"), (["--electricity-per-kwh", "0.6"], "¥0.6/kWh")):
        assert main([*arguments, *more]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        html = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert f"electricity {said}, PUE 1 (default)" in html
        assert ("0.6/kWh (default)" in printed) == ("0.6/kWh (default)" in html) == (not more)
    given = Report.from_measurements(repriced(measured[0], Settings(prices=Prices("$", 0.2))))
    assert "$0.2/kWh, PUE 1 (default)" in given.to_html()
