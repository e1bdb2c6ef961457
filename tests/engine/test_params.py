"""SamplingParams, options and sizes: what is accepted, what is refused with which message, who wins."""

import dataclasses
import math
import sys

import pytest

from qwen_fast import SamplingParams
from qwen_fast.loading import find_nccl
from qwen_fast.options import VLLM_OPTIONS, engine_options, refuse_unknown
from qwen_fast.params import generation_defaults
from qwen_fast.utils import derived_seed, format_bytes, fresh_seed, parse_bytes

BAD = [
    ({"n": 0}, ValueError, "n must be from 1 to 1024, got 0"),
    ({"n": 1025}, ValueError, "n must be from 1 to 1024, got 1025"),
    ({"n": True}, TypeError, "n must be an integer, got True"),
    ({"n": 1.0}, TypeError, "n must be an integer, got 1.0"),
    ({"temperature": -0.1}, ValueError, "temperature must be from 0 to 100, got -0.1"),
    ({"temperature": math.nan}, ValueError, "temperature must be from 0 to 100, got nan"),
    ({"temperature": math.inf}, ValueError, "temperature must be from 0 to 100, got inf"),
    ({"temperature": 10**400}, ValueError, "temperature must be from 0 to 100, got inf"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
    ({"top_p": 0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
    ({"top_p": 1.01}, ValueError, "top_p must be above 0 and at most 1, got 1.01"),
    ({"top_k": -2}, ValueError, "top_k must be from -1 to 2147483647, got -2"),
    ({"top_k": 2.5}, TypeError, "top_k must be an integer, got 2.5"),
    ({"min_p": 1.5}, ValueError, "min_p must be from 0 to 1, got 1.5"),
    ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be above 0 and at most 100, got 0.0"),
    ({"presence_penalty": 2.1}, ValueError, "presence_penalty must be from -2 to 2, got 2.1"),
    ({"frequency_penalty": -3}, ValueError, "frequency_penalty must be from -2 to 2, got -3.0"),
    ({"logit_bias": [1]}, TypeError, r"logit_bias must be a dict of token id to number, got \[1\]"),
    ({"logit_bias": {1: 101}}, ValueError, r"logit_bias\[1\] must be from -100 to 100, got 101.0"),
    ({"logit_bias": {-1: 0}}, ValueError, "logit_bias: a token id must be from 0"),
    ({"logit_bias": {"x": 0}}, TypeError, "logit_bias: a token id must be an integer, got 'x'"),
    ({"allowed_token_ids": []}, ValueError, "allowed_token_ids is empty"),
    ({"allowed_token_ids": ["a"]}, TypeError, r"allowed_token_ids\[0\] must be an integer, got 'a'"),
    ({"stop": ""}, ValueError, r"stop\[0\] is empty"),
    ({"stop": ["a", 1]}, TypeError, r"stop\[1\] must be a text, got 1"),
    ({"stop": b"a"}, TypeError, "stop must be a text or a list of texts"),
    ({"stop": ["x"] * 17}, ValueError, "stop has 17 texts, the limit is 16"),
    ({"stop": "é" * 129}, ValueError, r"stop\[0\] has 258 bytes, the limit is 256"),
    ({"stop": "\ud800"}, ValueError, r"stop\[0\] holds a lone surrogate"),
    ({"stop": "a", "detokenize": False}, ValueError, "stop strings need detokenize=True"),
    ({"bad_words": [""]}, ValueError, r"bad_words\[0\] is empty"),
    ({"stop_token_ids": 5}, TypeError, "stop_token_ids must be a list of token ids, got 5"),
    ({"stop_token_ids": [-1]}, ValueError, r"stop_token_ids\[0\] must be from 0"),
    ({"min_tokens": -1}, ValueError, "min_tokens must be from 0"),
    ({"min_tokens": 5, "max_tokens": 4}, ValueError, "min_tokens is 5, more than max_tokens, 4"),
    ({"max_tokens": -1}, ValueError, "max_tokens must be from 0"),
    ({"seed": 2**64}, ValueError, "seed must be from"),
    ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
    ({"logprobs": 65}, ValueError, "logprobs must be from 0 to 64, got 65"),
    ({"logprobs": True}, TypeError, "logprobs must be an integer, got True"),
    ({"prompt_logprobs": -1}, ValueError, "prompt_logprobs must be from 0 to 64, got -1"),
    ({"ignore_eos": 1}, TypeError, "ignore_eos must be True or False, got 1"),
    ({"priority": 2**31}, ValueError, "priority must be from"),
    ({"best_off": 2}, TypeError, "best_off"),
]


@pytest.mark.parametrize(
    "fields, error, message", BAD, ids=lambda value: str(value)[:40] if isinstance(value, dict) else ""
)
def test_refused(fields, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**fields)


def test_accepted_forms():
    params = SamplingParams(stop="end", logit_bias={"7": 1}, stop_token_ids=(1, 2), top_k=-1, temperature=0)
    assert params.stop == ["end"]
    assert params.logit_bias == {7: 1.0}
    assert params.stop_token_ids == [1, 2]
    assert params.temperature == 0.0 and isinstance(params.temperature, float)


def test_numpy_numbers_are_numbers():
    numpy = pytest.importorskip("numpy")
    params = SamplingParams(temperature=numpy.float32(0.5), top_k=numpy.int64(3), allowed_token_ids=numpy.arange(3))
    assert (params.temperature, params.top_k, params.allowed_token_ids) == (0.5, 3, [0, 1, 2])


def test_explicit_value_wins_over_generation_config_and_that_over_the_default():
    defaults = generation_defaults(
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "do_sample": True, "eos_token_id": 3}
    )
    values = SamplingParams(temperature=1.0, top_k=0).resolved(defaults)
    assert (values["temperature"], values["top_p"], values["top_k"]) == (1.0, 0.8, 0)
    assert values["repetition_penalty"] == 1.0
    assert values["max_tokens"] == -1


def test_do_sample_false_means_greedy_unless_asked_otherwise():
    defaults = generation_defaults({"do_sample": False, "temperature": 0.7, "max_new_tokens": 2048})
    assert SamplingParams().resolved(defaults)["temperature"] == 0.0
    assert SamplingParams(temperature=0.3).resolved(defaults)["temperature"] == 0.3
    assert SamplingParams().resolved(defaults)["max_tokens"] == 2048
    assert SamplingParams(min_tokens=3000).resolved(defaults)["max_tokens"] == 3000


def test_bad_generation_config_names_file_and_key():
    with pytest.raises(ValueError, match=r"generation_config.json: top_p must be above 0 and at most 1, got 7.0"):
        generation_defaults({"top_p": 7})
    with pytest.raises(ValueError, match=r"generation_config.json: temperature must be a number, got \[\]"):
        generation_defaults({"temperature": []})


def test_negative_seed_is_taken_modulo():
    assert SamplingParams(seed=-1).resolved({})["seed"] == 2**64 - 1


@pytest.mark.parametrize(
    "text, size",
    [
        ("6GiB", 6 * 2**30),
        ("500 MB", 500 * 10**6),
        ("1.5KiB", 1536),
        (" 7 ", 7),
        (12, 12),
        ("2tib", 2 * 2**40),
        ("0B", 0),
    ],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["6G", "GiB", "", "-1GiB", "1e3", "1 GiB 2", "99999999TiB", -1])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="kv_cache_memory"):
        parse_bytes(text, "kv_cache_memory")


def test_parse_bytes_wants_int_or_text():
    with pytest.raises(TypeError, match="kv_cache_memory must be an int"):
        parse_bytes(1.5, "kv_cache_memory")


def test_format_bytes():
    assert [format_bytes(n) for n in (5, 1536, 3 * 2**20, 2**40)] == ["5 B", "1.5 KiB", "3.0 MiB", "1.0 TiB"]


def test_seeds():
    assert derived_seed(1, 0) == derived_seed(1, 0) != derived_seed(1, 1)
    assert derived_seed(11, 1) != derived_seed(1, 11)
    assert all(0 <= seed < 2**63 for seed in [fresh_seed() for _ in range(100)])
    assert len({fresh_seed() for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"kv_cache_dtype": "fp8_e5m2"}, NotImplementedError, "kv_cache_dtype='fp8_e5m2' is not built yet"),
        ({"kv_cache_16bit_window": -1}, ValueError, "kv_cache_16bit_window must be from 0"),
        ({"kv_cache_16bit_window": "64"}, TypeError, "kv_cache_16bit_window must be an integer"),
        ({"kv_cache_16bit_layers": 3}, TypeError, "kv_cache_16bit_layers must be a sequence of layer indices, got 3"),
        ({"kv_cache_16bit_layers": "0,3"}, TypeError, "kv_cache_16bit_layers must be a sequence of layer indices"),
        ({"kv_cache_16bit_layers": [0, -2]}, ValueError, r"kv_cache_16bit_layers\[1\] must be from 0"),
        ({"kv_cache_16bit_layers": [0.5]}, TypeError, r"kv_cache_16bit_layers\[0\] must be an integer"),
        ({"max_model_len": 0}, ValueError, "max_model_len must be from 1"),
        ({"max_model_len": "4096"}, TypeError, "max_model_len must be an integer"),
        ({"num_threads": -1}, ValueError, "num_threads must be from 0"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be from 1"),
        ({"kv_cache_memory": "6 apples"}, ValueError, "kv_cache_memory: cannot read '6 apples'"),
        ({"kv_cache_tokens": 0}, ValueError, "kv_cache_tokens must be from 1"),
        ({"memory_utilization": 1.2}, ValueError, "memory_utilization must be above 0 and at most 1, got 1.2"),
        ({"memory_utilization": math.nan}, ValueError, "memory_utilization must be above 0"),
        ({"memory_utilization": 0.5, "gpu_memory_utilization": 0.5}, ValueError, "two names of one option"),
        ({"memory_utilization": "all"}, TypeError, "memory_utilization must be a number, got 'all'"),
        ({"memory": "6 apples"}, ValueError, "memory: cannot read '6 apples'"),
        ({"memory": 0}, ValueError, "memory must be above 0 bytes, got 0"),
        ({"memory": -1}, ValueError, r"memory must be from 0 to 2\*\*63 - 1 bytes, got -1"),
        ({"memory": 1.5}, TypeError, "memory must be an int of bytes or a text like '6GiB', got float"),
        (
            {"memory": "6GiB", "gpu_memory_utilization": 0.9},
            ValueError,
            "memory='6GiB' and memory_utilization=0.9 both say",
        ),
        ({"cpu_offload": "disk"}, ValueError, "cpu_offload must be 'embeddings' or None, got 'disk'"),
        ({"cpu_offload_gb": -1}, ValueError, "cpu_offload_gb must be from 0 to 1048576 GiB, got -1"),
        ({"cpu_offload_gb": math.nan}, ValueError, "cpu_offload_gb must be from 0 to 1048576 GiB, got nan"),
        ({"cpu_offload_gb": "4"}, TypeError, "cpu_offload_gb must be a number, got '4'"),
        ({"watchdog_seconds": -1}, ValueError, r"watchdog_seconds must be from 0 \(off\) to 86400, got -1"),
        ({"watchdog_seconds": math.nan}, ValueError, r"watchdog_seconds must be from 0 \(off\) to 86400, got nan"),
        ({"watchdog_seconds": "60"}, TypeError, "watchdog_seconds must be a number, got '60'"),
        ({"rope_scaling": "yarn"}, TypeError, "rope_scaling must be a dict"),
        ({"hf_overrides": {"a": math.nan}}, ValueError, "hf_overrides must hold JSON values"),
        ({"hf_overrides": {"a": object()}}, TypeError, "hf_overrides must hold JSON values"),
        ({"rope_scaling": {"a": 1}, "hf_overrides": {"rope_scaling": {}}}, ValueError, "rope_scaling is given twice"),
    ],
)
def test_engine_options_refused(options, error, message):
    with pytest.raises(error, match=message):
        engine_options(**options)


