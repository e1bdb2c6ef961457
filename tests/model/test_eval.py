"""Exact match on the closed tasks of the demo model, per number format: the table that stands in README.md.

    pytest -m long -s tests/model/test_eval.py      all 600 rows
    pytest -s tests/model/test_eval.py              two rows of each task

The model's own bf16 accuracy under transformers is 592 of 600 (README of the checkpoint).
"""

import json
from collections import defaultdict

import pytest
from model_helpers import DATA

ROWS = [json.loads(line) for line in (DATA / "demo_eval.jsonl").read_text(encoding="utf-8").splitlines()]

FORMATS = {
    "bf16": dict(dtype="bfloat16"),
    "w4 (4-bit weights, int8 activations)": dict(quantization="w4"),
    "w4, int4 head": dict(quantization="w4", lm_head_dtype="int4"),
}

# The fewest rows of 600 that must match, and the fewest of the default two per task.
LEAST = {
    "bf16": (588, 28),
    "w4 (4-bit weights, int8 activations)": (0, 0),
    "w4, int4 head": (0, 0),
}


def first_per_task(count):
    seen, chosen = defaultdict(int), []
    for row in ROWS:
        if seen[row["task"]] < count:
            seen[row["task"]] += 1
            chosen.append(row)
    return chosen


def exact_matches(llm, rows):
    """task -> (matches, rows). Greedy, 1,200 new tokens, no repetition penalty, as the checkpoint's README says."""
    from qwen_fast import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1200, repetition_penalty=1.0, skip_special_tokens=True)
    texts = {}
    plain = [i for i, row in enumerate(rows) if not row.get("tools")]
    for i, output in zip(plain, llm.chat([rows[i]["messages"] for i in plain], params), strict=True):
        texts[i] = output.outputs[0].text
    for i, row in enumerate(rows):
        if row.get("tools"):
            texts[i] = llm.chat(row["messages"], params, tools=row["tools"])[0].outputs[0].text
    tally = defaultdict(lambda: [0, 0])
    for i, row in enumerate(rows):
        tally[row["task"]][0] += texts[i] == row["answer"]
        tally[row["task"]][1] += 1
    return dict(tally)


def print_table(results):
    names = list(results)
    print("\n| task | " + " | ".join(names) + " |\n| --- |" + " --- |" * len(names))
    for task in results[names[0]]:
        print(
            f"| {task} | " + " | ".join(f"{results[name][task][0]}/{results[name][task][1]}" for name in names) + " |"
        )
    totals = {name: [sum(column) for column in zip(*results[name].values(), strict=True)] for name in names}
    print("| all | " + " | ".join(f"{good}/{count}" for good, count in totals.values()) + " |")
    return {name: total[0] for name, total in totals.items()}


@pytest.mark.parametrize("per_task", [2, pytest.param(40, marks=pytest.mark.long)])
def test_exact_match(demo, per_task):
    from qwen_fast import LLM

    rows = first_per_task(per_task)
    assert len(rows) == 15 * per_task
    results = {}
    for name, options in FORMATS.items():
        with LLM(str(demo), kv_cache_tokens=16384, **options) as llm:
            results[name] = exact_matches(llm, rows)
    totals = print_table(results)
    for name, total in totals.items():
        assert total >= LEAST[name][0 if per_task == 40 else 1], name
