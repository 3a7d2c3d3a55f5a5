"""Core attention: one key-value head shared by all query heads, over the window and the compressed entries, with sinks.

Every layer kind is this one function: SWA has no entries, HCA attends to all visible ones, CSA to those the indexer chose.
Window and entries share one softmax; the sink is a logit in the denominator only. Scores, softmax and sums are taken in
float64 and rounded once, so that a query's result does not depend on how many queries or masked keys were computed with it.
Source: spec 4.3, 4.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsv4lab.arguments import check_max_entries, check_ring
from dsv4lab.paging import check_keys
from dsv4lab.reference.cache import cache_read

_QUERY_BLOCK = 64  # queries that share a score matrix: bounds memory at 64 * H * (window + entries) floats


@dataclass(frozen=True)
class AttentionKeys:
    """The keys a group of queries attends to, oldest first: window tokens, then compressed entries.

    keys (n, c) f32, also the values; visible (m, n) bool; positions (n_window,) int64; entries (n - n_window,) int64.
    """

    keys: torch.Tensor
    visible: torch.Tensor
    positions: torch.Tensor
    entries: torch.Tensor


def gather_keys(
    window_pages: torch.Tensor,
    entry_pages: torch.Tensor | None,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    seq: int,
    topk_indices: torch.Tensor | None,
    *,
    window: int,
    ring_len: int,
    ratio: int,
    record: str,
    window_page: int,
    entry_page: int,
    dim: int,
    rope_dim: int,
) -> AttentionKeys:
    """Collect what the queries at `positions` (m,) of sequence `seq` attend to. topk_indices (m, k), or None: all visible."""
    device = positions.device
    first, last = int(positions.min()), int(positions.max())
    pos = torch.arange(max(first - window + 1, 0), last + 1, device=device)
    slots = seq * ring_len + pos % ring_len
    keys = cache_read(window_pages, slots, record=record, page_size=window_page, dim=dim, rope_dim=rope_dim)
    visible = (pos <= positions[:, None]) & (pos > positions[:, None] - window)
    entries = torch.arange(0, device=device)
    if entry_pages is not None:
        if topk_indices is None:
            entries = torch.arange((last + 1) // ratio, device=device)
            chosen = entries < (positions[:, None] + 1) // ratio  # (j + 1) m <= t + 1
        else:
            entries = topk_indices[topk_indices >= 0].unique().long()
            place = torch.searchsorted(entries, topk_indices.long().clamp(min=0))
            place = torch.where(topk_indices >= 0, place, entries.shape[0])  # the column after the last collects the empty ones
            chosen = visible.new_zeros(len(positions), entries.shape[0] + 1).scatter_(1, place, True)[:, :-1]
        slots = block_table[seq].long()[entries // entry_page] * entry_page + entries % entry_page
        read = cache_read(entry_pages, slots, record=record, page_size=entry_page, dim=dim, rope_dim=rope_dim)
        keys = torch.cat((keys, read))
        visible = torch.cat((visible, chosen), dim=1)
    return AttentionKeys(keys, visible, pos, entries)


def attention_probabilities(
    q: torch.Tensor, keys: AttentionKeys, sinks: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the keys and the sink: q (m, H, c) -> probabilities (m, H, n) f64, the sink's share (m, H) f64."""
    # s = q . k * scale; p = exp(s - M) / (sum exp(s - M) + exp(sink - M))
    scores = (q.double() @ keys.keys.double().t()) * scale
    scores = scores.masked_fill(~keys.visible[:, None, :], -torch.inf)
    sink = sinks.double().expand(q.shape[0], -1)[..., None]
    p = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)
    return p[..., :-1], p[..., -1]


def attention(
    q: torch.Tensor,
    sinks: torch.Tensor,
    window_pages: torch.Tensor,
    entry_pages: torch.Tensor | None,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    seq_idx: torch.Tensor,
    topk_indices: torch.Tensor | None,
    *,
    window: int,
    ring_len: int,
    ratio: int,
    scale: float,
    record: str,
    window_page: int,
    entry_page: int,
    rope_dim: int,
    max_entries: int | None = None,
) -> torch.Tensor:
    """Attend from every query to its window and its compressed entries, over the paged cache.

    q (M, H, c) rotated; sinks (H,) f32 logits after scaling; window_pages: pool whose sequence s keeps position p in slot
    s * ring_len + p mod ring_len; entry_pages: pool of compressed entries or None (SWA); block_table (num_seqs, nb) int: the
    page of entries [b * entry_page, (b + 1) * entry_page); positions, seq_idx (M,) int64; topk_indices (M, k) int32, -1 =
    empty, or None = every visible entry; ratio: tokens per entry; record: of the keys, "plain", "fp8" or "nvfp4";
    max_entries: no query sees more, by default as many as the block table has places for: kernels choose their way by it
    -> (M, H, c) of q.dtype, values still carrying the key rotation (see `inverse_rope`).
    Raises ValueError unless 1 <= window <= ring_len, on an entry without a page or beyond `max_entries`, and as
    `cache_read`.
    """
    check_ring(window, ring_len)
    check_max_entries(max_entries)
    rings, count = window_pages.shape[0] * window_page // ring_len, None if entry_pages is None else entry_pages.shape[0]
    paged: dict[str, Any] = dict(rings=rings, num_pages=count, page_size=entry_page, ratio=ratio)
    check_keys(block_table, positions, seq_idx, topk_indices, max_entries=max_entries, **paged)
    pages: dict[str, Any] = dict(record=record, window_page=window_page, entry_page=entry_page, rope_dim=rope_dim)
    out = q.new_empty(q.shape)
    for s in seq_idx.unique().tolist():
        rows = (seq_idx == s).nonzero(as_tuple=True)[0]
        for block in rows.split(_QUERY_BLOCK):
            keys = gather_keys(
                window_pages,
                entry_pages,
                block_table,
                positions[block],
                s,
                None if topk_indices is None else topk_indices[block],
                window=window,
                ring_len=ring_len,
                ratio=ratio,
                dim=q.shape[-1],
                **pages,
            )
            p, _ = attention_probabilities(q[block], keys, sinks, scale=scale)
            out[block] = (p @ keys.keys.double()).to(q.dtype)
    return out
