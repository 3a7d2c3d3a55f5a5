"""Mixture of experts: two routers, clamped SwiGLU experts, and the combination with the shared expert (spec 5)."""

from __future__ import annotations

import torch

from dsv4lab.arguments import check_experts, check_limit, check_routing, check_shape, check_top_k
from dsv4lab.formats import PackedWeight
from dsv4lab.paging import check_range
from dsv4lab.reference.gemm import linear, matmul_rows
from dsv4lab.reference.quant import quantize_fp8_rows, quantize_nvfp4


def router_scores(x: torch.Tensor, gate_weight: torch.Tensor) -> torch.Tensor:
    """sqrt(softplus(W x)): x (M, D), gate_weight (E, D) -> (M, E) f32."""
    logits = matmul_rows(x.float(), gate_weight.float()).double()
    return torch.logaddexp(logits, torch.zeros_like(logits)).sqrt().float()


def router_topk(
    x: torch.Tensor, gate_weight: torch.Tensor, bias: torch.Tensor, *, top_k: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route by score: the bias chooses, the score weighs. Ties go to the lower expert id.

    x (M, D); gate_weight (E, D); bias (E,) f32 -> weights (M, top_k) f32, expert ids (M, top_k) int64.
    Raises ValueError on bias and top_k.  Source: spec 5.1.
    """
    check_shape("bias", bias, gate_weight.shape[:1])
    check_top_k(top_k, gate_weight.shape[0])
    scores = router_scores(x, gate_weight)
    expert_idx = torch.sort(scores + bias.float(), dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    return _route_weights(scores, expert_idx, route_scale), expert_idx


def router_hash(
    x: torch.Tensor, gate_weight: torch.Tensor, tid2eid: torch.Tensor, token_ids: torch.Tensor, *, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route by token id: the table chooses, the learned score still weighs.

    x (M, D); gate_weight (E, D); tid2eid (V, top_k) int; token_ids (M,) int -> weights (M, top_k) f32, ids (M, top_k) int64.
    Raises ValueError on token_ids of another shape, or outside the table.
    """
    check_shape("token_ids", token_ids, x.shape[:1])
    check_range("token_ids", token_ids, tid2eid.shape[0], start=0)
    expert_idx = tid2eid[token_ids].long()
    check_range("ids of tid2eid", expert_idx, gate_weight.shape[0], start=0)
    return _route_weights(router_scores(x, gate_weight), expert_idx, route_scale), expert_idx


def _route_weights(scores: torch.Tensor, expert_idx: torch.Tensor, route_scale: float) -> torch.Tensor:
    """w = s[idx] / sum(s[idx]) * route_scale."""
    chosen = scores.double().gather(1, expert_idx)
    return (chosen / chosen.sum(-1, keepdim=True) * route_scale).float()


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, *, limit: float) -> torch.Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit) -> f64 (spec 5.2). Raises ValueError on up and limit."""
    check_shape("up", up, gate.shape)
    check_limit(limit)
    return torch.nn.functional.silu(gate.double().clamp(max=limit)) * up.double().clamp(-limit, limit)


def swiglu(gate: torch.Tensor, up: torch.Tensor, row_weight: torch.Tensor | None = None, *, limit: float) -> torch.Tensor:
    """`clamped_swiglu` times a factor for each row, rounded once: gate, up (..., I), row_weight (...) f32 -> like gate.

    Raises ValueError on shapes and limit.
    """
    if row_weight is not None:
        check_shape("row_weight", row_weight, gate.shape[:-1])
    h = clamped_swiglu(gate, up, limit=limit)
    return (h if row_weight is None else h * row_weight[..., None]).to(gate.dtype).contiguous()


def swiglu_fp8(
    gate: torch.Tensor, up: torch.Tensor, row_weight: torch.Tensor | None = None, *, limit: float, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`swiglu`, then FP8 rows: gate, up (..., I) -> codes (..., I) e4m3, scale (..., ceil(I / group)) e8m0 (spec 8.2).

    Raises as both.
    """
    return quantize_fp8_rows(swiglu(gate, up, row_weight, limit=limit), group=group)


def swiglu_nvfp4(
    gate: torch.Tensor,
    up: torch.Tensor,
    row_weight: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    *,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`swiglu`, then NVFP4: gate, up (..., I), I % 16 == 0 -> codes (..., I/2) u8, block_scale (..., I/16) e4m3, scale.

    Raises as both.
    """
    return quantize_nvfp4(swiglu(gate, up, row_weight, limit=limit), global_scale=global_scale)


def expert(
    x: torch.Tensor,
    w1: PackedWeight,
    w3: PackedWeight,
    w2: PackedWeight,
    *,
    limit: float,
    act: str,
    row_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """One expert: w2(clamped_swiglu(w1 x, w3 x) * row_weight). Also the shared expert, without row_weight.

    x (M, D); w1, w3 (I, D); w2 (D, I); row_weight (M,) f32, applied before w2 as the model's reference does
    -> (M, D) of x.dtype.  Raises as `swiglu` and `linear`.  Source: spec 5.2, 5.4.
    """
    check_experts(x, w1, w3, w2, stacked=False)
    h = swiglu(linear(x, w1, act=act), linear(x, w3, act=act), row_weight, limit=limit)
    return linear(h, w2, act=act)


def moe(
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
    """Routed experts: sum over a token's experts, accumulated in float32 in the order of expert ids.

    x (M, D); weights (M, k) f32, expert_idx (M, k) int64, an id outside of 0 .. E-1 (-1: an unused slot) adding nothing;
    w1, w3 (E, I, D), w2 (E, D, I) stacked -> (M, D) f32.  Raises ValueError on shapes and limit, TypeError on dtypes.
    """
    check_routing(x, weights, expert_idx)
    check_limit(limit)
    for weight in (w1, w3, w2):
        weight.check()
    check_experts(x, w1, w3, w2, stacked=True)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in expert_idx[(expert_idx >= 0) & (expert_idx < w1.shape[0])].unique().tolist():
        rows, slot = (expert_idx == e).nonzero(as_tuple=True)
        y = expert(x[rows], w1[e], w3[e], w2[e], limit=limit, act=act, row_weight=weights[rows, slot])
        out.index_add_(0, rows, y.float())
    return out


def moe_layer(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_idx: torch.Tensor,
    w1: PackedWeight,
    w3: PackedWeight,
    w2: PackedWeight,
    shared_w1: PackedWeight,
    shared_w3: PackedWeight,
    shared_w2: PackedWeight,
    *,
    limit: float,
    act: str,
    shared_act: str,
) -> torch.Tensor:
    """All experts of a layer: `moe_combine` of `moe` and of the shared `expert`.

    x (M, D); weights, expert_idx (M, k); w1, w3 (E, I, D), w2 (E, D, I); shared_w1, shared_w3 (J, D), shared_w2 (D, J); act,
    shared_act: activation quantisation of routed and shared matrices -> (M, D) of x.dtype.  Raises as `moe` and `expert`.
    Source: spec 5.2, 5.3, 5.4.
    """
    routed = moe(x, weights, expert_idx, w1, w3, w2, limit=limit, act=act)
    return moe_combine(routed, expert(x, shared_w1, shared_w3, shared_w2, limit=limit, act=shared_act))


def moe_combine(routed: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Routed sum plus shared expert, rounded once: routed (M, D) f32, shared (M, D) float -> like shared (spec 5.3).

    Raises ValueError on shapes.
    """
    check_shape("routed", routed, shared.shape)
    return (routed + shared.float()).to(shared.dtype).contiguous()
