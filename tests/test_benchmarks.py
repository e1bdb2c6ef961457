"""What of the benchmarks needs no GPU: adding kernels up to steps, the figures made of times, the files for a start."""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import awq_files
import gpu_decode
import gpu_linears
import gpu_timeline
import timeline

LAYER = ["norm", "linear", "rope", "attention", "linear", "norm", "linear", "linear"]
STEP = ["fetch", "embedding", *LAYER * 6, "norm", "linear", "sample", "publish"]


def in_a_row(names, graph=True, us=2.0, pause=0.5, between=3.0, start=100.0):
    """One after the other, in steps of STEP's length; a graph's kernels have one launch."""
    events = []
    for i, name in enumerate(names):
        start += between if i % len(STEP) == 0 else pause
        events.append(timeline.Event(name, start, start + us, i // len(STEP) if graph else i))
        start += us
    return events


def shares(events, frontier):
    return [(part.own, part.overlapped, part.gap) for part in timeline.attribute(events, frontier)]


def test_a_pause_belongs_to_the_kernel_that_ends_it():
    events = [timeline.Event("a", 10, 14), timeline.Event("b", 15, 18)]
    assert shares(events, 8) == [(4, 0, 2), (3, 0, 1)]


def test_what_overlaps_is_counted_once():
    events = [timeline.Event("a", 0, 10), timeline.Event("b", 4, 13), timeline.Event("c", 12, 15)]
    assert shares(events, 0) == [(10, 0, 0), (3, 6, 0), (2, 1, 0)]


def test_a_kernel_inside_another_has_no_time_of_its_own():
    events = [timeline.Event("a", 0, 10), timeline.Event("b", 2, 5), timeline.Event("c", 11, 12)]
    assert shares(events, 0) == [(10, 0, 0), (0, 3, 0), (1, 0, 1)]
    assert shares(events[:1], 20) == [(0, 10, 0)]  # all of it before the end of what came before


def test_parts_add_up():
    rng = random.Random(5)
    for _ in range(200):
        start, events = 0.0, []
        for _ in range(rng.randrange(1, 30)):
            start += rng.choice((0.0, 0.25, 1.0, 3.0))
            events.append(timeline.Event("x", start, start + rng.choice((0.0, 0.5, 2.0, 6.0))))
        frontier = rng.choice((-2.0, 0.0, 1.5))
        parts = timeline.attribute(events, frontier)
        whole = max(event.end for event in events)
        assert sum(part.own + part.gap for part in parts) == pytest.approx(max(whole, frontier) - frontier)
        for event, part in zip(events, parts):
            assert part.own + part.overlapped == pytest.approx(event.end - event.start)
            assert min(part.own, part.overlapped, part.gap) >= 0


def test_the_period_is_the_step_and_not_the_layer():
    prefill = ["fetch", "embedding", *["norm", "gemm", "prefill"] * 9, "sample", "publish"]
    period, first, end = timeline.find_period([*prefill, *STEP * 12, *prefill])
    assert period == len(STEP)
    assert first <= len(prefill) and end >= len(prefill) + 12 * len(STEP)


def test_a_short_step():
    names = ["fetch", "decode", "publish"]
    assert timeline.find_period(["prefill", *names * 20])[0] == 3


def test_without_a_period():
    with pytest.raises(ValueError, match="repeats 8 times"):
        timeline.find_period([*STEP * 3, "other"])
    with pytest.raises(ValueError, match="repeats 8 times"):
        timeline.find_period([str(i) for i in range(100)])


@pytest.mark.parametrize("graph", [True, False])
def test_steps_are_split_where_they_begin(graph):
    events = in_a_row(["other"] * len(STEP) + STEP * 12, graph)
    steps = timeline.split_steps(events)
    assert len(steps) >= 10
    for frontier, step in steps:
        assert [event.name for event in step] == STEP
        assert frontier == step[0].start - 3


def test_one_launch_wins_over_a_longer_pause():
    events = in_a_row(STEP * 12, between=0.5)
    late = [event for event in events if event.name == "sample"][3].start
    shifted = [
        timeline.Event(e.name, e.start + 50 * (e.start >= late), e.end + 50 * (e.start >= late), e.launch)
        for e in events
    ]
    assert [event.name for event in timeline.split_steps(shifted)[0][1]] == STEP


def test_copies_come_where_they_come():
    """Of the next step's metadata: short, at any place beside the kernels, once in the pause between two steps."""
    rng = random.Random(9)
    kernels = in_a_row(["other"] * len(STEP) + STEP * 20)
    per_step = len(STEP) * 2.5 + 2.5
    copies = [timeline.Event("copy", at, at + 0.5, 10_000 + i, True)
              for i, at in enumerate(105 + per_step * (i + rng.random()) for i in range(20))]  # fmt: skip
    events = sorted(kernels + copies, key=lambda event: event.start)
    steps = timeline.split_steps(events)
    assert len(steps) >= 18
    for frontier, step in steps:
        assert [event.name for event in step if not event.is_copy] == STEP
        assert frontier == max(event.end for event in events if event.start < step[0].start)
    step = timeline.account(steps, lambda names: [""] * len(names))
    assert step.us == pytest.approx(per_step, abs=0.6)
    assert sum(part.own + part.gap for part in step.parts.values()) == pytest.approx(step.us)
    assert step.parts["copy", ""].calls == pytest.approx(1, abs=0.3)
    assert step.parts["fetch", ""].calls == pytest.approx(1) and step.parts["linear", ""].calls == pytest.approx(25)


def test_a_long_kernel_before_a_short_copy():
    """The pause after a copy that lies inside a kernel is none."""
    events = []
    for i in range(20):
        at = 500.0 * i
        events += [timeline.Event("begin", at, at + 2, i), timeline.Event("decode", at + 3, at + 493, i)]
        events += [
            timeline.Event("copy", at + 5, at + 6, 100 + i, True),
            timeline.Event("sample", at + 494, at + 498, i),
        ]
    step = timeline.account(timeline.split_steps(events), lambda names: [""] * len(names))
    assert step.us == pytest.approx(500)
    assert [(name, part.own, part.gap) for (name, _), part in step.parts.items()] == [
        ("begin", pytest.approx(2), pytest.approx(2)),
        ("decode", pytest.approx(490), pytest.approx(1)),
        ("sample", pytest.approx(4), pytest.approx(1)),
        ("copy", 0, 0),
    ]


def test_account():
    def roles(names):
        return [str(names[:i].count("linear")) if name == "linear" else "" for i, name in enumerate(names)]

    events = in_a_row(STEP * 14)
    step = timeline.account(timeline.split_steps(events), roles)
    assert step.us == pytest.approx(len(STEP) * 2.5 + 2.5)
    assert sum(part.own + part.gap for part in step.parts.values()) == pytest.approx(step.us)
    assert sum(part.calls for part in step.parts.values()) == pytest.approx(len(STEP))
    assert step.parts["norm", ""].calls == pytest.approx(13)
    assert step.parts["linear", "24"].calls == pytest.approx(1)
    assert step.parts["norm", ""].own == pytest.approx(26) and step.parts["norm", ""].gap == pytest.approx(6.5)
    assert step.parts["fetch", ""].gap == pytest.approx(3)


def test_one_slow_step_does_not_count():
    events = in_a_row(STEP * 14)
    late = events[5 * len(STEP)].start
    slow = [
        timeline.Event(e.name, e.start + 900 * (e.start >= late), e.end + 900 * (e.start >= late), e.launch)
        for e in events
    ]
    step = timeline.account(timeline.split_steps(slow), lambda names: [""] * len(names))
    assert step.us == pytest.approx(len(STEP) * 2.5 + 2.5)


def test_a_trace_is_read_in_order():
    names = {
        "void attention_decode_kernel<128, 1>(attention_params)": "attention_decode_kernel",
        "qf_fetch_kernel(qf_cuda_step_io, int)": "qf_fetch_kernel",
        "void (anonymous namespace)::rmsnorm_kernel<4, false>(qf_cuda_rmsnorm_args)": "rmsnorm_kernel",
        "Memcpy HtoD (Pinned -> Device)": "Memcpy HtoD",
    }
    raw = [
        {"cat": "kernel", "name": name, "ts": 50.0 - i, "dur": 2.5, "args": {"correlation": 7}}
        for i, name in enumerate(names)
    ]
    raw[-1]["cat"] = "gpu_memcpy"
    raw += [
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 1.0, "dur": 5.0},
        {"ph": "M", "name": "process_name"},
    ]
    events = timeline.read_trace({"traceEvents": raw})
    assert [event.name for event in events] == list(names.values())[::-1]
    assert events[0] == timeline.Event("Memcpy HtoD", 47.0, 49.5, 7, True)
    assert events[1] == timeline.Event("rmsnorm_kernel", 48.0, 50.5, 7, False)


# -- gpu_timeline ------------------------------------------------------------------------------------------------

SHAPE_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_layers": 28, "num_heads": 28, "num_kv_heads": 4,
    "head_dim": 128, "vocab_size": 152064, "kv_cache_dtype": "bfloat16",
}  # fmt: skip


