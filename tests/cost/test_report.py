"""A whole report of the demo model: every table and plot is there, says where each figure is from, and asks for nothing."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree

import pytest

from qwen_fast.cost.money import Prices
from qwen_fast.cost.report import SCHEMA_PATH, Report
from qwen_fast.cost.run import Runner, Settings, repriced
from qwen_fast.cost.svg import draw, ticks

SECTIONS = ["memory", "time", "utilisation", "power", "levers", "concurrency"]


@pytest.fixture(scope="module")
def report(measured):
    return Report.from_measurements(measured[0])


def cells(report):
    for section in report.document["sections"]:
        for table in section["tables"]:
            for row in table["rows"]:
                for column in table["columns"]:
                    yield table, row, column, row["cells"][column["key"]]


def test_the_json_is_what_the_schema_says(report):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA_PATH.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    document = json.loads(report.to_json())
    jsonschema.validate(document, schema)
    document["sections"][0]["tables"][0]["rows"][0]["cells"]["mib"] = {"value": None}  # no reason
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


def test_all_sections_and_their_figures(report):
    assert [section["id"] for section in report.document["sections"]] == SECTIONS
    seen = set()
    for table, row, column, cell in cells(report):
        seen.add(table["id"])
        assert column["method"] and row["window"], (table["id"], column["title"])
        assert column["definition"] in report.document["definitions"]
        if cell["value"] is None:
            assert cell["why"]
    levers = {
        "output",
        "batch",
        "max_num_seqs",
        "block_size",
        "kv",
        "weights",
        "head",
        "offload",
        "prefix",
        "tensor_parallel",
        "text",
    }
    assert {f"lever-{name}" for name in levers} <= seen
    assert {
        "time-main",
        "memory-breakdown",
        "power-energy",
        "power-break-even-owned",
        "users-summary",
        "use-peaks",
    } <= seen


def test_no_figure_that_was_not_measured_is_a_number(report):
    rows = {row["label"]: row["cells"] for row in report.table("lever-offload")["rows"]}
    assert rows["embeddings on the host"]["tokens"]["why"] == "not measured: the CPU backend has one memory"
    kv = {row["label"]: row["cells"]["tokens"] for row in report.table("lever-kv")["rows"]}
    assert kv["bfloat16 (base)"]["value"] > 0
    breakdown = report.table("memory-breakdown")["rows"]
    parts = [
        row["cells"]["mib"]["value"]
        for row in breakdown
        if row["label"].split(" (")[0] not in ("total planned", "context and modules of the driver")
    ]
    total = next(row for row in breakdown if row["label"] == "total planned")["cells"]["mib"]["value"]
    assert sum(parts) == pytest.approx(total)


def test_ms_per_1000_tokens_is_1000_times_ms_per_token(report):
    for row in report.table("time-main")["rows"]:
        figures = row["cells"]
        assert figures["per_1k"]["value"] == pytest.approx(1000 * figures["ms"]["value"])


def test_money_follows_from_the_wall_meter_and_the_prices(report, measured):
    """100 W were entered for 3 users of the first workload: joules = 100 x seconds, euros by hand."""
    load = measured[0]["stages"]["load:short:3"]
    seconds = sum(window["seconds"] for window in load["windows"])
    tokens = sum(window["output_tokens"] for window in load["windows"])
    row = next(row for row in report.table("power-money-1k")["rows"] if row["label"].startswith("short QA, 3 users"))
    expected = 100.0 * seconds / 3.6e6 * 1.2 * 0.3
    assert row["cells"]["electricity"]["value"] == pytest.approx(1000 * expected / tokens)
    assert row["cells"]["rent"]["value"] == pytest.approx(1000 * 2.5 * seconds / 3600 / tokens)
    owned = 9000 / (4 * 8760 * 0.5) * seconds / 3600
    assert row["cells"]["owned"]["value"] == pytest.approx(1e3 * owned / tokens)
    said = " ".join(row["cells"]["how"]["value"] for row in report.table("power-arithmetic")["rows"])
    assert "€9,000 / (4 years x 8,760 h x utilisation 0.5)" in said and "PUE 1.2 x €0.3/kWh" in said


def test_without_prices_there_is_no_money(measured):
    bare = Report.from_measurements(repriced(measured[0], Settings(prices=Prices("$"))))
    for row in bare.table("power-money-1m")["rows"]:
        assert all(cell["value"] is None and cell["why"] for cell in row["cells"].values())
    assert "$0" not in bare.to_html()


def test_what_was_scaled_down_is_said(report):
    notes = report.document["notes"]
    assert any("scaled down from 1,850 in / 620 out" in note and "max_model_len is 192" in note for note in notes)
    assert any("quick report" in note for note in notes)


def test_the_page_is_whole_and_asks_for_nothing(report):
    html = report.to_html()
    for section in report.document["sections"]:
        assert f'<section id="{section["id"]}"' in html
        for one in (*section["tables"], *section["plots"]):
            assert html.count(f'id="{one["id"]}"') == 1
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(", html)
    assert not re.search(r'(src|href)="(?!#)', html)
    assert "default-src 'none'" in html
    anchors = set(re.findall(r'href="#([^"]+)"', html))
    assert anchors <= set(re.findall(r'id="([^"]+)"', html))


def test_plots_are_drawn_or_say_why(report):
    drawn = 0
    for section in report.document["sections"]:
        for plot in section["plots"]:
            if plot.get("why"):
                with pytest.raises(ValueError, match="nothing to draw"):
                    draw(plot)
                continue
            picture = xml.etree.ElementTree.fromstring(draw(plot))
            _, _, width, height = map(float, picture.get("viewBox").split())
            for shape in picture.iter():
                for name, most in (
                    ("x1", width),
                    ("x2", width),
                    ("cx", width),
                    ("y1", height),
                    ("y2", height),
                    ("cy", height),
                ):
                    assert -1 <= float(shape.get(name, 0)) <= most + 1, (plot["id"], shape.attrib)
            drawn += 1
    assert drawn >= 10


def test_ticks_are_round_and_inside():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0, 0.037) == [0, 0.01, 0.02, 0.03]
    assert ticks(-25, 130) == [0, 50, 100] and ticks(3, 3) == [3]


def test_names_from_outside_do_not_become_markup(measured):
    data = json.loads(json.dumps(measured[0], default=str))
    data["model"]["name"] = "<script>alert(1)</script>"
    data["workloads"][0]["notes"] = ["<img src=x onerror=alert(1)>"]
    html = Report.from_measurements(data).to_html()
    assert "<script" not in html and "<img" not in html and "&lt;script&gt;" in html


def test_csv_has_a_line_for_every_figure(report):
    from qwen_fast.cost.render_csv import HEADER, as_csv

    rows = list(csv.reader(io.StringIO(as_csv(report.document))))
    assert tuple(rows[0]) == HEADER
    assert len(rows) - 1 == sum(1 for _ in cells(report))
    for row in rows[1:]:
        assert len(row) == len(HEADER)
        assert bool(row[4]) != bool(row[10])  # a value, or why not
        assert not any(text.startswith(("=", "@")) for text in row)


def test_the_terminal_shows_every_table(report):
    plain = str(report)
    for section in report.document["sections"]:
        for table in section["tables"]:
            assert f"-- {table['title']}" in plain
    pytest.importorskip("rich")
    from qwen_fast.cost.render_terminal import rich_text

    rich = rich_text(report.document)
    assert "tokens/s" in rich and "Prefill and decode" in rich


def test_a_run_that_was_cut_off_goes_on(measured, settings):
    """Nothing is measured twice: with all stages there, only missing ones run."""
    data, path = measured
    kept = json.loads(path.read_text())
    del kept["stages"]["load:chat:3"]
    path.write_text(json.dumps(kept))
    said = []
    from cost_helpers import load

    again = Runner({}, settings, load, path, said.append).run()
    assert said == ["load:chat:3"]
    assert set(again["stages"]) == set(data["stages"])


def test_the_budget_leaves_reasons(llm, settings):
    from dataclasses import replace

    hurried = replace(settings, budget_s=1e-6, workloads=settings.workloads[:1])
    data = Runner({}, hurried, None, llm=llm).run()
    found = Report.from_measurements(data)
    assert not data["stages"]
    assert "time budget" in found.table("time-main")["rows"][0]["cells"]["tokens"]["why"]
    assert "not measured" in found.to_html()


def test_cost_report_of_a_loaded_engine(llm):
    found = llm.cost_report("20/8", users=[1, 2], window_s=0.01, levers=False)
    assert [row["label"] for row in found.table("time-main")["rows"]] == [
        "own lengths, 1 user (20 in / 8 out)",
        "own lengths, 2 users (20 in / 8 out)",
    ]
    assert "<iframe" in found._repr_html_() and "demo" in repr(found)
    with pytest.raises(TypeError, match="workload must be None"):
        llm.cost_report(3)
    with pytest.raises(ValueError, match="users must be numbers of at least 1"):
        llm.cost_report("20/8", users=[0])


def test_files_that_are_no_reports(tmp_path):
    path = tmp_path / "report.json"
    for text, kind, message in (
        ("{", ValueError, "not JSON"),
        ("[]", TypeError, "JSON object"),
        ("{}", ValueError, "not a report of this version"),
    ):
        path.write_text(text)
        with pytest.raises(kind, match=message):
            Report.read(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--users", "0"], "--users must be numbers of at least 1"),
        (["--lengths", "5"], "lengths must be IN/OUT"),
        (["--wall-watts", "5"], "--wall-watts must be USERS=W"),
        (["--wall-watts", "5=-1"], "wall_watts must be watts above 0"),
        (["--rent-per-hour", "nan"], "rent_per_hour must be above 0 and finite"),
        (["--budget-seconds", "0"], "budget_s must be above 0"),
    ],
)
def test_arguments_that_are_wrong(arguments, message, capsys):
    from qwen_fast.cli import main

    assert main(["cost", "demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_report_is_rendered_again_with_prices(measured, tmp_path, capsys):
    from qwen_fast.cli import main

    path = tmp_path / "measurements.json"
    path.write_text(json.dumps(measured[0], default=str))
    arguments = [
        "--render",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--currency",
        "$",
        "--rent-per-hour",
        "3",
        "--json",
    ]
    assert main(["cost", *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prices"]["rent_per_hour"] == 3 and document["prices"]["currency"] == "$"
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["report.csv", "report.html", "report.json"]


@pytest.mark.long
def test_the_command_within_two_minutes_and_in_chromium(tmp_path):
    command = [
        sys.executable,
        "-m",
        "qwen_fast",
        "cost",
        "demo",
        "--quick",
        "--out",
        str(tmp_path),
        "--rent-per-hour",
        "1.2",
    ]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    page = (tmp_path / "report.html").as_uri()
    arguments = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dump = subprocess.run(
        [*arguments, "--dump-dom", page], check=True, timeout=120, capture_output=True, text=True
    ).stdout
    assert dump.count("<table") >= 30 and dump.count("<svg") >= 10
    shot = tmp_path / "shot.png"
    subprocess.run(
        [*arguments, "--window-size=1280,2400", f"--screenshot={shot}", page],
        check=True,
        timeout=120,
        capture_output=True,
    )
    assert shot.stat().st_size > 50_000
    from qwen_fast.cost.render_pdf import write_pdf

    assert write_pdf(tmp_path / "report.html", tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes()[:5] == b"%PDF-"
