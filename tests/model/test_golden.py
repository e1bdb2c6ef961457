"""The demo's 16-bit checkpoint in float32 against values that transformers wrote when the model was trained."""

import json

import numpy as np
import pytest
from model_helpers import DATA, finish, log_softmax, open_engine, place_pairs

GOLDEN = json.loads((DATA / "demo_golden.json").read_text())["prompts"]

# Below this margin between the two highest logits, float32 sums in another order may choose the other token.
SMALLEST_MARGIN = 1e-3


CASES = {case["name"]: case for case in GOLDEN}


def pytest_generate_tests(metafunc):
    """Paths by prompts; 3,310 tokens on the plain C path take minutes."""
    if "name" in metafunc.fixturenames:
        pairs = place_pairs(CASES, long=lambda place, name: (place, name) == ("scalar", "long_context"))
        metafunc.parametrize("on, name", pairs, scope="module")


@pytest.fixture(scope="module")
def run(original_demo, on):
    """name -> the output of one request: 64 greedy tokens and the logits of the whole prompt. Run once each."""
    outputs = {}
    with open_engine(original_demo, **on, enable_prefix_caching=False) as engine:

        def run(name):
            if name not in outputs:
                ids = CASES[name]["prompt_ids"]
                request = engine.submit(
                    ids, temperature=0.0, max_tokens=64, ignore_eos=True, logits_start=0, logits_stop=len(ids)
                )
                outputs[name] = finish(request)
            return outputs[name]

        yield run


def test_greedy_ids(run, name):
    case, output = CASES[name], run(name)
    near_ties = [i for i, margin in enumerate(case["margins"]) if margin < SMALLEST_MARGIN]
    sure = near_ties[0] if near_ties else len(case["margins"])
    assert sure == len(case["greedy_ids"])  # no near tie in these prompts: every token is compared
    assert output["token_ids"] == case["greedy_ids"]


def test_prompt_logits(run, name):
    case, ids = CASES[name], CASES[name]["prompt_ids"]
    rows = np.asarray(run(name)["logits"])
    top = case["top5_last_prompt_position"]
    np.testing.assert_array_equal(np.argsort(-rows[-1], kind="stable")[:5], top["ids"])
    np.testing.assert_allclose(rows[-1][top["ids"]], top["logits"], rtol=0, atol=1e-3)
    last = rows[-1].astype(np.float64)
    assert np.log(np.exp(last - last.max()).sum()) + last.max() == pytest.approx(top["logsumexp"], abs=1e-3)
    nll = -log_softmax(rows[:-1])[np.arange(len(ids) - 1), ids[1:]]
    assert nll.mean() == pytest.approx(case["prompt_mean_nll"], abs=1e-4)
