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
            shown = output.get("text") or output.get("data", {}).get("text/plain", "")
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
