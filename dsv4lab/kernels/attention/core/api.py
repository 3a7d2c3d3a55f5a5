"""Core attention on any architecture that has a kernel for it: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dsv4lab.arguments import check_dense, check_max_entries, check_ring
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.attention.core.config import (
    DIM,
    ROPE_DIM,
    AttentionConfig,
    CombineConfig,
    Division,
    ResidentConfig,
    capacity,
    divide,
    merges,
    pairs,
    resident_config,
    resides,
    shares,
    unpacks,
)
from dsv4lab.kernels.cache.unpack.api import unpack_keys
from dsv4lab.paging import check_keys

ARCHITECTURES = ("sm_90a",)
_LOG2_E = 1.4426950408889634
_MODULES = "dsv4lab.kernels.attention.core"


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
    max_entries: int | None = None,
    parts: int | None = None,
    unpack: bool | None = None,
    pair: bool | None = None,
    merge: bool | None = None,
    share: bool | None = None,
    resident: bool | None = None,
) -> torch.Tensor:
    """Attend from every query to its window and its compressed entries.

    q (M, H, 512) bf16; sinks (H,) f32; pages: pools of `record`, plain ones in bf16; block_table (sequences, pages) and
    topk_indices (M, k) i32, no entry twice, each that is read with a page (`paging` finds those without); positions, seq_idx
    (M,) i64; contiguous; scale positive; 1 <= window <= ring_len -> (M, H, 512) bf16. Keys that are NaN or infinite reach no
    other sequence's queries.

    Scores and sums are float32, probabilities BF16 when they meet the values. parts: CTAs among which a query's keys are
    divided, by default `config.divide`'s; the result depends on it as on any order of summation, and on nothing else. unpack:
    whether a kernel before this one decodes packed keys, by default as `config.unpacks` has it; results are the same bits but
    for what no key has, NaN codes and scales beyond 2^7 (`decode`).
    pair: whether two CTAs share the work of decoding keys, by default as `config.pairs` has it; results are the same bits.
    merge: whether the parts of a query meet in a cluster of CTAs or in a second kernel, by default as `config.divide` has it,
    and of as many parts as are asked for, where a cluster holds them; results are the same bits.
    share: whether two CTAs, of two tiles of heads or two queries, have keys together, which a kernel before this one puts in
    line; not where entries are chosen, nor with parts. By default as `config.shares` has it where none of the above is given.
    Sums are in another order.
    resident: whether a CTA keeps all keys of many queries in shared memory, from where a kernel before this one puts them in
    line; not where entries are chosen or too many, nor with parts. By default as `config.resides` has it where none of the
    above is given. Sums are in another order.
    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.attention.attention`.
    """
    m, heads = q.shape[:2]
    kind = "window" if entry_pages is None else "visible" if topk_indices is None else "chosen"
    _check(q, sinks, block_table, positions, seq_idx, topk_indices)
    check_ring(window, ring_len)
    check_max_entries(max_entries)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    out = torch.empty_like(q)
    if not out.numel():
        return out
    reach = block_table.shape[1] * entry_page if entry_pages is not None else 0  # entries of a sequence, at most
    if max_entries is not None:
        reach = min(reach, max_entries)
    entries = topk_indices.shape[1] if topk_indices is not None else reach
    config = AttentionConfig(record, kind, window, window_page, entry_page if kind != "window" else 1)
    config.check()
    near = _bytes("window_pages", window_pages, config, window_page)
    far = None if entry_pages is None or not entries else _bytes("entry_pages", entry_pages, config, entry_page)
    tokens, held = near.shape[0] * window_page, 0 if far is None else far.shape[0] * entry_page
    rings, pages = tokens // ring_len, None if entry_pages is None else entry_pages.shape[0]
    paged: dict[str, Any] = dict(rings=rings, num_pages=pages, page_size=entry_page, ratio=ratio)
    check_keys(block_table, positions, seq_idx, topk_indices, max_entries=max_entries, **paged)
    if kind != "window" and not entries:
        kind, entry_pages, topk_indices, reach = "window", None, None, 0
        config = replace(config, kind=kind, entry_page=1)
    runtime = runtime_of(q)
    multiprocessors = runtime.multiprocessors
    keys = capacity(kind, window, entries)
    decoding = pairs(heads, record, multiprocessors) if pair is None else pair
    division = divide(m, heads, keys, multiprocessors, paired=decoding, clusters=runtime.clusters)
    count = division.parts if parts is None else parts
    if count < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    free = unpack is None and pair is None and merge is None and count == 1
    if unpack is None:
        most = min(held, min(m, block_table.shape[0]) * reach)
        unpack = unpacks(division, record, keys, rings=rings, window=window, tokens=tokens, entries=most)
    free = free and share is None and resident is None
    holding = resident_config(kind, window, reach)
    if resident is None:
        sizes = dict(multiprocessors=multiprocessors, rings=rings, ring_len=ring_len, entries=reach)
        resident = free and holding is not None and resides(division, record, **sizes)
    if share is None:
        share = free and not resident and unpack and shares(division, kind, rings=rings, ring_len=ring_len, entries=reach)
    for name, value in (("share", share), ("resident", resident)):
        if value and count > 1:
            raise ValueError(f"{name} must be false for several parts of a query, got True for {count}")
    table = block_table if kind != "window" else positions.view(torch.int32).view(1, -1)
    if share or resident or (unpack and record != "plain"):
        how: dict[str, Any] = dict(window=window, ring_len=ring_len, ratio=max(ratio, 1))  # 0 of a layer that has no entries
        how |= dict(
            max_entries=reach, record=record, window_page=window_page, entry_page=entry_page, dim=DIM, rope_dim=ROPE_DIM
        )
        if resident and holding is None:
            raise ValueError(
                f"resident must be false for keys that have no place in shared memory, got True for {kind!r} keys, a window of "
                f"{window} and {reach} entries"
            )
        plain, other = unpack_keys(
            window_pages, entry_pages, block_table, positions, seq_idx, **how, line=share or resident, quads=resident
        )
        if resident:
            assert holding is not None and other is not None  # where sequences have their rows
            _resident(holding, division, runtime, q, sinks, plain, other, positions, seq_idx, out, scale * _LOG2_E, ratio)
            return out
        if share:
            assert other is not None  # where sequences have their rows
            config = AttentionConfig("plain", kind, window, share="queries" if division.head_tiles % 2 else "tiles")
            near, far, table = plain, None, other
        else:
            config = replace(config, record="plain")
            near = _bytes("window_pages", plain, config, window_page)
            far = None if other is None else _bytes("entry_pages", other, config, entry_page)
    if pair is None:
        pair = pairs(heads, config.record, multiprocessors)
    if pair and division.head_tiles % 2:
        raise ValueError(f"pair must be false for an odd number of tiles of heads, got True for {division.head_tiles}")
    config = replace(config, pair=pair)
    if merge is None:
        merge = division.merge if parts is None else merges(count, config.ctas)
    if merge and not merges(count, config.ctas):
        raise ValueError(f"merge must be false for {count} parts of {config.ctas} CTAs each, got True")
    config = replace(config, merge=merge)
    config.check()
    rows = m * heads
    nothing = positions.view(torch.int32)
    flat = out.view(rows, DIM)
    apart = count > 1 and not merge
    partial = sinks.new_empty(count, rows, DIM) if apart else sinks.new_empty(1, 1, DIM)
    lse = sinks.new_empty(count, rows) if apart else sinks.view(1, -1)
    items = division.queries * division.head_tiles * count
    items += items % config.ctas  # of an odd number of queries, both CTAs have the last
    runtime.call(
        _compiled(config, runtime),
        q.view(rows, DIM),
        sinks,
        near,
        near.view(torch.uint8) if far is None else far,
        table,
        positions,
        seq_idx,
        topk_indices if topk_indices is not None else nothing.view(1, -1),
        flat,
        partial,
        lse,
        scale * _LOG2_E,
        ring_len,
        ratio,
        count,
        division.head_tiles,
        items,
        items if merge else min(items, max(multiprocessors // config.ctas, 1) * config.ctas),
    )
    if apart:
        runtime.call(_compiled_combine(runtime), partial, lse, sinks, flat)
    return out


def _resident(
    config: ResidentConfig,
    division: Division,
    runtime: Runtime,
    q: torch.Tensor,
    sinks: torch.Tensor,
    keys: torch.Tensor,
    places: torch.Tensor,
    positions: torch.Tensor,
    seq_idx: torch.Tensor,
    out: torch.Tensor,
    factor: float,
    ratio: int,
) -> None:
    """By the kernel that keeps keys, which are in line. factor: scale times log2 e."""
    runtime.call(
        _compiled_resident(config, runtime),
        q.view(-1, DIM),
        sinks,
        keys,
        places,
        positions,
        seq_idx,
        out.view(-1, DIM),
        factor,
        max(ratio, 1),
        division.head_tiles,
        min(division.queries * division.head_tiles, runtime.multiprocessors),
    )


def _compiled_resident(config: ResidentConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with all sizes left open. Raises ValueError for an architecture without a class."""
    _check_arch(runtime)

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.attention.core.resident import AttentionResidentSm90

        i32, i64, f32, free = cutlass.Int32, cutlass.Int64, cutlass.Float32, cute.sym_int
        examples = (
            fake(cutlass.BFloat16, free(), DIM),
            fake(f32, free(), align=4),
            fake(cutlass.BFloat16, free(), DIM),
            fake(i32, free(), free(), align=4),
            fake(i64, free(), align=8),
            fake(i64, free(), align=8),
            fake(cutlass.BFloat16, free(), DIM),
            f32(1.0),
            *(i32(1) for _ in range(3)),
            fake_stream(),
        )
        return AttentionResidentSm90(config), examples

    return cache.kernel(f"{_MODULES}.resident", config, build, runtime)


def _check_arch(runtime: Runtime) -> None:
    if runtime.arch not in ARCHITECTURES:
        raise ValueError(f"attention needs {' or '.join(ARCHITECTURES)}, got {runtime.arch}")


def _check(
    q: torch.Tensor,
    sinks: torch.Tensor,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    seq_idx: torch.Tensor,
    topk_indices: torch.Tensor | None,
) -> None:
    if q.dtype != torch.bfloat16 or sinks.dtype != torch.float32:
        raise TypeError(f"q must be bfloat16 and sinks float32, got {q.dtype} and {sinks.dtype}")
    check_dense("q", q, ("M", "H", DIM))
    m, heads = q.shape[:2]
    check_dense("sinks", sinks, (heads,))
    check_dense("positions", positions, (m,), torch.int64)
    check_dense("seq_idx", seq_idx, (m,), torch.int64)
    check_dense("block_table", block_table, ("sequences", "pages"), torch.int32)
    if topk_indices is not None:
        check_dense("topk_indices", topk_indices, (m, "k"), torch.int32)


def _bytes(name: str, pages: torch.Tensor, config: AttentionConfig, page_size: int) -> torch.Tensor:
    """A pool as (P, bytes) u8."""
    dtype = torch.bfloat16 if config.record == "plain" else torch.uint8
    if pages.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')} for {config.record} records, got {pages.dtype}")
    size = config.page_bytes(page_size)
    if not pages.is_contiguous() or pages.nbytes != pages.shape[0] * size or not pages.shape[0]:
        raise ValueError(
            f"{name} must be contiguous pages of {size} bytes, got {tuple(pages.shape)} {pages.dtype}, strides {pages.stride()}"
        )
    return pages.view(pages.shape[0], -1).view(torch.uint8)


def _compiled(config: AttentionConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with all sizes left open. Raises ValueError for an architecture without a class."""
    _check_arch(runtime)

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.attention.core.sm90 import AttentionSm90

        i32, i64, f32, free = cutlass.Int32, cutlass.Int64, cutlass.Float32, cute.sym_int
        examples = (
            fake(cutlass.BFloat16, free(), DIM),
            fake(f32, free(), align=4),
            fake(cutlass.BFloat16, free(), DIM)
            if config.share
            else fake(cutlass.Uint8, free(), config.page_bytes(config.window_page)),
            fake(cutlass.Uint8, free(), free(divisibility=16)),
            fake(i32, free(), free(), align=4),
            fake(i64, free(), align=8),
            fake(i64, free(), align=8),
            fake(i32, free(), free(), align=4),
            fake(cutlass.BFloat16, free(), DIM),
            fake(f32, free(), free(), DIM),
            fake(f32, free(), free(), align=4),
            f32(1.0),
            *(i32(1) for _ in range(6)),
            fake_stream(),
        )
        return AttentionSm90(config), examples

    return cache.kernel(f"{_MODULES}.sm90", config, build, runtime)


def _compiled_combine(runtime: Runtime) -> Callable[..., Any]:
    """The host function that combines parts."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.attention.core.combine import Combine

        f32, free = cutlass.Float32, cute.sym_int
        parts, rows = free(), free()
        examples = (
            fake(f32, parts, rows, DIM),
            fake(f32, parts, rows, align=4),
            fake(f32, free(), align=4),
            fake(cutlass.BFloat16, rows, DIM),
            fake_stream(),
        )
        return Combine(CombineConfig()), examples

    return cache.kernel(f"{_MODULES}.combine", CombineConfig(), build, runtime)
