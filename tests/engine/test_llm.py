"""LLM over the demo model, on the CPU and on a GPU: what a person calls, and what can go wrong while it runs."""

import gc
import os
import subprocess
import sys
import threading
import time

import pytest

from qwen_fast import LLM, EngineError, ModelError, SamplingParams, _engine

QUESTION = [{"role": "user", "content": "Tell me a story about Nora the fox."}]
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=24)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True, max_tokens=3000)


@pytest.fixture(scope="module")
def llm(demo_dir, device):
    with LLM(str(demo_dir), device=device, batch_invariant=True, kv_cache_tokens=8192, max_model_len=4096) as model:
        yield model


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def idle(llm):
    stats = llm.stats()
    return stats["num_running"] == 0 and stats["num_waiting"] == 0


def test_stream_and_generate_agree(llm):
    increments = list(llm.stream(QUESTION, GREEDY))
    assert [one.finished for one in increments] == [False] * (len(increments) - 1) + [True]
    (output,) = llm.chat(QUESTION, GREEDY)
    (sample,) = output.outputs
    assert "".join(one.text for one in increments) == sample.text
    assert sum((one.token_ids for one in increments), []) == sample.token_ids
    assert (sample.finish_reason, len(sample.token_ids)) == ("length", 24)
    assert sample.text == llm.decode(sample.token_ids, skip_special_tokens=True).rstrip("\ufffd")
    assert output.prompt == llm.decode(output.prompt_token_ids)
    assert "Nora" in output.prompt and output.finished


def test_a_stream_comes_in_pieces(llm):
    """However slowly it is read: the unread part is bounded, so thousands of tokens cannot come as one."""
    increments = list(llm.stream(QUESTION, ENDLESS))
    assert len(increments) > 1
    assert sum(len(one.token_ids) for one in increments) == ENDLESS.max_tokens


def test_the_demo_model_answers(llm):
    (output,) = llm.chat(
        [{"role": "user", "content": "Hello! Who are you?"}], SamplingParams(temperature=0, repetition_penalty=1.0)
    )
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason is None
    assert len(output.outputs[0].text) > 10


def test_usage_and_timings(llm):
    llm.reset_prefix_cache()
    (output,) = llm.chat(QUESTION, GREEDY)
    assert output.usage.prompt_tokens == len(output.prompt_token_ids)
    assert output.usage.completion_tokens == 24
    assert output.usage.total_tokens == output.usage.prompt_tokens + 24
    assert output.usage.cached_tokens == output.num_cached_tokens == 0
    times = output.metrics
    assert 0 <= times.queue_s <= times.ttft_s <= times.e2e_s
    assert times.tpot_s > 0
    assert times.arrival_time <= times.first_token_time <= times.last_token_time <= times.finished_time
    (again,) = llm.chat(QUESTION, GREEDY)
    assert again.usage.cached_tokens > 0
    assert again.outputs[0].token_ids == output.outputs[0].token_ids


def test_generate_takes_any_mix_in_order(llm):
    text = "The fox"
    ids = llm.encode(text)
    prompts = [text, ids, {"prompt": text}, {"prompt_token_ids": ids}, tuple(ids)]
    params = [SamplingParams(temperature=0, max_tokens=3 + i, ignore_eos=True) for i in range(5)]
    outputs = llm.generate(prompts, params, progress=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 4, 5, 6, 7]
    assert all(output.prompt_token_ids == ids for output in outputs)
    assert [output.prompt for output in outputs] == [text, None, text, None, None]
    longest = outputs[-1].outputs[0].token_ids
    assert all(longest[: len(output.outputs[0].token_ids)] == output.outputs[0].token_ids for output in outputs)


def test_one_prompt_is_a_list_of_one(llm):
    assert len(llm.generate("The fox", GREEDY)) == 1
    assert len(llm.generate(llm.encode("The fox"), GREEDY)) == 1
    assert llm.generate([], GREEDY) == []


def test_more_requests_than_fit_at_once(llm):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = llm.generate([[1 + i % 50, 2, 3] for i in range(300)], params, progress=True)
    assert len(outputs) == 300 and all(len(output.outputs[0].token_ids) == 8 for output in outputs)
    assert outputs[0].outputs[0].token_ids == outputs[50].outputs[0].token_ids


