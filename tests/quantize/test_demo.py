"""The quantisers on the demo's 16-bit checkpoint: the divergence from it that they are there to save."""

from __future__ import annotations

import pytest
from helpers import log_probs, mean_kl, read_tensors

from qwen_fast.quantize import quantize
from qwen_fast.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def original(shared_dir):
    path = shared_dir / "demo-model"
    if not (path / "config.json").exists():
        pytest.skip(f"the demo's 16-bit checkpoint is not in {shared_dir}")
    return path


@pytest.fixture(scope="module")
def heldout(original):
    return Tokenizer(original, 8192).encode((original / "heldout.txt").read_text())


def divergences(original, folder, ids, plans, **options):
    reference = log_probs(original, ids)
    found = {}
    for name, plan in plans.items():
        report = quantize(original, folder / name, device="cpu", progress=False, **{**options, **plan})
        found[name] = mean_kl(reference, log_probs(folder / name, ids))
        print(f"{name}: mean KL {found[name]:.5f} over {len(ids)} tokens, {report['seconds']:.1f} s")
        assert report["seconds"] < 120
        if name == "awq":
            assert read_tensors(folder / name)["model.layers.0.self_attn.q_proj.qweight"].shape == (384, 48)
    return found


@pytest.mark.long
def test_a_part_of_the_calibration_helps_already(original, heldout, tmp_path):
    """A seventh of the text, four windows of held-out tokens that plain rounding hurts; the whole is below."""
    ids = heldout[2560:4608]
    plans = {"rtn": {"method": "rtn", "symmetric": False}, "gptq": {"method": "gptq", "num_samples": 16}}
    found = divergences(original, tmp_path, ids, plans)
    assert 0 < found["gptq"] < 0.7 * found["rtn"]


@pytest.mark.long
@pytest.mark.parametrize("group_size", [128, 32])
def test_acceptance(original, heldout, tmp_path, group_size):
    """The whole calibration text, all held-out tokens (22,016); plain rounding in its better form, with zero points."""
    plans = {
        "rtn": {"method": "rtn", "symmetric": False},
        "awq": {"method": "awq"},
        "gptq": {"method": "gptq"},
    }
    found = divergences(original, tmp_path, heldout[: 43 * 512], plans, group_size=group_size)
    assert found["awq"] <= (0.7 if group_size == 128 else 0.85) * found["rtn"]
    assert found["gptq"] <= 0.7 * found["rtn"]
