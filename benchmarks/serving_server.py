"""The server and the models of serving.py: real shapes with made-up weights and tokenizers, or the demo."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import dummy
from gpu_common import SHAPES

TOKENS = 151643  # of Qwen2.5's vocabulary, before the control tokens
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(directory: Path) -> None:
    """A vocabulary of Qwen2.5's size: made-up words for ids that nobody trained, so that every token has a text."""
    letters = "etaoinshrdlucmfw"
    words: dict[str, int] = {}
    while len(words) < TOKENS:
        number, word = len(words), ""
        while number or not word:
            number, digit = divmod(number, len(letters))
            word += letters[digit]
        words[("Ġ" if len(words) % 2 else "") + word + "qx"[len(words) % 2]] = len(words)
    added = [
        {"id": TOKENS + i, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, text in enumerate(SPECIAL)
    ]
    model = {"type": "BPE", "vocab": words, "merges": [], "byte_fallback": False, "fuse_unk": False}
    found = {"version": "1.0", "added_tokens": added, "model": model}
    (directory / "tokenizer.json").write_text(json.dumps(found))


def model_options(
    name: str, directory: Path, sizes: dict[str, int], device: str, head: str, threads: int | None
) -> dict[str, Any]:
    """The model and the engine's options, for LLM and, as options of the command, for the server. sizes: of sequences
    and cache; device, head: of all but the demo (lm_head_dtype); threads: on the CPU."""
    sizes |= {"num_threads": threads} if threads else {}
    if name == "demo":
        return {"model": "demo", "device": "cpu", **sizes}
    model = dummy(directory / name, SHAPES[name])
    write_tokenizer(model)
    shape = {"load_format": "dummy", "quantization": "w4", "lm_head_dtype": head, "device": device}
    return {"model": str(model), "max_num_batched_tokens": 8192, **shape, **sizes}


def command_of(options: dict[str, Any], place: Sequence[str]) -> list[str]:
    """The command line of a server with an LLM's options."""
    words = [sys.executable, "-m", "qwen_fast", "serve", options["model"], "--served-model-name", "bench"]
    for name, value in options.items():
        if name != "model":
            words += ["--" + name.replace("_", "-"), str(value)]
    return [*words, "--generation-config", "vllm", *place]


class Server:
    """`qwen-fast serve` in a process of its own. address: the path of its Unix socket, or (host, port)."""

    def __init__(self, options: dict[str, Any], directory: Path, uds: bool, seconds: float = 300.0) -> None:
        self._log = directory / "server.log"
        path = str(directory / "bench.sock")
        place = ["--uds", path] if uds else ["--port", "0"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command_of(options, place), stdout=log, stderr=log)
        deadline = time.monotonic() + seconds
        while (found := self._listening()) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"the server did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.02)
        self.address: str | tuple[str, int] = path if uds else ("127.0.0.1", int(found[1]))

    def _listening(self) -> re.Match[str] | None:
        return re.search(r"running on (?:http://127\.0\.0\.1:(\d+)|unix socket)", self._log.read_text())

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST /v1/completions."""
        connection = http.client.HTTPConnection("localhost", timeout=300)
        with contextlib.closing(connection):
            if isinstance(self.address, str):
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.connect(self.address)
            else:
                connection.sock = socket.create_connection(self.address)
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            found = json.loads(response.read())
            if response.status != 200:
                raise RuntimeError(f"the server answered {response.status}: {found}")
            return found

    def loop_seconds(self) -> float:
        """CPU seconds of the event loop's thread."""
        path = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/stat")
        fields = path.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
