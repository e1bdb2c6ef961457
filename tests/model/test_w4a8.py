"""What the default number format of 4-bit weights costs: on the CPU int8 activations, int8 head, bfloat16 KV cache; on a
GPU bfloat16 operands."""

import pytest
from model_helpers import _engine, heldout_ids, logits, mean_kl, open_engine

LIMIT = 2e-4
W4_LIMIT = {"int8": 3e-3, "int4": 1e-2}

AUTO = {"dtype": "auto", "activation_dtype": "auto", "lm_head_dtype": "auto", "kv_cache_dtype": "auto"}


@pytest.fixture(scope="module")
def ids(demo):
    return heldout_ids(demo, 2000)


def rows(path, ids, **options):
    with open_engine(path, **{**AUTO, **options}) as engine:
        return logits(engine, ids), engine.info()


@pytest.mark.parametrize("isa", _engine.build_info()["isas"])
def test_int8_activations(demo, ids, isa):
    """On the same 4-bit weights, with the same head and cache: int8 activations are the only difference."""
    ids = ids[: 300 if isa == "scalar" else len(ids)]  # plain C is slow
    int8, info = rows(demo, ids, isa=isa)
    assert (info["activation_dtype"], info["lm_head_dtype"]) == ("int8", "int8")
    float32, info = rows(demo, ids, isa=isa, activation_dtype="float32", lm_head_dtype="int8")
    assert (info["activation_dtype"], info["lm_head_dtype"]) == ("float32", "int8")
    divergence = mean_kl(float32, int8)
    print(f"{isa}: W4A8 against float activations on the same weights: mean KL {divergence:.2e}")
    assert 0 < divergence < LIMIT


@pytest.mark.parametrize("head", ["int8", "int4"])
def test_quantising_while_loading(original_demo, ids, head, device):
    """Everything that quantization="w4" costs, against the 16-bit checkpoint in float32."""
    float32, _ = rows(original_demo, ids, dtype="float32")
    w4, info = rows(original_demo, ids, quantization="w4", lm_head_dtype=head, device=device)
    assert info["quantization"] == "w4" and info["lm_head_dtype"] == head
    divergence = mean_kl(float32, w4)
    print(f"w4 with an {head} head against the float32 model: mean KL {divergence:.2e}")
    assert 0 < divergence < W4_LIMIT[head]
