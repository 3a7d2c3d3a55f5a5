"""The key reader on any architecture: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.arguments import check_dense
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.cache.plan import ROPE_DIM
from dsv4lab.kernels.cache.pool import PAGE_ALIGN, bytes_of, plan_of
from dsv4lab.kernels.cache.read.config import ReadConfig
from dsv4lab.paging import check_slots

MAX_ELEMENTS = 2**31  # of the result: indices are 32 bits wide


def read_keys(
    pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    record: str,
    page_size: int,
    dim: int,
    rope_dim: int,
    config: ReadConfig | None = None,
) -> torch.Tensor:
    """Gather and dequantise keys: pages, a contiguous pool; slots (N,) i64 below P * page_size -> (N, dim) f32.

    -1, or any slot down to -2^31, gives zeros, as one beyond the pool, below 2^31, does (`paging` finds those). record "plain"
    (BF16 or f32 pages), "fp8" or "nvfp4"; dim a multiple of 16 from 80 to 512, rope_dim 64. Numbers are the reference's in
    every bit.  Raises ValueError on shapes and names, TypeError on dtypes.
    Source: `reference.cache.cache_read`.
    """
    check_dense("slots", slots, ("N",), torch.int64)
    if rope_dim != ROPE_DIM:
        raise ValueError(f"rope_dim must be {ROPE_DIM}, got {rope_dim}")
    key = plan_of(pages, kind="kv", record=record, page_size=page_size, dim=dim)
    rows = slots.shape[0]
    if rows * dim >= MAX_ELEMENTS:
        raise ValueError(f"the result must have less than 2^31 elements, got ({rows}, {dim})")
    out = torch.empty(rows, dim, dtype=torch.float32, device=pages.device)
    if not rows:
        return out
    check_slots(slots, pages.shape[0], page_size)
    config = config or ReadConfig.for_shape(rows, key)
    config.check()
    if config.key != key:
        raise ValueError(f"config must be for {key}, got {config.key}")
    runtime = runtime_of(pages)
    runtime.call(_compiled(config, runtime), bytes_of(pages), slots, out)
    return out


def _compiled(config: ReadConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with N and P left open."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.cache.read.kernel import ReadKeys

        rows = cute.sym_int()
        examples = (
            fake(cutlass.Uint8, cute.sym_int(), config.key.page_bytes, align=PAGE_ALIGN),
            fake(cutlass.Int64, rows, align=8),
            fake(cutlass.Float32, rows, config.key.dim),
            fake_stream(),
        )
        return ReadKeys(config), examples

    return cache.kernel("dsv4lab.kernels.cache.read.kernel", config, build, runtime)
