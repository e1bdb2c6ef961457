"""What the default number format of 4-bit weights costs on the CPU: int8 activations, int8 head, bfloat16 KV cache."""

import pytest
from model_helpers import heldout_ids, logits, mean_kl, open_engine


@pytest.fixture(scope="module")
def rows(demo):
    """name -> logits of 2,000 held-out tokens."""
    ids = heldout_ids(demo, 2000)
    auto = {"activation_dtype": "auto", "lm_head_dtype": "auto", "kv_cache_dtype": "auto"}
    settings = {
        "float32": {},
        "w4, float activations": dict(quantization="w4", dtype="bfloat16", lm_head_dtype="auto", kv_cache_dtype="auto"),
        "w4": dict(quantization="w4", dtype="bfloat16", **auto),
    }
    result = {}
    for name, options in settings.items():
        with open_engine(demo, **options) as engine:
            if name == "w4":
                assert engine.info()["activation_dtype"] == "int8"
            result[name] = logits(engine, ids)
    return result


def test_int8_activations(rows):
    divergence = mean_kl(rows["w4, float activations"], rows["w4"])
    # Measured 7.8e-05.
    print(f"W4A8 against float activations on the same weights: mean KL {divergence:.2e}")
    assert 0 < divergence < 2e-4


def test_w4_against_float32(rows):
    divergence = mean_kl(rows["float32"], rows["w4"])
    # Measured 2.0e-03: what rounding the demo's weights to 4 bits costs.
    print(f"W4A8 against the float32 model: mean KL {divergence:.2e}")
    assert 0 < divergence < 3e-3
