"""A PDF of the HTML, through a Chromium that is installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


def write_pdf(html: Path, pdf: Path, timeout_s: float = 120.0) -> bool:
    """False where there is no Chromium. RuntimeError where it fails."""
    program = find_chromium()
    if program is None:
        return False
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program, "--headless", "--disable-gpu", "--no-sandbox", "--no-pdf-header-footer", f"--user-data-dir={profile}",
            f"--print-to-pdf={pdf.absolute()}", html.absolute().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0 or not pdf.is_file():
        raise RuntimeError(f"{program} made no PDF (exit code {done.returncode}): {done.stderr.strip()[-300:]}")
    return True
