"""What only a GPU has: graphs, weights that stay in the host's memory, memory of its own, and batches of every size.

That its numbers are right is what the other files of this folder check, with `-m gpu`.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from model_helpers import (
    _engine,
    finish,
    log_softmax,
    logits,
    open_engine,
    random_weights,
    small_config,
    write_dense,
    write_dummy,
)
from test_determinism import bits

pytestmark = pytest.mark.gpu

AUTO = dict.fromkeys(("dtype", "activation_dtype", "kv_cache_dtype", "lm_head_dtype"), "auto")
CUDA = {"device": "cuda", **AUTO}
INVARIANT = {**CUDA, "batch_invariant": True, "lm_head_dtype": "int8"}  # one order of sums, for comparisons bit by bit
SLACK = 32 << 20  # of the driver's own bookkeeping
LAZY = 160 << 20  # modules and graphs, which come with the first engine of a process
PROMPTS = [[(37 * i + 11 * j) % 8000 for j in range(length)] for i, length in enumerate((1, 5, 64, 130, 300))]
OPTIONS = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, "logprobs": 2}


def free_bytes():
    return [gpu["free_bytes"] for gpu in _engine.device_info()]


def run_alone(engine, prompts=PROMPTS):
    return [bits(finish(engine.submit(prompt, **OPTIONS))) for prompt in prompts]


@pytest.fixture(scope="module")
def plain(demo):
    """The demo's outputs, bit for bit, and its memory report."""
    with open_engine(demo, **INVARIANT) as engine:
        return run_alone(engine), engine.stats()["memory"]


def test_devices(demo):
    gpus = _engine.device_info()
    assert [gpu["index"] for gpu in gpus] == list(range(len(gpus)))
    for device in ("cuda", "cuda:0", "auto"):
        with open_engine(demo, **{**CUDA, "device": device}) as engine:
            assert engine.info()["backend"] == "cuda"
            assert gpus[0]["name"] in engine.info()["description"]
    missing = f"cuda:{len(gpus)}"
    with (
        pytest.raises((ValueError, _engine.EngineError), match=missing),
        open_engine(demo, **{**CUDA, "device": missing}),
    ):
        pass


def test_two_runs_and_two_engines(demo):
    """Without batch_invariant too: a request alone has one order of everything."""
    with open_engine(demo, **CUDA) as first, open_engine(demo, **CUDA) as second:
        expected = run_alone(first)
        for engine in (first, second, first):
            engine.reset_prefix_cache()
            assert run_alone(engine) == expected
        handles = [[e.submit(prompt, **OPTIONS) for prompt in PROMPTS] for e in (first, second)]
        for requests in handles:
            assert [len(finish(request)["token_ids"]) for request in requests] == [24] * len(PROMPTS)


def test_graphs_change_nothing(demo, plain):
    with open_engine(demo, **INVARIANT, enforce_eager=True) as engine:
        assert run_alone(engine) == plain[0]


OFFLOADS = {
    "embeddings": {"cpu_offload": "embeddings"},
    "a layer": {"cpu_offload_gb": 1e-6},
    "all layers": {"cpu_offload_gb": 64.0},
    "both": {"cpu_offload": "embeddings", "cpu_offload_gb": 0.002},
}


@pytest.mark.parametrize("name", OFFLOADS)
def test_offload_changes_nothing(demo, plain, name):
    with open_engine(demo, **INVARIANT, **OFFLOADS[name]) as engine:
        assert run_alone(engine) == plain[0]
        assert run_alone(engine) == plain[0]  # now with prefix hits
        memory = engine.stats()["memory"]
    on_device = [report["embedding_bytes"] + report["layers_bytes"] for report in (memory, plain[1])]
    assert on_device[0] < on_device[1]


def test_offload_chooses_a_head_of_its_own(demo):
    """A tied 16-bit head is the embedding itself: with cpu_offload it becomes an 8-bit one, unless told otherwise."""
    for options, dtype in (({}, "model"), ({"cpu_offload": "embeddings"}, "int8")):
        with open_engine(demo, **CUDA, **options) as engine:
            assert engine.info()["lm_head_dtype"] == dtype


