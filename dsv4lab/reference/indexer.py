"""The lightning indexer: which compressed entries a CSA query attends to (spec 4.6, 8.3).

Queries and keys are rotated, turned by a Hadamard matrix and quantised; a weighted sum of relu(q . k) over the index heads
scores every visible entry; the best `k` are kept. With `plain` records nothing is quantised and the (orthogonal) Hadamard
turn, which would change nothing but rounding, is left out on both sides.
"""

from __future__ import annotations

import torch

from dsv4lab.arguments import check_shape
from dsv4lab.paging import check_entries, check_slots
from dsv4lab.records import check_pool, check_record
from dsv4lab.reference.cache import addressed, kv_norm_rope
from dsv4lab.reference.quant import (
    dequantize_mxfp4,
    fake_fp8_rows,
    fake_mxfp4,
    quantize_fp8_rows,
    quantize_mxfp4,
)
from dsv4lab.reference.rope import rope

_QUERY_BLOCK = 64  # queries whose per-head dot products are held at once


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Multiply the last dim by the Sylvester Hadamard matrix over sqrt(n): x (..., n), n a power of two -> like x."""
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"x must have a power-of-two last dim, got {n}")
    y = x.float()
    step = 1
    while step < n:
        # one butterfly: (a, b) -> (a + b, a - b) at distance `step`
        y = y.unflatten(-1, (-1, 2, step))
        y = torch.stack((y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]), dim=-2).flatten(-3)
        step *= 2
    return (y * n**-0.5).to(x.dtype)


def index_query(q: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, record: str) -> torch.Tensor:
    """RoPE, Hadamard, quantise and dequantise index queries.

    q (M, Hi, ci) float; positions (M,); inv_freq (rd/2,) f32; record "plain", "fp8" or "fp4" -> like q.
    Raises ValueError on the name and as `rope`.
    """
    check_record("index", record)
    q = rope(q, positions, inv_freq)
    if record == "plain":
        return q
    q = hadamard(q)
    return fake_fp8_rows(q, group=q.shape[-1]) if record == "fp8" else fake_mxfp4(q)


def index_key_write(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    eps: float,
    record: str,
    page_size: int,
) -> None:
    """Norm, RoPE, Hadamard, quantise and store index keys, in place.

    x (E, ci): pooled entries; positions (E,): each entry's first token; slots (E,) int64, -1 = do not store.
    Raises as `cache_write`.
    """
    packed = check_pool(pages, "index", record, page_size=page_size, dim=x.shape[1])
    key = kv_norm_rope(x, norm_weight, positions, inv_freq, eps=eps)
    key, page, place = addressed(key, slots, pages, page_size)
    if packed is None:
        pages[page, place] = key.to(pages.dtype)
        return
    data, scales = packed.parts(pages, page_size)
    if record == "fp8":
        codes, e8m0 = quantize_fp8_rows(hadamard(key), group=x.shape[1])
        data[page, place] = codes.view(torch.uint8)
        bits = e8m0.view(torch.uint8).int() << 23  # a power of two as float32 bits
        scales[page, place] = bits.view(torch.uint8)
    else:
        codes, e8m0 = quantize_mxfp4(hadamard(key))
        data[page, place] = codes
        scales[page, place] = e8m0.view(torch.uint8)


def index_key_read(pages: torch.Tensor, slots: torch.Tensor, *, record: str, page_size: int, dim: int) -> torch.Tensor:
    """Gather and dequantise index keys: slots (N,) int64 -> (N, dim) f32; slot -1 gives some key's. Raises as `cache_read`."""
    packed = check_pool(pages, "index", record, page_size=page_size, dim=dim)
    check_slots(slots, pages.shape[0], page_size)
    page, place = slots.clamp(min=0) // page_size, slots.clamp(min=0) % page_size
    if packed is None:
        return pages[page, place].float()
    data, scales = packed.parts(pages, page_size)
    rows, scale = data[page, place].contiguous(), scales[page, place].contiguous()
    if record == "fp8":
        return rows.view(torch.float8_e4m3fn).float() * scale.view(torch.float32)
    return dequantize_mxfp4(rows, scale.view(torch.float8_e8m0fnu))


def index_scores(
    q: torch.Tensor,
    head_weights: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_idx: torch.Tensor,
    num_visible: torch.Tensor,
    *,
    record: str,
    page_size: int,
    max_entries: int,
    scale: float = 1.0,
    fill: bool = True,
) -> torch.Tensor:
    """I[t, j] = sum_h scale w[t, h] relu(q[t, h] . k_j) over the entries of the query's own sequence.

    q (M, Hi, ci) from `index_query`; head_weights (M, Hi) f32; scale: ci^-1/2 Hi^-1/2 in the model; block_table (num_seqs, nb)
    int, pages of `page_size` entries; num_visible (M,) int -> (M, max_entries) f32, -inf from num_visible on; without `fill`
    these may be anything, which saves a kernel most of what it writes where little is seen of what may be.
    Raises ValueError on shapes, the name, the pool and a visible entry without a page, TypeError on the pool's dtype.
    """
    check_pool(pages, "index", record, page_size=page_size, dim=q.shape[-1])
    for name, value, want in (("head_weights", head_weights, 2), ("seq_idx", seq_idx, 1), ("num_visible", num_visible, 1)):
        check_shape(name, value, q.shape[:want])
    check_entries(block_table, seq_idx, pages.shape[0], page_size, visible=num_visible, most=max_entries)
    out = torch.full((q.shape[0], max_entries), -torch.inf, device=q.device)
    head_weights = head_weights * scale
    entry = torch.arange(max_entries, device=q.device)
    for s in seq_idx.unique().tolist():
        rows = (seq_idx == s).nonzero(as_tuple=True)[0]
        count = min(int(num_visible[rows].max()), max_entries)
        if count <= 0:
            continue
        slots = block_table[s].long()[entry[:count] // page_size] * page_size + entry[:count] % page_size
        keys = index_key_read(pages, slots, record=record, page_size=page_size, dim=q.shape[-1])
        for block in rows.split(_QUERY_BLOCK):
            # float64: a query's scores must not depend on how many entries its batch looks at
            dots = torch.relu(q[block].double() @ keys.double().t())  # (m, Hi, count)
            out[block, :count] = (head_weights[block].double()[:, :, None] * dots).sum(1).float()
    return out.masked_fill(entry >= num_visible[:, None], -torch.inf)


def index_topk(scores: torch.Tensor, num_visible: torch.Tensor, *, k: int) -> torch.Tensor:
    """The k best entries of every query, in ascending order, then -1. Ties go to the lower entry.

    scores (M, T) f32, of any value from num_visible on; num_visible (M,) int -> (M, k) int32. All visible entries where there
    are at most k.  Raises ValueError on num_visible and k.
    """
    check_shape("num_visible", num_visible, scores.shape[:1])
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    # what is not visible comes last, behind visible entries of -inf, which are before it
    scores = scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) >= num_visible[:, None], -torch.inf)
    width = min(k, scores.shape[1])
    best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :width]
    best = torch.where(best < num_visible[:, None], best, scores.shape[1]).sort(-1).values
    best = torch.where(best < scores.shape[1], best, -1)
    return torch.nn.functional.pad(best, (0, k - width), value=-1).int()
