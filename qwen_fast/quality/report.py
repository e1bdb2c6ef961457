"""A quality report: measurements turned into sections of tables and plots, and its forms: JSON, HTML, text."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .compare import compare_outcomes
from .definitions import DEFINITIONS
from .sections import sections

SCHEMA = "qwen_fast quality report, version 1"
SCHEMA_PATH = Path(__file__).with_name("schema.json")


class Report:
    """`document`: the JSON, as schema.json describes it. Shows itself as HTML in a notebook, and as text with str()."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        if document.get("schema") != SCHEMA:
            raise ValueError(f"not a report of this version: schema is {document.get('schema')!r}, expected {SCHEMA!r}")
        self.document = dict(document)

    @classmethod
    def from_measurements(cls, data: Mapping[str, Any]) -> Report:
        """From what Runner.run() returns, and `machine`: where it ran."""
        return cls(
            {
                "schema": SCHEMA,
                "generated": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                **{name: data[name] for name in ("began", "seconds", "machine", "settings", "reference", "cells")},
                "notes": [*data["notes"], *_notes(data)],
                "sections": sections(data),
                "definitions": {key: {"title": title, "text": text} for key, (title, text) in DEFINITIONS.items()},
            }
        )

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
            report = cls(document)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        try:
            for form in (report.to_json, report.to_html, report.to_text):
                form()
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{path}: not a whole report: {type(error).__name__}: {error}") from None
        return report

    def cell(self, label: str | None = None) -> dict[str, Any]:
        """A cell by its label, or the only one. KeyError where there is none."""
        found: list[dict[str, Any]] = [one for one in self.document["cells"] if label is None or one["label"] == label]
        if len(found) != 1:
            raise KeyError(label)
        return found[0]

    def compare(self, reference: str, measured: str) -> dict[str, Any]:
        """The exact matches of any two cells, paired: as the cells' own `tasks`. "reference" is the reference."""
        sides = []
        for label in (reference, measured):
            source = self.document["reference"] if label == "reference" else self.cell(label).get("tasks", {})
            if "outcomes" not in source:
                raise ValueError(f"{label!r} was not asked any tasks")
            sides.append(source["outcomes"])
        settings = self.document["settings"]
        return compare_outcomes(sides[0], sides[1], settings["draws"], settings["seed"])

    def to_json(self) -> str:
        return json.dumps(self.document, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"

    def to_html(self) -> str:
        """One file that asks for nothing from outside."""
        from .render_html import page

        return page(self.document)

    def to_text(self) -> str:
        from .render_terminal import as_text

        return as_text(self.document)

    def write(self, folder: str | Path) -> list[Path]:
        """report.json and report.html. Returns what was written."""
        folder = Path(folder)
        forms = {"json": self.to_json().encode(), "html": self.to_html().encode()}
        folder.mkdir(parents=True, exist_ok=True)
        # Both beside their places first: a full disk leaves an older report as it was.
        beside = {folder / f"report.{name}": folder / f"report.{name}.part" for name in forms}
        try:
            for part, form in zip(beside.values(), forms.values()):
                part.write_bytes(form)
            for path, part in beside.items():
                part.replace(path)
        except OSError as error:
            for part in beside.values():
                part.unlink(missing_ok=True)
            raise OSError(error.errno, f"cannot write the report into {folder}: {error.strerror}") from None
        return list(beside)

    def _repr_html_(self) -> str:
        from html import escape

        return f'<iframe style="width:100%;height:80vh;border:0" srcdoc="{escape(self.to_html())}"></iframe>'

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return f"<quality report of {len(self.document['cells'])} cells, {self.document['generated']}>"


def _notes(data: Mapping[str, Any]) -> list[str]:
    notes = []
    if data["settings"]["quick"]:
        notes.append("A quick report: few rows and little text. It shows that everything works; quote a full one.")
    for one in data["cells"]:
        if one["status"] != "measured":
            notes.append(f"{one['label']}: {one['status']}: {one['why']}")
            continue
        if one.get("text", {}).get("identical"):
            notes.append(f"{one['label']}: the same distributions as the reference, at every position.")
        cut = one.get("tasks", {}).get("cut_off", 0)
        if cut:
            most = data["settings"]["max_new_tokens"]
            notes.append(
                f"{one['label']}: {cut} answers did not end within {most} tokens, or the model's length; they count as they are."
            )
        about = one["about"]
        if about.get("backend", "cpu") != "cpu" and not about.get("options", {}).get("batch_invariant"):
            note = "On a GPU without batch_invariant, answers may depend on what runs beside them: a second run may differ in near ties."
            notes += [] if note in notes else [note]
    return notes
