"""Ids from the parts' largest logits, on any architecture: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.head.greedy.config import MAX_ELEMENTS, PickConfig


def pick_largest(parts: torch.Tensor, *, config: PickConfig | None = None) -> torch.Tensor:
    """The id in the largest of each row's numbers, taken as unsigned: parts (M, P) int64, contiguous, P >= 1, less than 2^31
    numbers -> ids (M,) int64.

    Raises ValueError on shapes, TypeError on dtypes.  Source: `gemm.mixed.api.partial_argmax`.
    """
    if parts.dtype != torch.int64:
        raise TypeError(f"parts must be int64, got {parts.dtype}")
    if parts.ndim != 2 or not parts.shape[1] or not parts.is_contiguous():
        raise ValueError(f"parts must be contiguous (M, P) with P >= 1, got {tuple(parts.shape)}, strides {parts.stride()}")
    if parts.numel() >= MAX_ELEMENTS:
        raise ValueError(f"parts must have less than 2^31 numbers, got {tuple(parts.shape)}")
    ids = torch.empty(parts.shape[0], dtype=torch.int64, device=parts.device)
    if ids.numel():
        config = config or PickConfig.for_shape(parts.shape[1])
        config.check()
        runtime = runtime_of(parts)
        runtime.call(_compiled(config, runtime), parts, ids)
    return ids


def _compiled(config: PickConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M and P left open."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.head.greedy.kernel import Pick

        tokens = cute.sym_int()
        i64 = cutlass.Int64
        return Pick(config), (fake(i64, tokens, cute.sym_int(), align=8), fake(i64, tokens, align=8), fake_stream())

    return cache.kernel("dsv4lab.kernels.head.greedy.kernel", config, build, runtime)
