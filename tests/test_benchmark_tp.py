"""What of the benchmark of several GPUs needs none: a step taken apart by ranks, and rows beside their targets."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_tp
import timeline
import tp_engine
import tp_split

NAMES = [
    "qf_step_begin_kernel",
    *["linear", "qf_all_reduce_kernel"] * 4,
    "qf_gather_kernel",
    "sample",
    "qf_share_tokens_kernel",
]


def a_run(device, linear_us, steps=14, start=100.0):
    """One after the other, 0.5 us between, 3 us between steps. A sum begins when a rank has its own part and ends on all
    ranks together, 2 us after the last of them came: linear_us are the linears' times of all ranks."""
    events, now, slowest = [], start, max(linear_us)
    for step in range(steps):
        now += 3
        for name in NAMES:
            if name == "linear":
                event = timeline.Event(name, now, now + linear_us[device], step, device=device)
            elif name == "qf_all_reduce_kernel":
                event = timeline.Event(name, now, now + slowest - linear_us[device] + 2, step, device=device)
            else:
                event = timeline.Event(name, now, now + 1, step, device=device)
            events.append(event)
            now = event.end + 0.5
    return events


def test_kernels_messages_and_gaps_are_the_step():
    events = sorted(a_run(0, (5, 8)) + a_run(1, (5, 8)), key=lambda event: event.start)
    ranks = tp_split.split(tp_split.decode_steps(events))
    assert list(ranks) == [0, 1]
    step = 3 + 4 * (8 + 2) + 4 * 1 + 0.5 * (len(NAMES) - 1) + 0.5
    for rank, linear in ((0, 5), (1, 8)):
        one = ranks[rank]
        assert one.us == pytest.approx(step)
        assert one.kernels + one.messages + one.gaps == pytest.approx(one.us)
        assert one.kernels == pytest.approx(1 + 4 * linear + 1)
        assert one.messages == pytest.approx(4 * (8 - linear + 2) + 2) and one.calls == pytest.approx(6)
        assert one.waiting == pytest.approx(4 * (8 - linear))
        assert one.said()["parts"]["linear"] == {
            "calls": pytest.approx(4), "us": pytest.approx(4 * linear), "gap_us": pytest.approx(2), "overlapped_us": 0,
        }  # fmt: skip


def test_a_step_of_few_kernels_after_a_prompt_of_many():
    """One kernel for all layers: the layers of the prompt before it repeat more often than its steps do."""
    events, now = [timeline.Event("warm", 0, 1)], 1.0
    for step in range(14):
        layers = ["linear", "rmsnorm"] * 80 if step == 0 else ["qf_decode_kernel"]
        for name in ["qf_step_begin_kernel", *layers, "sample"]:
            events.append(timeline.Event(name, now, now + (400 if name == "qf_decode_kernel" else 2), step))
            now = events[-1].end + 1
        events.append(timeline.Event("Memcpy HtoD", now, now, step, is_copy=True))
    rank = tp_split.split(tp_split.decode_steps(events))[0]
    assert (rank.us, rank.gaps, rank.messages) == (pytest.approx(407), pytest.approx(3), 0)
    assert list(rank.parts) == ["qf_step_begin_kernel", "qf_decode_kernel", "sample", "Memcpy HtoD"]
    with pytest.raises(ValueError, match="5 equal steps among 6; expected 8"):
        tp_split.decode_steps(event for event in events if event.launch < 7)


def test_ranks_that_cannot_be_matched():
    one = {0: [(0.0, [timeline.Event("linear", 1, 2)])], 1: [(99.0, [timeline.Event("linear", 100, 101, device=1)])]}
    with pytest.raises(ValueError, match="no stretch of time in common"):
        tp_split.split(one)
    extra = [
        timeline.Event("qf_all_reduce_kernel", 2, 3, device=1),
        timeline.Event("qf_all_reduce_kernel", 3, 4, device=1),
    ]
    two = {0: [(0.0, [timeline.Event("qf_all_reduce_kernel", 1, 2)])], 1: [(0.0, extra)]}
    ranks = tp_split.split(two)
    assert ranks[1].messages == 2 and ranks[0].waiting is None and ranks[1].waiting is None


def test_a_prompt_is_what_lies_between_two_pauses():
    def prompt(start, device):
        copy = timeline.Event("copy", start - 1, start - 0.5, is_copy=True, device=device)
        return [copy, *(timeline.Event("linear", start + 10 * i, start + 10 * i + 9, device=device) for i in range(6))]

    warm = [timeline.Event("fill", 0, 1), timeline.Event("fill", 0, 1, device=1)]
    events = [*warm, *prompt(100, 0), *prompt(101, 1), *prompt(300, 0), *prompt(302, 1)]
    runs = tp_split.prompt_runs(sorted(events, key=lambda event: event.start), 50, 20)
    assert [len(found) for found in runs.values()] == [2, 2]
    ranks = tp_split.split(runs)
    assert (ranks[0].us, ranks[0].kernels, ranks[0].gaps, ranks[0].messages) == (59, 54, 5, 0)
    with pytest.raises(ValueError, match="no stretch of 500 us"):
        tp_split.prompt_runs(events, 50, 500)


def test_a_trace_names_the_gpu():
    raw = [{"cat": "kernel", "name": "k", "ts": 1.0, "dur": 2.0, "args": {"device": device}} for device in (1, 0)]
    assert [event.device for event in timeline.read_trace({"traceEvents": raw})] == [1, 0]
    assert list(tp_split.by_device(timeline.read_trace({"traceEvents": raw}))) == [0, 1]


