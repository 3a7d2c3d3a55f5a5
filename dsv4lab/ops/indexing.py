"""The indexer and attention."""

# No `from __future__ import annotations`: torch.library reads the schema from the annotations themselves.
from typing import Optional

import torch
from torch import Tensor

from dsv4lab.dispatch import operator
from dsv4lab.reference import attention as _attention
from dsv4lab.reference import indexer as _indexer


@operator(fake=lambda q, *_, **__: q.new_empty(q.shape))  # tracing Hadamard's loop with symbolic sizes takes minutes
def index_query(q: Tensor, positions: Tensor, inv_freq: Tensor, *, record: str) -> Tensor:
    """See `reference.indexer.index_query`."""
    return _indexer.index_query(q, positions, inv_freq, record=record)


@operator(fake=lambda q, *_, max_entries, **__: q.new_empty((q.shape[0], max_entries), dtype=torch.float32))
def index_scores(
    q: Tensor,
    head_weights: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_idx: Tensor,
    num_visible: Tensor,
    *,
    record: str,
    page_size: int,
    max_entries: int,
    scale: float = 1.0,
    fill: bool = True,
) -> Tensor:
    """See `reference.indexer.index_scores`."""
    tensors = (q, head_weights, pages, block_table, seq_idx, num_visible)
    how = dict(record=record, page_size=page_size, max_entries=max_entries)
    return _indexer.index_scores(*tensors, **how, scale=scale, fill=fill)  # type: ignore[arg-type]


@operator()
def index_topk(scores: Tensor, num_visible: Tensor, *, k: int) -> Tensor:
    """See `reference.indexer.index_topk`."""
    return _indexer.index_topk(scores, num_visible, k=k)


@operator(fake=lambda q, *_, **__: q.new_empty(q.shape))
def attention(
    q: Tensor,
    sinks: Tensor,
    window_pages: Tensor,
    entry_pages: Optional[Tensor],
    block_table: Tensor,
    positions: Tensor,
    seq_idx: Tensor,
    topk_indices: Optional[Tensor],
    *,
    window: int,
    ring_len: int,
    ratio: int,
    scale: float,
    record: str,
    window_page: int,
    entry_page: int,
    rope_dim: int,
    max_entries: Optional[int] = None,
) -> Tensor:
    """See `reference.attention.attention`."""
    return _attention.attention(
        q,
        sinks,
        window_pages,
        entry_pages,
        block_table,
        positions,
        seq_idx,
        topk_indices,
        window=window,
        ring_len=ring_len,
        ratio=ratio,
        scale=scale,
        record=record,
        window_page=window_page,
        entry_page=entry_page,
        rope_dim=rope_dim,
        max_entries=max_entries,
    )
