"""What is written to and read from the pages, and the compressors."""

# No `from __future__ import annotations`: torch.library reads the schema from the annotations themselves.
from typing import Any

import torch
from torch import Tensor

from dsv4lab.dispatch import operator
from dsv4lab.reference import cache as _cache
from dsv4lab.reference import compressor as _compressor


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Shape function of operations that only write into their arguments."""


@operator(mutates=("pages",), fake=_nothing)
def cache_write(
    x: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    pages: Tensor,
    slots: Tensor,
    *,
    eps: float,
    record: str,
    page_size: int,
) -> None:
    """See `reference.cache.cache_write`."""
    _cache.cache_write(x, norm_weight, positions, inv_freq, pages, slots, eps=eps, record=record, page_size=page_size)


@operator(fake=lambda pages, slots, *, dim, **_: pages.new_empty((slots.shape[0], dim), dtype=torch.float32))
def cache_read(pages: Tensor, slots: Tensor, *, record: str, page_size: int, dim: int, rope_dim: int) -> Tensor:
    """See `reference.cache.cache_read`."""
    return _cache.cache_read(pages, slots, record=record, page_size=page_size, dim=dim, rope_dim=rope_dim)


@operator()
def compressor_pool(
    values: Tensor,
    scores: Tensor,
    ape: Tensor,
    state: Tensor,
    positions: Tensor,
    seq_idx: Tensor,
    first_row: Tensor,
    last_row: Tensor,
    *,
    ratio: int,
    overlap: bool,
) -> Tensor:
    """See `reference.compressor.compressor_pool`."""
    return _compressor.compressor_pool(
        values, scores, ape, state, positions, seq_idx, first_row, last_row, ratio=ratio, overlap=overlap
    )


@operator(mutates=("state",), fake=_nothing)
def compressor_state_update(
    values: Tensor, scores: Tensor, ape: Tensor, state: Tensor, positions: Tensor, seq_idx: Tensor, last_position: Tensor
) -> None:
    """See `reference.compressor.compressor_state_update`."""
    _compressor.compressor_state_update(values, scores, ape, state, positions, seq_idx, last_position)
