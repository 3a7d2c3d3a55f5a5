"""The top-k selection on any architecture: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.arguments import check_contiguous
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.indexer.topk.config import MAX_ENTRIES, MAX_K, IndexTopkConfig

_INTEGERS = {torch.int32: "i32", torch.int64: "i64"}


def index_topk(
    scores: torch.Tensor, num_visible: torch.Tensor, *, k: int, config: IndexTopkConfig | None = None
) -> torch.Tensor:
    """The k best of every query's visible entries, in ascending order of entries, then -1. Ties go to the lower entry.

    scores (M, T) f32, T <= 262,144; num_visible (M,) i32 or i64; contiguous; k from 1 to 2048 -> (M, k) i32. All visible
    entries where there are at most k. Entries from num_visible on are not looked at. -0 equals 0; a NaN is taken only where
    there are not k numbers, unlike in the reference, which takes it first.
    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.indexer.index_topk`.
    """
    why = refuses(scores, num_visible, k=k)
    if why is not None:
        raise why
    check_contiguous(scores=scores, num_visible=num_visible)
    rows, entries = scores.shape
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    if not rows or not entries:
        return out.fill_(-1)
    runtime = runtime_of(scores)
    visible = _INTEGERS[num_visible.dtype]
    config = config or IndexTopkConfig.for_shape(rows, entries, runtime.multiprocessors, visible=visible)
    config.check()
    if config.visible != visible or config.capacity < entries:
        raise ValueError(f"config must be for {visible} and hold {entries} entries, got {config}")
    clusters = min(rows, runtime.clusters(config.cluster) * config.resident) if config.alone else rows
    runtime.call(_compiled(config, runtime), scores, num_visible, out, clusters)
    return out


def refuses(scores: torch.Tensor, num_visible: torch.Tensor, *, k: int) -> Exception | None:
    """What is wrong with these arguments."""
    if scores.dtype != torch.float32 or num_visible.dtype not in _INTEGERS:
        return TypeError(f"scores must be float32, num_visible int32 or int64, got {scores.dtype} and {num_visible.dtype}")
    if scores.dim() != 2 or scores.shape[1] > MAX_ENTRIES:
        return ValueError(f"scores must be (M, T) with T <= {MAX_ENTRIES}, got {tuple(scores.shape)}")
    if num_visible.shape != scores.shape[:1]:
        return ValueError(f"num_visible must be ({scores.shape[0]},), got {tuple(num_visible.shape)}")
    if not 1 <= k <= MAX_K:
        return ValueError(f"k must be 1 to {MAX_K}, got {k}")
    return None


def _compiled(config: IndexTopkConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M, T and k left open."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.indexer.topk.kernel import IndexTopk

        integer = {"i32": cutlass.Int32, "i64": cutlass.Int64}[config.visible]
        m = cute.sym_int()
        examples = (
            fake(cutlass.Float32, m, cute.sym_int(), align=4),
            fake(integer, m, align=integer.width // 8),
            fake(cutlass.Int32, m, cute.sym_int(), align=4),
            cutlass.Int32(1),
            fake_stream(),
        )
        return IndexTopk(config), examples

    return cache.kernel("dsv4lab.kernels.indexer.topk.kernel", config, build, runtime)
