"""Debian's nginx with the files of examples/ in front of chat servers, over HTTP and over FastCGI."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import http.client
import itertools
import json
import signal
import time

import pytest
from backends import ServeBackend, Stream, running_backends, running_nginx, tool

WAYS = ["http", "fastcgi"]


@pytest.fixture(scope="module")
def backends(tmp_path_factory):
    tool("nginx", "nginx")
    with running_backends(tmp_path_factory.mktemp("backends")) as started:
        yield started


@pytest.fixture(scope="module", params=WAYS)
def port(request, backends, tmp_path_factory):
    """The port of nginx in front of the backends."""
    with running_nginx(request.param, tmp_path_factory.mktemp(request.param), backends) as port:
        yield port


def wait_until_idle(backends, seconds=5.0):
    """Seconds until nothing runs and every KV block is back."""
    started = time.monotonic()
    while not all(backend.idle() for backend in backends):
        assert time.monotonic() - started < seconds, [backend.stats() for backend in backends]
        time.sleep(0.01)
    return time.monotonic() - started


def test_events_are_not_collected(port):
    """Ten events of a few bytes, 50 ms apart, arrive one by one: nginx waits for no buffer to fill."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/ticks")
    response = connection.getresponse()
    arrivals = []
    while part := response.read1(1000):
        arrivals.append((time.monotonic(), part))
    assert [part for _, part in arrivals] == [b"data: %d\n\n" % i for i in range(10)]
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(arrivals)]
    assert min(gaps) > 0.01
    connection.close()


def test_a_client_that_goes_away_is_cancelled(port, backends):
    wait_until_idle(backends)
    streams = [Stream(port, 3500, seed) for seed in range(6)]
    for stream in streams:
        stream.read()
    assert sum(backend.active() for backend in backends) == 6
    steps = [backend.stats()["num_steps"] for backend in backends]
    for stream in streams:
        stream.close()
    wait_until_idle(backends, seconds=2.0)
    after = [backend.stats()["num_steps"] - before for backend, before in zip(backends, steps)]
    assert max(after) < 500, f"the requests ran on for {after} steps of 3500"
    assert sum(backend.stats()["num_finished_abort"] for backend in backends) >= 6


def test_least_conn_spreads_streams(port, backends):
    streams = [Stream(port, 2000, seed) for seed in range(6)]
    served = [stream.backend for stream in streams]
    for stream in streams:
        stream.close()
    wait_until_idle(backends)
    assert [sum(address in backend.addresses for address in served) for backend in backends] == [3, 3]


def test_what_nginx_passes_on(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"Authorization": "Bearer secret", "X-Request-Id": "r-1", "Content-Type": "text/x"}
    for size in (0, 1_000_000):  # on one connection
        connection.request("POST", "/some/p%C3%A4th?a=1&b=%20", bytes(size), headers)
        response = connection.getresponse()
        told = json.load(response)
        assert (response.status, told["method"], told["path"], told["query"]) == (
            200,
            "POST",
            "/some/päth",
            "a=1&b=%20",
        )
        assert told["body_bytes"] == size
        passed = {name: told["headers"][name] for name in ("authorization", "x-request-id", "content-type")}
        assert passed == {"authorization": "Bearer secret", "x-request-id": "r-1", "content-type": "text/x"}
        assert int(told["headers"]["content-length"]) == size
    connection.request("POST", "/", bytes(11 * 2**20), headers)
    assert connection.getresponse().status == 413
    connection.close()
    connection.request("GET", "/metrics")
    assert connection.getresponse().status == 404
    connection.close()


# -- qwen-fast serve ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    tool("nginx", "nginx")
    with running_backends(tmp_path_factory.mktemp("servers"), ServeBackend) as started:
        yield started


@pytest.fixture(scope="module")
def ports(servers, tmp_path_factory):
    """The ports of an nginx for each way, in front of the same servers."""
    with contextlib.ExitStack() as stack:
        folders = {way: tmp_path_factory.mktemp(f"serve_{way}") for way in WAYS}
        yield {way: stack.enter_context(running_nginx(way, folder, servers)) for way, folder in folders.items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_chat_arrives_chunk_by_chunk(ports, servers, way):
    """The first tokens are there while the engine still writes the others, and something arrives in each tenth of the
    time; the text is what the server gives without nginx."""
    expected = Stream(servers[0].port, 1200).read_all()
    stream = Stream(ports[way], 1200)
    stream.read()
    (server,) = [one for one in servers if stream.backend in one.addresses]
    assert server.active() == 1, "the answer was held back until it was whole"
    assert stream.read_all() == expected
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert len(stream.arrivals) > 12
    last = stream.arrivals[-1]
    assert stream.arrivals[0] < 0.5 * last
    assert {int(10 * t / last) for t in stream.arrivals if t < last} >= {
        *range(int(10 * stream.arrivals[0] / last), 10)
    }
    stream.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_client_of_the_server_goes_away(ports, servers, way):
    streams = [Stream(ports[way], 3500, seed) for seed in range(6)]
    for stream in streams:
        stream.read()
    assert sum(server.active() for server in servers) == 6
    for stream in streams:
        stream.close()
    assert wait_until_idle(servers) < 1.0


def read_whole(stream):
    """The text, or None if it breaks off."""
    try:
        return stream.read_all()
    except (http.client.IncompleteRead, ConnectionError, AssertionError):
        return None
    finally:
        stream.close()


def together(calls):
    """The results of functions that run at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


def test_one_of_two_servers_is_killed(ports, servers):
    """kill -9 amid streams over both ways: the clients of the other server get their whole answers, and so does whoever
    comes later, though least_conn would send half of them to the dead one. The last test here: it leaves one server."""
    victim, survivor = servers
    expected = [Stream(survivor.port, 1000, seed).read_all() for seed in range(2)]
    streams = [(seed, Stream(port, 1000, seed)) for port in ports.values() for seed in (0, 1, 0, 1)]
    for _, stream in streams:
        stream.read()
    victim.stop(signal.SIGKILL)
    texts = together([functools.partial(read_whole, stream) for _, stream in streams])
    for (seed, stream), text in zip(streams, texts):
        assert text == expected[seed] or (text is None and stream.backend in victim.addresses)
    assert None in texts, "every stream had ended before the kill"
    assert [sum(stream.backend in server.addresses for _, stream in streams) for server in servers] == [4, 4]

    later = together([functools.partial(Stream, port, 1000, seed) for port in ports.values() for seed in (0, 1, 0, 1)])
    assert [stream.response.status for stream in later] == [200] * 8
    assert together([functools.partial(read_whole, stream) for stream in later]) == expected * 4
    assert all(stream.backend in survivor.addresses for stream in later)
    wait_until_idle([survivor])
