"""plan() and choose(): what they say, what they refuse, and that nothing is said that is not known."""

from __future__ import annotations

import json
import math

import pytest

from qwen_fast.cost import CardPrice, Plan, Prices, choose, plan
from qwen_fast.cost.cards import CARDS, GIB, custom_card, find_card
from qwen_fast.cost.choice import parse_card_price, study_b_prices
from qwen_fast.cost.planner import MAX_TOKENS, curve
from qwen_fast.cost.shapes import NAMES, Shape, find_shape, part_of
from qwen_fast.cost.study_b import CLAIMS
from qwen_fast.cost.targets import parse_target
from qwen_fast.utils import DEMO_DIR

# -- shapes and cards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters",
    [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("3B", 3_085_938_688), ("7B", 7_615_616_512),
     ("14B", 14_770_033_664), ("32B", 32_763_876_352), ("72B", 72_706_203_648)],
)  # fmt: skip
def test_built_in_shapes_have_the_published_number_of_parameters(name, parameters):
    assert find_shape(name).parameters == parameters


def test_shapes_by_other_names(tmp_path):
    for text in ("7B", "7b", "Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct-AWQ"):
        assert find_shape(text) is find_shape("7B")
    demo = find_shape("demo")
    config = json.loads((DEMO_DIR / "config.json").read_text())
    assert (demo.hidden_size, demo.num_layers) == (config["hidden_size"], config["num_hidden_layers"])
    assert (demo.weight_bits, demo.group_size) == (4, 32)
    checkpoint = plan("demo", "H200").memory  # as the engine plans it, to the byte
    assert (checkpoint.layers_bytes, checkpoint.head_bytes, checkpoint.embedding_bytes) == (7_909_376, 6_292_992, 0)
    assert find_shape(DEMO_DIR / "config.json").num_heads == demo.num_heads
    for text in ("8B", "llama-7B", "gpt2", "Qwen2.5-7B-0.5B", ""):
        with pytest.raises(ValueError, match="model"):
            find_shape(text)
    for broken in ("[]", "{", '{"hidden_size": 0}', json.dumps({**config, "vocab_size": "many"})):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ValueError, match=r"config\.json"):
            find_shape(tmp_path)


