"""The examples run as they are."""

import ast
import contextlib
import io
import json
import pathlib
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


def test_stream():
    done = subprocess.run([sys.executable, EXAMPLES / "stream.py"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Nora" in done.stdout and "What is 128 + 256?\n  128 + 256 = 384\n" in done.stdout


def test_notebook():
    """The cells in order, in one namespace, the last expression of each as its value."""
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    namespace, values, printed = {}, [], io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, source in enumerate(cells):
            tree = ast.parse(source, f"cell {number}")
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, f"cell {number}", "exec"), namespace)
            if last is not None:
                values.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace))
    assert "128 + 256 = 384" in printed.getvalue()
    assert any(isinstance(value, dict) and value["kv_cache_bytes"] > 0 for value in values)
    assert any(value == (len(namespace["ids"]), 8192) for value in values)
    assert namespace["llm"].closed


def test_notebook_is_clean():
    """No outputs, no counters: what is committed does not change when somebody runs it."""
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
