"""The experts on Hopper, from token rows and their routing to the sum over each token's experts; no step waits for the host.

    permute   routing -> sorted rows and a list of token tiles (moe.permute)
    x         quantised as the model says; many tokens: rows copied into sorted order (moe.gather), few: read where they are
    product 1 clamped SwiGLU of gate and up, times the routing weight, rounded (gemm.mixed, grouped, paired)
    h         quantised as the model says
    product 2 (gemm.mixed, grouped)
    combine   a token's rows added in the order of expert ids (moe.combine)

The routing weight is applied before the second product, as the model's reference does (spec 5.2). Bytes for few tokens: the
three matrices of every expert that is hit. Flops: 6 M top_k D I.
"""

from __future__ import annotations

import torch

from dsv4lab.formats import PackedWeight
from dsv4lab.kernels.gemm.mixed.api import Slots, Tiles, grouped, linear
from dsv4lab.kernels.gemm.mixed.config import FEW, grouped_tokens
from dsv4lab.kernels.gemm.mixed.prepared import prepared
from dsv4lab.kernels.gemm.operators import activations
from dsv4lab.kernels.moe.combine.api import combine
from dsv4lab.kernels.moe.gather.api import gather_rows
from dsv4lab.kernels.moe.permute.api import permute


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_idx: torch.Tensor,
    w1: PackedWeight,
    w3: PackedWeight,
    w2: PackedWeight,
    *,
    limit: float,
    act: str,
) -> torch.Tensor:
    """Routed experts, as `reference.moe.moe`.

    x (M, D) bf16, or f32 with an act; weights (M, k) f32, expert_idx (M, k) i64; w1, w3 (E, I, D), w2 (E, D, I) stacked, w1
    and w3 in one format -> (M, D) f32. Tokens are not checked: ids outside 0 .. E-1 contribute nothing.
    Raises ValueError on shapes, TypeError on dtypes.
    """
    pair, down = prepared(w1, w3), prepared(w2)
    num_experts, top_k, rows = pair.shape[0], expert_idx.shape[1], expert_idx.numel()
    tokens, _ = grouped_tokens(rows, num_experts)
    order = permute(expert_idx.contiguous(), num_experts=num_experts, tile_tokens=tokens)
    tiles = Tiles(order.tiles, order.num_tiles, tokens)
    slots = Slots(order.slots, weights.contiguous(), top_k)

    # A calibrated scale belongs to an expert, so rows are quantised when it is known whose they are.
    static = act == "nvfp4" and w1.input_scale is not None
    gather = tokens <= FEW and not static
    values, factor = (x.contiguous(), None) if static else activations(x, act, None)
    if not gather:
        values = gather_rows(values, order.slots, top_k=top_k)
    if static:
        values, factor = activations(values, act, _of_rows(w1.input_scale, expert_idx, order.slots))
    h = grouped(
        values,
        pair,
        tiles,
        rows=rows,
        out_dtype=x.dtype,
        slots=slots,
        gather=gather,
        factor=factor,
        factor_of="row" if static else "token",
        limit=limit,
    )
    values, factor = activations(h, act, _of_rows(w2.input_scale, expert_idx, order.slots) if act == "nvfp4" else None)
    y = grouped(values, down, tiles, rows=rows, out_dtype=x.dtype, factor=factor)
    return combine(y, order.position, top_k=top_k)


def _of_rows(input_scale: torch.Tensor | None, expert_idx: torch.Tensor, slots: torch.Tensor) -> torch.Tensor | None:
    """Each sorted row's scale, from one an expert."""
    return None if input_scale is None else input_scale.float()[expert_idx.flatten()[slots.long()]]


def shared_expert(
    x: torch.Tensor, w1: PackedWeight, w3: PackedWeight, w2: PackedWeight, *, limit: float, act: str
) -> torch.Tensor:
    """The expert of every token, as `reference.moe.expert`: x (M, D) bf16, or f32 with an act -> (M, D) of x.dtype."""
    values, factor = activations(x, act, w1.input_scale)
    h = linear(values, prepared(w1, w3), out_dtype=x.dtype, factor=factor, limit=limit)
    values, factor = activations(h, act, w2.input_scale)
    return linear(values, prepared(w2), out_dtype=x.dtype, factor=factor)
