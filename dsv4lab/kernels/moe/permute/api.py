"""The token permutation on any architecture: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dsv4lab.arguments import check_dense
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.moe.permute.config import ROW_STEP, PermuteConfig, max_tiles


class Permutation(NamedTuple):
    """Entries (token, slot) of a routing, flat index m k + s, sorted by expert and inside an expert by flat index.

    slots (N,) i32: of sorted row p, the flat index; -1 past the last row, where entries were dropped.
    position (N,) i32: of a flat index, its sorted row; -1 where its expert id is none of 0 .. E-1.
    tiles (max_tiles, 4) i32: token tiles of a grouped GEMM, [expert, first row, end row, number of the expert among those hit],
    ascending; written up to num_tiles.
    num_tiles (1,) i32.
    """

    slots: torch.Tensor
    position: torch.Tensor
    tiles: torch.Tensor
    num_tiles: torch.Tensor


def permute(
    expert_idx: torch.Tensor, *, num_experts: int, tile_tokens: int, config: PermuteConfig | None = None
) -> Permutation:
    """Sort entries by expert and cut every expert's rows into token tiles, in one launch that the host does not wait for.

    expert_idx (M, k) i64, contiguous; ids outside 0 .. E-1 are dropped. tile_tokens T: the most rows of a tile, T % 8 == 0.
    An expert of n rows gets ceil(n / T) tiles, as even as multiples of 8 rows allow.
    Raises ValueError on shapes and sizes, TypeError on dtypes.
    """
    check_dense("expert_idx", expert_idx, ("M", "k"), torch.int64)
    if tile_tokens < ROW_STEP or tile_tokens % ROW_STEP:
        raise ValueError(f"tile_tokens must be a positive multiple of {ROW_STEP}, got {tile_tokens}")
    entries, device = expert_idx.numel(), expert_idx.device
    config = config or PermuteConfig.for_shape(entries, num_experts)
    config.check()
    if config.experts != num_experts or config.entries < entries:
        raise ValueError(f"config must have experts == {num_experts} and take {entries} entries, got {config}")
    found = Permutation(
        torch.empty(entries, dtype=torch.int32, device=device),
        torch.empty(entries, dtype=torch.int32, device=device),
        torch.empty(max_tiles(entries, num_experts, tile_tokens), 4, dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
    )
    if not entries:
        found.num_tiles.zero_()
        return found
    runtime = runtime_of(expert_idx)
    runtime.call(_compiled(config, runtime), expert_idx.view(-1), *found, tile_tokens)
    return found


def _compiled(config: PermuteConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with N and T left open."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.moe.permute.kernel import Permute

        i32, n = cutlass.Int32, cute.sym_int()
        examples = (
            fake(cutlass.Int64, n, align=8),
            fake(i32, n, align=4),
            fake(i32, n, align=4),
            fake(i32, cute.sym_int(), 4),
            fake(i32, 1, align=4),
            i32(8),
            fake_stream(),
        )
        return Permute(config), examples

    return cache.kernel("dsv4lab.kernels.moe.permute.kernel", config, build, runtime)
