"""`qwen-fast serve`: its options, and a real process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest

from qwen_fast.cli import build_parser, engine_arguments, main
from qwen_fast.server.arguments import model_options, server_config


def parsed(*words: str) -> Any:
    args = build_parser().parse_args(["serve", *words])
    args.model = args.model_name or args.model
    return args


def test_a_documented_command_line_of_vllm():
    line = "Qwen/Qwen2.5-7B-Instruct --tensor-parallel-size 4 --dtype half --max-model-len 131072"
    args = parsed(*line.split(), "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    assert engine_arguments(args) == {"tensor_parallel_size": 4, "dtype": "half", "max_model_len": 131072}
    config = server_config(args)
    assert config.model_names == ("Qwen/Qwen2.5-7B-Instruct",) and config.tool_call_parser == "hermes"
    assert config.enable_auto_tool_choice and (config.host, config.port) == ("127.0.0.1", 8000)


def test_options_reach_the_configuration():
    words = "--host 0.0.0.0 --port 9000 --served-model-name a b --api-key k1 k2 --api-key k3 --limit-n 3"
    words += ' --allowed-origins ["https://x.example"] --uvicorn-log-level debug --limit-request-seconds 5'
    config = server_config(parsed(*words.split()))
    assert (config.host, config.port, config.model_names) == ("0.0.0.0", 9000, ("a", "b"))
    assert config.api_key == ("k1", "k2", "k3") and config.allowed_origins == ("https://x.example",)
    assert config.log_level == "debug" and config.limits.n == 3 and config.limits.request_seconds == 5
    assert server_config(parsed()).limits.n == 8


def test_one_watchdog_for_server_and_ranks():
    args = parsed("--watchdog-seconds", "7.5", "--tensor-parallel-comm", "nccl")
    assert server_config(args).watchdog_seconds == 7.5
    assert engine_arguments(args) == {"watchdog_seconds": 7.5, "tensor_parallel_comm": "nccl"}
    assert server_config(parsed()).watchdog_seconds is None and engine_arguments(parsed()) == {}


def test_options_of_vllm_that_ask_for_nothing():
    words = "--disable-log-requests --swap-space 4 --enable-prefix-caching --enable-chunked-prefill --task generate"
    words += " --max-log-len 100 --disable-uvicorn-access-log --enable-prompt-tokens-details --tokenizer-mode auto"
    words += " --no-enable-lora --block-size 32 --gpu-memory-utilization 0.8 -tp 1 --seed 3"
    args = parsed("demo", *words.split())
    assert model_options(args) == {
        "seed": 3,
        "swap_space": 4,
        "enable_chunked_prefill": True,
        "task": "generate",
        "tokenizer_mode": "auto",
        "enable_lora": False,
    }
    assert engine_arguments(args)["tensor_parallel_size"] == 1
    assert engine_arguments(parsed("--no-enable-prefix-caching"))["enable_prefix_caching"] is False


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--port -1", "port must be from 0 to 65535, got -1"),
        ("--limit-n 0", "n must be from 1"),
        ("--lora-modules x=y", "--lora-modules is not built"),
        ("--enable-lora", "enable_lora=True is not built"),
        ("--trust-remote-code", "trust_remote_code=True is refused"),
        ("--tool-call-parser other", "tool_call_parser must be 'hermes'"),
        ('--override-generation-config {"temperature":-1}', "temperature must be"),
        ("--max-model-len 0", "max_model_len must be from 1"),
    ],
)
def test_wrong_options_end_the_command(words, says, capsys):
    assert main(["serve", "demo", "--device", "cpu", *words.split()]) == 2
    assert says in capsys.readouterr().err


def test_options_that_are_no_options(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "demo", "--invented"])
    with pytest.raises(SystemExit):
        main(["serve", "demo", "--override-generation-config", "[1]"])
    assert "a JSON object is expected" in capsys.readouterr().err


def test_without_the_extra(monkeypatch, capsys):
    import importlib.util

    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else known(name))
    assert main(["serve", "demo"]) == 1
    assert "pip install qwen_fast[server]" in capsys.readouterr().err


def test_the_options_need_no_fastapi():
    """`qwen-fast generate` builds the same parser: nothing heavy may come with it."""
    code = "import sys, qwen_fast.cli; qwen_fast.cli.build_parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"fastapi", "starlette", "pydantic", "uvicorn", "numpy", "asyncio"} & set(loaded)


def wait_for_port(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """The port from uvicorn's line, and all lines so far."""
    lines: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
            return int(found[1]), lines
    raise AssertionError("".join(lines))


def test_a_process_serves_and_ends():
    command = [
        sys.executable,
        "-m",
        "qwen_fast",
        "serve",
        "demo",
        "--device",
        "cpu",
        "--port",
        "0",
        "--num-threads",
        "1",
    ]
    command += ["--served-model-name", "mine", "--override-generation-config", '{"temperature": 0}']
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            port, lines = wait_for_port(process)
            assert any("serving <AsyncLLM 'demo'" in line for line in lines)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
                body = {"model": "mine", "prompt": "Once", "max_tokens": 8}
                texts = {http.post("/v1/completions", json=body).json()["choices"][0]["text"] for _ in range(3)}
                assert len(texts) == 1  # temperature 0 is this server's default
                assert http.post("/v1/completions", json={**body, "model": "demo"}).status_code == 404
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            process.wait(20)
            assert time.monotonic() - began < 10
            assert process.returncode in (0, -signal.SIGTERM)
        finally:
            process.kill()
