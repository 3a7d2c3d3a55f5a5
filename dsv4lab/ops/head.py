"""The prediction block, heads that draw, and sampling."""

# No `from __future__ import annotations`: torch.library reads the schema from the annotations themselves.
from typing import Optional

import torch
from torch import Tensor

from dsv4lab.dispatch import operator
from dsv4lab.formats import PackedWeight, weights_of
from dsv4lab.ops.weights import pack_all
from dsv4lab.reference import head as _head
from dsv4lab.reference import sampling as _sampling


def _two_counts(probs: Tensor) -> tuple[Tensor, Tensor]:
    return probs.new_empty(probs.shape[0], dtype=torch.int64), probs.new_empty(probs.shape[0], dtype=torch.int64)


@operator(fake=lambda embedding, streams, *_, **__: streams.new_empty(streams.shape))
def _mtp_input(
    embedding: Tensor,
    streams: Tensor,
    enorm_weight: Tensor,
    hnorm_weight: Tensor,
    fmts: str,
    codes: list[Tensor],
    scale: list[Tensor],
    global_scale: list[Tensor],
    input_scale: list[Tensor],
    *,
    eps: float,
    act: str,
) -> Tensor:
    e_proj, h_proj = weights_of(fmts, codes, scale, global_scale, input_scale)
    return _head.mtp_input(embedding, streams, enorm_weight, hnorm_weight, e_proj, h_proj, eps=eps, act=act)


def mtp_input(
    embedding: Tensor,
    streams: Tensor,
    enorm_weight: Tensor,
    hnorm_weight: Tensor,
    e_proj: PackedWeight,
    h_proj: PackedWeight,
    *,
    eps: float,
    act: str,
) -> Tensor:
    """See `reference.head.mtp_input`."""
    packed = pack_all(e_proj, h_proj)
    return _mtp_input(embedding, streams, enorm_weight, hnorm_weight, *packed, eps=eps, act=act)


@operator(fake=lambda x, weight: x.new_empty(x.shape[0], dtype=torch.int64))
def lm_head_greedy(x: Tensor, weight: Tensor) -> Tensor:
    """See `reference.head.lm_head_greedy`."""
    return _head.lm_head_greedy(x, weight)


def _logits_and_peaks(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, vocab = x.shape[0], weight.shape[0]
    parts = -(-vocab // _head.PEAK_IDS)
    return x.new_empty(rows, vocab, dtype=torch.float32), x.new_empty(rows, parts, dtype=torch.int64)


@operator(fake=_logits_and_peaks)
def lm_head_peaks(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.head.lm_head_peaks`."""
    return _head.lm_head_peaks(x, weight)


@operator(fake=lambda x, *_, **__: x.new_empty(x.shape[0], dtype=torch.int64))
def lm_head_sample(x: Tensor, weight: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """See `reference.head.lm_head_sample`."""
    return _head.lm_head_sample(x, weight, temperature=temperature, seed=seed, position=position)


@operator(fake=lambda logits, *_, **__: logits.new_empty(logits.shape[0], dtype=torch.int64))
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    position: Tensor,
    peaks: Optional[Tensor] = None,
) -> Tensor:
    """See `reference.sampling.sample`."""
    draw = dict(seed=seed, position=position)
    return _sampling.sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, **draw, peaks=peaks)


@operator()
def probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, peaks: Optional[Tensor] = None) -> Tensor:
    """See `reference.sampling.probabilities`."""
    return _sampling.probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p, peaks=peaks)


@operator(fake=lambda target_probs, *_, **__: _two_counts(target_probs))
def accept_drafts(
    target_probs: Tensor, draft_probs: Tensor, draft_ids: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.sampling.accept_drafts`."""
    return _sampling.accept_drafts(target_probs, draft_probs, draft_ids, seed=seed, position=position)
