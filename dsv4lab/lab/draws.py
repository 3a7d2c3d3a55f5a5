"""Draws against the distribution that they should come from, and drafts against the model that judges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from dsv4lab.model.cache import Batch

if TYPE_CHECKING:
    from dsv4lab.model.model import Model


class Fit(NamedTuple):
    """A chi-squared test. p_value: how often chance alone gives as large a statistic."""

    statistic: float
    freedom: int
    p_value: float


def chi_squared(counts: torch.Tensor, probabilities: torch.Tensor, *, least: float = 10.0) -> Fit:
    """Whether counts (V,) int are of draws from `probabilities` (V,), which sum to 1.

    Outcomes that are expected less than `least` times count as one. A draw of what cannot be drawn gives a p-value of 0.
    Raises ValueError where shapes differ, or fewer than two groups of outcomes are left.
    """
    if counts.shape != probabilities.shape or counts.dim() != 1:
        raise ValueError(f"counts must be (V,) like probabilities {tuple(probabilities.shape)}, got {tuple(counts.shape)}")
    seen, p = counts.double().cpu(), probabilities.double().cpu()
    expected = p / p.sum() * seen.sum()
    common = expected >= least
    seen_of, expected_of = (_grouped(value, common) for value in (seen, expected))
    some = expected_of > 0
    freedom = int(some.sum()) - 1
    if freedom < 1:
        raise ValueError(f"there must be two groups of outcomes expected {least:g} times, got {freedom + 1}")
    if bool((seen[p == 0] > 0).any()):
        return Fit(float("inf"), freedom, 0.0)
    statistic = ((seen_of - expected_of).square() / expected_of)[some].sum()
    return Fit(float(statistic), freedom, float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), statistic / 2)))


def chi_squared_of(drawn: torch.Tensor, judged: torch.Tensor, count: int, *, least: float = 10.0) -> tuple[float, float]:
    """What `chi_squared` of `count` draws from `drawn` against `judged`, both (V,) probabilities, is to be: mean, deviation.

    Outcomes are grouped as there. With d = (p - q) / q of the groups the mean is sum p (1 - p) / q + n sum q d^2, the variance,
    of normal counts, 2 sum (p / q)^2 + 4 n (sum p d^2 - (sum p d)^2).
    """
    p, q = (value.double().cpu() / value.double().sum().cpu() for value in (drawn, judged))
    common = count * q >= least
    p, q = (_grouped(value, common) for value in (p, q))
    p, q = p[q > 0], q[q > 0]
    d = (p - q) / q
    mean = (p * (1 - p) / q).sum() + count * (q * d.square()).sum()
    variance = 2 * (p / q).square().sum() + 4 * count * ((p * d.square()).sum() - (p * d).sum().square())
    return float(mean), float(variance.sqrt())


def _grouped(value: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
    """Of each common outcome, then of all others together."""
    return torch.cat([value[common], value[~common].sum()[None]])


def judged_drafts(model: Model, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the backbone and of the prediction block for the same tokens, ids[2:] and the one after: two (n, V)."""
    cache = model.new_cache(max_seqs=1, max_tokens=len(ids), max_step=len(ids))
    seq = cache.open()
    _, streams = model.run_step(cache, [(seq, list(ids))])
    batch = Batch.plan(cache, [(seq, list(ids[1:]))], starts=[0])
    _, drafts = model.predict_next(streams[:-1], batch.token_ids, batch)
    return model.head_logits(streams)[1:], drafts
