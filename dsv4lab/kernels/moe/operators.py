"""The mixture of experts as operators call it: `ENTRIES` for the registry. Imports no CuTeDSL."""

from __future__ import annotations

from typing import Any

import torch

from dsv4lab.formats import weights_of
from dsv4lab.kernels._common.elements import FLOATS, dense
from dsv4lab.kernels.entry import Entry
from dsv4lab.kernels.gemm.operators import why_not_mixed
from dsv4lab.kernels.moe.combine.api import moe_combine
from dsv4lab.kernels.moe.combine.config import DEPTH_MULTIPLE
from dsv4lab.kernels.moe.combine.config import MAX_TOP_K as MAX_ROWS
from dsv4lab.kernels.moe.experts import experts, layer, shared_expert
from dsv4lab.kernels.moe.permute.config import MAX_ENTRIES
from dsv4lab.kernels.moe.router.api import router_hash, router_topk
from dsv4lab.kernels.moe.router.config import MAX_EXPERTS, MAX_TOP_K, STEP

ARCHITECTURES = ("sm_90a", "sm_100a")
INTEGERS = (torch.int32, torch.int64)


def route_by_score(
    x: torch.Tensor, gate_weight: torch.Tensor, bias: torch.Tensor, *, top_k: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator `router_topk`."""
    args = (dense(x), dense(gate_weight), bias.float().contiguous())
    return router_topk(*args, top_k=top_k, route_scale=route_scale)


def route_by_hash(
    x: torch.Tensor, gate_weight: torch.Tensor, tid2eid: torch.Tensor, token_ids: torch.Tensor, *, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator `router_hash`."""
    args = (dense(x), dense(gate_weight), tid2eid.contiguous(), token_ids.contiguous())
    return router_hash(*args, route_scale=route_scale)


def combine_two(routed: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """The operator `moe_combine`."""
    return moe_combine(dense(routed), dense(shared))


Parts = list[torch.Tensor]  # of w1, w3 and w2, routed, then shared; a part that a format lacks is empty


def run_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_idx: torch.Tensor,
    fmts: str,
    *parts: Parts,
    limit: float,
    act: str,
) -> torch.Tensor:
    """The operator `moe_experts`."""
    w1, w3, w2 = weights_of(fmts, *parts)
    return experts(x, weights, expert_idx, w1, w3, w2, limit=limit, act=act)


def run_shared_expert(
    x: torch.Tensor,
    fmts: str,
    *parts: Parts,
    limit: float,
    act: str,
) -> torch.Tensor:
    """The operator `shared_expert`."""
    w1, w3, w2 = weights_of(fmts, *parts)
    return shared_expert(x, w1, w3, w2, limit=limit, act=act)


def run_layer(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_idx: torch.Tensor,
    fmts: str,
    *parts: Parts,
    limit: float,
    act: str,
    shared_act: str,
) -> torch.Tensor:
    """The operator `moe_layer`."""
    w1, w3, w2, s1, s3, s2 = weights_of(fmts, *parts)
    routed, shared = (w1, w3, w2), (s1, s3, s2)
    return layer(x, weights, expert_idx, routed, shared, limit=limit, act=act, shared_act=shared_act)


def _layer_refuses(
    x: torch.Tensor,
    weights: torch.Tensor,
    expert_idx: torch.Tensor,
    fmts: str,
    codes: Parts,
    *parts: Parts,
    limit: float,
    act: str,
    shared_act: str,
) -> str | None:
    names, why = fmts.split(","), _ids_refuse(expert_idx)
    for some, how in ((slice(3), act), (slice(3, 6), shared_act)):
        of = ",".join(names[some])
        why = why or _shared_refuses(x, of, codes[some], *(p[some] for p in parts), limit=limit, act=how)
    return why


def _experts_refuse(x: torch.Tensor, weights: torch.Tensor, expert_idx: torch.Tensor, *parts: Any, **how: Any) -> str | None:
    return _ids_refuse(expert_idx) or _shared_refuses(x, *parts, **how)


def _ids_refuse(expert_idx: torch.Tensor) -> str | None:
    if expert_idx.numel() > MAX_ENTRIES or expert_idx.shape[-1] > MAX_ROWS:
        return f"expert_idx must have {MAX_ENTRIES} ids at most, {MAX_ROWS} a token, got {tuple(expert_idx.shape)}"
    return None


def _shared_refuses(
    x: torch.Tensor,
    fmts: str,
    codes: Parts,
    scale: Parts,
    *_: Parts,
    limit: float,
    act: str,
) -> str | None:
    names = fmts.split(",")
    if names[0] != names[1]:
        return f"w1 and w3 must have one format, got {names[0]} and {names[1]}"
    if act == "none" and x.dtype != torch.bfloat16:
        return f"x must be bfloat16 without an act, got {x.dtype}"
    why = (why_not_mixed(x, n, c, s if s.numel() else None, act) for n, c, s in zip(names, codes, scale, strict=True))
    return next((reason for reason in why if reason), None)


def _router_refuses(x: torch.Tensor, gate_weight: torch.Tensor, top_k: int) -> str | None:
    if x.dtype not in FLOATS or gate_weight.dtype not in FLOATS:
        return f"x and gate_weight must be bfloat16 or float32, got {x.dtype} and {gate_weight.dtype}"
    if x.ndim != 2 or not x.shape[1] or x.shape[1] % STEP:
        return f"x must be (M, D) with D % {STEP} == 0, got {tuple(x.shape)}"
    if gate_weight.shape[0] > MAX_EXPERTS or top_k > MAX_TOP_K:
        return f"E must be {MAX_EXPERTS} at most and k {MAX_TOP_K}, got {gate_weight.shape[0]} and {top_k}"
    return None


def _score_refuses(
    x: torch.Tensor, gate_weight: torch.Tensor, bias: torch.Tensor, *, top_k: int, route_scale: float
) -> str | None:
    return _router_refuses(x, gate_weight, top_k)


def _hash_refuses(
    x: torch.Tensor, gate_weight: torch.Tensor, tid2eid: torch.Tensor, token_ids: torch.Tensor, *, route_scale: float
) -> str | None:
    if tid2eid.dtype not in INTEGERS or token_ids.dtype not in INTEGERS:
        return f"tid2eid and token_ids must be int32 or int64, got {tid2eid.dtype} and {token_ids.dtype}"
    return _router_refuses(x, gate_weight, tid2eid.shape[1])


def _combine_refuses(routed: torch.Tensor, shared: torch.Tensor) -> str | None:
    if routed.dtype != torch.float32 or shared.dtype not in FLOATS:
        return f"routed must be float32 and shared bfloat16 or float32, got {routed.dtype} and {shared.dtype}"
    if routed.ndim != 2 or routed.shape != shared.shape or routed.shape[1] % DEPTH_MULTIPLE:
        return (
            f"routed and shared must be (M, D) with D % {DEPTH_MULTIPLE} == 0, got {tuple(routed.shape)}, {tuple(shared.shape)}"
        )
    return None


ENTRIES = (
    Entry("moe_experts", "sm_90a", run_experts, _experts_refuse),
    Entry("shared_expert", "sm_90a", run_shared_expert, _shared_refuses),
    Entry("moe_layer", "sm_90a", run_layer, _layer_refuses),
    *(
        Entry(operation, arch, function, refuses)
        for arch in ARCHITECTURES
        for operation, function, refuses in (
            ("router_topk", route_by_score, _score_refuses),
            ("router_hash", route_by_hash, _hash_refuses),
            ("moe_combine", combine_two, _combine_refuses),
        )
    ),
)
