"""A run from reference to report, with scorers that need no engine."""

from __future__ import annotations

import html.parser
import json
import re

import jsonschema
import pytest
from quality_helpers import TableScorer, measured, row

from qwen_fast.quality import Runner, Settings
from qwen_fast.quality.report import SCHEMA_PATH, Report

TEXT = "The quick brown fox jumps over the lazy dog. " * 9
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA_PATH.read_text()))
QUESTIONS = [f"question {i}: the code of A is {i}1 and of B is {i}2" for i in range(12)]
ROWS = [
    *(row("look", text, f"{i}1", i + 1, kind="recall") for i, text in enumerate(QUESTIONS[:6])),
    *(
        row("json", text, json.dumps({"a": int(f"{i}1")}), i + 1, kind="json")
        for i, text in enumerate(QUESTIONS[6:], 6)
    ),
]
RIGHT = {text: one.answer for text, one in zip(QUESTIONS, ROWS)}


def answers(**wrong):
    return RIGHT | {QUESTIONS[int(key[1:])]: text for key, text in wrong.items()}


def test_a_model_against_itself_differs_in_nothing():
    report = measured(TableScorer(answers=RIGHT), {"same": TableScorer(answers=RIGHT)}, TEXT, ROWS)
    cell = report.cell("same")
    assert cell["text"]["kl_mean"] == {"value": 0.0, "low": 0.0, "high": 0.0} and cell["text"]["identical"]
    assert cell["text"]["perplexity_ratio"]["value"] == 1 and cell["text"]["same_top"]["value"] == 1
    assert cell["tasks"]["differences"] == [] and cell["tasks"]["all"]["p"] == 1
    assert any("the same distributions" in note for note in report.document["notes"])
    assert VALIDATOR.is_valid(report.document)


def test_more_noise_is_more_divergence_and_rows_are_counted():
    theirs = answers(q0="99")
    ours = answers(q1="12", q7='{"a": 72}', q8="no")
    cells = {"0.1": TableScorer(0.1, ours), "0.4": TableScorer(0.4, theirs)}
    report = measured(TableScorer(answers=theirs), cells, TEXT, ROWS)
    assert VALIDATOR.is_valid(report.document), list(VALIDATOR.iter_errors(report.document))[:1]
    small, large = (report.cell(name) for name in cells)
    assert 0 < small["text"]["kl_mean"]["value"] < large["text"]["kl_mean"]["low"]
    assert small["text"]["positions"] == len(TEXT) - 7  # 405 characters in 7 windows
    tasks = small["tasks"]
    assert (tasks["all"]["rows"], tasks["all"]["broken"], tasks["all"]["fixed"]) == (12, 3, 1)
    assert tasks["by_task"]["look"]["broken"] == 1 and tasks["by_task"]["json"]["broken"] == 2
    exact = tasks["all"]["metrics"]["exact"]
    assert (exact["reference"]["value"], exact["measured"]["value"]) == (11 / 12, 9 / 12)
    assert exact["difference"]["value"] == pytest.approx(-2 / 12)
    assert tasks["all"]["metrics"]["json_valid"]["measured"]["value"] == pytest.approx(5 / 6)
    assert tasks["all"]["metrics"]["other_record"]["measured"]["value"] == pytest.approx(1 / 6)
    assert tasks["all"]["metrics"]["fields_missing"]["measured"]["value"] == pytest.approx(1 / 6)
    assert tasks["all"]["metrics"]["wrong_from_prompt"]["measured"]["value"] == pytest.approx(1 / 6)  # 12 is B's code
    assert tasks["outcomes"] == {"look": "101111", "json": "100111"}
    assert [(one["task"], one["row"], one["change"]) for one in tasks["differences"]] == [
        ("look", 1, "fixed"), ("look", 2, "broken"), ("json", 8, "broken"), ("json", 9, "broken"),
    ]  # fmt: skip
    assert tasks["differences"][1] | {} == {
        "task": "look",
        "row": 2,
        "change": "broken",
        "answer": "11",
        "reference": "11",
        "measured": "12",
    }
    assert {one["low"] for one in tasks["recall"]} == {0} and tasks["recall"][0]["rows"] == 6
    assert not large["tasks"]["differences"]
    pair = report.compare("0.4", "0.1")
    assert pair["all"]["metrics"]["exact"] == exact and pair["all"]["broken"] == 3
    assert report.compare("0.1", "reference")["all"]["broken"] == 1
    with pytest.raises(KeyError):
        report.compare("reference", "nobody")


def test_live_and_by_file_give_the_same_report():
    def run(how):
        reference, cell = TableScorer(answers=RIGHT), TableScorer(0.2, RIGHT)
        report = measured(reference, {"a": cell}, TEXT, ROWS, reference_logits=how)
        assert reference.closed and cell.closed
        return report.document

    live, file = run("both"), run("file")
    assert "both models loaded" in live["reference"]["logits"] and "exact" in file["reference"]["logits"]
    assert (
        live["cells"][0]["text"] == file["cells"][0]["text"] and live["cells"][0]["tasks"] == file["cells"][0]["tasks"]
    )


def refuses():
    raise NotImplementedError("kv_cache_dtype='int3' is not built; /home/me/models/qwen/config.json says so")