def test_engine_options_passed():
    options = engine_options(
        kv_cache_memory="1MiB", rope_scaling={"factor": 4.0}, gpu_memory_utilization=0.25, isa="auto"
    )
    assert options == {
        "quantization": "auto",
        "kv_cache_memory": 2**20,
        "memory_utilization": 0.25,
        "hf_overrides": '{"rope_scaling": {"factor": 4.0}}',
        "isa": "auto",
    }


def test_engine_options_of_several_ranks():
    options = engine_options(tensor_parallel_size=2, tensor_parallel_comm="nccl", watchdog_seconds=5)
    assert options == {
        "quantization": "auto",
        "tensor_parallel_size": 2,
        "tensor_parallel_comm": "nccl",
        "watchdog_seconds": 5.0,
    }
    assert "watchdog_seconds" not in engine_options(watchdog_seconds=None)


def test_nccl_is_found_in_its_package(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_nccl() is None
    library = tmp_path / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    library.parent.mkdir(parents=True)
    assert find_nccl() is None
    library.touch()
    assert find_nccl() == str(library)


def test_engine_options_of_a_gpu():
    options = engine_options(
        device="cuda:1",
        memory="6GiB",
        cpu_offload="embeddings",
        cpu_offload_gb=4,
        batch_invariant=True,
        enforce_eager=None,
        tensor_parallel_size=1,
    )
    assert options == {
        "quantization": "auto",
        "device": "cuda:1",
        "memory_bytes": 6 * 2**30,
        "cpu_offload": "embeddings",
        "cpu_offload_gb": 4.0,
        "batch_invariant": True,
        "tensor_parallel_size": 1,
    }


def test_unknown_options():
    refuse_unknown({"kv_transfer_config": None, "num_speculative_tokens": 0, "pipeline_parallel_size": 1})
    with pytest.raises(NotImplementedError, match="enable_lora=True is not built: leave it out"):
        refuse_unknown({"enable_lora": True})
    with pytest.raises(NotImplementedError, match="speculative_config"):
        refuse_unknown({"speculative_config": {"model": "x"}})
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_modle_len'"):
        refuse_unknown({"max_modle_len": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"compilation_config": 3, "disable_log_stats": False, "enable_chunked_prefill": True, "tokenizer_mode": "auto"},
        {"max_logprobs": 20, "swap_space": 4, "disable_custom_all_reduce": True, "use_v2_block_manager": True},
        {"max_seq_len_to_capture": 8192, "skip_tokenizer_init": False, "num_gpu_blocks_override": None},
        dict.fromkeys(VLLM_OPTIONS),
    ],
)
def test_options_that_ask_for_nothing(options):
    refuse_unknown(options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"enable_chunked_prefill": False}, "enable_chunked_prefill=False is not built: prompts are always cut"),
        ({"skip_tokenizer_init": True}, "skip_tokenizer_init=True is not built: prompts may be token ids"),
        ({"num_gpu_blocks_override": 100}, "num_gpu_blocks_override=100 is not built: use kv_cache_tokens"),
        ({"max_logprobs": 65}, "max_logprobs=65 is not built: the limit is 64"),
        ({"max_logprobs": -1}, "max_logprobs=-1 is not built: the limit is 64"),
        ({"tokenizer_mode": "mistral"}, "tokenizer_mode='mistral' is not built"),
        ({"enable_lora": True}, "enable_lora=True is not built"),
    ],
)
def test_options_that_ask_for_what_is_not_there(options, message):
    with pytest.raises(NotImplementedError, match=message):
        refuse_unknown(options)