def test_linear_layers_are_told_by_their_order():
    found = gpu_timeline.roles(STEP, 6)
    assert [place for place in found if place] == [*("qkv", "o", "gate_up", "down") * 6, "head"]
    assert all(bool(place) == (name == "linear") for name, place in zip(STEP, found, strict=True))
    assert gpu_timeline.roles(["fetch", "qf_decode_kernel", "publish"], 6) == ["", "", ""]
    assert gpu_timeline.roles(["qf_decode_kernel", "linear"], 6) == ["", "head"]
    with pytest.raises(ValueError, match="25 linear layers; expected 29"):
        gpu_timeline.roles(STEP, 7)


def test_what_the_kernels_of_a_layer_move():
    """The weights of the 7B shape as its engine reports them, and a batch's keys and values."""
    layer = sum(gpu_timeline.weight_bytes(*gpu_timeline.linear_size(SHAPE_7B, place)) for place in gpu_timeline.LINEARS)
    assert 28 * layer == pytest.approx(3467878400, rel=1e-3)
    moved, flops = gpu_timeline.work("attention_decode_kernel", "", SHAPE_7B, 0, 64, 256)
    assert moved == 64 * (256 * 2 * 4 * 128 * 2 + 4 * 3584)
    assert flops == 4 * 64 * 28 * 128 * 256
    moved, flops = gpu_timeline.work("qf_linear_wgmma_kernel", "head", SHAPE_7B, 1_000_000, 2, 256)
    assert moved == 1_000_000 + 2 * (2 * 3584 + 4 * 152064) and flops == 4 * 152064 * 3584
    assert gpu_timeline.work("qf_publish_kernel", "", SHAPE_7B, 0, 64, 256) == (0, 0)


