"""What is written: read back by the engine bit by bit as the formats' descriptions say, and by transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import LINEARS, dense_weights, log_probs, mean_kl, read_tensors, token_blocks, write_model

from qwen_fast import _engine
from qwen_fast.quantize import formats, quantize

CASES = {
    "awq": {"method": "awq"},
    "awq-row": {"method": "awq", "group_size": -1},
    "awq-as-ct-asym-head8": {"method": "awq", "format": "compressed-tensors", "symmetric": False, "head_bits": 8},
    "gptq": {"method": "gptq"},
    "gptq-asym-64": {"method": "gptq", "symmetric": False, "group_size": 64},
    "gptq-desc-act": {"method": "gptq", "act_order": "group", "group_size": 32},
    "gptq-8": {"method": "gptq", "bits": 8, "symmetric": False},
    "gptq-as-awq": {"method": "gptq", "format": "awq"},
    "gptq-as-ct-desc-act-asym": {
        "method": "gptq", "format": "compressed-tensors", "act_order": "group", "symmetric": False
    },
    "rtn": {"method": "rtn"},
    "rtn-asym-32-head8": {"method": "rtn", "symmetric": False, "group_size": 32, "head_bits": 8},
    "rtn-8-row": {"method": "rtn", "bits": 8, "group_size": -1},
    "rtn-as-awq": {"method": "rtn", "format": "awq"},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("files") / "model")
    for name, text in (("tokenizer_config.json", '{"a": 1}'), ("generation_config.json", '{"top_k": 5}')):
        (path / name).write_text(text)
    (path / "notes.bin").write_bytes(b"x")
    return path


@pytest.fixture(scope="module", params=CASES)
def made(request, model, tmp_path_factory):
    """(options, directory) of each case; shared by the tests."""
    options = CASES[request.param]
    out = tmp_path_factory.mktemp("made") / "out"
    report = quantize(model, out, calibration=token_blocks(), device="cpu", progress=False, **options)
    assert report["calibration_tokens"] == (0 if options["method"] == "rtn" else 1024)
    assert report["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return options, out


def test_the_engine_reads_what_the_description_says(made):
    _, out = made
    config, dense = dense_weights(out)
    modules = [f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS]
    modules += ["lm_head"] if "lm_head.weight" in dense else []
    for module in modules:
        ours = np.asarray(_engine.dequantize(str(out), module))
        assert ours.tobytes() == np.ascontiguousarray(dense[f"{module}.weight"], np.float32).tobytes(), module
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in dense)


def test_scales_are_exact_in_both_16_bit_types(made):
    _, out = made
    for name, values in read_tensors(out).items():
        if name.endswith(("scales", "weight_scale")):
            wide = values.astype(np.float32)
            assert (wide.view(np.uint32) & 0xFFFF == 0).all() and (wide.astype(np.float16) == wide).all(), name


def test_near_the_original(made, model):
    options, out = made
    ids = np.random.default_rng(9).integers(0, 300, 256).tolist()
    reference = log_probs(model, ids)
    divergence = mean_kl(reference, log_probs(out, ids))
    assert 0 < divergence < (0.005 if options.get("bits") == 8 else 0.6)


def test_better_than_rounding_and_a_control(model, tmp_path):
    """Far less divergence than plain rounding on a model with loud channels; scales of other groups are far worse than both."""
    ids = np.random.default_rng(9).integers(0, 300, 512).tolist()
    reference = log_probs(model, ids)
    found = {}
    for name, options in {"rtn": {"format": "awq"}, "awq": {}, "gptq": {"format": "awq"}}.items():
        quantize(
            model, tmp_path / name, method=name, calibration=token_blocks(), device="cpu", progress=False, **options
        )
        found[name] = mean_kl(reference, log_probs(tmp_path / name, ids))
    print(found)
    assert found["awq"] < 0.65 * found["rtn"] and found["gptq"] < 0.5 * found["rtn"]
    path = tmp_path / "gptq" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name.endswith("proj.scales"):
            begin, end = (8 + length + at for at in entry["data_offsets"])
            raw[begin:end] = np.random.default_rng(1).permutation(np.frombuffer(raw[begin:end], np.float16)).tobytes()
    path.write_bytes(raw)
    assert mean_kl(reference, log_probs(tmp_path / "gptq", ids)) > 1.2 * found["rtn"]


def test_configuration_and_other_files(made, model):
    options, out = made
    config = json.loads((out / "config.json").read_text())
    quant = config.pop("quantization_config")
    original = json.loads((model / "config.json").read_text())
    head = options.get("head_bits") == 8
    assert config == {**original, "tie_word_embeddings": not head}
    method = options.get("format") or {"rtn": "compressed-tensors"}.get(options["method"], options["method"])
    assert quant["quant_method"] == method
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    assert (out / "generation_config.json").read_text() == '{"top_k": 5}'
    if method == "gptq":
        assert quant["desc_act"] == (options.get("act_order") == "group")


def in_transformers(path, ids):
    """Log-probabilities by transformers in float32 on weights that the reader of these tests gives it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, dense = dense_weights(path)
    keep = {key: v for key, v in config.items() if key not in ("architectures", "torch_dtype", "quantization_config")}
    hf = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**keep)).float().eval()
    state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in dense.items()}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    hf.load_state_dict(state, strict=True)
    with torch.inference_mode():
        rows = hf(torch.tensor([ids])).logits[0].double()
        return (rows - rows.logsumexp(-1, keepdim=True)).numpy()