UNBUILT_FIELDS = {
    "best_of": (2, 1),
    "logits_processors": ([len], []),
    "truncate_prompt_tokens": (5, None),
    "output_kind": (2, 0),
    "use_beam_search": (True, False),
    "length_penalty": (0.5, 1.0),
    "early_stopping": (True, False),
    "flat_logprobs": (True, False),
    "extra_args": ({"a": 1}, {}),
}


@pytest.mark.parametrize("name", UNBUILT_FIELDS)
def test_fields_that_are_not_built(name):
    refused, accepted = UNBUILT_FIELDS[name]
    with pytest.raises(NotImplementedError, match=rf"SamplingParams\({name}=.*is not built; leave {name} out"):
        SamplingParams(**{name: refused})
    assert SamplingParams(**{name: accepted}) == SamplingParams(**{name: None}) == SamplingParams()
    assert name not in SamplingParams().resolved({})


def test_spaces_between_special_tokens():
    assert SamplingParams(spaces_between_special_tokens=True) == SamplingParams(spaces_between_special_tokens=False)
    with pytest.raises(TypeError, match="spaces_between_special_tokens must be a bool, got 'x'"):
        SamplingParams(spaces_between_special_tokens="x")
    assert dataclasses.replace(SamplingParams(n=2), max_tokens=3) == SamplingParams(n=2, max_tokens=3)