class Engine:
    """What gpu_timeline asks of an engine of the 7B shape."""

    def info(self):
        return SHAPE_7B

    def stats(self):
        return {"memory": {"layers_bytes": 3467878400, "head_bytes": 1089994752, "embedding_bytes": 1089994752}}


@pytest.mark.parametrize("graph", [True, False])
def test_the_table_of_a_step_adds_up(capsys, graph):
    """Of a batch, whose layers are kernels of their own, and of one sequence: the weights are counted once each."""
    kernels = ["rmsnorm", "linear", "rope_kv", "attention", "linear", "rmsnorm", "linear", "linear"]
    names = ["fetch", "embedding", *kernels * 28, "rmsnorm", "linear", "qf_sample_greedy_kernel"]
    if not graph:
        names = ["fetch", "embedding", "qf_decode_kernel", "qf_sample_greedy_kernel"]
    events, at = [], 0.0
    for i, name in enumerate(names * 12):
        events.append(timeline.Event(name, at, at + 30, i // len(names)))
        at += 29 if name == "linear" else 31
    step = timeline.account(timeline.split_steps(events), lambda seen: gpu_timeline.roles(seen, 28))
    limits = argparse.Namespace(read_gbs=4000.0, gemm_tflops=800.0)
    rows = gpu_timeline.table(step, Engine(), 1, limits)
    gpu_timeline.print_table(rows, step)
    assert f"together {step.us:.2f} us" in capsys.readouterr().out
    assert sum(row["calls"] for row in rows) == pytest.approx(len(names))
    assert sum(row["us"] + row["gap_us"] for row in rows) == pytest.approx(step.us)
    moved = sum(row["bytes"] for row in rows if row["place"] or "attention" in row["kernel"])
    assert moved == pytest.approx(gpu_timeline.step_bytes(Engine(), 1, 192), rel=3e-3)
    flops = sum(row["flops"] for row in rows)
    assert flops == pytest.approx(gpu_timeline.step_flops(SHAPE_7B, 1, 192), rel=1e-6)


def test_the_larger_bound_is_the_roofline():
    limits = argparse.Namespace(read_gbs=4000.0, gemm_tflops=800.0)
    row = gpu_timeline.row_of(timeline.Part(2, 20.0, 1.0, 0.5), 40e6, 1e9, limits)
    assert row["least_us"] == pytest.approx(10) and row["share"] == pytest.approx(0.5)
    row = gpu_timeline.row_of(timeline.Part(2, 20.0), 40e6, 12e9, limits)
    assert row["least_us"] == pytest.approx(15) and row["share"] == pytest.approx(0.75)
    assert gpu_timeline.row_of(timeline.Part(1, 2.0), 0, 0, limits)["share"] is None


# -- gpu_linears -------------------------------------------------------------------------------------------------


def layer_lines(times):
    """times[bits][tokens]: of each of two linears."""
    return "\n".join(
        f"layer 7B {linear} 3584 3584 {bits} {tokens} {us:.3f} 1"
        for bits, row in times.items()
        for tokens, us in row.items()
        for linear in ("qkv", "o")
    )


def test_the_faster_16_bits_count_linear_by_linear():
    times = {4: {1: 5.0, 64: 20.0}, 8: {1: 6.0, 64: 30.0}, 16: {1: 12.0, 64: 24.0}}
    ours = gpu_linears.parse_layers("checks passed\n" + layer_lines(times) + "\nlinear: passed\n")
    cublas = {case: (8.0 if case[1] == "qkv" else 30.0, "x W") for case in ours[4]}
    rows = gpu_linears.compare(ours, cublas)
    assert [row["tokens"] for row in rows] == [1, 64]
    assert rows[0]["faster_16_bits_us"] == 8 + 12 and rows[0]["ratio_4_bits"] == pytest.approx(2.0)
    assert rows[1]["faster_16_bits_us"] == 8 + 24 and rows[1]["ratio_4_bits"] == pytest.approx(0.8)
    assert rows[1]["us"] == {"4 bits": 40, "8 bits": 60, "16 bits": 48, "cublas": 38}
    found = gpu_linears.worst(rows, "7B")
    assert (found["worst"], found["worst_few"], found["met"]) == (pytest.approx(0.8), pytest.approx(2.0), False)
    gpu_linears.print_rows(rows)


def test_a_table_that_is_not_whole():
    times = {4: {1: 5.0}, 8: {1: 6.0}, 16: {1: 12.0, 64: 24.0}}
    for text in ("", layer_lines(times), layer_lines({4: {1: 5.0}})):
        with pytest.raises(ValueError, match="not a table"):
            gpu_linears.parse_layers(text)


@pytest.mark.oracle
def test_ways_to_multiply_agree(monkeypatch):
    torch = pytest.importorskip("torch")
    chosen = []
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", chosen.append)
    pool = torch.randn(3 * 96 * 128) / 8
    for tokens in (1, 5):
        ways = list(gpu_linears.ways_to_multiply(torch, 96, 128, tokens, pool))
        assert len(ways) == (10 if tokens == 1 else 8) and chosen[-2:] == ["cublas", "cublaslt"]
        for way in ways:
            way.check()
            assert way.call(2).shape == (tokens, 96)
        ways[0].weight = ways[0].weight.flip(0)
        with pytest.raises(RuntimeError, match="off by"):
            ways[0].check()


def test_results_without_a_built_package(tmp_path, monkeypatch):
    """The kernels' own programs run before the package is built; what they measured must not be lost for that."""
    import qwen_fast

    monkeypatch.setitem(sys.modules, "qwen_fast._engine", None)
    monkeypatch.delattr(qwen_fast, "_engine", raising=False)
    args = argparse.Namespace(commit="abc")
    gpu_linears.save("gpu-linears", [{"us": 1}], True, tmp_path, **gpu_linears.gpu_environment(args))
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["rows"] == [{"us": 1}] and found["environment"]["commit"] == "abc"
    assert found["environment"]["build"] is None and found["environment"]["gpus"] is None


# -- gpu_decode --------------------------------------------------------------------------------------------------


def test_rows_are_kept_and_time_runs_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_decode, "gpu_environment", lambda args: {})
    args = argparse.Namespace(save=True, results=tmp_path, budget_seconds=None)
    rows = gpu_decode.Rows(args, argparse.Namespace(said={"read_gbs": 1}))
    for batch in gpu_decode.in_time(rows, "7B", [1, 2, 3, 4]):
        rows.add({"batch": batch})
        (path,) = tmp_path.iterdir()
        assert [row["batch"] for row in json.loads(path.read_text())["rows"]] == list(range(1, batch + 1))
        args.budget_seconds = 1000 if batch == 1 else -1
    assert rows.left_out == ["7B, batch 3", "7B, batch 4"]
    rows.write()
    assert json.loads(path.read_text())["environment"]["left_out"] == rows.left_out


# -- awq_files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_made_up_files_are_a_checkpoint(tmp_path, tied):
    """The engine finds every tensor, and what it computes is finite and not all the same."""
    from qwen_fast import _engine

    shape = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": tied}
    size = awq_files.write_awq(tmp_path, "qwen2.5-7b", shard_bytes=400_000, block_bytes=1 << 17, **shape)
    awq_files.read_files(tmp_path)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and 0 < sum(path.stat().st_size for path in shards) - size < 8192 * len(shards)
    engine = _engine.Engine(str(tmp_path), device="cpu", kv_cache_tokens=128, max_model_len=64)
    try:
        assert engine.info()["quantization"] == "awq"
        request = engine.submit(list(range(16)), max_tokens=0, logits_start=0, logits_stop=16)
        rows = [x for row in request.read(timeout=60)["logits"].tolist() for x in row]
    finally:
        engine.close()
    assert all(-30 < x < 30 for x in rows) and max(rows) - min(rows) > 0.5


def test_files_of_the_7b_shape_have_the_published_size():
    config = json.loads((awq_files.CONFIGS / "qwen2.5-7b.json").read_text())
    assert sum(map(awq_files.size_of, awq_files.tensors(config))) == pytest.approx(5.57e9, rel=1e-3)
