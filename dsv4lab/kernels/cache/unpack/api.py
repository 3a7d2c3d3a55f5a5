"""The unpacker on any architecture that has a kernel for it: checks, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.arguments import check_dense
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.cache.plan import ROPE_DIM
from dsv4lab.kernels.cache.pool import PAGE_ALIGN, bytes_of, plan_of
from dsv4lab.kernels.cache.unpack.config import MAX_SEQS, UnpackConfig, rows_in_line

ARCHITECTURES = ("sm_90a",)


def unpack_keys(
    window_pages: torch.Tensor,
    entry_pages: torch.Tensor | None,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    seq_idx: torch.Tensor,
    *,
    window: int,
    ring_len: int,
    ratio: int,
    record: str,
    window_page: int,
    entry_page: int,
    dim: int,
    rope_dim: int,
    max_entries: int | None = None,
    line: bool = False,
    quads: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dequantise the keys that queries may see into plain pools of BF16, to which the same block table belongs.

    Arguments as `reference.attention.attention` has them: pools of a packed `record`, the window's of at most 1,024 rings;
    block_table (sequences, pages) i32; positions, seq_idx (M,) i64, M > 0, all contiguous -> (P, window_page, dim) bf16 and,
    where there are entries, (P, entry_page, dim) bf16. Places that none of the queries may see are not written, pages that
    are -1 not looked for, nor entries from `max_entries` on.

    line: into rows instead, one sequence after another, its tokens in the order of their positions; records may be plain, too
    -> (rows, dim) bf16 and (rings, 4) i32, of every sequence that has queries: the row of its first token, that token's
    position, the row of its first entry, its number of entries. The 7 rows after the last token, and those after the last entry
    up to a multiple of 8, are zeros, as are entries without a page.
    quads: with another order of dims, see `UnpackConfig`.
    Raises ValueError on shapes and names, TypeError on dtypes.  Source: `reference.cache.cache_read`.
    """
    check_dense("positions", positions, ("M",), torch.int64)
    check_dense("seq_idx", seq_idx, ("M",), torch.int64)
    check_dense("block_table", block_table, ("sequences", "pages"), torch.int32)
    if not positions.shape[0] or positions.shape != seq_idx.shape:
        raise ValueError(f"positions must be one a query, as seq_idx, got {tuple(positions.shape)}, {tuple(seq_idx.shape)}")
    if rope_dim != ROPE_DIM:
        raise ValueError(f"rope_dim must be {ROPE_DIM}, got {rope_dim}")
    for name, number in (("window", window), ("ring_len", ring_len), ("ratio", ratio)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    pools: list[tuple[str, torch.Tensor, int]] = [("window_pages", window_pages, window_page)]
    if entry_pages is not None:
        pools.append(("entry_pages", entry_pages, entry_page))
        if not block_table.numel():
            raise ValueError(f"block_table must have pages where there are entries, got {tuple(block_table.shape)}")
    keys = []
    for name, pages, size in pools:
        keys.append(plan_of(pages, kind="kv", record=record, page_size=size, dim=dim))
        if not pages.shape[0]:
            raise ValueError(f"{name} must have at least one page, got none")
    rings = window_pages.shape[0] * window_page // ring_len
    if rings > MAX_SEQS:
        raise ValueError(f"window_pages must have at most {MAX_SEQS} rings, got {rings}")
    config = UnpackConfig(keys[0], keys[1] if entry_pages is not None else None, line, quads)
    config.check()
    rows = [pages.shape[0] * size for _, pages, size in pools]
    most = 0 if entry_pages is None else block_table.shape[1] * entry_page
    if max_entries is not None:
        most = min(most, max_entries)
    if line:
        rows = [rows_in_line(positions.shape[0], rings, ring_len=ring_len, entries=most)]
    plain = torch.empty(sum(rows), dim, dtype=torch.bfloat16, device=window_pages.device).split(rows)
    places = positions.new_empty(rings, 4, dtype=torch.int32)
    runtime = runtime_of(window_pages)
    runtime.call(
        _compiled(config, runtime),
        bytes_of(window_pages),
        bytes_of(window_pages if entry_pages is None else entry_pages),
        block_table if entry_pages is not None else positions.view(torch.int32).view(1, -1),
        positions,
        seq_idx,
        plain[0],
        plain[-1],
        places,
        window,
        ring_len,
        ratio,
        most,
        runtime.multiprocessors,
    )
    if line:
        return plain[0], places
    near = plain[0].view(-1, window_page, dim)
    return near, plain[1].view(-1, entry_page, dim) if entry_pages is not None else None


def _compiled(config: UnpackConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with all sizes left open. Raises ValueError for an architecture without a class."""
    if runtime.arch not in ARCHITECTURES:
        raise ValueError(f"unpack_keys needs {' or '.join(ARCHITECTURES)}, got {runtime.arch}")

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.cache.unpack.kernel import UnpackKeys

        i32, i64, free, dim = cutlass.Int32, cutlass.Int64, cute.sym_int, config.window.dim
        entry_bytes = (config.entries or config.window).page_bytes
        examples = (
            fake(cutlass.Uint8, free(), config.window.page_bytes, align=PAGE_ALIGN),
            fake(cutlass.Uint8, free(), entry_bytes, align=PAGE_ALIGN),
            fake(i32, free(), free(), align=4),
            fake(i64, free(), align=8),
            fake(i64, free(), align=8),
            fake(cutlass.BFloat16, free(), dim),
            fake(cutlass.BFloat16, free(), dim),
            fake(i32, free(), free(), align=4),
            *(i32(1) for _ in range(5)),
            fake_stream(),
        )
        return UnpackKeys(config), examples

    return cache.kernel("dsv4lab.kernels.cache.unpack.kernel", config, build, runtime)
