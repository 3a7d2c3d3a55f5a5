"""The experts on Hopper, from token rows and their routing to the sum over each token's experts; no step waits for the host.

    permute   routing -> sorted rows and a list of token tiles (moe.permute); a token alone has its rows sorted by no launch:
              a tile for each, and the last step puts them in order
    x         quantised as the model says; many tokens: rows copied into sorted order (moe.gather), few: read where they are
    product 1 clamped SwiGLU of gate and up, times the routing weight, rounded (gemm.mixed, grouped, paired)
    h         quantised as the model says, by product 1 itself where that is faster (`gemm.mixed.config.requantises`)
    product 2 (gemm.mixed, grouped)
    combine   a token's rows added in the order of expert ids, the shared expert's last (moe.combine)

The shared expert of a token alone, where it has the routed ones' form, is one more matrix of both products, the first to be
multiplied: its weights arrive while the router still runs (`gemm.mixed.config`, beside). Otherwise it runs on a second stream.

The routing weight is applied before the second product, as the model's reference does (spec 5.2). Bytes for few tokens: the
three matrices of every expert that is hit. Flops: 6 M top_k D I.
"""

from __future__ import annotations

import torch

from dsv4lab.arguments import check_experts, check_limit, check_routing
from dsv4lab.formats import PackedWeight
from dsv4lab.kernels._common.aside import Aside
from dsv4lab.kernels._common.elements import dense
from dsv4lab.kernels.gemm.mixed.api import Slots, Tiles, grouped, linear
from dsv4lab.kernels.gemm.mixed.config import FEW, grouped_tokens, requantises
from dsv4lab.kernels.gemm.mixed.prepared import prepared
from dsv4lab.kernels.gemm.operators import activations, factor_of
from dsv4lab.kernels.moe.combine.api import combine
from dsv4lab.kernels.moe.gather.api import gather_rows
from dsv4lab.kernels.moe.permute.api import Permutation, permute


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
    """Routed experts.

    x (M, D) bf16, or f32 with an act; weights (M, k) f32, expert_idx (M, k) i64; w1, w3 (E, I, D), w2 (E, D, I) stacked, w1
    and w3 in one format and of one input_scale, w1's being taken -> (M, D) f32. Tokens are not checked: ids outside 0 .. E-1
    contribute nothing.
    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.moe.moe`.
    """
    y, order = _rows(x, weights, expert_idx, w1, w3, w2, None, limit=limit, act=act)
    return _combined(y, order, expert_idx, w1)


Three = tuple[PackedWeight, PackedWeight, PackedWeight]  # w1, w3, w2


def layer(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_idx: torch.Tensor,
    routed: Three,
    shared: Three,
    *,
    limit: float,
    act: str,
    shared_act: str,
) -> torch.Tensor:
    """Routed experts and the shared one, as `reference.moe.moe_layer`: arguments as for `experts` and `shared_expert`
    -> (M, D) of x.dtype: the bits of `moe_combine` of both. Raises as they do.
    """
    if together(x, expert_idx, routed, shared, act=act, shared_act=shared_act):
        y, order = _rows(x, weights, expert_idx, *routed, shared, limit=limit, act=act)
        top_k = expert_idx.shape[1]
        return _combined(y[:top_k], order, expert_idx, routed[0], y[top_k:])
    aside = Aside(x.device)
    with aside.run():
        z = shared_expert(x, *shared, limit=limit, act=shared_act)
    y, order = _rows(x, weights, expert_idx, *routed, None, limit=limit, act=act)
    aside.join()
    return _combined(y, order, expert_idx, routed[0], z)


def together(x: torch.Tensor, expert_idx: torch.Tensor, routed: Three, shared: Three, *, act: str, shared_act: str) -> bool:
    """Whether the shared expert is one more matrix of the routed ones' products: for one token, and matrices of one form.

    Not with calibrated scales, of which activations have one for each expert.
    """
    alike = all(r.format == s.format and r.shape[-2:] == s.shape[-2:] for r, s in zip(routed, shared, strict=True))
    given = act != "none" and any(w.input_scale is not None for w in (*routed, *shared))
    tokens, _ = grouped_tokens(expert_idx.numel(), routed[0].shape[0])
    return x.shape[0] == 1 and alike and act == shared_act and not given and tokens <= FEW


def _combined(
    y: torch.Tensor, order: Permutation | None, expert_idx: torch.Tensor, w1: PackedWeight, shared: torch.Tensor | None = None
) -> torch.Tensor:
    """A token's rows added, the shared expert's last."""
    top_k = expert_idx.shape[1]
    if order is None:
        return combine(y, expert_idx.contiguous().view(-1), top_k=top_k, shared=shared, num_experts=w1.shape[0])
    return combine(y, order.position, top_k=top_k, shared=shared)