def test_offload_in_a_batch(demo):
    """Prefill and decode of many, with layers that take turns in two slots."""
    outputs = []
    for options in ({}, {"cpu_offload_gb": 64.0}):
        with open_engine(demo, **CUDA, batch_invariant=True, **options) as engine:
            requests = [engine.submit(prompt, **OPTIONS) for prompt in PROMPTS * 3]
            outputs.append([bits(finish(request)) for request in requests])
    assert outputs[0] == outputs[1]


def test_the_plan_is_what_is_allocated(demo):
    options = {**CUDA, "kv_cache_tokens": 8192, "num_threads": 2}
    planned = _engine.estimate(str(demo), **options)
    before = free_bytes()[0]
    with open_engine(demo, **options) as engine:
        memory = engine.stats()["memory"]
        taken = before - free_bytes()[0]
    names = ("embedding", "layers", "head", "workspace", "kv_cache")
    assert [memory[f"{name}_bytes"] for name in names] == [planned[f"{name}_bytes"] for name in names]
    total = sum(memory[f"{name}_bytes"] for name in names)
    assert total <= taken + SLACK
    assert taken <= total + LAZY
    assert memory["device_total_bytes"] == _engine.device_info()[0]["total_bytes"]
    assert 0 < memory["available_bytes"] <= memory["device_total_bytes"]


def test_memory_comes_back(demo, tmp_path):
    """After a close, and after loads that fail: a tensor that is missing, too little memory, a Ctrl-C."""
    broken = tmp_path / "broken"
    weights = random_weights(small_config(), 1)
    del weights["model.layers.1.mlp.down_proj.weight"]
    write_dense(broken, small_config(), weights)

    def stop(done, total):
        raise KeyboardInterrupt

    def try_everything():
        with open_engine(demo, **CUDA) as engine:
            finish(engine.submit([1, 2, 3], **OPTIONS))
        with pytest.raises(_engine.ModelError, match="down_proj"), open_engine(broken, **CUDA):
            pass
        with pytest.raises(MemoryError, match="1048576"), open_engine(demo, **{**CUDA, "memory_bytes": 1 << 20}):
            pass
        with pytest.raises(MemoryError), open_engine(demo, **{**CUDA, "kv_cache_tokens": 1 << 30}):
            pass
        with pytest.raises(KeyboardInterrupt), open_engine(demo, **CUDA, progress=stop):
            pass

    try_everything()
    before = free_bytes()
    for _ in range(3):
        try_everything()
    assert all(now >= then - SLACK for now, then in zip(free_bytes(), before, strict=True))
    with open_engine(demo, **CUDA) as engine:
        assert finish(engine.submit([1, 2, 3], **OPTIONS))["num_output_tokens"] == 24


def test_failed_load_beside_a_running_engine(demo, plain):
    with open_engine(demo, **INVARIANT) as engine:
        request = engine.submit(PROMPTS[3], **{**OPTIONS, "max_tokens": 2000})
        for _ in range(3):
            with pytest.raises(MemoryError), open_engine(demo, **{**CUDA, "memory_bytes": 1 << 20}):
                pass
        request.cancel()
        assert run_alone(engine) == plain[0]


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(14, 2, 64), (7, 1, 128)])
def test_batches_of_every_size(tmp_path, heads, kv_heads, head_dim):
    """1 to 256 sequences that decode together, against each alone: every graph, every choice of kernel."""
    shape = {"hidden_size": heads * head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    model = write_dummy(tmp_path, **shape, num_hidden_layers=2)
    prompts = [[(7 * i + 3 * j) % 300 for j in range(1 + i % 40)] for i in range(256)]
    options = {**CUDA, "load_format": "dummy", "quantization": "w4", "kv_cache_tokens": 32768, "max_num_seqs": 256}
    with open_engine(model, **options, batch_invariant=True) as engine:
        request = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, "logprobs": 0}
        alone = [bits(finish(engine.submit(prompt, **request))) for prompt in prompts]
        for batch in (*range(1, 20), 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256):
            requests = [engine.submit(prompt, **request) for prompt in prompts[:batch]]
            assert [bits(finish(one)) for one in requests] == alone[:batch], batch


