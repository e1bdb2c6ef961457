"""Loads on a real engine: what they count is what the engine counts."""

from __future__ import annotations

import pytest

from qwen_fast.cost.derive import Derived
from qwen_fast.cost.measure import Effort, NotMeasured, run_load, subtract
from qwen_fast.cost.workloads import Item, Workload, fixed

SHORT = Effort(windows=3, window_s=0.05, min_finished=1, most_s=20)


def test_windows_hold_the_tokens_of_the_requests(llm):
    before = llm.stats()
    found = run_load(llm, fixed("x", "x", 16, 10), 1, SHORT)
    after = llm.stats()
    windows = found["windows"]
    assert len(windows) == 3
    assert all(window["seconds"] >= 0.05 for window in windows)
    requests = sum(window["finished"] for window in windows)
    tokens = sum(window["output_tokens"] for window in windows)
    # One user: a window ends as a request ends; the next one may have begun before the counters are read.
    assert requests * 10 - 10 <= tokens <= requests * 10 + 10
    assert found["requests"]["n"] == requests
    assert tokens <= after["num_generated_tokens"] - before["num_generated_tokens"]
    assert sum(window["cached_tokens"] for window in windows) == 0
    assert after["num_running"] == after["num_waiting"] == 0  # what was left over is cancelled


def test_latencies_are_ordered_and_fit_together(llm):
    found = run_load(llm, fixed("x", "x", 16, 10), 4, SHORT)["requests"]
    for name in ("ttft_ms", "tpot_ms", "e2e_s"):
        one = found[name]
        assert 0 < one["p50"] <= one["p90"] <= one["p99"] <= one["max"]
    assert found["e2e_s"]["p99"] * 1000 >= found["ttft_ms"]["p50"]
    whole = found["ttft_ms"]["mean"] + 9 * found["tpot_ms"]["mean"]
    assert whole == pytest.approx(1000 * found["e2e_s"]["mean"], rel=0.2)


def test_more_users_than_one_are_there_at_once(llm):
    found = run_load(llm, fixed("x", "x", 40, 30), 8, SHORT)
    block = llm.stats()["memory"]["kv_block_bytes"]
    assert found["memory"]["kv_high_bytes"] >= 6 * 2 * block  # 40 tokens and more are two blocks of 32 each


def test_prompts_of_ones_own_are_asked_as_they_are(llm):
    item = Item(3, 5, (5, 6, 7), ends=False)
    found = run_load(llm, Workload("own", "own", (item,)), 1, SHORT)
    assert found["prompt_tokens"] == 3 and found["requests"]["n"] >= 3


def test_prompts_that_come_again_are_computed_again_and_equal_beginnings_are_shared(llm):
    """Two prompts of 80 tokens with 64 in common, over and over: half a round's beginnings are found, whole prompts never."""
    items = tuple(Item(80, 2, (*range(10, 74), *([tail] * 16))) for tail in (1, 2))
    found = run_load(llm, Workload("two", "two", items), 1, SHORT)
    cached = sum(window["cached_tokens"] for window in found["windows"])
    asked = sum(window["prompt_tokens"] for window in found["windows"])
    assert 0.25 < cached / asked < 0.5  # 64 of 160


def test_what_ends_nowhere_is_not_measured(llm):
    hurried = Effort(windows=1, window_s=0.01, min_finished=1, most_s=0.001)
    with pytest.raises(NotMeasured, match=r"did not end within 0.001 s"):
        run_load(llm, fixed("x", "x", 90, 100), 2, hurried)
    assert llm.stats()["num_running"] == 0
    with pytest.raises(ValueError, match="users must be at least 1, got 0"):
        run_load(llm, fixed("x", "x", 1, 1), 0, SHORT)
    with pytest.raises(ValueError, match="must be above 0"):
        Effort(windows=0)


def test_the_meter_agrees_with_the_tokens(llm):
    """One user: every output token reads all weights once, prompts add a step each."""
    found = run_load(llm, fixed("x", "x", 16, 10), 1, SHORT)
    if found["windows"][0]["meter"] is None:
        pytest.fail("this build has no meter")
    steps = sum(window["steps"] for window in found["windows"])
    weights = sum(window["meter"]["weight_bytes"] for window in found["windows"])
    layers = llm.stats()["memory"]["layers_bytes"]
    assert weights == pytest.approx(steps * layers, rel=0.05)
    for window in found["windows"]:
        assert window["meter"]["device_ns"] <= window["seconds"] * 1e9 * 1.05
        assert (
            window["meter"]["device_ns"] == window["meter"]["prefill_device_ns"] + window["meter"]["decode_device_ns"]
        )


def test_differences_of_counters():
    assert subtract({"a": 5, "b": {"c": 3}, "d": "x", "e": True}, {"a": 2, "b": {"c": 1}}) == {"a": 3, "b": {"c": 2}}


def fake(meter, seconds=2.0, tokens=100):
    window = {"seconds": seconds, "output_tokens": tokens, "prompt_tokens": 50, "cached_tokens": 10, "finished": 5,
              "busy_s": 1.0, "steps": 10, "preemptions": 0, "meter": meter}  # fmt: skip
    return {"windows": [window, window], "users": 2}


