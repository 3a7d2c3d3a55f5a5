"""Choices as masks: what they keep, and how many noise changes, against counting."""

from __future__ import annotations

import pytest
import torch

import dsv4lab
from dsv4lab import ops
from dsv4lab.lab import observed, picks
from dsv4lab.reference.indexer import index_topk


def test_masks_and_what_they_keep() -> None:
    mask = picks.as_mask(torch.tensor([[0, 2, -1], [-1, -1, -1]]), 4)
    assert mask.tolist() == [[True, False, True, False], [False] * 4]
    p = torch.tensor([[0.1, 0.2, 0.3, 0.0], [0.2, 0.2, 0.2, 0.2]])
    torch.testing.assert_close(picks.kept(p, mask), torch.tensor([0.4 / 0.6, 0.0]))
    assert picks.changed(mask, mask.roll(1, 1)).tolist() == [2, 0]
    with pytest.raises(ValueError, match="chosen must be < 2 entries, got 2"):
        picks.as_mask(torch.tensor([[2]]), 2)


def test_expected_changes_are_those_of_a_draw() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(400, 200, generator=g) * 200  # density 1
    noisy = scores + 3 * torch.randn(scores.shape, generator=g)
    visible = torch.full((400,), 200)
    one, other = (picks.as_mask(index_topk(s, visible, k=80), 200) for s in (scores, noisy))
    found = float(picks.changed(one, other).double().mean())
    expected = picks.expected_changes(scores, picks.error_rms(noisy, scores), k=80)
    assert float(expected.mean()) == pytest.approx(found, rel=0.12)
    few = picks.expected_changes(scores.where(torch.arange(200) < 50, -torch.inf), torch.ones(400), k=45)
    assert bool(few.isnan().all())
    with pytest.raises(ValueError, match=r"k must be in \[6, 194\), got 3"):
        picks.expected_changes(scores, torch.ones(400), k=3)


def test_a_common_error_changes_nothing() -> None:
    scores = torch.randn(3, 20).masked_fill(torch.arange(20) > 10, -torch.inf)
    assert float(picks.error_rms(scores + 2.0, scores).max()) < 1e-6


def test_probabilities_of_all_entries_are_those_of_a_choice_of_all() -> None:
    model = dsv4lab.load(dsv4lab.nano())
    ids = torch.randint(0, 500, (1, 100), generator=torch.Generator().manual_seed(0))
    with ops.observe() as calls:
        model.logits(ids, step=100)  # 25 entries: fewer than are chosen
    call = observed.only(calls, "attention", "layers.1")
    mapped = observed.attention_map(call, 90, 10, num_entries=25)
    torch.testing.assert_close(picks.entry_probabilities(call, 25)[90:], mapped.compressed.mean(0))