@pytest.mark.parametrize("quantization", ["none", "w4"])
def test_batches_agree_without_batch_invariance(tmp_path, quantization):
    """The other order of sums is rounding: log-probabilities beside neighbours are near those alone."""
    config = small_config(hidden_size=896, num_attention_heads=14, num_key_value_heads=2, intermediate_size=1216)
    write_dense(tmp_path, config, random_weights(config, 3))
    prompts = [[(7 * i + 3 * j) % 300 for j in range(1 + i % 40)] for i in range(200)]
    with open_engine(tmp_path, **CUDA, quantization=quantization, max_num_seqs=256) as engine:
        request = {"max_tokens": 1, "temperature": 0.0, "logprobs": 5, "ignore_eos": True}
        alone = [finish(engine.submit(prompt, **request))["logprobs"][0] for prompt in prompts]
        for batch in (2, 3, 8, 9, 16, 17, 64, 200):
            engine.reset_prefix_cache()
            requests = [engine.submit(prompt, **request) for prompt in prompts[:batch]]
            for one, reference in zip(requests, alone):
                ours = {token: logprob for token, logprob, _ in finish(one)["logprobs"][0]}
                both = [(ours[token], logprob) for token, logprob, _ in reference if token in ours]
                assert len(both) >= 4
                np.testing.assert_allclose(*zip(*both), atol=0.1)


def check_decode_against_prefill(engine, vocab_size):
    """Log-probabilities of tokens as they were generated, and of the same tokens as a prompt."""
    for length in (3, 250, 900):
        prompt = [(37 * i) % vocab_size for i in range(length)]
        output = finish(engine.submit(prompt, **{**OPTIONS, "max_tokens": 40}))
        whole = prompt + output["token_ids"]
        engine.reset_prefix_cache()
        rows = log_softmax(logits(engine, whole, length - 1, len(whole) - 1))
        decoded = [row[0][1] for row in output["logprobs"]]
        np.testing.assert_allclose(decoded, rows[np.arange(40), output["token_ids"]], atol=0.1)  # bf16 weights, rounded


def test_decode_agrees_with_prefill(demo):
    with open_engine(demo, **CUDA) as engine:
        check_decode_against_prefill(engine, 8000)


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(14, 2, 64), (7, 1, 128)])
@pytest.mark.parametrize("head", ["model", "int8", "int4"])
def test_decode_kernel_agrees_with_prefill(tmp_path, heads, kv_heads, head_dim, head):
    """4 bits in groups of 128: one sequence decodes in one kernel."""
    shape = {"hidden_size": heads * head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    shape["max_position_embeddings"] = 1024
    write_dense(tmp_path, small_config(**shape), random_weights(small_config(**shape), 5))
    with open_engine(tmp_path, **{**CUDA, "lm_head_dtype": head}, quantization="w4") as engine:
        check_decode_against_prefill(engine, engine.info()["vocab_size"])


# -- the command -------------------------------------------------------------------------------------------------


def run(*arguments):
    command = [sys.executable, "-m", "qwen_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # `-m` prefers what lies in the working directory
    short = ["--temperature", "0", "--max-tokens", "8"]
    generated = run("generate", "Hello!", "--device", "cuda", *short)
    assert generated.returncode == 0 and generated.stdout.strip(), generated.stderr
    assert run("generate", "Hello!", *short).stdout == generated.stdout  # "auto" is the GPU
    info = run("info", "demo", "--gpu")
    assert info.returncode == 0, info.stderr
    rows = dict(line.split("  ", 1) for line in info.stdout.splitlines())
    assert {"embedding", "layers' weights", "head", "workspace", "KV cache", "context, modules", "remains"} <= set(
        rows
    )
    assert "nothing" not in rows["remains"]
    memory = json.loads(run("info", "demo", "--gpu", "--json").stdout)["memory"]
    assert memory["device_total_bytes"] == _engine.device_info()[0]["total_bytes"]
    doctor = run("doctor").stdout
    assert "built in, for compute capabilities" in doctor and _engine.device_info()[0]["name"] in doctor
    refused = run("generate", "Hello!", "--memory", "1MiB", "--device", "cuda")
    assert refused.returncode == 1 and refused.stderr.startswith("qwen-fast: error: out of memory: "), refused.stderr
