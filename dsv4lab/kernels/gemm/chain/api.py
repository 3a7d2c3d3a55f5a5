"""Both products of one token's experts on Hopper, in one launch: checks, shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.arguments import check_dense
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.counters import counters
from dsv4lab.kernels._common.elements import ELEMENT
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.gemm.chain.config import ChainConfig
from dsv4lab.kernels.gemm.mixed.layout import K_PAD, TILE, PreparedWeight, record_words

Pair = tuple[PreparedWeight, PreparedWeight]


def chained(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_idx: torch.Tensor,
    routed: Pair,
    beside: Pair | None,
    *,
    limit: float,
    config: ChainConfig | None = None,
) -> torch.Tensor:
    """What each of one token's experts makes of it: W2 (SwiGLU(W1 x, W3 x) weight), h rounded like y.

    x (1, D) bf16; weights (k,) f32, expert_idx (k,) i64: results of ids outside 0 .. E-1 are anything; routed: w1 and w3 as a
    pair (E, I, D), and w2 (E, D, I), of one format, D and I multiples of 128; beside: the same of one matrix, with weight 1
    -> (k, D) bf16, and one row more for the matrices beside, the last. limit: SwiGLU's clamp, positive, or infinite for none.
    Raises ValueError on shapes, formats and limit, TypeError on dtypes. Source: `reference.moe.moe`.
    """
    pair, down = routed
    check_chain(routed, beside)
    dim, inner, top_k = down.shape[1], down.shape[2], expert_idx.shape[0]
    check_dense("x", x, (1, dim), torch.bfloat16)
    check_dense("weights", weights, (top_k,), torch.float32)
    check_dense("expert_idx", expert_idx, (top_k,), torch.int64)
    if not limit > 0:
        raise ValueError(f"limit must be positive, or infinite for none, got {limit}")
    rows = top_k + (beside is not None)
    h, y = (torch.empty(rows, n, dtype=x.dtype, device=x.device) for n in (inner, dim))
    if not rows:
        return y
    if config is None:
        padded = [w.records.shape[1] * TILE for w in routed]
        config = ChainConfig.for_shape(pair.format, ELEMENT[x.dtype], *padded, beside=beside is not None)
    config.check()
    if (config.first.format, config.first.beside) != (pair.format, beside is not None):
        raise ValueError(f"config must be of {pair.format}, beside={beside is not None}, got {config.first}")
    for weight in routed:
        if weight.records.shape[1] % config.first.chunks:
            raise ValueError(f"config must have chunks that divide {weight.records.shape[1]}, got {config.first.chunks}")
    more = routed if beside is None else beside
    runtime = runtime_of(x)
    runtime.call(
        _compiled(config, runtime),
        x,
        *(pair.records, pair.alpha, more[0].records, more[0].alpha, h),
        *(down.records, down.alpha, more[1].records, more[1].alpha, y),
        weights,
        expert_idx.view(torch.int32).view(-1, 2),
        counters("chain", x.device, 2 + rows),
        limit,
        config.ctas(rows, pair.slabs, runtime.multiprocessors),
    )
    return y


def chains(routed: Pair, beside: Pair | None) -> bool:
    """Whether `chained` takes these weights."""
    try:
        check_chain(routed, beside)
    except ValueError:
        return False
    return True


def check_chain(routed: Pair, beside: Pair | None) -> None:
    """Raises ValueError where matrices do not fit each other."""
    pair, down = routed
    experts, inner, dim = pair.shape
    if not pair.paired or down.paired or down.shape != (experts, dim, inner) or down.format != pair.format:
        raise ValueError(
            "routed must be a pair (E, I, D) and a matrix (E, D, I) of one format, got "
            f"{pair.shape} {pair.format}, paired={pair.paired}, and {down.shape} {down.format}, paired={down.paired}"
        )
    if dim % K_PAD or inner % K_PAD:  # nothing clears what a stage has past the end of K
        raise ValueError(f"routed must have D and I that are multiples of {K_PAD}, got {dim} and {inner}")
    for weight, mate in zip(routed, beside or (), strict=False):
        want, got = ((1, *weight.shape[1:]), weight.format, weight.paired), (mate.shape, mate.format, mate.paired)
        if got != want:
            raise ValueError(f"beside must have (shape, format, paired) = {want}, got {got}")


def _compiled(config: ChainConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with all sizes left open. Raises ValueError for an architecture without a class."""
    if runtime.arch != "sm_90a":
        raise ValueError(f"the experts of one token need sm_90a, got {runtime.arch}")

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.gemm.chain.sm90 import ChainSm90

        i32, f32, bf16 = cutlass.Int32, cutlass.Float32, cutlass.BFloat16
        free = cute.sym_int

        def matrix() -> tuple[Any, Any]:
            return fake(i32, free(), free(divisibility=2), record_words(config.first.format)), fake(f32, free(), 2, align=4)

        def rows() -> Any:
            return fake(bf16, free(), free(divisibility=8))

        examples = (
            rows(),
            *matrix(),
            *matrix(),
            rows(),
            *matrix(),
            *matrix(),
            rows(),
            fake(f32, free(), align=4),
            fake(i32, free(), 2, align=4),
            fake(i32, free(), align=4),
            f32(1.0),
            i32(1),
            fake_stream(),
        )
        return ChainSm90(config), examples

    return cache.kernel("dsv4lab.kernels.gemm.chain.sm90", config, build, runtime)