def test_quotients_by_hand():
    """Two windows of 2 s and 100 tokens each; 60 J each by the counter, 10 W idle: 600 J gross and 400 J net for 1,000."""
    meter = {"weight_bytes": 10**9, "kv_read_bytes": 10**9, "host_bytes": 5 * 10**9, "flops": 4 * 10**9, "device_ns": 10**9,
             "prefill_device_ns": 25 * 10**7, "decode_device_ns": 75 * 10**7, "energy_uj": {"gpu0": 60_000_000}}  # fmt: skip
    source = {"name": "gpu0", "measured": True, "note": ""}
    data = {"meter": {"sources": [source]}, "stages": {"idle": {"watts": {"gpu0": 10.0}}}}
    one = Derived(fake(meter), data)
    assert one.tokens_s.mean == pytest.approx(50.0) and one.ms_per_token.mean == 20.0 and one.busy.mean == 50.0
    assert one.joules == 120.0 and one.watts.mean == 30.0
    assert one.joules_per_1k().mean == 600.0 and one.joules_per_1k(net=True).mean == 400.0
    assert one.bytes_per_1k() == 2e10 and one.bytes_per_1k("host_bytes") == 5e10
    assert one.bytes_per_s.mean == 1e9 and one.flops_per_s.mean == 2e9
    assert one.prefill_share == 0.25 and one.computed_in == 80


def test_without_a_meter_there_is_a_reason_and_no_zero():
    one = Derived(fake(None), {"meter": {"why": "this build has no meter"}, "stages": {}})
    assert one.why == one.why_energy == "not measured: this build has no meter"
    for figure in (one.joules, one.watts, one.joules_per_1k(), one.bytes_per_1k(), one.bytes_per_s, one.prefill_share):
        assert figure is None
    source = {"name": "cpu", "measured": False, "note": "no counter here"}
    meter = {"device_ns": 1, "prefill_device_ns": 0, "energy_uj": {}, "flops": 0}
    other = Derived(fake(meter), {"meter": {"sources": [source]}, "stages": {}})
    assert other.why is None and other.why_energy == "not measured: no counter here"
    assert other.joules is None and other.watts is None


def test_a_change_is_certain_only_beyond_its_interval_and_the_drift():
    from qwen_fast.cost.section_levers import levers_section

    def load(rates):
        windows = [{"seconds": 1.0, "output_tokens": rate, "prompt_tokens": 1, "cached_tokens": 0, "finished": 1, "busy_s": 1.0,
                    "steps": 1, "preemptions": 0, "meter": None} for rate in rates]  # fmt: skip
        sizes = dict.fromkeys(("embedding", "layers", "head", "workspace", "kv_cache"), 1 << 20)
        memory = {"kv_high_bytes": 2, "kv_low_bytes": 1}
        times = {"ttft_ms": None, "tpot_ms": None, "e2e_s": None, "n": 0}
        return {"windows": windows, "users": 8, "workload": "x", "label": "x, 1 in / 1 out", "window": "3 windows", "memory": memory,
                "requests": times, "plan_bytes": sizes, "kv_block_bytes": 32}  # fmt: skip

    def data(second_base):
        cases = [("kv", "a", True), ("kv", "b", False), ("head", "c", True), ("head", "d", False)]
        levers = [
            {
                "key": f"lever:{lever}:{name}",
                "lever": lever,
                "setting": name,
                "base": base,
                "plain": base,
                "label": "x",
                "users": 8,
            }
            for lever, name, base in cases
        ]
        rates = {"a": (99, 100, 101), "b": (119, 120, 121), "c": second_base, "d": (100, 200, 300)}
        stages = {f"lever:{lever}:{name}": load(rates[name]) for lever, name, _ in cases}
        return {"stages": stages, "levers": levers, "meter": {"why": "no"}, "skipped": {}, "plan": {"block_size": 32}}

    steady = levers_section(data((98, 99, 100)))
    assert "more than noise: KV precision: b, +20 %" in steady["lead"]  # d is +100 %, but its windows disagree
    drifted = levers_section(data((59, 60, 61)))
    assert "varied by 67 %" in drifted["lead"] and "No gain" in drifted["lead"]
    change = steady["tables"][0]["rows"][1]["cells"]["more"]
    # Welch by hand: both variances are 1, over 3 windows; 4 degrees, t = 2.776; of a base of 100.
    assert change["value"] == pytest.approx(20) and change["high"] - 20 == pytest.approx(2.776 * (2 / 3) ** 0.5)


class FakeNvml:
    """Two GPUs; records how they were asked for."""

    def __init__(self):
        self.asked = []

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        self.asked.append(index.value)
        handle._obj.value = 100 + index.value
        return 0 if index.value < 2 else 2

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        self.asked.append(name)
        handle._obj.value = 7
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.total, memory._obj.free, memory._obj.used = 1000, 900, handle.value
        return 0


def test_memory_of_gpus_through_visible_devices(monkeypatch):
    from qwen_fast.cost.nvml import GpuMemory, nvml_name

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    library = FakeNvml()
    assert GpuMemory([0, 1], library).used_bytes() == 100 + 101
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-abc")
    assert GpuMemory([0, 1], library).used_bytes() == 101 + 7
    assert library.asked == [0, 1, 1, b"GPU-abc"]
    assert nvml_name(0, "") == 0 and nvml_name(3, "5,6") == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(OSError, match="the handle of GPU 4 failed with code 2"):
        GpuMemory([0], library)


def test_without_nvml_the_curve_says_so(llm):
    from qwen_fast.cost.sampler import METHODS, MemorySampler

    with MemorySampler(llm, [0]) as sampler:
        pass
    if sampler.kind == "gpu":
        pytest.skip("this machine has NVML")
    assert sampler.kind == "host" and "not measured" in METHODS["host"]
    assert all(used > 1 << 20 for _, used, _ in sampler.samples)
