"""A report: measurements turned into six sections of tables and plots, and its forms: JSON, HTML, CSV, terminal, PDF."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .definitions import DEFINITIONS
from .section_levers import concurrency_section, levers_section
from .section_memory import memory_section
from .section_parallel import with_comparison
from .section_power import power_section
from .section_time import time_section
from .section_use import use_section

SCHEMA = "qwen_fast cost report, version 1"
SCHEMA_PATH = Path(__file__).with_name("schema.json")


class Report:
    """`document`: the JSON, as schema.json describes it. Shows itself as HTML in a notebook, and as text with str()."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        if document.get("schema") != SCHEMA:
            raise ValueError(f"not a report of this version: schema is {document.get('schema')!r}, expected {SCHEMA!r}")
        self.document = dict(document)

    @classmethod
    def from_measurements(cls, data: Mapping[str, Any]) -> Report:
        """From what Runner.run() returns."""
        return cls(build(data))

    @classmethod
    def read(cls, path: str | Path) -> Report:
        """From a report.json. ValueError or TypeError where it is none."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if not isinstance(document, dict):
            raise TypeError(f"{path}: a report is a JSON object, got {type(document).__name__}")
        try:
            return cls(document)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def table(self, name: str) -> dict[str, Any]:
        """A table by its id, such as "time-main". KeyError where there is none."""
        for one in self.document["sections"]:
            for found in one["tables"]:
                if found["id"] == name:
                    return found
        raise KeyError(name)

    def to_json(self) -> str:
        return json.dumps(self.document, ensure_ascii=False, separators=(",", ":")) + "\n"

    def to_html(self) -> str:
        """One file that asks for nothing from outside."""
        from .render_html import page

        return page(self.document)

    def to_text(self) -> str:
        from .render_terminal import as_text

        return as_text(self.document)

    def write(self, folder: str | Path, pdf: bool = False) -> list[Path]:
        """report.json, report.html, report.csv and, with pdf and a Chromium, report.pdf. Returns what was written."""
        from .render_csv import as_csv
        from .render_pdf import write_pdf

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name, text in (("json", self.to_json()), ("html", self.to_html()), ("csv", as_csv(self.document))):
            path = folder / f"report.{name}"
            path.write_text(text, encoding="utf-8")
            written.append(path)
        if pdf and write_pdf(folder / "report.html", folder / "report.pdf"):
            written.append(folder / "report.pdf")
        return written

    def _repr_html_(self) -> str:
        from html import escape

        return f'<iframe style="width:100%;height:80vh;border:0" srcdoc="{escape(self.to_html())}"></iframe>'

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return f"<cost report of {self.document['model']['name']!r}, {self.document['generated']}>"


def build(data: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a report from measurements."""
    info = data["info"]
    return {
        "schema": SCHEMA,
        "generated": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "began": data["began"],
        "seconds": data.get("seconds", 0.0),
        "model": data["model"],
        "machine": data["machine"],
        "engine": info,
        "settings": data["settings"],
        "prices": data["prices"],
        "workloads": data["workloads"],
        "notes": _notes(data),
        "sections": [
            memory_section(data), time_section(data), use_section(data), power_section(data), levers_section(data),
            with_comparison(concurrency_section(data), data),
        ],
        "definitions": {key: {"title": title, "text": text} for key, (title, text) in DEFINITIONS.items()},
        "measurements": {"stages": data["stages"], "skipped": data["skipped"]},
    }  # fmt: skip


def _notes(data: Mapping[str, Any]) -> list[str]:
    notes = [f"{one['label']}: {note}" for one in data["workloads"] for note in one["notes"]]
    if data["settings"]["quick"]:
        notes.append("A quick report: short windows and requests. It shows that everything works; quote a full one.")
    if data["identity"]["options"].get("load_format") == "dummy":
        notes.append(
            "Random weights in the model's real shapes and formats: speed, memory and energy are real, texts are not."
        )
    why = data["meter"].get("why")
    if why:
        notes.append(f"Bytes, operations, device time by phase and energy are not measured: {why}.")
    measured = [one["name"] for one in data["meter"].get("sources", ()) if one["measured"]]
    if not why and not measured:
        notes.append("Energy is not measured: no counter can be read here. No guess stands in its place.")
    if data["machine"]["load_average"] > data["machine"]["cpus"] * 0.75:
        notes.append(
            f"The machine was not idle: load average {data['machine']['load_average']:.1f} on {data['machine']['cpus']} CPUs at "
            "the start. Figures are worse and less steady than this machine's best."
        )
    notes += _cached(data)
    count = int(data["info"].get("tensor_parallel_size") or 1)
    if count > 1 and data["info"]["backend"] != "cpu":
        notes.append(
            f"{count} GPUs hold the model together: planned memory and KV cache are those of the GPU with the most, memory in use, "
            "bytes moved, power and energy those of all of them."
        )
    preempted = sum(
        window["preemptions"]
        for load in data["stages"].values()
        if isinstance(load, dict)
        for window in load.get("windows", ())
    )
    if preempted:
        notes.append(f"{preempted} preemptions in the windows: the KV cache was too small for a load.")
    return notes


def _cached(data: Mapping[str, Any]) -> list[str]:
    """Loads whose prompts came from the prefix cache in part: their times hold for such prompts only."""
    notes = []
    for workload in data["workloads"]:
        loads = [one for key, one in data["stages"].items() if key.startswith(f"load:{workload['name']}:")]
        windows = [window for load in loads for window in load["windows"]]
        cached, asked = (sum(window[name] for window in windows) for name in ("cached_tokens", "prompt_tokens"))
        if cached:
            share = 100 * cached / asked
            notes.append(
                f"{workload['label']}: {share:.0f} % of the prompt tokens came from the prefix cache (prompts that begin alike)."
            )
    return notes