def test_n_samples(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=16, top_p=1.0, top_k=0)
    (output,) = llm.chat(QUESTION, params)
    assert [sample.index for sample in output.outputs] == [0, 1, 2]
    assert {sample.seed for sample in output.outputs} == {7}
    assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1
    assert output.usage.completion_tokens == sum(len(sample.token_ids) for sample in output.outputs)
    (single,) = llm.chat(QUESTION, SamplingParams(n=1, temperature=1.0, seed=7, max_tokens=16, top_p=1.0, top_k=0))
    assert single.outputs[0].token_ids == output.outputs[0].token_ids
    streamed = ["", "", ""]
    for one in llm.stream(QUESTION, params):
        streamed[one.index] += one.text
    assert streamed == [sample.text for sample in output.outputs]


def test_logprobs(llm):
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=6, logprobs=3, prompt_logprobs=2)
    (output,) = llm.chat(QUESTION, params)
    (sample,) = output.outputs
    assert len(sample.logprobs) == len(sample.token_ids)
    for token_id, row in zip(sample.token_ids, sample.logprobs):
        assert next(iter(row)) == token_id
        assert 3 <= len(row) <= 4
        assert row[token_id].rank == 1  # greedy
        assert row[token_id].logprob == max(entry.logprob for entry in row.values()) <= 0
        assert row[token_id].decoded_token == llm.decode([token_id])
    assert sample.cumulative_logprob == pytest.approx(
        sum(row[i].logprob for i, row in zip(sample.token_ids, sample.logprobs))
    )
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    assert all(i in row for i, row in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:]))
    assert llm.chat(QUESTION, GREEDY)[0].outputs[0].logprobs is None


def test_logits_and_logprobs_agree(llm):
    numpy = pytest.importorskip("numpy")
    (output,) = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=1, logprobs=0))
    ids = output.prompt_token_ids
    rows = llm.logits(ids, len(ids) - 2)
    assert rows.shape == (2, llm.vocab_size) and rows.dtype == numpy.float32
    row = rows[1].astype(numpy.float64)
    expected = row - (row.max() + numpy.log(numpy.exp(row - row.max()).sum()))
    ((token_id, entry),) = output.outputs[0].logprobs[0].items()
    assert entry.logprob == pytest.approx(expected[token_id], abs=1e-4)
    assert llm.logits(ids).shape == (len(ids), llm.vocab_size)
    assert numpy.array_equal(llm.logits(ids, 3, 5), llm.logits(ids)[3:5])
    with pytest.raises(ValueError, match="no positions from 5 to 3"):
        llm.logits(ids, 5, 3)


def test_stop_strings(llm):
    full = llm.chat(QUESTION, GREEDY)[0].outputs[0].text
    stop = full[10:14]
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=24, stop=[stop])
    (sample,) = llm.chat(QUESTION, params)[0].outputs
    assert sample.text == full[: full.index(stop)]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    params.include_stop_str_in_output = True
    (sample,) = llm.chat(QUESTION, params)[0].outputs
    assert sample.text == full[: full.index(stop)] + stop
    assert "".join(one.text for one in llm.stream(QUESTION, params)) == sample.text


def test_stop_token_ids(llm):
    ids = llm.chat(QUESTION, GREEDY)[0].outputs[0].token_ids
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=24, stop_token_ids=[ids[5]])
    (sample,) = llm.chat(QUESTION, params)[0].outputs
    assert (sample.finish_reason, sample.stop_reason) == ("stop", ids[5])
    assert len(sample.token_ids) <= 6


def test_bad_words_and_bias(llm):
    ids = llm.chat(QUESTION, GREEDY)[0].outputs[0].token_ids
    word = next(text for text in (llm.decode([i]).strip() for i in ids) if text.isalpha() and len(text) > 2)
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=24, bad_words=[word])
    (banned,) = llm.chat(QUESTION, params)[0].outputs
    assert not set(llm.encode(" " + word)) & set(banned.token_ids) or len(llm.encode(" " + word)) > 1
    forced = SamplingParams(temperature=0, max_tokens=3, logit_bias={42: 100}, repetition_penalty=1.0)
    assert llm.chat(QUESTION, forced)[0].outputs[0].token_ids == [42, 42, 42]
    only = SamplingParams(temperature=0, max_tokens=3, allowed_token_ids=[7, 8])
    assert set(llm.chat(QUESTION, only)[0].outputs[0].token_ids) <= {7, 8}


