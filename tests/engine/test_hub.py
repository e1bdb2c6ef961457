"""The real download path, against a hub of our own on the loopback interface: first from the network, then offline
from the cache, and what is said of a repository that is not there."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "acme/demo"
SCRIPT = """
import sys
from qwen_fast import LLM, ModelError, SamplingParams
try:
    with LLM(sys.argv[1], kv_cache_tokens=4096) as llm:
        print(llm.generate("Hello", SamplingParams(max_tokens=3, temperature=0))[0].outputs[0].token_ids)
except ModelError as error:
    print("ModelError:", error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The three routes of the hub that snapshot_download uses: revision, tree, and resolve."""

    protocol_version = "HTTP/1.1"
    folder = None  # set by the fixture's subclass
    requests: list[str]

    def log_message(self, *args):
        pass

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        self.requests.append(f"{self.command} {path}")
        files = sorted(self.folder.iterdir())
        json_type = {"Content-Type": "application/json"}
        if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            info = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            self.answer(200, json.dumps(info).encode(), json_type)
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)} for f in files]
            self.answer(200, json.dumps(tree).encode(), json_type)
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            file = self.folder / path.rpartition("/")[2]
            self.answer(200, file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT})
        else:
            missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found", **json_type}
            self.answer(404, b'{"error": "Repository not found"}', missing)


def etag(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(demo_dir):
    handler = type("DemoHub", (Hub,), {"folder": demo_dir, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.requests = handler.requests
    yield server
    server.shutdown()
    server.server_close()


def load(name, home, **environment):
    """What a fresh process prints that loads the model."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    variables.update(HF_HOME=str(home), HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1", NO_PROXY="*", **environment)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name], env=variables, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_download_then_offline(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    first = load(REPO, tmp_path, HF_ENDPOINT=endpoint)
    assert first.startswith("[") and len(json.loads(first)) == 3
    assert any(request.endswith("/model.safetensors") for request in hub.requests)
    assert not any(request.endswith("/README.md") for request in hub.requests)  # only what the engine reads
    seen = len(hub.requests)
    assert load(REPO, tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1") == first
    assert len(hub.requests) == seen


def test_missing_repository(hub, tmp_path):
    said = load("acme/nothing", tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert said.startswith("ModelError: 'acme/nothing' is no directory here") and "does not exist" in said


def test_nobody_answers(hub, tmp_path):
    port = hub.server_port
    hub.shutdown()
    hub.server_close()
    said = load(REPO, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert "not in the cache" in said or "could not be downloaded" in said
