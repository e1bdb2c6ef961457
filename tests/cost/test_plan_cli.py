"""qwen-fast plan: its options, exit codes and errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qwen_fast import cli
from qwen_fast.cost import plan


def run(capsys, *words: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["plan", *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_plan_as_text_and_json(capsys):
    code, out, _ = run(capsys, "7B", "--card", "H200", "--users", "16", "--in", "128", "--out", "256")
    assert code == 0 and "TPOT" in out and "KV cache" in out and "not measured" in out
    code, out, _ = run(capsys, "7B", "--users", "16", "--in", "128", "--out", "256", "--json")
    data, made = json.loads(out), plan("7B", "H200", users=16, tokens_in=128, tokens_out=256)
    assert data == json.loads(json.dumps(made.to_json()))
    assert data["speed"]["step_s"]["value"] == made.speed.step_s.value


def test_exit_code_says_whether_it_fits_and_reaches_the_target(capsys):
    assert run(capsys, "72B", "--card", "L4")[0] == 1
    assert run(capsys, "7B", "--target", "4 users, P99<10s")[0] == 0
    code, out, _ = run(capsys, "7B", "--card", "L4", "--target", "4 users, P99<1ms")
    assert code == 1 and "NOT met" in out and "predicted" in out


def test_cards(capsys):
    code, out, _ = run(capsys, "--card", "list")
    assert code == 0 and out.count("\n") == 12 and "whitepaper" in out
    code, out, _ = run(capsys, "0.5B", "--card-memory", "12GiB", "--bandwidth", "400", "--tflops", "30", "--json")
    card = json.loads(out)["card"]
    assert (code, card["memory_bytes"], card["by_hand"]) == (0, 12 << 30, True)
    code, out, _ = run(capsys, "0.5B", "--card", "2x L4", "--bandwidth", "400", "--json")
    assert json.loads(out)["count"] == 2 and json.loads(out)["card"]["bandwidth_gbs"] == 400
    assert "by hand: bandwidth" in json.loads(out)["card"]["source"]


def test_cheapest(capsys, tmp_path):
    page = tmp_path / "plan.html"
    words = ["7B", "--cheapest", "--target", "16 users, P99<3s", "--in", "2048", "--out", "512", "--html", str(page)]
    code, out, _ = run(capsys, *words, "--price", "L40S=rent:2", "--price", "H200=rent:30", "--currency", "$")
    first = next(line for line in out.splitlines() if "/h" in line)
    assert code == 0 and "L40S" in first and "$" in first
    assert page.read_text().startswith("<!doctype html>") and "L40S" in page.read_text()
    code, out, _ = run(capsys, *words, "--study-b-prices", "--json")
    sources = [option["arithmetic"] for option in json.loads(out)["options"] if option["per_hour"] is not None]
    assert sources and all("assumed: study B" in said for said in sources)


def test_study_b(capsys):
    code, out, _ = run(capsys, "--study-b")
    assert code == 0
    for name in ("RTX 4090D, 16-bit", "RTX 4090D, 4-bit", "A10G", "A100-40G", "A100-80G", "4x RTX 4090D"):
        assert name in out
    assert "890 ms" in out and "¥16.03" in out
    assert run(capsys, "0.5B", "--study-b")[0] == 2


@pytest.mark.parametrize(
    "words, said",
    [
        (["9B"], "model: '9B'"),
        (["7B", "--card", "RTX 1"], "card: 'RTX 1'"),
        (["7B", "--card-memory", "24GiB"], "needs all of"),
        (["7B", "--card-memory", "much", "--card", "L4"], "--card-memory"),
        (["7B", "--card", "L4", "--bandwidth", "nan"], "bandwidth_gbs must be above 0"),
        (["7B", "--card", "L4", "--tflops", "-1"], "tflops must be above 0"),
        (["7B", "--weights", "5"], "'5' is not one of"),
        (["7B", "--users", "0"], "users must be 1 to"),
        (["7B", "--target", "soon"], "cannot read 'soon'"),
        (["7B", "--cheapest"], "needs --target"),
        (["7B", "--cheapest", "--target", "1 user", "--watts", "300"], "--watts is for one card"),
        (["7B", "--price", "L4=rent:1"], "--cheapest"),
        (["7B", "--rent-per-hour", "0"], "rent_per_hour must be above 0"),
        (["7B", "--rent-per-hour", "nan"], "rent_per_hour must be above 0"),
        (["7B", "--watts", "0"], "watts must be above 0"),
        (["7B", "--context", "10"], "context 10 is less"),
        (["7B", "--card", "4x L4", "--count", "2"], "count is 2"),
    ],
)
def test_errors(capsys, words, said):
    code, _, err = run(capsys, *words)
    assert code == 2 and said in err and "Traceback" not in err


def test_the_arguments_cost_no_start_up_time():
    """Building the parser, which every command does, imports neither planner nor numpy."""
    code = "import sys, qwen_fast.cli as c; c.build_parser(); print([m for m in sys.modules if 'planner' in m or 'roofline' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
