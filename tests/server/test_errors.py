"""What is refused: the table of bad_requests.py, broken connections, limits, and defects of our own."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from typing import Any

import httpx
import openai
import pytest
from bad_requests import TABLE, Bad
from server_helpers import Serving, serving

from qwen_fast.server import ServerConfig
from qwen_fast.server.config import Limits
from qwen_fast.server.errors import MAX_MESSAGE_CHARS
from qwen_fast.server.json_body import shape_of
from qwen_fast.server.state import Unlimited

GOOD = {"model": "demo", "prompt": "Once", "max_tokens": 2, "temperature": 0}


def quiet(**options: Any) -> ServerConfig:
    return ServerConfig(port=0, log_level="critical", **options)


def check_shape(response: httpx.Response) -> dict[str, Any]:
    """The error of a response in OpenAI's shape."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"] and list(body["error"]) == ["message", "type", "param", "code"]
    error = body["error"]
    assert isinstance(error["message"], str) and 0 < len(error["message"]) <= MAX_MESSAGE_CHARS
    assert isinstance(error["type"], str) and isinstance(error["code"], (int, str))
    assert error["param"] is None or isinstance(error["param"], str)
    for leak in ("Traceback", "qwen_fast.", "pydantic", "site-packages", ".py"):
        assert leak not in error["message"]
    return error


@pytest.fixture(scope="module")
def good_text(served: Serving) -> str:
    return httpx.post(f"{served.url}/v1/completions", json=GOOD).json()["choices"][0]["text"]


def test_the_table_is_large():
    assert len(TABLE) >= 200 and len({bad.name for bad in TABLE}) == len(TABLE)


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_bad_requests(bad: Bad, http: httpx.Client, good_text: str):
    response = http.post(bad.path, content=bad.body, headers=bad.headers)
    error = check_shape(response)
    assert response.status_code == bad.status, error
    assert bad.says in error["message"]
    good = http.post("/v1/completions", json=GOOD)
    assert good.status_code == 200 and good.json()["choices"][0]["text"] == good_text


def test_nothing_is_left_of_them(served: Serving):
    assert served.idle()
    assert served.llm.stats()["num_free_blocks"] == served.llm.info()["num_blocks"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, openai.BadRequestError), (404, openai.NotFoundError)],
)
def test_the_official_clients_exceptions(client: openai.OpenAI, status: int, kind: type[openai.APIStatusError]):
    options = {"temperature": -1} if status == 400 else {"model": "another"}
    with pytest.raises(kind) as caught:
        client.completions.create(**{**GOOD, **options})
    assert caught.value.status_code == status
    assert caught.value.param == ("temperature" if status == 400 else "model")


def test_methods_and_paths(http: httpx.Client):
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", "/tokenize", 405),
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/%2e%2e%2f", 404),
        ("GET", "/%00", 404),
        ("GET", "/" + "a" * 5000, 404),
    ):
        response = http.request(method, path)
        assert response.status_code == status, (method, path)
        check_shape(response)
    assert http.get("/v1/chat/completions").headers["allow"] == "POST"


# -- the connection


def send(served: Serving, data: bytes, wait: float = 5.0) -> bytes:
    """What the server answers to raw bytes until it closes, or nothing more comes."""
    answer = b""
    with socket.create_connection(served.address, timeout=wait) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while part := connection.recv(65536):
                answer += part
    return answer


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no host
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /health HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\na: \x00\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nlong: " + b"a" * 200_000,
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=range(12),
)
def test_what_is_no_http(served: Serving, http: httpx.Client, data: bytes):
    answer = send(served, data, wait=0.3)
    assert not answer or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 415"))
    assert http.get("/health").status_code == 200


def test_a_body_that_does_not_come(demo):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with serving(demo, quiet(limits=Limits(body_seconds=0.2))) as running:
        begun = time.monotonic()
        for rest in (b"content-length: 100\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"):
            assert b" 408 " in send(running, head + rest).split(b"\r\n")[0]
        assert time.monotonic() - begun < 5
    with serving(demo, quiet()) as running, socket.create_connection(running.address) as gone:
        gone.sendall(head + b"content-length: 100\r\n\r\n{")
        gone.close()
        assert running.idle() and httpx.get(f"{running.url}/health").status_code == 200


def test_an_unwanted_body_is_read_away(served: Serving):
    """The answer comes before the body is wanted, and the connection carries the next request."""
    refused = b"POST /v1/nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n" + b"x" * 3_000_000
    last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answer = send(served, refused + last)
    assert answer.startswith(b"HTTP/1.1 404") and b"HTTP/1.1 200" in answer


def test_bodies_without_a_declared_length(demo):
    with serving(demo, quiet(limits=Limits(body_bytes=2000))) as running:

        def parts() -> Any:
            yield b'{"prompt": "'
            for _ in range(50):
                yield b"x" * 100

        response = httpx.post(
            f"{running.url}/v1/completions", content=parts(), headers={"content-type": "application/json"}
        )
        assert response.status_code == 413 and "2000 bytes" in check_shape(response)["message"]


