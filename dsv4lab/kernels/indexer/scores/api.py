"""The index scores on Hopper: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.arguments import check_contiguous
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.counters import counters
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.indexer.scores.config import DIM, MAX_COLUMNS, IndexScoresConfig
from dsv4lab.paging import check_entries
from dsv4lab.records import INDEX_RECORDS, check_pool

INTEGERS = {torch.int32: "i32", torch.int64: "i64"}
_MAX_ENTRIES = 2**28  # the grid's second dimension has 65,535 spans at most


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
    config: IndexScoresConfig | None = None,
) -> torch.Tensor:
    """I[t, j] = sum_h scale w[t, h] relu(q[t, h] . k_j) over the entries of the query's own sequence.

    q (M, Hi, 128) bf16, Hi <= 256; head_weights (M, Hi) f32; pages of `page_size` records, a multiple of 4: plain (P,
    page_size, 128) bf16, fp8 and fp4 (P, page bytes) u8; block_table (num_seqs, nb) i32, page numbers; seq_idx and num_visible
    (M,) i32 or i64, rows of one sequence next to each other for speed; all contiguous; max_entries up to 2^28
    -> (M, max_entries) f32; from num_visible on -inf, without `fill` anything. num_visible is cut to max_entries; a visible
    entry must have a page (`paging` finds those without: -1 counts as page 0).
    A weight times scale is rounded once. Products are exact, sums float32's: a score is within 2^-17 sum |w relu(q . k)| +
    2^-21 sum |w| sum |q k| of the exact one (2^-18 sum |w relu(q . k)| in the simulator, whose tensor core cuts
    nothing off). `decode` has the limits of scales. A NaN in a query, a plain key or a scale leaves its scores
    without a finite value.
    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.indexer.index_scores`.
    """
    why = refuses(
        q, head_weights, pages, block_table, seq_idx, num_visible, record=record, page_size=page_size, max_entries=max_entries
    )
    if why is not None:
        raise why
    check_contiguous(
        q=q, head_weights=head_weights, pages=pages, block_table=block_table, seq_idx=seq_idx, num_visible=num_visible
    )
    check_entries(block_table, seq_idx, pages.shape[0], page_size, visible=num_visible, most=max_entries)
    out = torch.empty(q.shape[0], max_entries, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    if not pages.shape[0] or not block_table.numel():
        return out.fill_(-torch.inf)  # there are no entries to see
    given = (record, q.shape[1], page_size, INTEGERS[num_visible.dtype], INTEGERS[seq_idx.dtype])
    if config is None:
        size = (q.shape[0], max_entries, block_table.shape[0], runtime_of(q).multiprocessors)
        config = IndexScoresConfig.for_shape(*size, q.shape[1], record, page_size, visible=given[3], sequence=given[4])
    config.check()
    if (config.record, config.heads, config.page_size, config.visible, config.sequence) != given:
        raise ValueError(f"config must have record, heads, page_size, visible, sequence {given}, got {config}")
    if config.divided and q.shape[0] > config.known:
        raise ValueError(f"config must not be divided for more than {config.known} queries, got {q.shape[0]}")
    runtime = runtime_of(q)
    work = (q.shape[0], max_entries, runtime.multiprocessors)
    span, ctas = (0, config.ctas(*work)) if config.divided else (config.span(*work), 0)
    flat = pages.view(torch.uint8).view(pages.shape[0], -1)
    counted = counters("index_scores", q.device, 2) if config.divided else block_table.view(-1)  # which is not read as such
    tensors = (q, head_weights, flat, block_table, seq_idx, num_visible, out, counted)
    runtime.call(_compiled(config, runtime), *tensors, span, ctas, int(fill), scale)
    return out


def refuses(
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
) -> Exception | None:
    """What is wrong with these arguments."""
    if record not in INDEX_RECORDS:
        return ValueError(f"record must be one of {', '.join(INDEX_RECORDS)}, got {record!r}")
    if q.dtype != torch.bfloat16 or head_weights.dtype != torch.float32:
        return TypeError(f"q must be bfloat16 and head_weights float32, got {q.dtype} and {head_weights.dtype}")
    if block_table.dtype != torch.int32 or seq_idx.dtype not in INTEGERS or num_visible.dtype not in INTEGERS:
        return TypeError(
            "block_table must be int32, seq_idx and num_visible int32 or int64, got "
            f"{block_table.dtype}, {seq_idx.dtype} and {num_visible.dtype}"
        )
    if q.dim() != 3 or q.shape[2] != DIM or not 1 <= q.shape[1] <= MAX_COLUMNS:
        return ValueError(f"q must be (M, Hi, {DIM}) with Hi from 1 to {MAX_COLUMNS}, got {tuple(q.shape)}")
    rows = q.shape[0]
    if head_weights.shape != q.shape[:2] or seq_idx.shape != (rows,) or num_visible.shape != (rows,):
        return ValueError(
            f"head_weights must be {tuple(q.shape[:2])}, seq_idx and num_visible ({rows},), got {tuple(head_weights.shape)}, "
            f"{tuple(seq_idx.shape)} and {tuple(num_visible.shape)}"
        )
    if block_table.dim() != 2:
        return ValueError(f"block_table must be (num_seqs, nb), got {tuple(block_table.shape)}")
    if page_size < 1 or page_size % 4:
        return ValueError(f"page_size must be a positive multiple of 4, got {page_size}")
    if not 0 <= max_entries <= _MAX_ENTRIES:
        return ValueError(f"max_entries must be 0 to {_MAX_ENTRIES}, got {max_entries}")
    if record == "plain" and pages.dtype != torch.bfloat16:
        return TypeError(f"plain pages must be bfloat16, got {pages.dtype}")
    try:
        check_pool(pages, "index", record, page_size=page_size, dim=DIM)
    except (TypeError, ValueError) as why:
        return why
    return None


def _compiled(config: IndexScoresConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M, T, P and the block table's sizes left open."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.indexer.scores.kernel import IndexScoresSm90

        types = {"i32": cutlass.Int32, "i64": cutlass.Int64}
        m = cute.sym_int()
        examples = (
            fake(cutlass.BFloat16, m, config.heads, DIM),
            fake(cutlass.Float32, m, config.heads, align=4),
            fake(cutlass.Uint8, cute.sym_int(), cute.sym_int(divisibility=16)),
            fake(cutlass.Int32, cute.sym_int(), cute.sym_int(), align=4),
            fake(types[config.sequence], m, align=types[config.sequence].width // 8),
            fake(types[config.visible], m, align=types[config.visible].width // 8),
            fake(cutlass.Float32, m, cute.sym_int(), align=4),
            fake(cutlass.Int32, cute.sym_int(), align=4),
            *[cutlass.Int32(1)] * 3,
            cutlass.Float32(1.0),
            fake_stream(),
        )
        return IndexScoresSm90(config), examples

    return cache.kernel("dsv4lab.kernels.indexer.scores.kernel", config, build, runtime)
