"""Negative controls: damage that the instrument must see, through the code that measures everything else.

The first is Qwen2.5's own: a huge bias of k_proj in the slow RoPE dimensions. Keys that are quantised with it keep
nothing but it; quantised without it, and with the exact term added when they are read, they keep nearly all. The second is a
checkpoint whose scales of 4-bit weights stand in the wrong rows.
"""

from __future__ import annotations

import json
import shutil

import pytest
from quality_helpers import MACHINE

from qwen_fast.quality import Answer, Cell, EngineScorer, Runner, Settings, read_rows
from qwen_fast.quality.report import Report
from qwen_fast.quality.tasks import TEXT_FILE, select

BIAS = 400.0


def report(load_reference, cells, rows, tokens, longest):
    listed = [Cell(name, {"keys": name}, load) for name, load in cells.items()]
    settings = Settings(window=256, tokens=tokens, draws=400, max_new_tokens=longest, reference_logits="both")
    runner = Runner(load_reference, listed, settings, TEXT_FILE.read_text(encoding="utf-8"), rows)
    data = runner.run()
    data["settings"] |= {"text": "heldout.txt", "tasks": "eval.jsonl"}
    return Report.from_measurements(data | {"machine": MACHINE})


class TorchScorer:
    """A transformers model whose cache passes keys through `keys(rotated keys, their rotated bias)` on the way in."""

    def __init__(self, model, engine, keys=None):
        self.model, self._engine, self._keys = model, engine, keys
        self.vocab_size, self.max_model_len, self.tokens = model.config.vocab_size, 4096, engine.tokens
        self.encode, self.render = engine.encode, engine.render

    def describe(self):
        return {"model": "demo in transformers"}

    def _cache(self):
        import torch
        from transformers import DynamicCache
        from transformers.models.qwen2.modeling_qwen2 import rotate_half

        scorer, model = self, self.model

        class Cache(DynamicCache):
            def update(self, keys, values, layer, *args, **kwargs):
                if scorer._keys is not None:
                    first, count = self.get_seq_length(layer), keys.shape[-2]
                    cos, sin = model.model.rotary_emb(keys, torch.arange(first, first + count)[None])
                    attention = model.model.layers[layer].self_attn
                    bias = attention.k_proj.bias.view(1, keys.shape[1], 1, keys.shape[3])
                    keys = scorer._keys(keys, bias * cos[:, None] + rotate_half(bias) * sin[:, None])
                return super().update(keys, values, layer, *args, **kwargs)

        return Cache()

    def logits(self, ids, start, stop):
        import torch

        with torch.no_grad():
            found = self.model(torch.tensor([list(ids)]), past_key_values=self._cache(), use_cache=True)
        return found.logits[0, start:stop].float().numpy()

    def generate(self, prompts, max_tokens):
        import torch

        end = self._engine.llm.tokenizer.token_id("<|im_end|>")
        answers = []
        for prompt, most in zip(prompts, max_tokens):
            cache, ids, fed = self._cache(), [], list(prompt)
            with torch.no_grad():
                while len(ids) < most and ids[-1:] != [end]:
                    fed = [
                        int(
                            self.model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
                            .logits[0, -1]
                            .argmax()
                        )
                    ]
                    ids += fed
            done = ids[-1:] == [end]
            answers.append(
                Answer(self._engine.llm.decode(ids[:-1] if done else ids), len(ids), "stop" if done else "length")
            )
        return answers

    def close(self):
        pass


def int4(keys):
    """Symmetric, one scale for each token and head."""
    scale = keys.abs().amax(dim=-1, keepdim=True) / 7
    return (keys / scale).round().clamp(-7, 7) * scale


@pytest.fixture(scope="module")
def biased(shared_dir):
    """The demo model in float32, the biases of its keys huge in the slowest RoPE pair."""
    import torch
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the steps are small: threads would mostly wait for each other
    model = AutoModelForCausalLM.from_pretrained(shared_dir / "demo-model", dtype=torch.float32).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias.view(-1, 64)
            bias[:, 31], bias[:, 63] = BIAS, -BIAS
    yield model
    torch.set_num_threads(threads)


@pytest.mark.oracle
def test_naive_int4_keys_with_the_bias_inside_are_seen(biased, shared_dir):
    engine = EngineScorer(shared_dir / "demo-model", {"kv_cache_tokens": 4096})
    short = [one for one in read_rows() if one.task in ("arith", "lists") and len(engine.encode(one.answer)) < 12]
    rows = select(short, 4)

    def scorer(keys):
        return lambda: TorchScorer(biased, engine, keys)

    found = report(
        scorer(None),
        {"naive": scorer(lambda keys, bias: int4(keys)), "without the bias": scorer(lambda keys, bias: int4(keys - bias) + bias)},
        rows, 256, 12,
    )  # fmt: skip
    engine.close()
    naive, good = found.cell("naive"), found.cell("without the bias")
    assert naive["text"]["kl_mean"]["low"] > 1.0 and naive["text"]["same_top"]["high"] < 0.7
    assert naive["text"]["perplexity_ratio"]["low"] > 2
    exact = naive["tasks"]["all"]["metrics"]["exact"]
    assert (
        exact["reference"]["value"] > 0.8 and exact["difference"]["high"] < -0.4 and naive["tasks"]["all"]["p"] < 0.05
    )
    assert good["text"]["kl_mean"]["high"] < 0.1 and good["text"]["perplexity_ratio"]["high"] < 1.1
    assert good["tasks"]["all"]["metrics"]["exact"]["measured"]["value"] > exact["measured"]["value"] + 0.4


@pytest.fixture(scope="module")
def permuted(demo_dir, tmp_path_factory):
    """permuted(share) writes the demo checkpoint with the scales of `share` of its 4-bit layers one row further."""
    from safetensors.torch import load_file, save_file

    def write(share):
        folder = tmp_path_factory.mktemp("permuted")
        for path in demo_dir.iterdir():
            if path.suffix == ".json":
                shutil.copy(path, folder)
        tensors = load_file(demo_dir / "model.safetensors")
        scales = sorted(name for name in tensors if name.endswith("weight_scale"))
        assert len(scales) == 8 * 7
        for name in scales[: round(share * len(scales))]:
            tensors[name] = tensors[name].roll(1, dims=0).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


def test_scales_in_the_wrong_rows_are_seen(demo_dir, permuted):
    rows = select(read_rows(), 1)
    options = {"kv_cache_tokens": 16384}

    def load(path):
        return lambda: EngineScorer(path, options)

    cells = {"whole": load(permuted(0)), "one layer": load(permuted(1 / 56)), "permuted": load(permuted(1))}
    found = report(load(demo_dir), cells, rows, 1024, 64)
    whole, one, bad = (found.cell(name) for name in cells)
    assert whole["text"]["identical"] and not whole["tasks"]["differences"]
    assert one["text"]["kl_mean"]["low"] > 0 and not one["text"]["identical"]
    assert bad["text"]["kl_mean"]["low"] > 10 * one["text"]["kl_mean"]["high"] and bad["text"]["kl_mean"]["low"] > 0.5
    exact = bad["tasks"]["all"]["metrics"]["exact"]
    assert exact["difference"]["high"] < -0.1 and bad["tasks"]["all"]["p"] < 0.05
    json.dumps(found.document, allow_nan=False)