def test_seeds(llm, demo_dir, device):
    params = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=16)
    first, second = (llm.chat(QUESTION, params)[0].outputs[0] for _ in range(2))
    assert first.seed != second.seed
    params.seed = first.seed
    assert llm.chat(QUESTION, params)[0].outputs[0].token_ids == first.token_ids
    params.seed = None
    runs = []
    for _ in range(2):
        with LLM(str(demo_dir), seed=5, device=device, batch_invariant=True, kv_cache_tokens=4096) as model:
            runs.append([output.outputs[0].token_ids for output in model.generate(["a", "a"], params)])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_detokenize_false(llm):
    params = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
    (sample,) = llm.chat(QUESTION, params)[0].outputs
    assert sample.text == "" and len(sample.token_ids) == 4


def test_max_tokens_zero_computes_the_prompt(llm):
    (output,) = llm.generate("The fox", SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert output.outputs[0].token_ids == [] and output.outputs[0].finish_reason == "length"
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_chat_forms(llm):
    both = llm.chat([QUESTION, [{"role": "user", "content": "Hello!"}]], GREEDY)
    assert len(both) == 2 and both[0].prompt != both[1].prompt
    streamed = "".join(one.text for one in llm.chat(QUESTION, GREEDY, stream=True))
    assert streamed == both[0].outputs[0].text
    tool = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
    assert "get_time" in llm.chat(QUESTION, GREEDY, tools=[tool])[0].prompt
    begun = [*QUESTION, {"role": "assistant", "content": "Nora"}]
    assert llm.chat(begun, GREEDY, continue_final_message=True)[0].prompt.endswith("assistant\nNora")
    with pytest.raises(ValueError, match="stream=True takes one conversation, got 2"):
        llm.chat([QUESTION, QUESTION], stream=True)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda llm: llm.generate(""), ValueError, "the prompt is empty"),
        (lambda llm: llm.stream([]), ValueError, "the prompt is empty"),
        (lambda llm: llm.stream(5), TypeError, "a prompt must be a text, token ids, messages or a dict, got int"),
        (
            lambda llm: llm.stream([8192]),
            ValueError,
            r"token id 8192 at position 0 is not in the vocabulary \(0 to 8191\)",
        ),
        (lambda llm: llm.stream({"promt": "x"}), ValueError, r"needs 'prompt' \(text\) or 'prompt_token_ids'"),
        (lambda llm: llm.stream("x", {"n": 1}), TypeError, "sampling_params must be SamplingParams, got dict"),
        (lambda llm: llm.generate(["a", "b"], [SamplingParams()]), ValueError, "2 prompts but 1 sampling_params"),
        (lambda llm: llm.generate(QUESTION), TypeError, r"use chat\(\) for messages"),
        (lambda llm: llm.chat("hi"), TypeError, "messages must be a list"),
        (lambda llm: llm.generate(b"x"), TypeError, r"must be a text or token ids, got bytes; use .decode\(\)"),
        (lambda llm: llm.generate(bytearray(b"x")), TypeError, r"a text or token ids, got bytearray; use .decode\(\)"),
        (lambda llm: llm.generate(["a", b"x"]), TypeError, "prompt 1: a prompt must be a text or token ids, got bytes"),
        (lambda llm: llm.stream(b"x"), TypeError, "a prompt must be a text or token ids, got bytes"),
        (lambda llm: llm.logits(b"x"), TypeError, "a prompt must be a text or token ids, got bytes"),
        (lambda llm: llm.generate({"prompt_token_ids": b"x"}), TypeError, "must be a list of ints, got bytes"),
        (lambda llm: llm.chat(b"x"), TypeError, "messages must be a list"),
        (lambda llm: llm.generate(["a", [9000]]), ValueError, "prompt 1: token id 9000"),
        (lambda llm: llm.stream([1] * 4097), ValueError, "409[67]"),
        (lambda llm: llm.stream("x", SamplingParams(logit_bias={8192: 1})), ValueError, "8192"),
    ],
)
def test_refused_calls(llm, call, error, message):
    with pytest.raises(error, match=message):
        call(llm)
    wait_until(lambda: idle(llm))


