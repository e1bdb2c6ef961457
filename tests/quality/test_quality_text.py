"""Perplexity and divergence against PyTorch; pieces, windows, the file between two models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quality_helpers import TableScorer

from qwen_fast.quality import spool
from qwen_fast.quality import text as texts


def both(vocabulary=97, rows=200, noise=0.5, seed=0):
    generator = np.random.default_rng(seed)
    reference = generator.normal(0, 4, (rows, vocabulary)).astype(np.float32)
    measured = (reference + generator.normal(0, noise, reference.shape)).astype(np.float32)
    return reference, measured, generator.integers(0, vocabulary, rows)


@pytest.mark.oracle
@pytest.mark.parametrize("shift", [0.0, 3000.0])
def test_rows_against_torch(shift):
    reference, measured, following = both()
    nll, nll_reference, kl, same = texts.compare_rows(reference + np.float32(shift), measured, following)
    base, ours = (torch.from_numpy(one).double().log_softmax(-1) for one in (reference + np.float32(shift), measured))
    expected = torch.nn.functional.kl_div(ours, base, log_target=True, reduction="none").sum(-1)
    assert kl == pytest.approx(expected.numpy(), rel=1e-10, abs=1e-14)
    targets = torch.from_numpy(following)
    assert nll == pytest.approx(torch.nn.functional.nll_loss(ours, targets, reduction="none").numpy(), rel=1e-12)
    assert nll_reference == pytest.approx(
        torch.nn.functional.nll_loss(base, targets, reduction="none").numpy(), rel=1e-12
    )
    assert (same == (base.argmax(-1) == ours.argmax(-1)).numpy()).all() and not same.all()


def test_divergence_by_hand_and_its_direction():
    reference, measured = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    _, _, kl, _ = texts.compare_rows(reference, measured, [0])
    assert kl[0] == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))
    assert texts.compare_rows(reference, reference + 7, [0])[2][0] == pytest.approx(0, abs=1e-15)


def test_logits_that_are_not_finite_are_refused():
    reference, measured, following = both(rows=5)
    measured[3, 1] = np.nan
    with pytest.raises(FloatingPointError, match="the measured model's logits are not finite at row 3 of 5"):
        texts.compare_rows(reference, measured, following)


def test_windows_and_pieces_cover_every_position_once(monkeypatch):
    windows = texts.windows_of(range(1000), 300, most=902)
    assert [len(one) for one in windows] == [300, 300, 300, 2] and windows[3] == [900, 901]
    assert [len(one) for one in texts.windows_of(range(601), 300)] == [300, 300]  # one token predicts nothing
    monkeypatch.setattr(texts, "PIECE_BYTES", 4 * 152_064 * 7)
    cut = list(texts.pieces(300, 152_064))
    assert [at for start, stop in cut for at in range(start, stop)] == list(range(299))
    assert max(stop - start for start, stop in cut) == 7
    monkeypatch.setattr(texts, "PIECE_BYTES", 1)
    assert list(texts.pieces(4, 10)) == [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        texts.windows_of(range(10), 1)


def test_how_the_text_is_cut_into_pieces_makes_no_difference(monkeypatch):
    windows = texts.windows_of([(i * 31) % 97 for i in range(400)], 150)
    sides = [TableScorer(), TableScorer(0.3)]

    def found():
        sources = [spool.LiveRows(side, windows) for side in sides]
        return texts.compare_text(windows, 97, *sources)

    whole = found()
    monkeypatch.setattr(texts, "PIECE_BYTES", 4 * 97 * 13)
    cut = found()
    assert max(stop - start for start, stop in sides[0].asked[3:]) == 13
    assert len(whole) == 397 and all(np.array_equal(getattr(whole, name), getattr(cut, name)) for name in texts.NAMES)
    assert np.bincount(whole.block).tolist() == [128, 21, 128, 21, 99]


def test_the_summary_is_that_of_all_positions():
    reference, measured, following = both(rows=700)
    parts = texts.compare_rows(reference, measured, following)
    found = texts.Positions(*parts, np.arange(700) // 128)
    summary = texts.summary(found, 2000, 1)
    nll, nll_reference, kl, same = parts
    assert summary["positions"] == 700 and summary["blocks"] == 6
    assert summary["perplexity"]["value"] == pytest.approx(np.exp(nll.mean()))
    assert summary["perplexity_ratio"]["value"] == pytest.approx(np.exp(nll.mean() - nll_reference.mean()))
    assert summary["kl_mean"]["value"] == pytest.approx(kl.mean())
    assert summary["kl_median"]["value"] == np.sort(kl)[349] and summary["kl_p99"]["value"] == np.sort(kl)[692]
    assert summary["kl_max"] == kl.max() and summary["same_top"]["value"] == same.mean()
    assert summary["rms_delta_p"]["value"] == pytest.approx(
        np.sqrt(((np.exp(-nll) - np.exp(-nll_reference)) ** 2).mean())
    )
    error = 1.96 * kl.std() / np.sqrt(700)  # these positions are independent: the plain standard error is right
    assert (summary["kl_mean"]["high"] - summary["kl_mean"]["low"]) / 2 == pytest.approx(error, rel=0.7)
    assert texts.summary(found, 2000, 1) == summary and texts.summary(found, 2000, 2) != summary


def test_the_worst_positions_are_named():
    found = texts.Positions(*(np.array([0.0, 3, 1, 2]) for _ in range(3)), np.ones(4, bool), np.zeros(4, int))
    worst = texts.worst(found, [[1, 2, 3], [4, 5, 6]], 2)
    assert [(one["window"], one["position"], one["kl"]) for one in worst] == [(0, 1, 3.0), (1, 1, 2.0)]


@pytest.mark.parametrize("half", [False, True])
def test_the_file_gives_back_the_reference(half, tmp_path):
    windows = texts.windows_of([(i * 31) % 97 for i in range(300)], 90)
    scorer, other = TableScorer(), TableScorer(0.02)
    spooled = spool.SpooledRows(scorer, windows, half, str(tmp_path))
    live = spool.LiveRows(scorer, windows)
    assert ("exact" in spooled.how) != half
    results = [texts.compare_text(windows, 97, source, spool.LiveRows(other, windows)) for source in (live, spooled)]
    if half:
        assert results[0].kl.mean() == pytest.approx(results[1].kl.mean(), abs=2e-6)
        assert results[0].nll_reference == pytest.approx(results[1].nll_reference, abs=0.01)
    else:
        assert all(np.array_equal(getattr(results[0], name), getattr(results[1], name)) for name in texts.NAMES)
    spooled.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_fit_is_refused_before_it_is_written(monkeypatch, tmp_path):
    windows = texts.windows_of(range(97), 50)
    assert spool.file_bytes(windows, 152_064, True) == 95 * 152_064 * 2
    monkeypatch.setattr(spool.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"take 36,860 bytes in a temporary file.* has 1,000 free"):
        spool.SpooledRows(TableScorer(), windows, folder=str(tmp_path))