def test_what_is_refused_is_shown_with_its_reason():
    bad = TableScorer(0.1, RIGHT)
    bad.logits = lambda ids, start, stop: TableScorer.logits(bad, ids, start, stop) * float("nan")
    other = TableScorer(0.1, RIGHT)
    other.tokens = other.tokens[:-1]
    cells = {"good": TableScorer(0.1, RIGHT), "int3": refuses, "nan": bad, "other": other}
    report = measured(TableScorer(answers=RIGHT), cells, TEXT, ROWS)
    document = report.document
    assert [one["status"] for one in document["cells"]] == ["measured", "refused", "failed", "failed"]
    assert document["cells"][1]["why"] == "kv_cache_dtype='int3' is not built; config.json says so"
    assert (
        "logits are not finite" in document["cells"][2]["why"]
        and "the tokenizers differ" in document["cells"][3]["why"]
    )
    assert VALIDATOR.is_valid(document), list(VALIDATOR.iter_errors(document))[:1]
    for text in (report.to_html(), report.to_text(), str(report)):
        assert "is not built; config.json says so" in text.replace("&#x27;", "'") and "the tokenizers differ" in text
    for one in cells.values():
        assert one is refuses or one.closed


def test_alone_what_is_refused_is_raised():
    with pytest.raises(NotImplementedError, match="is not built"):
        measured(TableScorer(), {"int3": refuses}, TEXT, alone=True)


def test_a_spent_budget_begins_no_cell():
    report = measured(TableScorer(), {"a": TableScorer(), "b": TableScorer()}, TEXT, budget_s=1e-9)
    assert [one["status"] for one in report.document["cells"]] == ["not begun"] * 2
    assert VALIDATOR.is_valid(report.document) and "the budget of 1e-09 s was spent" in report.to_text()


def test_halves_can_be_left_out():
    text_only = measured(TableScorer(), {"a": TableScorer(0.1)}, TEXT)
    assert "tasks" not in text_only.cell() and VALIDATOR.is_valid(text_only.document)
    tasks_only = measured(TableScorer(answers=RIGHT), {"a": TableScorer(answers=RIGHT)}, None, ROWS)
    assert "text" not in tasks_only.cell() and VALIDATOR.is_valid(tasks_only.document)
    for one in (text_only, tasks_only):
        one.to_html()
    with pytest.raises(ValueError, match="nothing to measure"):
        Runner(TableScorer, [], Settings(), None, [])
    with pytest.raises(ValueError, match="no cell"):
        Runner(TableScorer, [], Settings(), TEXT, [])


def test_rows_that_do_not_fit_are_named():
    long = row("long", "x" * 500, "y", 77)
    report = measured(TableScorer(answers=RIGHT), {"a": TableScorer(answers=RIGHT)}, None, [*ROWS, long])
    assert report.document["reference"]["rows"] == 12
    assert any(note.startswith("1 rows are left out") for note in report.document["notes"])
    small = TableScorer(answers=RIGHT)
    small.max_model_len = 40
    found = measured(TableScorer(answers=RIGHT), {"a": small}, None, ROWS).cell()
    assert found["status"] == "failed" and "does not fit the max_model_len of 40" in found["why"]


def test_embeddings_of_other_heights_are_compared_over_the_rows_of_both():
    """Qwen2.5's sizes share a tokenizer, and pad their embeddings differently."""
    report = measured(TableScorer(vocab_size=120), {"a": TableScorer()}, TEXT)
    assert report.cell()["text"]["vocab_rows"] == 97 and report.cell()["status"] == "measured"


@pytest.mark.parametrize("options", [{"window": 1}, {"limit": 0}, {"draws": 10}, {"tokens": 1}, {"reference_logits": "disk"}, {"budget_s": 0},
                                     {"max_new_tokens": True}])  # fmt: skip
def test_wrong_settings(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Settings(**options)


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.links, self.ids = {}, [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        self.links += [attrs[name] for name in ("href", "src") if name in attrs]
        if tag not in ("meta", "br", "line", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "circle", "rect", "polyline"):
            assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes(tmp_path):
    texts = answers(q1="<script>alert(1)</script>")
    report = measured(
        TableScorer(answers=RIGHT), {"<i>0.1</i>": TableScorer(0.1, texts), "0.2": TableScorer(0.2, RIGHT)}, TEXT, ROWS
    )
    text = report.to_html()
    page = Page(text)
    assert not page.open and "script" not in page.tags and "<i>" not in text.replace("<i class", "")
    assert page.tags["table"] >= 8 and page.tags["svg"] >= 4 and page.tags["details"] == 1
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"(src|href)=\"(?!#)|url\(|@import", text)
    assert [one.name for one in report.write(tmp_path)] == ["report.json", "report.html"]
    again = Report.read(tmp_path / "report.json")
    assert again.document == report.document and again.to_html() == text
    assert "srcdoc" in report._repr_html_() and "2 cells" in repr(report)


def test_reading_what_is_no_report(tmp_path):
    path = tmp_path / "report.json"
    for text, kind, said in (
        ("{", ValueError, "not JSON"),
        ("[]", TypeError, "got list"),
        ('{"schema": "x"}', ValueError, "not a report"),
    ):
        path.write_text(text)
        with pytest.raises(kind, match=said):
            Report.read(path)


def test_the_terminal_has_every_table(capsys):
    from qwen_fast.quality.render_terminal import show

    report = measured(TableScorer(answers=RIGHT), {"0.1": TableScorer(0.1, answers(q1="12"))}, TEXT, ROWS)
    plain = report.to_text()
    show(report.document)
    shown = capsys.readouterr().out
    for section in report.document["sections"]:
        for table in section["tables"]:
            assert table["title"] in plain and table["title"] in shown
    assert "Mean KL divergence" in plain
