"""benchmarks/serving.py: what it reads off a stream, the figures that it makes of it, and a small run."""

from __future__ import annotations

import asyncio
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import serving
import serving_clients
import serving_server

EVENTS = [
    '{"choices":[{"index":0,"text":"a \\ndata: { b","finish_reason":null}],"usage":null}',
    '{"choices":[{"index":0,"text":" c","finish_reason":"length"}],"usage":null}',
    '{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":3,"total_tokens":7}}',
]


def response(chunks):
    """An answer in chunked transfer coding."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body


ANSWER = response([f"data: {event}\n\n".encode() for event in EVENTS] + [b"data: [DONE]\n\n"])


class Transport:
    """Sends an answer back in pieces as soon as a request was written."""

    def __init__(self, stream, pieces):
        self.stream, self.pieces = stream, pieces

    def write(self, data):
        for piece in self.pieces:
            asyncio.get_running_loop().call_soon(self.stream.data_received, piece)


def ask(pieces, new_tokens=3):
    async def run():
        stream = serving_clients.Stream()
        stream.connection_made(Transport(stream, pieces))
        await asyncio.wait_for(stream.ask(b"x"), 5)
        return stream.record(1.0, new_tokens)

    return asyncio.run(run())


@pytest.mark.parametrize("size", [1, 2, 5, 7, 64, 10_000])
def test_a_stream_split_anywhere(size):
    record = ask([ANSWER[i : i + size] for i in range(0, len(ANSWER), size)])
    assert (record.events, record.tokens, record.size, record.due) == (3, 3, len(ANSWER), 1.0)
    assert 0 < record.first <= record.last


def test_a_stream_that_is_not_what_was_asked_for():
    with pytest.raises(RuntimeError, match="4 tokens was expected"):
        ask([ANSWER], new_tokens=4)
    with pytest.raises(RuntimeError, match="3 tokens was expected"):
        ask([ANSWER.replace(b'"length"', b'"stop"')])
    with pytest.raises(RuntimeError, match="the server answered b'HTTP/1.1 429"):
        ask([b"HTTP/1.1 429 Too Many Requests\r\n\r\n"])


def test_a_request_is_one_stream():
    head, _, body = serving_clients.request_bytes([5, 6], 9, {"seed": 3}).partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head
    found = json.loads(body)
    assert (found["prompt"], found["max_tokens"], found["stream"], found["seed"]) == ([5, 6], 9, True, 3)


def test_no_two_rows_share_a_prompt():
    pairs = [serving.Level(120, 280, 256, number) for number in (0, 1, 2, serving.WARM_NUMBER)]
    seeds = [seed for level in pairs for how in ("closed", "poisson") for seed in level.seeds(768, how)]
    assert len(seeds) == len(set(seeds)) == 4 * 2 * 768 and min(seeds) >= 0


def test_poisson_arrivals():
    arrivals = serving.poisson_arrivals(4000, 50.0, 3)
    assert arrivals == serving.poisson_arrivals(4000, 50.0, 3) == sorted(arrivals)
    assert arrivals != serving.poisson_arrivals(4000, 50.0, 4)
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(
        mean**2, rel=0.15
    )  # as of exponential ones


def test_summary():
    records = [
        serving_clients.Record(10.0, 10.1, 11.1, 12, 500, 11),
        serving_clients.Record(10.0, 10.3, 12.0, 12, 500, 11),
    ]
    found = serving.summary(records, 10.0)
    assert found["tokens_per_s"] == pytest.approx(11) and found["requests_per_s"] == pytest.approx(1)
    assert found["mean_open"] == pytest.approx(3.1 / 2) and found["tokens_per_event"] == pytest.approx(1)
    assert found["ttft_ms"] == pytest.approx({"p50": 100, "p99": 300})
    assert found["tpot_ms"] == pytest.approx({"p50": 100, "p99": 170})
    assert serving.percentiles(range(1, 101)) == {"p50": 50, "p99": 99}


def test_verdict(capsys):
    def row(concurrent, share, rate, busy=0.1):
        server = {"tokens_per_s": rate, "client_share": busy, "loop_share": 0.97}
        return {"model": "0.5B", "arrivals": "closed", "concurrent": concurrent, "share": share, "server": server}

    found = serving.verdict("0.5B", [row(1, 0.97, 2000), row(32, 0.91, 30000), row(256, 0.5, 60000, 0.9)])
    assert (found["least_share"], found["met"]) == (0.91, True)
    assert found["saturation"] == {"tokens_per_s": 60000, "loop_share": 0.97}
    serving.print_verdict("0.5B", found)
    said = capsys.readouterr().out
    assert (
        "at least 91%" in said
        and "up to 32 concurrent" in said
        and "60,000 tokens/s, its event loop 97% busy" in said
        and "--clients" in said
    )
    found = serving.verdict("0.5B", [row(32, 0.89, 30000)])
    assert found["met"] is False
    found = serving.verdict("0.5B", [row(32, 0.9, 30000)])
    assert found["met"] is True and found["saturation"] is None and serving.verdict("7B", [])["met"] is None


def test_the_made_up_tokenizer(tmp_path):
    from qwen_fast.tokenizer import Tokenizer

    serving_server.write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path, 151936)
    assert len(tokenizer) == 151646 and len(set(tokenizer.tokens)) == 151646 and all(tokenizer.tokens)


def test_a_small_run(tmp_path, monkeypatch, capsys):
    words = "--models demo --workloads 20x12 --concurrency 1,3 --poisson 3 --least-requests 4 --clients 1 --threads 1"
    monkeypatch.setattr(sys, "argv", ["serving.py", *words.split(), "--uds", "--save", "--results", str(tmp_path)])
    serving.main()
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["environment"]["left_out"] == [] and found["environment"]["checks"]["demo"]["logits"]
    rows = [(row["arrivals"], row["concurrent"], row["requests"]) for row in found["rows"]]
    assert rows == [("closed", 1, 4), ("closed", 3, 9), ("poisson", 3, 9)]
    for row in found["rows"]:
        assert row["server"]["tokens_per_s"] > 0 and row["engine"]["tokens_per_s"] > 0
        assert row["server"]["ttft_ms"]["p50"] <= row["server"]["ttft_ms"]["p99"]
        assert row.get("share", 1) > 0
    said = capsys.readouterr().out
    assert said.count("closed") == 2 and said.count("poisson") == 1 and "engine, 20/12, 3 concurrent" in said


def test_no_row_begins_after_the_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "Server", None)  # none is started
    words = "--models demo --workloads 20x12,30x12 --concurrency 1 --budget-seconds 0 --threads 1"
    monkeypatch.setattr(sys, "argv", ["serving.py", *words.split(), "--save", "--results", str(tmp_path)])
    serving.main()
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["rows"] == [] and found["environment"]["verdicts"]["demo"]["met"] is None
    assert found["environment"]["left_out"] == ["demo, 20/12, 1 concurrent", "demo, 30/12, 1 concurrent"]
    assert capsys.readouterr().out.count("left out: ") == 2


def test_the_server_must_give_the_engines_tokens():
    class Server:
        def ask(self, body):
            assert body["return_token_ids"] and len(body["prompt"]) == serving.CHECK_PROMPT
            return {"choices": [{"token_ids": [1, 2]}]}

    serving.check_server(Server(), {"vocab_size": 8192, "tokens": [1, 2]})
    with pytest.raises(RuntimeError, match="the engine \\[1, 3\\]"):
        serving.check_server(Server(), {"vocab_size": 8192, "tokens": [1, 3]})
