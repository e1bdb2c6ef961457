"""The published figures: which cannot hold, by arithmetic that is done here a second time."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_fast.cost.report import Report
from qwen_fast.cost.studies import comparison, studies_html, studies_markdown, verdicts
from qwen_fast.cost.studies_data import ENERGY_A, SPEED_A

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def find(words):
    (one,) = [one for one in verdicts() if words in one.claim]
    return one


def test_energy_does_not_follow_from_watts_and_speed():
    assert 1000 * 497 / 80.6 == pytest.approx(6166, abs=0.5)
    low = find("2.18 J")
    assert not low.holds and "= 6,166 J" in low.arithmetic and "factor of 2,829" in low.reading
    seconds = [1000 * one.joules_1k / one.watts for one in ENERGY_A]
    assert max(seconds) - min(seconds) < 0.02  # the same time at every load: computed, not measured
    assert "228 tokens/s" in find("read as kJ").arithmetic


def test_prices_do_not_follow_from_hours_and_speed():
    assert 1.2 / (20.8 * 3600) * 1e6 == pytest.approx(16.03, abs=0.01)
    first = find("RTX 4090D, 16-bit weights: ¥4.3")
    assert not first.holds and "= ¥16.0" in first.arithmetic
    assert not find("A100-40G").holds


def test_weights_and_traffic():
    """494,032,768 parameters, 136,134,656 (151,936 x 896) of them the embedding."""
    assert 151_936 * 896 == 136_134_656
    assert "together 0.46 GB" in find("1.32 GB").arithmetic
    assert "462 GB" in find("2.1 GB moved").arithmetic
    assert "12,288 bytes a token" in find("1.07 MB").arithmetic


def test_the_table_of_speeds_is_consistent_in_itself():
    for one in SPEED_A:
        assert 1000 / one.ms_per_token == pytest.approx(one.tokens_s, rel=0.01)
        assert one.ms_per_1k == pytest.approx(1000 * one.ms_per_token)
    assert not find("12.4 to 18.9 ms").holds


def test_the_page_beside_a_report(measured):
    document = Report.from_measurements(measured[0]).document
    tables = {one["id"]: one for one in comparison(document)}
    short = tables["study-a-speed"]["rows"][0]["cells"]
    assert short["theirs"]["value"] == 80.6 and short["ours"]["value"] > 0
    assert tables["study-a-batch"]["rows"][-1]["cells"]["ours"]["why"] == "not measured: this report has no such load"
    html = studies_html([document])
    assert "cannot hold as printed" in html and "<script" not in html
    text = studies_markdown([document])
    assert text.count("\n| ") > 30 and "| A: 2.1 GB moved for 1,000 tokens | no |" in text


def test_what_was_in_the_cache_and_in_the_tail():
    assert 32 * 131_072 * 12_288 / 1e9 == pytest.approx(51.54, abs=0.01)
    assert not find("128K tokens").holds and "51.5 GB" in find("128K tokens").arithmetic
    assert 280 / (312 / 8) == pytest.approx(7.18, abs=0.01)
    assert not find("P99 of").holds and "280 tokens take 7.2 s" in find("P99 of").arithmetic
    assert find("tokens/s per W").holds and "= 452 W" in find("tokens/s per W").arithmetic


@pytest.mark.parametrize(("model", "study", "other"), [("0.5b", "study-a", "study-b"), ("7b", "study-b", "study-a")])
def test_the_committed_page_is_what_the_committed_reports_give(model, study, other):
    path = next(RESULTS.glob(f"*-cost-{model}")) / "report.json"
    document = Report.read(path).document
    tables = {one["id"]: one for one in comparison(document)}
    assert tables and all(name.startswith(study) and not name.startswith(other) for name in tables)
    documents = [Report.read(next(RESULTS.glob(f"*-cost-{name}")) / "report.json").document for name in ("0.5b", "7b")]
    (page,) = RESULTS.glob("*-studies.md")
    assert studies_markdown(documents) == page.read_text(encoding="utf-8")
