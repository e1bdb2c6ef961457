"""_engine.Layers: the engine's layers by themselves, and the tap that sees what linears get."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from helpers import log_probs, read_tensors, write_model

from qwen_fast import _engine

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("layers") / "model", num_hidden_layers=3, hidden_size=256, intermediate_size=384,
                       num_attention_heads=4, num_key_value_heads=2)  # fmt: skip


@pytest.fixture(scope="module")
def tensors(model):
    return read_tensors(model)


def open_layers(model, **options):
    return _engine.Layers(
        str(model), **{"device": "cpu", "dtype": "float32", "max_tokens": 256, "num_threads": 2, **options}
    )


def embedded(tensors, lengths, seed=0):
    ids = [np.random.default_rng(seed + i).integers(0, 300, n).tolist() for i, n in enumerate(lengths)]
    return ids, tensors["model.embed_tokens.weight"][np.concatenate(ids)].copy()


def test_layers_are_the_models(model, tensors):
    """The norm and the head in numpy behind the layers give the engine's logits, sequence by sequence."""
    lengths = [70, 1, 33]
    ids, hidden = embedded(tensors, lengths)
    layers = open_layers(model)
    layers.forward(0, 3, hidden, lengths)
    layers.close()
    x = hidden.astype(np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * tensors["model.norm.weight"]
    rows = x @ tensors["model.embed_tokens.weight"].T.astype(np.float64)
    rows -= np.logaddexp.reduce(rows, axis=-1, keepdims=True)
    at = 0
    for one in ids:
        assert np.abs(rows[at : at + len(one)] - log_probs(model, one)).max() < 1e-4
        at += len(one)


def test_a_layer_at_a_time_and_neighbours_change_nothing(model, tensors):
    lengths = [64, 40]
    _, hidden = embedded(tensors, lengths)
    layers = open_layers(model)
    whole, parts, alone = hidden.copy(), hidden.copy(), hidden[64:].copy()
    layers.forward(0, 3, whole, lengths)
    for i in range(3):
        layers.forward(i, i + 1, parts, np.array(lengths, np.int32))
    layers.forward(0, 3, alone, [40])
    assert whole.tobytes() == parts.tobytes() and whole[64:].tobytes() == alone.tobytes()
    layers.forward(1, 1, parts, lengths)  # no layer
    assert whole.tobytes() == parts.tobytes()


def test_the_tap_sees_the_inputs(model, tensors):
    """Of the first layer's q_proj: the norm of the embedding. Of every linear: each row once, in order; nothing changes."""
    lengths = [70, 33]
    _, hidden = embedded(tensors, lengths)
    start, plain = hidden.copy(), hidden.copy()
    seen = {}
    layers = open_layers(model)
    layers.forward(0, 3, plain, lengths)
    layers.forward(0, 3, hidden, lengths, lambda layer, name, x: seen.setdefault((layer, name), []).append(np.array(x)))
    assert hidden.tobytes() == plain.tobytes()
    seen = {key: np.concatenate(parts) for key, parts in seen.items()}
    assert set(seen) == {(layer, name) for layer in range(3) for name in LINEARS}
    for (_, name), x in seen.items():
        assert x.dtype == np.float32 and x.shape == (103, 384 if name == "down_proj" else 256)
    expected = start / np.sqrt((start**2).mean(-1, keepdims=True) + 1e-6)
    expected *= tensors["model.layers.0.input_layernorm.weight"]
    assert np.abs(seen[0, "q_proj"] - expected).max() < 1e-5
    assert (seen[0, "q_proj"] == seen[0, "v_proj"]).all() and (seen[0, "gate_proj"] == seen[0, "up_proj"]).all()
    x = seen[1, "gate_proj"].astype(np.float64)
    gate, up = (x @ tensors[f"model.layers.1.mlp.{name}_proj.weight"].T.astype(np.float64) for name in ("gate", "up"))
    assert np.abs(seen[1, "down_proj"] - gate / (1 + np.exp(-gate)) * up).max() < 1e-4


def test_only_the_linears_that_are_named(model, tensors):
    _, hidden = embedded(tensors, [20])
    seen = []
    layers = open_layers(model)
    layers.forward(0, 2, hidden, [20], lambda layer, name, x: seen.append((layer, name)), ["down_proj", "q_proj"])
    assert seen == [(0, "q_proj"), (0, "down_proj"), (1, "q_proj"), (1, "down_proj")]
    layers.forward(0, 2, hidden, [20], seen.append, [])
    assert len(seen) == 4


def test_rows_that_are_kept(model, tensors):
    """They are the layers' own memory: keeping them is refused, and what is kept stays there until it is let go."""
    kept = []
    _, hidden = embedded(tensors, [200])
    layers = open_layers(model)

    def keep_array(_layer, _name, x):
        with pytest.raises(TypeError):
            x[0, 0] = 1.0  # read-only
        kept.append(np.asarray(x))

    for tap in (keep_array, lambda *call: kept.append(call[2].cast("B"))):
        with pytest.raises(BufferError, match="the tap kept its rows"):
            layers.forward(0, 1, hidden, [200], tap, ["down_proj"])
        with pytest.raises(BufferError, match="still in use"):
            layers.close()
        assert np.isfinite(np.asarray(kept[0]).view(np.float32)).all()
        kept.clear()
    views = []
    layers.forward(0, 1, hidden, [200], lambda *call: views.append(call[2]), ["q_proj"])
    with pytest.raises(ValueError, match="released"):
        views[0][0, 0]
    with pytest.raises(BufferError):
        memoryview(layers)  # outside a tap there are no rows
    layers.close()


def test_an_exception_in_the_tap_is_raised(model, tensors):
    _, hidden = embedded(tensors, [20])
    calls = []

    def tap(layer, name, x):
        calls.append(name)
        raise KeyError("stop here")

    layers = open_layers(model)
    with pytest.raises(KeyError, match="stop here"):
        layers.forward(0, 3, hidden, [20], tap)
    assert calls == ["q_proj"]
    layers.forward(0, 1, hidden, [20])  # and it works on
    with pytest.raises(KeyError, match="stop here") as raised:
        layers.forward(0, 1, hidden, [20], tap)
    layers.close()  # although the traceback holds the tap's frame
    assert raised.traceback


def test_one_call_at_a_time(model, tensors):
    _, hidden = embedded(tensors, [20])
    layers = open_layers(model)
    failures = []

    def tap(layer, name, x):
        for call in (lambda: layers.forward(0, 1, hidden, [20]), layers.info, layers.close):
            try:
                call()
            except _engine.EngineError as error:
                failures.append(str(error))

    thread = threading.Thread(target=lambda: layers.forward(0, 1, hidden, [20], tap, ["o_proj"]))
    thread.start()
    thread.join()
    assert failures == ["another call of the layers is in progress"] * 3


def test_info_and_close(model):
    layers = open_layers(model)
    info = layers.info()
    assert (info["backend"], info["dtype"], info["num_layers"], info["hidden_size"]) == ("cpu", "float32", 3, 256)
    assert info["max_tokens"] == 256 and info["max_seq_len"] == 512
    layers.close()
    layers.close()
    with pytest.raises(_engine.EngineError, match="closed"):
        layers.info()
    with pytest.raises(_engine.EngineError, match="closed"):
        layers.forward(0, 1, np.zeros((1, 256), np.float32), [1])


WRONG = {
    "layers beyond the last": ((0, 4), (8, 256), [8], ValueError, r"\[0, 4\)"),
    "layers in the wrong order": ((2, 1), (8, 256), [8], ValueError, r"\[2, 1\)"),
    "another width": ((0, 1), (8, 255), [8], ValueError, r"\(8, 255\)"),
    "no rows": ((0, 1), (0, 256), [], ValueError, r"\(0, 256\)"),
    "lengths that do not add up": ((0, 1), (8, 256), [4, 3], ValueError, "add up to 7"),
    "no sequence": ((0, 1), (8, 256), [], ValueError, "0 entries"),
    "an empty sequence": ((0, 1), (8, 256), [8, 0], ValueError, r"seq_lens\[1\] is 0"),
    "a sequence that is too long": ((0, 1), (257, 256), [257], ValueError, "at most 256 tokens"),
    "too many sequences": ((0, 1), (257, 256), [1] * 257, ValueError, "257 entries"),
    "a length of no whole number": ((0, 1), (8, 256), [8.0], TypeError, "seq_lens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(model, name):
    (first, last), shape, lengths, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        open_layers(model).forward(first, last, np.zeros(shape, np.float32), lengths)


def test_wrong_buffers_taps_and_options(model):
    layers = open_layers(model)
    good = np.zeros((8, 256), np.float32)
    for hidden in (good.astype(np.float64), [[0.0] * 256], np.zeros(256, np.float32)):
        with pytest.raises(TypeError, match="hidden"):
            layers.forward(0, 1, hidden, [8])
    fixed = good.copy()
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        layers.forward(0, 1, fixed, [8])
    with pytest.raises(TypeError, match="tap must be callable"):
        layers.forward(0, 1, good, [8], 5)
    with pytest.raises(ValueError, match="'lm_head'"):
        layers.forward(0, 1, good, [8], print, ["lm_head"])
    with pytest.raises(ValueError, match="isa"):
        open_layers(model, isa="sse")
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        open_layers(model, max_tokens=0)
    with pytest.raises(TypeError):
        _engine.Layers(str(model), quantization="w4")
    with pytest.raises(OSError):
        open_layers(model / "nowhere")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_the_gpu_gives_what_the_cpu_gives(model, tensors, dtype, limit):
    lengths = [70, 33]
    _, hidden = embedded(tensors, lengths)
    found = []
    for options in ({}, {"device": "cuda", "dtype": dtype}):
        rows, seen = hidden.copy(), {}
        layers = open_layers(model, **options)
        layers.forward(
            0, 3, rows, lengths, lambda i, name, x, to=seen: to.setdefault(f"{i}{name}", []).append(np.array(x))
        )
        layers.close()
        found.append({"rows": rows, **{key: np.concatenate(parts) for key, parts in seen.items()}})
    assert found[0].keys() == found[1].keys()
    for key, expected in found[0].items():
        assert np.abs(found[1][key] - expected).max() < limit * np.abs(expected).max(), key