def test_memory_of_a_card(monkeypatch):
    shown = {
        "--query-gpu=index,uuid": "0, GPU-a\n1, GPU-b\n",
        "--query-compute-apps=pid,gpu_uuid,used_memory": "7, GPU-b, 300\n7, GPU-a, 200\n8, GPU-a, 9\n",
    }

    def asked(command, **more):
        return argparse.Namespace(stdout=shown[command[1]])

    monkeypatch.setattr(tp_engine.subprocess, "run", asked)
    assert tp_engine.card_bytes(7, 2) == [200 << 20, 300 << 20]
    assert tp_engine.card_bytes(8, 1) == [9 << 20] and tp_engine.card_bytes(8, 2) is None
    shown["--query-compute-apps=pid,gpu_uuid,used_memory"] = "7, GPU-a, [N/A]\n"
    assert tp_engine.card_bytes(7, 1) is None


def test_rows_stand_beside_targets_and_gains(tmp_path, monkeypatch, capsys):
    """The whole program over the demo's shape on the CPU, whose ranks are threads; no step is taken apart there."""
    config = json.loads((ROOT / "qwen_fast" / "demo" / "config.json").read_text())
    config.pop("quantization_config", None)
    small = {**config, "num_hidden_layers": 2, "max_position_embeddings": 8192}

    def dummy(directory, shape):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(small))
        return directory

    monkeypatch.setattr(gpu_tp, "dummy", dummy)
    monkeypatch.setitem(gpu_tp.TARGETS, ("72b-w4-1", 2), 1e9)
    monkeypatch.setitem(gpu_tp.GAIN_TARGETS, ("72b-w4-prefill", 2), 1e-9)
    words = "gpu_tp.py --device cpu --no-split --gpus 1,2 --rows 72b-w4-1,72b-w4-prefill --repeats 1 --read-gbs 40 --gemm-tflops 1"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--save", "--results", str(tmp_path)])
    gpu_tp.main()
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    rows = {(row["row"], row["gpus"]): row for row in found["rows"]}
    assert set(rows) == {(name, gpus) for name in ("72b-w4-1", "72b-w4-prefill") for gpus in (1, 2)}
    assert all(row["tokens_per_s"] > 0 and row["flops"] > 0 for row in rows.values())
    assert rows["72b-w4-1", 2]["target_tokens_per_s"] == 1e9 and rows["72b-w4-1", 1]["target_tokens_per_s"] == 70
    (gain,) = [one for one in found["environment"]["gains"] if one["row"] == "72b-w4-prefill"]
    times = [rows["72b-w4-prefill", gpus]["seconds"]["median"] for gpus in (1, 2)]
    assert gain["times"] == pytest.approx(times[0] / times[1]) and gain["target"] == 1e-9
    assert [one["gpus"] for one in found["environment"]["engines"]] == [1, 2]
    assert all(one["memory"]["planned_bytes"] > 0 for one in found["environment"]["engines"])
    assert found["environment"]["left_out"] == []
    said = capsys.readouterr().out
    assert "(must 1,000,000,000: -100%)" in said and "(must 1e-09: met)" in said


def test_an_engine_that_fails_costs_its_own_rows_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_tp, "dummy", lambda directory, shape: directory)
    words = "gpu_tp.py --device cpu --no-split --gpus 1 --rows 7b-w4-1 --read-gbs 40 --gemm-tflops 1 --save --results"
    monkeypatch.setattr(sys, "argv", [*words.split(), str(tmp_path)])
    gpu_tp.main()
    (path,) = tmp_path.iterdir()
    (left,) = json.loads(path.read_text())["environment"]["left_out"]
    assert left == "7b-w4-1 on 1: the engine's process ended with 1"


def test_more_gpus_than_there_are(tmp_path, monkeypatch):
    seen = {"gpus": [{"name": "NVIDIA H200"}]}
    monkeypatch.setattr(gpu_tp, "gpu_environment", lambda args: seen)
    words = "gpu_tp.py --gpus 2,4 --rows 7b-w4-1,7b-w4-64 --read-gbs 40 --gemm-tflops 1 --save --results"
    monkeypatch.setattr(sys, "argv", [*words.split(), str(tmp_path)])
    gpu_tp.main()
    (path,) = tmp_path.iterdir()
    left = json.loads(path.read_text())["environment"]["left_out"]
    assert left == [f"7b-w4-1, 7b-w4-64 on {gpus}: this machine shows 1 GPU(s)" for gpus in (2, 4)]


def test_parts_that_do_not_add_up_are_an_error(tmp_path):
    args = argparse.Namespace(tolerance=5.0, save=False, results=tmp_path, commit=None)
    results = gpu_tp.Results(args, argparse.Namespace(said={}))
    results.rows = [{"row": "7b-w4-1", "gpus": 2, "seconds": {"median": 100e-6}}]
    ranks = {"0": tp_split.Rank(80, 50, 20, 10).said(), "1": tp_split.Rank(80, 60, 5, 15).said()}
    results.split("7b-w4-1", 2, {"ranks": ranks, "seconds_before": 100e-6})
    assert results.rows[0]["split"]["slowest_rank"] == 1
    assert results.rows[0]["split"]["off"] == pytest.approx(-0.2) and not results.rows[0]["split"]["agrees"]
