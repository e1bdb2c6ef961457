"""The notebooks in examples/ run from top to bottom in a kernel of their own, and are committed without outputs."""

from __future__ import annotations

import asyncio
import json
import pathlib
import re

import nbclient
import nbformat
import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """{name: the notebook with its outputs, or what stopped it}; all kernels run at once."""

    async def run(name):
        notebook = nbformat.read(EXAMPLES / name, as_version=4)
        folder = str(tmp_path_factory.mktemp("notebook"))
        client = nbclient.NotebookClient(
            notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        return await client.async_execute()

    async def run_all():
        return await asyncio.gather(*map(run, NOTEBOOKS), return_exceptions=True)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):  # nothing is left in the home folder
            patch.setenv(name, str(tmp_path_factory.mktemp("jupyter")))
        return dict(zip(NOTEBOOKS, asyncio.run(run_all())))


def outputs(executed, name):
    """What the notebook prints and shows, as text; nothing may come on standard error."""
    notebook = executed[name]
    if isinstance(notebook, BaseException):
        raise notebook
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = {"text": output.get("text", ""), **output.get("data", {})}
            shown = "\n".join(
                data[kind] for kind in ("text", "text/markdown", "text/html", "text/plain") if kind in data
            )
            assert output.get("name") != "stderr", shown
            texts.append(shown)
    return "\n".join(texts)


def test_quickstart(executed):
    said = outputs(executed, "quickstart.ipynb")
    assert "Nora" in said and "128 + 256 = 384" in said and "kv_cache_bytes" in said


def test_structured_output_and_tools(executed):
    said = outputs(executed, "structured_output_and_tools.ipynb")
    assert "'name': 'Nora', 'age': 7" in said and "-> stop" in said and "-> length" in said
    assert said.count("ValueError") == 3
    assert 'get_weather {"city": "Oslo"}' in said and "temperature = 3" in said
    assert said.count("get_weather {") == 2


def test_batch(executed):
    said = outputs(executed, "batch.ipynb")
    assert "60 answers, " in said and "20 of 61 are done" in said and "61 of 61 are done" in said
    assert re.search(r"[1-9]\d* of \d+ prompt tokens came from the cache", said)
    assert "1 failed:" in said and "  60: the prompt has" in said


def table_of(said, first):
    """The rows of the Markdown table whose first title is `first`: {first cell: the others}."""
    _, _, rest = said.partition(f"| {first} | ")
    lines = rest.splitlines()[2:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("| "))
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[:end]]
    assert rows, first
    return {row[0]: row[1:] for row in rows}


def whole(text):
    return int(text.replace(",", ""))


@pytest.fixture(scope="module")
def cost_said(executed):
    return outputs(executed, "cost_of_your_workload.ipynb")


def test_cost_of_one_request_and_of_all(cost_said):
    assert "128 + 256 = 384" in cost_said
    one = table_of(cost_said, "one request")
    assert one["prompt tokens"][0] == "43" and one["output tokens"][0] == "14"
    parts = [whole(row[0]) for name, row in one.items() if name.endswith(" bytes")]
    assert len(parts) == 6 and min(parts) > 0 and sum(parts) == whole(one["bytes together"][0])
    assert whole(one["device time of the output in µs"][0]) > 0
    for name, (usages, requests, unsettled, total) in table_of(cost_said, "field").items():
        assert whole(usages) == whole(requests) == whole(total) - whole(unsettled), name
        assert whole(total) > 0 or name == "cached_tokens"
    for name, parts in table_of(cost_said, "source (µJ)").items():
        if parts[0].startswith("not measured: "):
            assert len(parts[0]) > len("not measured: ") and one["energy"][0].startswith("not measured: ")
        else:
            assert sum(map(whole, parts[:3])) == whole(parts[3]) > 0, name


def test_cost_of_a_workload(cost_said):
    alone, four = table_of(cost_said, "load").values()  # the first table of the report: speed
    assert all(float(row[2].split()[0].replace(",", "")) > 0 for row in (alone, four))
    moved = cost_said.partition("| load | together (GB")[2]
    weights = [float(line.split(" | ")[2]) for line in moved.splitlines()[2:4]]
    assert 0 < weights[1] < 0.8 * weights[0]  # four users read the weights once
    money = table_of(cost_said, "4 users, pay by")
    assert list(money) == [f"{sign} {way}" for sign in "€$¥" for way in ("electricity", "owned", "rent")]
    euros, dollars, yuan = (float(money[f"{sign} rent"][0][1:]) for sign in "€$¥")
    assert dollars / euros == pytest.approx(0.55 / 0.50, rel=2e-3) and yuan / euros == pytest.approx(4, rel=2e-3)
    priced = cost_said.partition("| load | electricity (€ per million output tokens)")[2].splitlines()[3]
    assert float(priced.strip("| ").split(" | ")[3]) == pytest.approx(euros, rel=5e-3)
    for sign in "€$¥":
        amount, how = money[f"{sign} electricity"]
        assert how == "energy is not measured" if amount == "-" else "J/kWh x PUE 1.2" in how


def test_cost_of_a_plan(cost_said):
    assert "<td>1x RTX 4090</td>" in cost_said and "4 users at once" in cost_said and "7.62 B parameters" in cost_said
    plans = table_of(cost_said, "7B on an RTX 4090")
    assert list(plans) == ["1 user", "4 users", "16 users", "64 users"]
    memory = [float(row[0]) for row in plans.values()]
    speed = [whole(row[4].split()[0]) for row in plans.values()]
    assert sorted(set(memory)) == memory and memory[-1] < 24 and sorted(set(speed)) == speed
    assert {row[1] for row in plans.values()} == {"yes"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_clean(name):
    """No outputs, no counters: what is committed does not change when somebody runs it."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    notebook = json.loads(text)
    nbformat.validate(notebook)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        assert not cell["metadata"] and not cell.get("outputs") and cell.get("execution_count") is None
        assert "".join(cell["source"]).strip()