def _rows(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_idx: torch.Tensor,
    w1: PackedWeight,
    w3: PackedWeight,
    w2: PackedWeight,
    shared: Three | None,
    *,
    limit: float,
    act: str,
) -> tuple[torch.Tensor, Permutation | None]:
    """What each expert makes of each of its rows (rows, D), sorted, or of one token in the order of its choices: then there
    is no order, and the shared expert's row, if it is given, comes last.
    """
    check_routing(x, weights, expert_idx)
    check_limit(limit)
    check_experts(x, w1, w3, w2, stacked=True)
    if shared is not None:
        check_experts(x, *shared, stacked=False)
    pair, down = prepared(w1, w3), prepared(w2)
    more = (None, None) if shared is None else (prepared(shared[0], shared[1]), prepared(shared[2]))
    num_experts, top_k, rows = pair.shape[0], expert_idx.shape[1], expert_idx.numel()
    tokens, _ = grouped_tokens(rows, num_experts)
    # A calibrated scale belongs to an expert, so rows are quantised when it is known whose they are.
    static = act == "nvfp4" and w1.input_scale is not None
    given = _of_matrices(w2.input_scale) if act == "nvfp4" else None
    ids = expert_idx.contiguous()
    alone = rows == top_k and not static and given is None and tokens <= FEW
    order = None if alone else permute(ids, num_experts=num_experts, tile_tokens=tokens)
    tiles = Tiles.of_rows(ids.view(-1), tokens) if order is None else Tiles(order.tiles, order.num_tiles, tokens)
    slots = Slots(None if order is None else order.slots, weights.contiguous(), top_k)
    gather = tokens <= FEW and not static
    values, factor = (dense(x), None) if static else activations(x, act, None)
    if not gather and order is not None:
        values = gather_rows(values, order.slots, top_k=top_k)
    if static:
        values, _ = activations(values, act, _of_rows(w1.input_scale, ids, slots.slots))
        factor = _of_matrices(w1.input_scale)
    requant = _requant(x, act, w2.input_scale, tokens)
    h = grouped(
        values,
        pair,
        tiles,
        rows=rows,
        out_dtype=x.dtype,
        slots=slots,
        gather=gather,
        factor=factor,
        factor_of="matrix" if static else "token",
        limit=limit,
        requant=requant,
        beside=more[0],
    )
    factor = given
    if requant is None:
        h, of_rows = activations(h, act, _of_rows(given, ids, slots.slots))
        factor = of_rows if given is None else given
    of = factor_of(given)
    return grouped(h, down, tiles, rows=rows, out_dtype=x.dtype, factor=factor, factor_of=of, beside=more[1]), order


def _of_matrices(input_scale: torch.Tensor | None) -> torch.Tensor | None:
    """One scale an expert, (E,) f32."""
    return None if input_scale is None else input_scale.float().reshape(-1).contiguous()


def _of_rows(input_scale: torch.Tensor | None, ids: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor | None:
    """Each sorted row's scale, from one an expert, by copies and gathers alone; of rows past the last, whose slot is -1, any
    expert's. Rows that no launch has sorted have no such scale.
    """
    if input_scale is None or slots is None:
        return None
    known = ids.new_zeros(ids.numel() + 1)
    known[:-1] = ids.view(-1)
    return input_scale.float()[known[slots.long()]]


def _requant(x: torch.Tensor, act: str, input_scale: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """The scales by which the first product quantises what it writes; None: it does not, as for float32."""
    if x.dtype != torch.bfloat16 or not requantises(act, tokens=tokens, given=input_scale is not None):
        return None
    return _of_matrices(input_scale)


def shared_expert(
    x: torch.Tensor, w1: PackedWeight, w3: PackedWeight, w2: PackedWeight, *, limit: float, act: str
) -> torch.Tensor:
    """The expert of every token, as `reference.moe.expert`: x (M, D) bf16, or f32 with an act -> (M, D) of x.dtype.

    Raises ValueError on shapes, TypeError on dtypes.
    """
    check_limit(limit)
    check_experts(x, w1, w3, w2, stacked=False)
    values, factor = activations(x, act, w1.input_scale)
    requant = _requant(x, act, w2.input_scale, x.shape[0])
    of = factor_of(w1.input_scale)
    h = linear(values, prepared(w1, w3), out_dtype=x.dtype, factor=factor, factor_of=of, limit=limit, requant=requant)
    values, factor = activations(h, act, w2.input_scale) if requant is None else (h, requant)
    return linear(values, prepared(w2), out_dtype=x.dtype, factor=factor, factor_of=factor_of(w2.input_scale))
