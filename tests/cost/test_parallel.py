"""One device against several: what is compared, and the tables, on ranks of CPU threads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cost_helpers import load

from qwen_fast.cost.beside import comparison
from qwen_fast.cost.machine import device_name
from qwen_fast.cost.parallel import USERS, Compared, compared, users_of
from qwen_fast.cost.probe import gpu_peaks
from qwen_fast.cost.render_markdown import markdown
from qwen_fast.cost.report import SCHEMA_PATH, Report
from qwen_fast.cost.run import Runner, Settings


@pytest.fixture(scope="module")
def parallel_run(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel") / "measurements.json"
    asked = replace(
        settings,
        workloads=settings.workloads[-1:],
        users=(1, 3),
        gpus=(1, 2),
        with_levers=False,
        with_sweep=False,
        windows=2,
    )
    loaded = []

    def counting(options):
        loaded.append(dict(options))
        return load(options)

    return Runner({"device": "cpu"}, asked, counting, path).run(), asked, path, loaded


def test_which_numbers_are_compared():
    assert compared(None, 1, 4, True) == [Compared(1), Compared(2), Compared(4)]
    assert compared(None, 2, 2, True) == [Compared(1), Compared(2)]
    assert compared(None, 1, 1, True) == [] and compared(None, 1, 0, False) == []
    assert compared((4, 1, 2), 1, 2, True) == [Compared(1), Compared(2), Compared(4, "this machine shows 2 GPUs")]
    assert compared((1, 2), 1, 0, False) == [Compared(1), Compared(2)]
    (_, other) = compared((1, 2), 1, 2, True, same_engine=True)
    assert other.why.startswith("it needs another engine")
    assert users_of(None, 32) == (1, 16, 32) and users_of((2, 8), 256) == (2, 8) and USERS[-1] == 128


def test_each_number_has_an_engine_of_its_own(parallel_run):
    data, _, _, loaded = parallel_run
    assert [one.get("tensor_parallel_size") for one in loaded] == [None, 2]
    assert {key for key in data["stages"] if key.startswith("gpus:")} == {
        "gpus:1:engine", "gpus:2:engine", "gpus:2:idle", "gpus:2:1", "gpus:2:3",
    }  # fmt: skip
    assert data["stages"]["gpus:2:engine"]["description"].startswith("2 x CPU")
    assert len(data["stages"]["gpus:2:3"]["windows"]) == 2
    assert not [key for key in data["stages"] if key.startswith(("sweep:", "plus:", "lever:"))]
    assert "--no-sweep" in data["skipped"]["sweep:64"] and "--no-sweep" in data["skipped"]["plus:in"]


def test_the_tables_say_who_does_what(parallel_run):
    jsonschema = pytest.importorskip("jsonschema")
    data = parallel_run[0]
    report = Report.from_measurements(data)
    jsonschema.validate(json.loads(report.to_json()), json.loads(SCHEMA_PATH.read_text()))
    rows = {row["label"]: row["cells"] for row in report.table("gpus-loads")["rows"]}
    one, two = "1 rank of CPU threads", "2 ranks of CPU threads"
    assert list(rows) == [f"{one}, 1 user", f"{one}, 3 users", f"{two}, 1 user", f"{two}, 3 users"]
    for label, cells in rows.items():
        for name in ("ttft", "ttft-p99", "tpot", "e2e", "tokens", "times"):
            assert cells[name]["value"] > 0, (label, name)
    assert rows[f"{one}, 3 users"]["times"]["value"] == pytest.approx(1)
    times = rows[f"{two}, 3 users"]["tokens"]["value"] / rows[f"{one}, 3 users"]["tokens"]["value"]
    assert rows[f"{two}, 3 users"]["times"]["value"] == pytest.approx(times)
    if rows[f"{two}, 1 user"]["watts"]["value"] is None:  # no counter here: the reason stands in its place
        assert "not measured" in rows[f"{two}, 1 user"]["per_watt"]["why"]
    summary = {row["label"]: row["cells"] for row in report.table("gpus-summary")["rows"]}
    assert summary[two]["ttft"]["value"] == "3 or more: the most tried"
    plan = data["stages"]["gpus:2:engine"]["plan_bytes"]
    assert summary[two]["plan"]["value"] == pytest.approx(sum(plan.values()) / 2**20)
    assert summary[two]["in_use"]["why"] == "not measured: the CPU backend has one memory"
    html = report.to_html()
    assert "One device against several" in html and "plot-gpus" in report.to_json()
    assert "2 ranks of CPU threads, 3 users" in report.to_text()


def test_it_stands_beside_the_study(parallel_run):
    tables = {one["id"]: one for one in comparison(Report.from_measurements(parallel_run[0]).document)}
    rows = {row["label"]: row["cells"] for row in tables["study-b-gpus"]["rows"]}
    published = rows["4x RTX 4090D, 16-bit weights (published)"]
    assert (published["tokens"]["value"], published["per_watt"]["value"], published["users"]["value"]) == (
        125,
        0.069,
        16,
    )
    assert rows["RTX 4090D, 16-bit weights (published)"]["per_watt"]["value"] == 0.046
    ours = rows["here, 2 ranks of CPU threads, 3 users"]
    assert ours["ttft"]["value"] > 0 and ours["users"]["value"] == "3 or more: the most tried"
    text = "\n".join(markdown(tables["study-b-gpus"]))
    assert "| here, 1 rank of CPU threads, 1 user |" in text and text.count("\n|") == 2 + len(rows)


def test_a_run_that_was_cut_off_measures_the_rest_only(parallel_run):
    data, asked, path, _ = parallel_run
    cut = json.loads(json.dumps(data, default=str))
    for key in ("gpus:2:engine", "gpus:2:3"):
        del cut["stages"][key]
    path.write_text(json.dumps(cut))
    said = []
    again = Runner({"device": "cpu"}, replace(asked, budget_s=1e-6), load, path, said.append).run()
    assert said == [] and "used up" in again["skipped"]["gpus:2:3"]
    assert again["stages"]["gpus:2:1"] == cut["stages"]["gpus:2:1"]
    said.clear()
    again = Runner({"device": "cpu"}, asked, load, path, said.append).run()
    assert said == ["gpus:2:engine", "gpus:2:3"] and set(again["stages"]) == set(data["stages"])


def test_a_number_that_cannot_be_loaded_leaves_its_reason(parallel_run, settings):
    asked = replace(parallel_run[1], gpus=(1, 2), users=(1,))

    def refusing(options):
        if options.get("tensor_parallel_size"):
            raise ValueError("no such\nnumber")
        return load(options)

    data = Runner({"device": "cpu"}, asked, refusing).run()
    rows = {row["label"]: row["cells"] for row in Report.from_measurements(data).table("gpus-loads")["rows"]}
    assert rows["2 ranks of CPU threads, 1 user"]["tokens"]["why"] == "not measured: no such number"
    summary = Report.from_measurements(data).table("gpus-summary")["rows"][1]["cells"]
    assert {cell["why"] for cell in summary.values()} == {"not measured: no such number"}


def test_a_loaded_engine_is_compared_with_none(llm, settings):
    asked = replace(
        settings, workloads=settings.workloads[:1], users=(1,), gpus=(1, 2), with_levers=False, with_sweep=False
    )
    data = Runner({}, asked, None, llm=llm).run()
    assert "needs another engine" in data["skipped"]["gpus:2:1"] and "gpus:1:engine" in data["stages"]


def test_nothing_is_compared_where_nobody_asks(measured):
    data = measured[0]
    assert "gpus" not in data
    with pytest.raises(KeyError):
        Report.from_measurements(data).table("gpus-loads")


def test_the_cache_has_room_for_all_users(settings):
    asked = replace(settings, users=None, gpus=(1, 2), gpus_users=(5000,), with_levers=False)
    runner = Runner({"device": "cpu"}, asked, None)
    assert runner._cache_tokens() == 5001 * (36 + 128)
    assert Runner({"device": "cpu"}, replace(asked, gpus=None), None)._cache_tokens() == 65536


@pytest.mark.parametrize("wrong", [{"gpus": (0,)}, {"gpus": (65,)}, {"gpus_users": ()}, {"windows": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_several_gpus_have_several_times_the_peak():
    one, two = gpu_peaks(4000, 700, "probe"), gpu_peaks(4000, 700, "probe", 2)
    assert two.bytes_per_s == 2 * one.bytes_per_s and two.flops_per_s == 2 * one.flops_per_s
    assert two.bandwidth_method == "2 times one GPU's: probe" and one.bandwidth_method == "probe"
    assert gpu_peaks(None, None, count=2).bytes_per_s is None


def test_a_report_names_all_its_gpus():
    machine = {"gpus": [{"name": "NVIDIA H200"}] * 4, "cpu": "a processor", "cpus": 8}
    assert device_name({"machine": machine, "engine": {"tensor_parallel_size": 2}}) == "2 x NVIDIA H200"
    assert device_name({"machine": machine, "engine": {}}) == "NVIDIA H200"
    assert device_name({"machine": {**machine, "gpus": []}, "engine": {}}) == "a processor, 8 CPUs"
