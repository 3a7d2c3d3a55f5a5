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


@operator(mutates=("state", "pages"), fake=_nothing)
def compress(
    values: Tensor,
    scores: Tensor,
    ape: Tensor,
    state: Tensor,
    norm_weight: Tensor,
    inv_freq: Tensor,
    pages: Tensor,
    positions: Tensor,
    seq_idx: Tensor,
    first_row: Tensor,
    last_position: Tensor,
    block_table: Tensor,
    *,
    ratio: int,
    overlap: bool,
    eps: float,
    record: str,
    page_size: int,
    key: str,
    rounded: bool,
) -> None:
    """See `reference.compressor.compress`."""
    held = (values, scores, ape, state, norm_weight, inv_freq, pages)
    where = (positions, seq_idx, first_row, last_position, block_table)
    how: dict[str, Any] = dict(record=record, page_size=page_size, key=key, rounded=rounded)
    _compressor.compress(*held, *where, ratio=ratio, overlap=overlap, eps=eps, **how)
