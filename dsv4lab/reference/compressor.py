"""Compressors: gated pooling of `ratio` tokens into one entry, with state carried across steps (spec 4.4).

Per token the projections give values a and scores z (the position embedding `ape` is added here). An HCA entry pools its own
block; a CSA entry pools the previous block through the first half of the channels and its own block through the second half.
The softmax is per channel. State is a ring per sequence addressed by absolute position, so rewinding copies nothing:
`state` (num_seqs, R, 2, o*d) f32 holds a and z + ape of token p at p mod R.
"""

from __future__ import annotations

import torch

from dsv4lab.arguments import check_shape, check_state
from dsv4lab.paging import check_completed, check_steps
from dsv4lab.reference.cache import cache_write
from dsv4lab.reference.indexer import index_key_write

KEYS = ("kv", "index")  # what entries become: keys of the attention or of the indexer


def compress(
    values: torch.Tensor,
    scores: torch.Tensor,
    ape: torch.Tensor,
    state: torch.Tensor,
    norm_weight: torch.Tensor,
    inv_freq: torch.Tensor,
    pages: torch.Tensor,
    positions: torch.Tensor,
    seq_idx: torch.Tensor,
    first_row: torch.Tensor,
    last_position: torch.Tensor,
    block_table: torch.Tensor,
    *,
    ratio: int,
    overlap: bool,
    eps: float,
    record: str,
    page_size: int,
    key: str,
    rounded: bool,
) -> None:
    """One step of a compressor: pool the entries that the tokens complete, store them as keys, move the tokens into the ring.

    norm_weight (d,); inv_freq (rd/2,) f32; pages: a pool of `record`, of keys ("kv") or of index keys ("index"), into which
    block_table (num_seqs, nb) int leads: entry j of sequence s is place j mod page_size of page block_table[s, j / page_size],
    -1: not stored. rounded: to BF16, the pooled sum and all that comes after it. The others as in `compressor_pool` and
    `compressor_state_update`. Writes pages and state, in place. Raises ValueError on key, a short ring, as `cache_write`
    and `paging.check_completed` and `check_steps`.
    """
    if key not in KEYS:
        raise ValueError(f"key must be one of {KEYS}, got {key!r}")
    check_shape("positions", positions, values.shape[:1])
    check_shape("scores", scores, values.shape)
    check_state(state, ratio, overlap)
    check_shape("block_table", block_table, (state.shape[0], *block_table.shape[1:]))
    check_completed(block_table, positions, seq_idx, pages, page_size, ratio)
    check_steps(positions, seq_idx, first_row, last_position)
    last_row = ((positions + 1) % ratio == 0).nonzero(as_tuple=True)[0]
    pooled = compressor_pool(
        values, scores, ape, state, positions, seq_idx, first_row, last_row, ratio=ratio, overlap=overlap
    ).to(torch.bfloat16 if rounded else torch.float32)
    entry = positions[last_row] // ratio
    page = block_table[seq_idx[last_row], entry // page_size].long()
    slots = page * page_size + entry % page_size  # below 0 without a page
    write = cache_write if key == "kv" else index_key_write
    write(pooled, norm_weight, entry * ratio, inv_freq, pages, slots, eps=eps, record=record, page_size=page_size)
    compressor_state_update(values, scores, ape, state, positions, seq_idx, last_position)


def compressor_pool(
    values: torch.Tensor,
    scores: torch.Tensor,
    ape: torch.Tensor,
    state: torch.Tensor,
    positions: torch.Tensor,
    seq_idx: torch.Tensor,
    first_row: torch.Tensor,
    last_row: torch.Tensor,
    *,
    ratio: int,
    overlap: bool,
) -> torch.Tensor:
    """Pool the entries that this step's tokens complete.

    values, scores (M, o*d) f32, o = 2 with overlap, else 1; ape (ratio, o*d) f32; state as above, read only;
    positions, seq_idx (M,) int64; first_row (M,) int64: the row of the first token of the same sequence in this step;
    last_row (E,) int64: the rows of the tokens that complete an entry (position % ratio == ratio - 1)
    -> (E, d) f32. A slot of the span comes from this step's rows where it lies in them, else from the ring.
    """
    span = 2 * ratio if overlap else ratio
    back = torch.arange(span - 1, -1, -1, device=values.device)
    rows = last_row[:, None] - back  # (E, span)
    pos = positions[last_row][:, None] - back
    here = rows >= first_row[last_row][:, None]
    ring = state[seq_idx[last_row][:, None], pos.clamp(min=0) % state.shape[1]]  # (E, span, 2, o*d)
    rows = rows.clamp(min=0)
    a = torch.where(here[..., None], values.float()[rows], ring[:, :, 0])
    z = torch.where(here[..., None], scores.float()[rows] + ape[pos % ratio], ring[:, :, 1])
    z = torch.where((pos >= 0)[..., None], z, -torch.inf)  # the block before the first has weight 0
    a = torch.where((pos >= 0)[..., None], a, 0.0)
    if overlap:
        d = values.shape[1] // 2
        a = torch.cat((a[:, :ratio, :d], a[:, ratio:, d:]), dim=1)
        z = torch.cat((z[:, :ratio, :d], z[:, ratio:, d:]), dim=1)
    # e[i] = sum_p softmax_p(z_p[i]) a_p[i]
    return (torch.softmax(z.double(), dim=1) * a).sum(1).float()


def compressor_state_update(
    values: torch.Tensor,
    scores: torch.Tensor,
    ape: torch.Tensor,
    state: torch.Tensor,
    positions: torch.Tensor,
    seq_idx: torch.Tensor,
    last_position: torch.Tensor,
) -> None:
    """Write this step's tokens into the ring, in place, after `compressor_pool` has read it.

    last_position (M,) int64: the last position of the same sequence in this step; older tokens that share a ring place with
    a newer one are left out. Others as in `compressor_pool`.
    """
    ring = state.shape[1]
    keep = positions > last_position - ring
    pos = positions[keep]
    z = scores.float()[keep] + ape[pos % ape.shape[0]]
    state[seq_idx[keep], pos % ring] = torch.stack((values.float()[keep], z), dim=1)