@pytest.mark.oracle
def test_the_same_logits_in_transformers(made):
    _, out = made
    ids = np.random.default_rng(10).integers(0, 300, 128).tolist()
    assert abs(mean_kl(in_transformers(out, ids), log_probs(out, ids))) < 1e-6


@pytest.mark.oracle
@pytest.mark.parametrize("head_bits", [16, 8])
def test_transformers_own_reader(model, tmp_path, head_bits):
    """compressed-tensors, by the package of that name, where it is installed."""
    pytest.importorskip("compressed_tensors")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    out = tmp_path / "out"
    quantize(model, out, method="rtn", head_bits=head_bits, device="cpu", progress=False)
    hf = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = np.random.default_rng(10).integers(0, 300, 128).tolist()
    with torch.inference_mode():
        rows = hf(torch.tensor([ids])).logits[0].double()
    theirs = (rows - rows.logsumexp(-1, keepdim=True)).numpy()
    assert abs(mean_kl(theirs, log_probs(out, ids))) < 1e-6


def test_an_untied_head_and_shards(tmp_path, monkeypatch):
    from qwen_fast.quantize import run

    model = write_model(tmp_path / "model", tie_word_embeddings=False)
    monkeypatch.setattr(run, "SHARD_BYTES", 100_000)
    quantize(model, tmp_path / "out", method="rtn", device="cpu", progress=False)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    tensors = read_tensors(tmp_path / "out")
    assert set(tensors) == set(index["weight_map"])
    raw = [path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(len(one) - 8 - int.from_bytes(one[:8], "little") for one in raw)
    assert (tensors["lm_head.weight"] == read_tensors(model)["lm_head.weight"]).all()
    ids = list(range(100))
    assert mean_kl(log_probs(model, ids), log_probs(tmp_path / "out", ids)) < 0.6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_packing(bits, axis):
    values = np.random.default_rng(bits).integers(0, 2**bits, (13, 19)).astype(np.uint8)
    words = np.moveaxis(formats.pack(values, bits, axis), axis, -1).view(np.uint32)
    moved = np.moveaxis(values, axis, -1)
    per_word = 32 // bits
    for i, j in np.ndindex(*moved.shape):
        assert words[i, j // per_word] >> (bits * (j % per_word)) & (2**bits - 1) == moved[i, j]
    assert words.shape[-1] == -(-moved.shape[-1] // per_word)


def test_a_head_in_other_bits_than_the_layers_is_checked(model, tmp_path):
    """The loader's side: a group for the head alone, wherever it stands, and nothing else."""
    out = tmp_path / "out"
    quantize(model, out, method="rtn", head_bits=8, device="cpu", progress=False)
    path = out / "config.json"
    config = json.loads(path.read_text())
    before = np.asarray(_engine.dequantize(str(out), "lm_head")).tobytes()
    groups = config["quantization_config"]["config_groups"]

    def dequantize(**changed):
        changed = {**config["quantization_config"], "config_groups": changed}
        path.write_text(json.dumps({**config, "quantization_config": changed}))
        return np.asarray(_engine.dequantize(str(out), "lm_head")).tobytes()

    assert dequantize(a=groups["group_1"], b=groups["group_0"]) == before
    assert dequantize(a={**groups["group_1"], "targets": ["lm_head"]}, b=groups["group_0"]) == before
    with pytest.raises(_engine.ModelError, match="no group has the targets"):
        dequantize(a=groups["group_1"])
    with pytest.raises(_engine.ModelError, match="targets"):
        dequantize(a={**groups["group_1"], "targets": ["re:.*down_proj"]}, b=groups["group_0"])
    with pytest.raises(_engine.ModelError, match="lm_head"):
        dequantize(a=groups["group_0"])  # the head's tensors do not fit the layers' 4 bits
