"""Choices of the indexer as masks: what they keep of attention's probability, and how many of them noise would change."""

from __future__ import annotations

import math
from typing import Any

import torch

from dsv4lab.dispatch import Call
from dsv4lab.reference.attention import attention_probabilities, gather_keys

_RANKS = 6  # on each side of the last chosen entry, over which the density of scores is taken


def as_mask(chosen: torch.Tensor, entries: int) -> torch.Tensor:
    """Chosen indices (M, k), -1 = none -> (M, entries) bool. Raises ValueError for an index that is no entry."""
    if chosen.numel() and int(chosen.max()) >= entries:
        raise ValueError(f"chosen must be < {entries} entries, got {int(chosen.max())}")
    mask = torch.zeros(chosen.shape[0], entries + 1, dtype=torch.bool, device=chosen.device)
    place = torch.where(chosen < 0, entries, chosen).long()  # the last column collects the empty ones
    return mask.scatter_(1, place, True)[:, :entries]


def entry_probabilities(call: Call, entries: int) -> torch.Tensor:
    """What an observed `attention` call of one sequence would give each entry if it chose none, mean of heads: (M, T) f64.

    Zero where not visible. The pools must still hold what the call saw.
    """
    a: dict[str, Any] = call.inputs
    where = {k: a[k] for k in ("window", "ring_len", "ratio", "record", "window_page", "entry_page", "rope_dim")}
    pools, seq = (a["window_pages"], a["entry_pages"], a["block_table"]), int(a["seq_idx"][0])
    keys = gather_keys(*pools, a["positions"], seq, None, dim=a["q"].shape[-1], **where)
    p, _ = attention_probabilities(a["q"], keys, a["sinks"], scale=a["scale"])
    found = p.new_zeros(p.shape[0], entries)
    found[:, keys.entries] = p[..., len(keys.positions) :].mean(1)
    return found


def kept(probabilities: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The share of the entries' probability (M, T) that a choice (M, T) keeps -> (M,)."""
    return (probabilities * mask).sum(-1) / probabilities.sum(-1)


def changed(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many entries of a choice another one of as many leaves out: two (M, T) bool -> (M,) int64."""
    return (one & ~other).sum(-1)


def expected_changes(scores: torch.Tensor, noise: torch.Tensor, *, k: int) -> torch.Tensor:
    """How many of the k best entries independent Gaussian noise would change: scores (M, T), noise (M,) RMS -> (M,) f64.

    Scores lie with density r about the k-th. Those that noise carries across are r sigma / sqrt(2 pi) on each side. NaN where
    fewer than k + 6 scores are finite.
    """
    ordered = scores.double().sort(-1, descending=True).values
    if k < _RANKS or k + _RANKS >= scores.shape[1]:
        raise ValueError(f"k must be in [{_RANKS}, {scores.shape[1] - _RANKS}), got {k}")
    density = 2 * _RANKS / (ordered[:, k - _RANKS] - ordered[:, k + _RANKS])
    enough = ordered[:, k + _RANKS] > -torch.inf
    return torch.where(enough, density * noise.double() / math.sqrt(2 * math.pi), torch.nan)


def error_rms(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """RMS error of each query's finite scores about their mean error, which changes no choice: two (M, T) -> (M,) f64."""
    seen = want > -torch.inf
    error = torch.where(seen, got.double() - want.double(), 0.0)
    count = seen.sum(-1).clamp(min=1)
    return (error.square().sum(-1) / count - (error.sum(-1) / count).square()).clamp(min=0).sqrt()