def test_leaving_a_stream_cancels_it(llm):
    for one in llm.stream(QUESTION, ENDLESS):
        if one.token_ids:
            break
    del one
    gc.collect()
    wait_until(lambda: idle(llm))
    stream = llm.stream(QUESTION, ENDLESS)
    next(stream)
    stream.close()
    wait_until(lambda: idle(llm))
    llm.stream(QUESTION, ENDLESS)  # never started to read
    gc.collect()
    wait_until(lambda: idle(llm))
    with pytest.raises(RuntimeError, match="mine"):
        for _ in llm.stream(QUESTION, ENDLESS):
            raise RuntimeError("mine")
    wait_until(lambda: idle(llm))


def test_a_stream_that_nobody_reads_pauses(llm):
    stream = llm.stream(QUESTION, ENDLESS)
    next(stream)
    before = llm.stats()["num_generated_tokens"]
    time.sleep(0.2)
    wait_until(lambda: llm.stats()["num_paused"] == 1, 60)
    assert llm.stats()["num_generated_tokens"] - before < 600
    stream.close()
    wait_until(lambda: idle(llm))


def test_threads(llm):
    expected = llm.chat(QUESTION, GREEDY)[0].outputs[0].token_ids
    results = []

    def work(i):
        if i % 2:
            results.append(llm.chat(QUESTION, GREEDY)[0].outputs[0].token_ids)
        else:
            results.append(sum((one.token_ids for one in llm.stream(QUESTION, GREEDY)), []))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [expected] * 8


def test_two_engines(llm, demo_dir, device):
    with LLM(str(demo_dir), device=device, batch_invariant=True, kv_cache_tokens=4096) as other:
        assert (
            other.chat(QUESTION, GREEDY)[0].outputs[0].token_ids == llm.chat(QUESTION, GREEDY)[0].outputs[0].token_ids
        )
    assert other.closed and not llm.closed


def test_close_mid_stream(demo_dir, device):
    llm = LLM(str(demo_dir), device=device, kv_cache_tokens=4096)
    stream = llm.stream(QUESTION, ENDLESS)
    next(stream)
    llm.close()
    llm.close()
    rest = list(stream)
    assert rest[-1].finish_reason == "abort"
    with pytest.raises(EngineError, match="closed"):
        llm.stream("x")
    assert "closed" in repr(llm)


def test_info_stats_and_repr(llm, device):
    info = llm.info()
    assert info["backend"] == device
    assert (info["num_layers"], info["hidden_size"], info["vocab_size"]) == (8, 384, 8192)
    if device == "cpu":
        assert info["isa"] in _engine.build_info()["isas"] and info["isa"] in info["description"]
    memory = llm.stats()["memory"]
    assert memory["layers_bytes"] > 0 and memory["kv_cache_bytes"] == memory["num_blocks"] * memory["kv_block_bytes"]
    assert (memory["device_total_bytes"] > 0) == (device == "cuda")
    assert 0 <= memory["device_overhead_bytes"] <= memory["device_total_bytes"]
    assert f"on {device}: 8 layers" in repr(llm)
    assert "tokens" in llm.chat(QUESTION, GREEDY)[0]._repr_html_()
    assert llm.generation_config["top_k"] == 20 and llm.config["hidden_size"] == 384


