"""Exact match on the closed tasks of the demo model, per number format: the table that stands in README.md.

    pytest -m long -s tests/model/test_eval.py      all 600 rows
    pytest -s tests/model/test_eval.py              two rows of each task

The 16-bit model under transformers scored 592 of 600 when it was trained.
"""

import json
from collections import defaultdict

import pytest
from model_helpers import DATA

ROWS = [json.loads(line) for line in (DATA / "demo_eval.jsonl").read_text(encoding="utf-8").splitlines()]

# By device: the fixture with the checkpoint, options, the fewest rows of 600 that must match, and of the default 30.
BOTH = {
    "demo, int4 head": ("demo", {"lm_head_dtype": "int4"}, 585, 27),
    "16-bit original": ("original_demo", {}, 590, 28),
    "original with `w4`": ("original_demo", {"quantization": "w4"}, 588, 28),
}
FORMATS = {
    "cpu": {
        "demo (4 bits, int8 activations)": ("demo", {}, 585, 27),
        "demo, float activations": ("demo", {"activation_dtype": "float32"}, 585, 27),
        **BOTH,
    },
    "cuda": {
        "demo (4 bits)": ("demo", {}, 585, 27),
        "demo, 16-bit head": ("demo", {"lm_head_dtype": "model"}, 585, 27),
        **BOTH,
    },
}


def first_per_task(count):
    seen, chosen = defaultdict(int), []
    for row in ROWS:
        if seen[row["task"]] < count:
            seen[row["task"]] += 1
            chosen.append(row)
    return chosen


def exact_matches(llm, rows):
    """task -> (matches, rows). Greedy until the end token, no repetition penalty."""
    from qwen_fast import SamplingParams

    params = SamplingParams(temperature=0.0, repetition_penalty=1.0)
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
def test_exact_match(request, shared_dir, device, per_task):
    from qwen_fast import LLM

    rows = first_per_task(per_task)
    assert len(rows) == 15 * per_task
    results = {}
    for name, (fixture, options, *_) in FORMATS[device].items():
        if fixture == "original_demo" and not (shared_dir / "demo-model").is_dir():
            print(f"{name}: the checkpoint is not in {shared_dir}")
            continue
        with LLM(str(request.getfixturevalue(fixture)), device=device, kv_cache_tokens=16384, **options) as llm:
            results[name] = exact_matches(llm, rows)
    for name, total in print_table(results).items():
        assert total >= FORMATS[device][name][2 if per_task == 40 else 3], name