@pytest.mark.parametrize(
    "quantization, found",
    [
        (None, (None, 128)),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, (4, 128)),
        ({"quant_method": "gptq", "bits": 8, "group_size": 32}, (8, 32)),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, (4, 128)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 256}, (4, 128)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 16}, (16, 128)),  # kept as 16 bits on a GPU
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, (None, 128)),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": 64}}}}, (8, 64)),
    ],
)
def test_formats_of_checkpoints(tmp_path, quantization, found):
    config = json.loads((DEMO_DIR / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = find_shape(tmp_path)
    assert (shape.weight_bits, shape.group_size) == found


def test_cards_and_counts():
    assert find_card("4x RTX 4090 D") == (CARDS["RTX 4090D"], 4)
    assert find_card("a100-40gb x2") == (CARDS["A100-40G"], 2)
    assert find_card("rtx 3060 12g")[0].name == "RTX 3060"
    for text in ("RTX 9999", "2x H200 x2", "", "x", "9x H200", "0x H200"):
        with pytest.raises(ValueError, match=r"card"):
            find_card(text)
    assert all(card.source for card in CARDS.values())
    wanted = "RTX 3060, RTX 3090, RTX 4090, RTX 4090D, RTX 5090, L4, L40S, A10G, A100-40G, A100-80G, H100, H200"
    assert ", ".join(CARDS) == wanted


@pytest.mark.parametrize("field", ["memory_bytes", "bandwidth_gbs", "tflops"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_cards_by_hand_need_real_figures(field, value):
    figures = {"memory_bytes": 24 * GIB, "bandwidth_gbs": 1000.0, "tflops": 100.0, field: value}
    with pytest.raises(ValueError, match=field):
        custom_card(**figures)


# -- targets -----------------------------------------------------------------------------------------------------


def test_targets():
    target = parse_target("16 users,  P99 < 3s, tpot<=50ms, tokens/s > 1000")
    assert target.users == 16
    found = [(bound.field, bound.most, bound.limit) for bound in target.bounds]
    assert found == [("ttft_p99_s", True, 3.0), ("tpot_s", True, 0.05), ("tokens_per_s", False, 1000.0)]
    assert parse_target("latency<2min").bounds[0].limit == 120
    assert target.bounds[1].met(0.05) and not target.bounds[1].met(0.051)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "empty part"), ("16 users,", "empty part"), ("16", "cannot read"), ("sixteen users", "cannot read"),
        ("0 users", "1 to 65536"), ("16 users, 8 users", "twice"), ("P99<3", "needs a unit"), ("P99>3s", "slow"),
        ("P98<3s", "not known"), ("P99<3s, TTFT P99<2s", "bounds already"), ("tokens/s<10", "low rate"),
        ("tokens/s>10ms", "without 'ms'"), ("TPOT<0ms", "above 0"), ("P99<<3s", "cannot read"),
        ("P99<3s; 16 users", "cannot read"), ("TPOT<1e-3s", "cannot read"), ("TPOT<-5ms", "cannot read"),
    ],
)  # fmt: skip
def test_targets_that_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_target(text)


# -- plan --------------------------------------------------------------------------------------------------------


def test_arguments_are_checked():
    cases = [
        ({"users": 0}, "users"), ({"users": 2.0}, "users"), ({"tokens_in": 0}, "tokens_in"), ({"tokens_out": True}, "tokens_out"),
        ({"context": 100}, "context 100"), ({"block_size": 24}, "block_size"), ({"parallel": "data"}, "parallel"),
        ({"watts": -5.0}, "watts"), ({"watts": math.nan}, "watts"), ({"weights": 5}, "weight_bits"), ({"head": 3}, "head_bits"),
        ({"kv": "fp4"}, "kv"), ({"count": 9}, "1 to 8"), ({"count": 9, "parallel": "tensor"}, "1 to 8"),
        ({"users": 4, "target": "8 users"}, "users is 4"),
    ]  # fmt: skip
    for options, said in cases:
        with pytest.raises(ValueError, match=said):
            plan("7B", "H200", **options)
    with pytest.raises(ValueError, match="count is 2"):
        plan("7B", "4x H200", count=2)


@pytest.mark.parametrize("name", NAMES)
def test_limits_are_where_the_memory_ends(name):
    made = plan(name, "H100", tokens_in=1000, tokens_out=200, users=3)
    assert made.fits
    assert made.at(made.max_users).fits and not made.at(made.max_users + 1).fits
    longer = plan(name, "H100", tokens_in=1000, tokens_out=200, users=3, context=made.max_context)
    assert longer.fits
    if made.max_context < 2 * MAX_TOKENS:  # plan() asks for no more
        beyond = plan(name, "H100", tokens_in=1000, tokens_out=200, users=3, context=made.max_context + 32)
        assert not beyond.fits and beyond.room_bytes < 0 and beyond.speed is None and beyond.max_users < 3
    else:
        assert name == "0.5B"


def test_more_of_anything_is_not_quicker():
    base = {"tokens_in": 512, "tokens_out": 256}
    for card in CARDS:
        steps = [plan("0.5B", card, users=n, **base).speed.step_s.value for n in (1, 2, 8, 9, 32, 33, 128, 256)]
        assert steps == sorted(steps), card
        prompts = [
            plan("7B", card, tokens_in=n, tokens_out=1).speed.ttft_s.value for n in (512, 1024, 2048, 4096, 9000)
        ]
        assert prompts == sorted(prompts), card
    speeds = [plan(name, "H200", **base).speed.step_s.value for name in NAMES]
    assert speeds == sorted(speeds)
    by_bits = [plan("7B", "RTX 4090", weights=bits, **base) for bits in (4, 8, 16)]
    assert [p.speed.step_s.value for p in by_bits] == sorted(p.speed.step_s.value for p in by_bits)
    assert [p.memory.layers_bytes for p in by_bits] == sorted(p.memory.layers_bytes for p in by_bits)


def test_nothing_beats_the_data_sheet():
    for card in CARDS.values():
        for bits in (4, 16):
            made = plan("1.5B", card, weights=bits, users=8)
            bytes_read = made.memory.layers_bytes + (made.memory.head_bytes or made.memory.embedding_bytes)
            assert made.speed.step_s.low >= 0.99 * bytes_read / (card.bandwidth_gbs * 1e9), card.name
            for name in ("ttft_s", "tpot_s", "tokens_per_s", "user_tokens_per_s", "latency_s", "ttft_p99_s"):
                one = getattr(made.speed, name)
                assert 0 < one.low <= one.value <= one.high < math.inf, (card.name, name)


def test_users_and_prompts_add_up():
    made = plan("7B", "H200", users=8, tokens_in=1024, tokens_out=128)
    s = made.speed
    cycle = 128 * s.step_s.value + 8 * s.ttft_s.value
    assert s.tokens_per_s.value == pytest.approx(8 * 128 / cycle)
    assert s.user_tokens_per_s.value == pytest.approx(s.tokens_per_s.value / 8)
    assert s.ttft_p99_s.value == pytest.approx(8 * s.ttft_s.value)
    assert sum(s.terms_us.values()) / 1e6 == pytest.approx(s.step_s.value)
    replicas = plan("7B", "2x H200", users=16, tokens_in=1024, tokens_out=128)
    assert replicas.parallel == "replicas"
    assert replicas.speed.tokens_per_s.value == pytest.approx(2 * s.tokens_per_s.value)
    assert replicas.memory == made.memory


def test_what_was_never_measured_is_said_and_ranges_widen():
    def width(made: Plan) -> float:
        return made.speed.step_s.high / made.speed.step_s.value

    measured = plan("7B", "H200", tokens_in=128, tokens_out=256, users=16)
    assert "as measured" in measured.speed.step_s.basis
    other_shape = plan("14B", "H200", tokens_in=128, tokens_out=256, users=16)
    assert "never measured: shape" in other_shape.speed.step_s.basis
    other_card = plan("7B", "RTX 4090", tokens_in=128, tokens_out=256, users=16)
    assert "never measured: card" in other_card.speed.step_s.basis
    long = plan("7B", "H200", tokens_in=4096, tokens_out=256, users=16)
    assert "16 users beyond 2304 positions" in long.speed.step_s.basis
    bf16 = plan("7B", "H200", weights=16, tokens_in=128, tokens_out=256)
    assert "weights" in bf16.speed.step_s.basis
    assert width(measured) < width(other_shape) < width(other_card)
    tensor = plan("7B", "4x H200", parallel="tensor")
    assert "4 cards as one" in tensor.speed.step_s.basis
    assert any("of 4 cards an assumption" in note for note in tensor.notes)
    two = plan("7B", "2x H200", parallel="tensor", tokens_in=128, tokens_out=256, users=16)
    assert "as measured" in two.speed.step_s.basis and width(two) < width(tensor)
    assert any("measured between 2 H200s" in note for note in two.notes)
    pcie = plan("7B", "2x RTX 4090", parallel="tensor")
    assert "never measured: card" in pcie.speed.step_s.basis and any("nothing was measured" in n for n in pcie.notes)
    assert all(any(card.source in note for note in plan("0.5B", card).notes) for card in CARDS.values())


def test_power_is_never_guessed():
    made = plan("7B", "H200")
    assert made.watts is None and made.joules_per_1k_out is None
    assert "give watts" in made.power_note and "not measured" in str(made)
    given = plan("7B", "H200", watts=500.0)
    assert given.joules_per_1k_out == pytest.approx(500 / given.speed.tokens_per_s.value * 1000)
    assert given.power_note == "given by you"


def test_money():
    made = plan("7B", "H200", users=16, prices=Prices(currency="$", rent_per_hour=3.6))
    hours = 1e6 / made.speed.tokens_per_s.value / 3600
    assert made.money.rent.value == pytest.approx(3.6 * hours)
    assert made.money.electricity is None and made.money.owned is None
    assert plan("7B", "H200").money is None
    powered = plan("7B", "H200", watts=400.0, prices=Prices(electricity_per_kwh=0.5))
    assert powered.money.electricity.value == pytest.approx(400 * 1e6 / powered.speed.tokens_per_s.value / 3.6e6 * 0.5)
    assert powered.at(2).money.electricity.value < powered.money.electricity.value  # two users: more tokens a joule


def test_targets_are_judged():
    good = plan("7B", "H200", tokens_in=2048, tokens_out=512, target="16 users, P99<3s")
    assert good.workload.users == 16 and good.meets_target and good.unmet == ()
    bad = plan("7B", "RTX 3060", tokens_in=2048, tokens_out=512, target="16 users, P99<3s, TPOT<1us")
    assert not bad.meets_target and len(bad.unmet) == 2
    big = plan("72B", "RTX 3060", target="1 user")
    assert big.unmet == ("it does not fit the memory",)


def test_a_model_too_large_for_one_card_is_cut_over_all():
    made = plan("72B", "4x A100-80G", weights=16)
    assert made.parallel == "tensor" and made.fits
    assert not plan("72B", "4x A100-80G", weights=16, parallel="replicas").fits
    one = plan("72B", "H200", weights=16)
    assert made.memory.layers_bytes == pytest.approx(one.memory.layers_bytes / 4, rel=0.01)
    narrow = Shape("narrow", 256, 512, 2, 2, 1, 4096, True)
    with pytest.raises(ValueError, match="2 query heads, fewer than 4 cards"):
        plan(narrow, "H200", count=4, parallel="tensor")
    assert plan("7B", "H200", count=3, parallel="tensor").fits  # parts need not be even


def test_a_part_is_the_largest_one_of_a_rank():
    """As csrc/model/parallel.c shares heads, features (by 128) and rows of the vocabulary (by 64) out."""
    seven = find_shape("7B")
    two, three, eight = (part_of(seven, ranks) for ranks in (2, 3, 8))
    assert (two.num_heads, two.num_kv_heads, two.intermediate_size, two.vocab_size) == (14, 2, 9472, 76032)
    assert (three.num_heads, three.num_kv_heads, three.intermediate_size) == (14, 2, 50 * 128)
    assert (eight.num_heads, eight.num_kv_heads, eight.intermediate_size) == (4, 1, 19 * 128)
    assert part_of(seven, 1) is seven
    tiny = part_of(Shape("tiny", 256, 100, 1, 4, 2, 70, True), 3)
    assert (tiny.intermediate_size, tiny.vocab_size) == (64, 32)


# -- study B -----------------------------------------------------------------------------------------------------


def test_study_b_stands_beside_predictions():
    for claim in CLAIMS:
        made = plan("7B", claim.card, count=claim.count, parallel="tensor" if claim.count > 1 else "auto",
                    weights=claim.weight_bits, tokens_in=2048, tokens_out=512)  # fmt: skip
        assert made.claims == (claim,)
        text = str(made)
        assert "study B" in text and f"{claim.ttft_ms:,.0f} ms" in text and f"{claim.tpot_ms:g} ms" in text
    assert plan("7B", "RTX 4090D", weights=16).claims == ()  # another workload
    assert plan("0.5B", "RTX 4090D", tokens_in=2048, tokens_out=512).claims == ()
    assert CLAIMS[0].own_price_per_million() == pytest.approx(16.03, abs=0.01)  # it says 4.3


# -- choose ------------------------------------------------------------------------------------------------------


def test_the_cheapest_card_for_a_goal():
    prices = {
        "RTX 4090": CardPrice(rent_per_hour=2.0),
        "H200": CardPrice(rent_per_hour=30.0),
        "L4": CardPrice(hardware_price=20000.0),
    }
    found = choose("7B", "16 users, P99<3s", card_prices=prices, tokens_in=2048, tokens_out=512)
    costs = [option.per_hour for option in found.options if option.per_hour is not None]
    assert costs == sorted(costs) and found.best.per_hour == costs[0] and len(costs) == 3
    assert all(option.plan.meets_target for option in found.options)
    h200 = next(option for option in found.options if option.plan.card.name == "H200")
    assert h200.per_hour == pytest.approx(30.0 * h200.plan.count)
    assert h200.per_million_out == pytest.approx(30.0 / (h200.plan.speed.tokens_per_s.value * 3600) * 1e6, rel=1e-3)
    l4 = next(option for option in found.options if option.plan.card.name == "L4")
    assert l4.per_hour == pytest.approx(20000.0 * l4.plan.count / (3 * 8760 * 0.5))
    json.dumps(found.to_json(), allow_nan=False)
    assert "cheapest first" in str(found) and "<table>" in found._repr_html_()


def test_without_prices_nothing_is_called_cheapest():
    found = choose("0.5B", "1 user, TPOT<1s", cards=["L4", "H200"])
    assert found.best is None and len(found.options) == 2 and "cannot be said" in str(found)
    none = choose("72B", "1 user", cards=["RTX 3060"], weights=16)
    assert none.options == () and none.refused == (("8x RTX 3060", "it does not fit the memory"),)


def test_card_prices():
    assert parse_card_price("A10G=rent:4.8") == ("A10G", CardPrice(4.8, None))
    assert parse_card_price("RTX 4090=buy:16000") == ("RTX 4090", CardPrice(None, 16000.0))
    for text in ("A10G", "A10G=4.8", "A10G=rent:", "A10G=rent:0", "A10G=rent:-1", "A10G=rent:nan", "A10G=lease:1",
                 "Z9=rent:1", "2x A10G=rent:1"):  # fmt: skip
        with pytest.raises(ValueError, match=r"card"):
            parse_card_price(text)
    assert all("assumed" in price.source for price in study_b_prices().values())
    with pytest.raises(TypeError, match="count"):
        choose("7B", "1 user", count=2)


# -- forms -------------------------------------------------------------------------------------------------------


def test_forms():
    made = plan("7B", "H200", users=4, target="P99<3s", prices=Prices(rent_per_hour=3.0))
    data = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert data["memory"]["total_bytes"] == made.memory.total_bytes
    assert data["speed"]["tpot_s"]["value"] == made.speed.tpot_s.value
    assert data["target"]["met"] is True and data["shape"]["name"] == "7B"
    page = made._repr_html_()
    assert page.count("<table>") == page.count("</table>") >= 5 and "KV cache" in page
    text = str(made)
    for said in ("layers' weights", "TTFT, alone", "TPOT", "most users", "NVIDIA H200 Tensor Core GPU data sheet"):
        assert said in text


def test_a_name_cannot_break_the_page():
    made = plan("0.5B", custom_card(24 * GIB, 500.0, 50.0, name="<b>&"))
    assert "<b>&" not in made._repr_html_() and "&lt;b&gt;&amp;" in made._repr_html_()


def test_plot():
    pytest.importorskip("matplotlib")
    figure = plan("7B", "H200", users=4).plot()
    bars, lines = figure.axes[:2]
    assert len(bars.patches) == 6 and len(lines.lines[0].get_xdata()) > 5
    assert sum(bar.get_height() for bar in bars.patches) == pytest.approx(
        plan("7B", "H200", users=4).memory.total_bytes / 2**30
    )


def test_curve():
    made = plan("7B", "RTX 3060")
    points = curve(made, [1, 2, 4, 10**4])
    assert [point.workload.users for point in points] == [1, 2, 4]
    rates = [point.speed.tokens_per_s.value for point in points]
    assert rates == sorted(rates) and rates[0] < rates[-1]