def test_options(demo_dir, tmp_path):
    with pytest.raises(ValueError, match="tensor_parallel_size is 99; the model has only"):
        LLM(str(demo_dir), device="cpu", tensor_parallel_size=99)
    with pytest.raises(TypeError, match="tensor_parallel_size must be int, not str"):
        LLM(str(demo_dir), device="cpu", tensor_parallel_size="2")
    with pytest.raises(ValueError, match="cpu_offload must be .*disk"):
        LLM(str(demo_dir), cpu_offload="disk")
    with pytest.raises((NotImplementedError, EngineError, ValueError), match="cuda:99"):
        LLM(str(demo_dir), device="cuda:99")
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_len'"):
        LLM(str(demo_dir), max_len=5)
    with pytest.raises(ValueError, match="trust_remote_code=True is refused"):
        LLM(str(demo_dir), trust_remote_code=True)
    with pytest.raises(ModelError, match="no such directory: /nowhere/model"):
        LLM("/nowhere/model")
    with pytest.raises(ModelError, match="expected a config.json"):
        LLM(str(tmp_path))
    with pytest.raises(ModelError, match="neither a directory nor a hub id"):
        LLM("not a model")


def test_vllm_options(demo_dir):
    options = {"batch_invariant": True, "enforce_eager": True, "max_logprobs": 20, "enable_chunked_prefill": True}
    with LLM(str(demo_dir), device="cpu", kv_cache_tokens=1024, isa="scalar", **options) as llm:
        assert llm.info()["isa"] == "scalar"
    with pytest.raises(NotImplementedError, match="use kv_cache_tokens"):
        LLM(str(demo_dir), num_gpu_blocks_override=10)


def test_size_of_the_kv_cache(demo_dir):
    """On the CPU. Without a size: half of the memory, bounded. A share that was asked for is used, up to what all sequences need."""

    def tokens(**options):
        report = _engine.estimate(str(demo_dir), device="cpu", **options)
        return report["num_blocks"] * report["block_size"], report

    assert tokens()[0] == tokens(memory_utilization=0.0)[0] == 65536
    assert tokens(memory_utilization=0.5, max_num_seqs=20, max_model_len=4000)[0] == 20 * 4000
    count, report = tokens(memory_utilization=0.02, max_num_seqs=4096)
    fixed = sum(report[f"{name}_bytes"] for name in ("embedding", "layers", "head", "workspace"))
    left = int(report["available_bytes"] * 0.02) - fixed
    if left >= report["kv_block_bytes"]:  # true of any machine with 8 GB free
        assert count == left // report["kv_block_bytes"] * report["block_size"]
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="memory_utilization must be above 0 and at most 1"):
            tokens(memory_utilization=share)


def test_memory_for_all(demo_dir, device):
    """memory= bounds weights, workspace and cache together, and the cache takes what the others leave."""
    names = ("embedding", "layers", "head", "workspace", "kv_cache")
    least = 0
    with LLM(str(demo_dir), device=device, memory="1GiB", max_num_batched_tokens=256, max_model_len=512) as llm:
        memory = llm.stats()["memory"]
        taken = sum(memory[f"{name}_bytes"] for name in names)
        assert taken <= 2**30
        room_for_all = memory["num_blocks"] * memory["block_size"] >= 256 * 512
        assert room_for_all or taken + memory["kv_block_bytes"] > 2**30
        least = taken - memory["kv_cache_bytes"]
        text = llm.chat(QUESTION, GREEDY)[0].outputs[0].text
    options = {"device": device, "max_num_batched_tokens": 256, "max_model_len": 512}
    with LLM(str(demo_dir), memory=least + 64 * memory["kv_block_bytes"], **options) as llm:
        assert llm.stats()["memory"]["num_blocks"] == 64
        assert llm.chat(QUESTION, GREEDY)[0].outputs[0].text == text
    for size in ("1MiB", least):
        with pytest.raises(MemoryError, match=r"\d+"):
            LLM(str(demo_dir), memory=size, **options)


def test_hub_id_offline(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    code = "from qwen_fast.hub import resolve_model; resolve_model('nobody/no-such-model')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "'nobody/no-such-model' is no directory here, and as a hub id it is not in the cache" in done.stderr


def test_without_a_tokenizer(tiny_config, device):
    with LLM(tiny_config(), device=device, load_format="dummy", kv_cache_tokens=1024) as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0))
        assert len(output.outputs[0].token_ids) == 4
        with pytest.raises(ModelError, match=r"no tokenizer.json; give tokenizer="):
            llm.generate("text")
        with pytest.raises(ModelError, match=r"no tokenizer.json"):
            llm.generate([[1]], SamplingParams(stop="x"))
