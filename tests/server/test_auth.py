"""API keys: their file, their comparison, and which routes they open."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import socket
import time

import httpx
import pytest
from server_helpers import serving

from qwen_fast.server import ServerConfig, auth
from qwen_fast.server.auth import ApiKey, KeyLimits, Keys, keys_of, read_keys
from qwen_fast.server.config import Limits
from qwen_fast.server.errors import ApiError
from qwen_fast.server.serve import plug_ins

CAROL = hashlib.sha256(b"sk-carol").hexdigest()
FILE = f"""
# who may
{{"key": "sk-alice", "name": "alice", "requests_per_minute": 60, "concurrency": 8, "tokens_per_minute": 1e5}}
sk-bob name=bob concurrency=2 share_cache=true

{{"sha256": "{CAROL}", "name": "carol"}}
sk-nameless
"""


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_file_in_both_forms():
    alice, bob, carol, nameless = read_keys(FILE)
    assert alice == ApiKey("alice", hashlib.sha256(b"sk-alice").digest(), KeyLimits(60, 8, 1e5))
    assert (bob.name, bob.limits, bob.share_cache) == ("bob", KeyLimits(concurrency=2), True)
    assert (carol.name, nameless.name) == ("carol", "line-7")
    keys = Keys([alice, bob, carol, nameless])
    for key, name in (("sk-alice", "alice"), ("sk-bob", "bob"), ("sk-carol", "carol"), ("sk-nameless", "line-7")):
        assert keys.principal(bearer(key)).name == name


def test_keys_share_no_cache_unless_they_say_so():
    alice, bob, carol, nameless = [key.principal.cache_salt for key in read_keys(FILE)]
    assert bob == 0
    assert len({alice, bob, carol, nameless}) == 4
    assert all(0 <= salt < 2**64 for salt in (alice, bob, carol, nameless))


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"key": "k"', "line 1: not valid JSON"),
        ('{"name": "a"}', "one of key and sha256 is needed"),
        ('{"key": "a b"}', "a key has 1 to 512 characters"),
        ('{"key": 7}', "a key has 1 to 512 characters"),
        ('{"sha256": "12"}', "64 hexadecimal digits"),
        ('{"key": "k", "sha256": "%s"}' % ("0" * 64), "one of key and sha256"),
        ('{"key": "k", "name": "a b"}', "a name has 1 to 64"),
        ('{"key": "k", "rpm": 5}', "unknown field 'rpm'; known: key, sha256, name"),
        ('{"key": "k", "concurrency": 1.5}', "concurrency must be an integer, got 1.5"),
        ('{"key": "k", "concurrency": true}', "concurrency must be an integer, got True"),
        ('{"key": "k", "tokens_per_minute": -1}', "tokens_per_minute must be from 0 to 1e[+]12, got -1"),
        ('{"key": "k", "requests_per_minute": NaN}', "requests_per_minute must be from 0"),
        ('{"key": "k", "share_cache": 1}', "share_cache must be true or false"),
        ("k concurrency", "words are name=value"),
        ("k concurrency=many", "concurrency must be a number"),
        ("# nothing", "holds no key"),
    ],
)
def test_a_line_that_is_wrong(line, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_keys(line, "keys.txt")
    assert str(caught.value).startswith("keys.txt")


@pytest.mark.parametrize("text", ["k\nk name=other", "k name=one\nj name=one"])
def test_keys_and_names_are_unique(text):
    with pytest.raises(ValueError, match="the same key|two API keys are named 'one'"):
        Keys(read_keys(text))


def test_no_message_holds_a_key(tmp_path):
    file = tmp_path / "keys"
    file.write_text("sk-secret-of-all name=a\nsk-secret-of-all name=b\n")
    with pytest.raises(ValueError) as caught:
        keys_of(ServerConfig(api_key_file=str(file)))
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="api_key 1: a key has") as caught:
        keys_of(ServerConfig(api_key=("bad secret",)))
    assert "bad secret" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer sk-alic", "Bearer sk-alicee", "Basic sk-alice", "sk-alice", "Bearer \xff\udc80"],
)
def test_who_is_nobody(header):
    with pytest.raises(ApiError) as caught:
        Keys(read_keys(FILE)).principal({"authorization": header} if header else {})
    assert caught.value.status == 401
    assert caught.value.headers["www-authenticate"] == "Bearer"


def test_every_key_is_compared_by_digest(monkeypatch):
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(auth, "hmac", type("hmac", (), {"compare_digest": staticmethod(compare)}))
    keys = Keys(read_keys(FILE))
    assert keys.principal(bearer("sk-alice")).name == "alice"  # the first of four
    assert compared == [(32, 32)] * 4


@pytest.fixture(scope="module")
def locked(demo):
    config = ServerConfig(port=0, log_level="warning", api_key=("sk-one", "sk-two"))
    with contextlib.ExitStack() as stack:
        parts = stack.enter_context(plug_ins(demo, config))
        running = stack.enter_context(serving(demo, config, **parts))
        yield stack.enter_context(httpx.Client(base_url=running.url, timeout=30))


ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/demo"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/version"),
    ("GET", "/load"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
    ("GET", "/no/such/route"),
    ("GET", "/health/more"),
    ("GET", "//health"),
]


@pytest.mark.parametrize("method, path", ROUTES)
def test_every_other_route_needs_a_key(locked, method, path):
    for headers in ({}, bearer("sk-three")):
        answer = locked.request(method, path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "AuthenticationError"
    expected = 404 if "no/such" in path or "health" in path else 200 if method == "GET" else 415
    assert locked.request(method, path, headers=bearer("sk-two")).status_code == expected


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
def test_probes_need_none(locked, path):
    assert locked.get(path).status_code == 200


def test_one_key_opens_at_most_half_of_the_connections(demo):
    limits = Limits(connections=8)
    config = ServerConfig(port=0, log_level="warning", api_key=("sk-one", "sk-two"), limits=limits)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer sk-one\r\n"
    head += b"content-type: application/json\r\ncontent-length: 9\r\n\r\n"
    with contextlib.ExitStack() as stack:
        parts = stack.enter_context(plug_ins(demo, config))
        running = stack.enter_context(serving(demo, config, **parts))
        for _ in range(4):  # bodies that do not come
            stack.enter_context(socket.create_connection(running.address)).sendall(head)
        deadline = time.monotonic() + 10
        while len(running.server.in_flight) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        refused = httpx.get(f"{running.url}/v1/models", headers=bearer("sk-one"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_connections")
        assert httpx.get(f"{running.url}/v1/models", headers=bearer("sk-two")).status_code == 200


def test_metrics_may_be_public(demo):
    config = ServerConfig(port=0, log_level="warning", api_key=("sk-one",), metrics_public=True)
    with plug_ins(demo, config) as parts, serving(demo, config, **parts) as running:
        assert httpx.get(f"{running.url}/metrics").status_code == 200
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