def test_too_many_requests_open(demo):
    body = {"prompt": "Once", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with serving(demo, quiet(limits=Limits(connections=2))) as running:
        url = f"{running.url}/v1/completions"
        with httpx.stream("POST", url, json=body), httpx.stream("POST", url, json=body):
            full = httpx.post(url, json=GOOD)
            assert full.status_code == 503 and full.headers["retry-after"] == "1"
            assert "the limit is 2" in check_shape(full)["message"]
            assert httpx.get(f"{running.url}/health").status_code == 200
        assert running.idle()
        assert httpx.post(url, json=GOOD).status_code == 200


# -- defects of our own


class Broken(Unlimited):
    """Admission with a defect."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def slot(self, principal: Any, n: int) -> Any:
        raise self._error


@pytest.mark.parametrize("error", [RuntimeError("the secret"), ValueError("the secret"), KeyError("the secret")])
def test_a_defect_is_500_and_its_text_stays_here(demo, caplog, error):
    caplog.set_level(logging.ERROR)
    with serving(demo, quiet(), admission=Broken(error)) as running:
        response = httpx.post(f"{running.url}/v1/completions", json=GOOD, headers={"x-request-id": "req-77"})
        shown = check_shape(response)
        assert response.status_code == 500 and "req-77" in shown["message"] and "secret" not in response.text
        assert any("req-77" in record.getMessage() and record.exc_info for record in caplog.records)
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_out_of_memory_is_503(demo):
    with serving(demo, quiet(), admission=Broken(MemoryError())) as running:
        response = httpx.post(f"{running.url}/v1/completions", json=GOOD)
        assert response.status_code == 503 and check_shape(response)["code"] == "out_of_memory"


class Doorkeeper:
    """Auth that knows one key."""

    def principal(self, headers: Any) -> Any:
        from qwen_fast.server.errors import ApiError
        from qwen_fast.server.state import Principal

        if headers.get("authorization") != "Bearer open":
            raise ApiError(401, "no valid key")
        return Principal("friend", 5)


def test_every_route_but_health_asks_for_the_key(demo):
    with serving(demo, quiet(), auth=Doorkeeper()) as running, httpx.Client(base_url=running.url) as http:
        paths = ["/v1/models", "/version", "/load", "/docs", "/openapi.json", "/metrics", "/nothing", "/v1/models/x"]
        for response in [http.get(path) for path in paths] + [http.post("/tokenize"), http.post("/v1/completions")]:
            assert response.status_code == 401
            check_shape(response)
        for path in ("/health", "/ready", "/ping"):
            assert http.get(path).status_code == 200
        opened = {"authorization": "Bearer open"}
        assert http.get("/v1/models", headers=opened).status_code == 200
        assert http.get("/nothing", headers=opened).status_code == 404
        with pytest.raises(openai.AuthenticationError):
            running.client(api_key="wrong").models.list()
        assert running.client(api_key="open").completions.create(**GOOD).choices[0].text


def test_behind_a_proxy_that_strips_a_prefix(demo):
    opened = {"authorization": "Bearer open"}
    config = quiet(root_path="/api")
    with serving(demo, config, auth=Doorkeeper()) as running, httpx.Client(base_url=running.url) as http:
        assert http.get("/health").status_code == 200 and http.get("/version").status_code == 401
        assert http.get("/version", headers=opened).status_code == 200
        assert http.post("/v1/completions", json=GOOD, headers=opened).status_code == 200


# -- configuration


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"port": 70000}, "port must be from 0 to 65535, got 70000"),
        ({"port": "80"}, "port must be an integer"),
        ({"shutdown_timeout": -1}, "shutdown_timeout must be from 0"),
        ({"shutdown_timeout": float("nan")}, "shutdown_timeout must be from 0"),
        ({"served_model_name": ("",)}, "served_model_name holds an empty text"),
        ({"served_model_name": "x"}, "served_model_name must be a tuple"),
        ({"tool_call_parser": "other"}, "tool_call_parser must be 'hermes', got 'other'"),
        ({"log_level": "loud"}, "log_level must be"),
        ({"ssl_keyfile": "k"}, "ssl_keyfile needs ssl_certfile"),
        ({"access_log": 1}, "access_log must be True or False"),
        ({"limits": 5}, "limits must be Limits"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises((ValueError, TypeError), match=says.replace("(", r"\(")):
        ServerConfig(**options)


@pytest.mark.parametrize("options", [{"n": 0}, {"json_depth": 1000}, {"body_bytes": -1}, {"request_seconds": 0}])
def test_limits_out_of_range(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be from"):
        Limits(**options)


def test_json_depth_ignores_strings():
    def json_depth(body: bytes) -> int:
        return shape_of(body).depth

    assert json_depth(b"") == 0 and json_depth(b"5") == 0
    assert json_depth(b'{"a": "[[[["}') == 1
    assert json_depth(rb'{"a": "\"[[[[", "b": [[]]}') == 3
    assert json_depth(b'{"a": "\\\\", "b": [[]]}') == 3
    for depth in (1, 5, 31):
        value: Any = 1
        for _ in range(depth):
            value = {"x": [value]} if depth % 2 else [value]
        text = json.dumps(value).encode()
        assert json_depth(text) == (2 * depth if depth % 2 else depth)


def test_json_depth_is_linear():
    """Quotes that end no string, and escapes without end, cost what their length says."""
    for body in (
        b'{"' + b'\\"' * 2_000_000,
        b'{"' + b"\\" * 4_000_000,
        b'["' * 2_000_000,
        b'{"a": [' + b'"' * 4_000_001,
    ):
        start = time.perf_counter()
        shape_of(body)
        assert time.perf_counter() - start < 2  # 0.05 s each; a rescan at every quote would take hours
