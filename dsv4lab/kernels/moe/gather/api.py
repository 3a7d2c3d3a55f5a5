"""The row gather on any architecture: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.arguments import check_dense
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.moe.gather.config import MAX_WORDS, UNIT_BYTES, GatherConfig


def gather_rows(x: torch.Tensor, slots: torch.Tensor, *, top_k: int, config: GatherConfig | None = None) -> torch.Tensor:
    """Rows of tokens in the order of a permutation: y[p] = x[slots[p] // k], zeros where slots[p] is -1.

    x (M, D) bf16 or f32, contiguous, rows of a multiple of 16 bytes; slots (N,) i32, below M k (not checked: that would need
    the device) -> (N, D) of x.dtype.  Raises ValueError on shapes, TypeError on dtypes.
    """
    if x.dtype not in (torch.bfloat16, torch.float32) or slots.dtype != torch.int32:
        raise TypeError(f"x must be bfloat16 or float32 and slots int32, got {x.dtype} and {slots.dtype}")
    check_dense("x", x, ("M", "D"))
    check_dense("slots", slots, ("N",))
    if top_k < 1:
        raise ValueError(f"top_k must be positive, got {top_k}")
    (tokens, depth), rows = x.shape, slots.shape[0]
    row_bytes = depth * x.element_size()
    if row_bytes % UNIT_BYTES:
        raise ValueError(f"x must have rows of a multiple of {UNIT_BYTES} bytes, got D={depth} of {x.dtype}")
    if max(rows, tokens) * row_bytes // 4 >= MAX_WORDS:
        raise ValueError(f"x and the result must have less than 2^31 words, got {tokens} and {rows} rows of {row_bytes} bytes")
    y = torch.empty(rows, depth, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if not tokens:
        raise ValueError(f"x must have rows to gather, got none for {rows} slots")
    config = config or GatherConfig.for_shape(rows, row_bytes)
    runtime = runtime_of(x)
    runtime.call(_compiled(config, runtime), x.view(torch.int32), slots, y.view(torch.int32), top_k)
    return y


def _compiled(config: GatherConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M, N, D and k left open."""
    config.check()

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.moe.gather.kernel import GatherRows

        i32, rows, words = cutlass.Int32, cute.sym_int(), cute.sym_int(divisibility=UNIT_BYTES // 4)
        examples = (fake(i32, cute.sym_int(), words), fake(i32, rows, align=4), fake(i32, rows, words), i32(1), fake_stream())
        return GatherRows(config), examples

    return cache.kernel("dsv4lab.kernels.moe.gather.kernel", config, build, runtime)
