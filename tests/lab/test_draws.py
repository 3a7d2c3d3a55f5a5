"""The chi-squared test against its distribution, and that it sees what it should."""

from __future__ import annotations

import pytest
import torch

import dsv4lab
from dsv4lab.lab import draws, observed


def test_p_values_of_fair_draws_are_uniform() -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.rand(40, generator=g) ** 4
    p /= p.sum()
    fits = [
        draws.chi_squared(torch.bincount(torch.multinomial(p, 3000, True, generator=g), minlength=40), p) for _ in range(300)
    ]
    values = torch.tensor([fit.p_value for fit in fits]).sort().values
    assert float((values - torch.arange(300) / 300).abs().max()) < 0.1  # Kolmogorov: 0.094 is the 1 % point
    assert {fit.freedom for fit in fits} == {int((p * 3000 >= 10).sum())}  # the rare ones are one more group
    assert abs(sum(fit.statistic for fit in fits) / 300 / fits[0].freedom - 1) < 0.1


def test_wrong_and_impossible_draws_are_seen() -> None:
    fair, counts = torch.full((4,), 0.25), torch.tensor([250, 250, 280, 220])
    fit = draws.chi_squared(counts, fair)
    assert fit.statistic == pytest.approx(2 * 30**2 / 250) and fit.freedom == 3
    assert fit.p_value == pytest.approx(0.0658, abs=1e-4)  # 1 - F(7.2) of 3 degrees
    assert draws.chi_squared(counts, torch.tensor([0.5, 0.5, 0.0, 0.0])).p_value == 0.0
    with pytest.raises(ValueError, match=r"counts must be \(V,\) like probabilities \(4,\), got \(3,\)"):
        draws.chi_squared(counts[:3], fair)
    with pytest.raises(ValueError, match="two groups of outcomes expected 10 times, got 1"):
        draws.chi_squared(torch.tensor([3, 2]), torch.tensor([0.5, 0.5]))


def test_what_the_statistic_of_other_draws_is_to_be() -> None:
    """Mean and deviation over 400 experiments, near to the truth and far from it, rare outcomes included."""
    g = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(60, generator=g).double()
    p, n = logits.softmax(-1), 4000
    for q in ((logits / 1.05).softmax(-1), (logits / 1.5).softmax(-1), torch.randn(60, generator=g).double().softmax(-1)):
        found = [torch.bincount(torch.multinomial(p, n, True, generator=g), minlength=60) for _ in range(400)]
        seen = torch.tensor([draws.chi_squared(counts, q).statistic for counts in found]).double()
        mean, deviation = draws.chi_squared_of(p, q, n)
        assert abs(float(seen.mean()) - mean) < 4 * deviation / 20
        assert 0.8 < float(seen.std()) / deviation < 1.2


def test_drafts_are_judged_where_they_stand() -> None:
    model = dsv4lab.load(dsv4lab.nano())
    ids = model.tokenizer.encode("def main():\n    return 1\n")
    judge, drafted = draws.judged_drafts(model, ids)
    assert judge.shape == drafted.shape == (len(ids) - 1, model.config.vocab_size)
    torch.testing.assert_close(judge, model.logits(ids)[0, 1:])
    agreed = observed.draft_agreement(model, ids)
    assert torch.equal(agreed, (judge.argmax(-1) == drafted.argmax(-1))[:-1])
