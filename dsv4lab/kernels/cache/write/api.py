"""The key writer on any architecture: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dsv4lab.arguments import check_dense, check_eps
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.elements import ELEMENT, dense
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.cache.plan import ROPE_DIM, WARP
from dsv4lab.kernels.cache.pool import PAGE_ALIGN, bytes_of, plan_of
from dsv4lab.kernels.cache.write.config import WriteConfig
from dsv4lab.paging import check_positions, check_slots

MAX_ELEMENTS = 2**31  # of x: indices are 32 bits wide


def write_keys(
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
    kind: str,
    settled: bool = True,
    config: WriteConfig | None = None,
) -> None:
    """Normalise, rotate, quantise and store keys, in place.

    x (M, c) and norm_weight (c,) bf16 or f32; positions (M,) i64 up to 2^20; inv_freq (32,) f32, at most 1; slots (M,) i64
    below P * page_size, -1 (or any down to -2^31) = do not store, no slot twice; pages: a contiguous pool of P pages.
    kind "kv": c a multiple of 16 from 80 to 512, record "plain", "fp8" or "nvfp4"; "index": c = 128, record "plain", "fp8" or
    "fp4". What has a slot beyond the pool, below 2^31, is not stored (`paging` finds those, and doubles). Stored bytes are the
    reference's wherever float32 sums and rotations round to the same `x.dtype` as the reference's float64 ones. settled:
    norm_weight and inv_freq are no results of the kernel before, which may still run when they are read.
    Raises ValueError on shapes, names and page sizes, TypeError on dtypes.  Source: `reference.cache.cache_write`,
    `reference.indexer.index_key_write`.
    """
    _check_rows(x, norm_weight, positions, inv_freq, slots)
    elements = dict(element=ELEMENT[x.dtype], weight=ELEMENT[norm_weight.dtype])
    key = plan_of(pages, kind=kind, record=record, page_size=page_size, dim=x.shape[1], **elements)
    check_eps(eps)
    check_positions(positions)
    check_slots(slots, pages.shape[0], page_size, written=True)
    rows = x.shape[0]
    if x.numel() >= MAX_ELEMENTS:
        raise ValueError(f"x must have less than 2^31 elements, got {tuple(x.shape)}")
    if not rows:
        return
    config = config or WriteConfig.for_shape(rows, key)
    config.check()
    if config.key != key:
        raise ValueError(f"config must be for {key}, got {config.key}")
    runtime, weight = runtime_of(x), dense(norm_weight)
    config = replace(config, settled=settled and weight is norm_weight)
    runtime.call(
        _compiled(config, runtime),
        dense(x).view(torch.uint32),
        weight.view(torch.uint32),
        positions,
        inv_freq,
        bytes_of(pages),
        slots,
        eps,
    )


def _check_rows(
    x: torch.Tensor, norm_weight: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, slots: torch.Tensor
) -> None:
    for name, value in (("x", x), ("norm_weight", norm_weight)):
        if value.dtype not in ELEMENT:
            raise TypeError(f"{name} must be bfloat16 or float32, got {value.dtype}")
    check_dense("x", x, ("M", "c"))
    check_dense("norm_weight", norm_weight, x.shape[1:])
    check_dense("positions", positions, x.shape[:1], torch.int64)
    check_dense("slots", slots, x.shape[:1], torch.int64)
    check_dense("inv_freq", inv_freq, (ROPE_DIM // 2,), torch.float32)


def _compiled(config: WriteConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M and P left open."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.cache.write.kernel import WriteKeys

        key, rows = config.key, cute.sym_int()
        words = {"bf16": key.dim // 2, "f32": key.dim}
        examples = (
            fake(cutlass.Uint32, rows, words[key.element]),
            fake(cutlass.Uint32, words[key.weight]),
            fake(cutlass.Int64, rows, align=8),
            fake(cutlass.Float32, WARP, align=4),
            fake(cutlass.Uint8, cute.sym_int(), key.page_bytes, align=PAGE_ALIGN),
            fake(cutlass.Int64, rows, align=8),
            cutlass.Float32(0.0),
            fake_stream(),
        )
        return WriteKeys(config), examples

    return cache.kernel("dsv4lab.kernels.cache.write.kernel", config, build, runtime)
