"""Routers and experts."""

# No `from __future__ import annotations`: torch.library reads the schema from the annotations themselves.
from typing import Optional

import torch
from torch import Tensor

from dsv4lab.dispatch import operator
from dsv4lab.formats import PackedWeight, weights_of
from dsv4lab.ops.weights import pack_all
from dsv4lab.reference import moe as _moe


@operator()
def router_topk(x: Tensor, gate_weight: Tensor, bias: Tensor, *, top_k: int, route_scale: float) -> tuple[Tensor, Tensor]:
    """See `reference.moe.router_topk`."""
    return _moe.router_topk(x, gate_weight, bias, top_k=top_k, route_scale=route_scale)


@operator()
def router_hash(
    x: Tensor, gate_weight: Tensor, tid2eid: Tensor, token_ids: Tensor, *, route_scale: float
) -> tuple[Tensor, Tensor]:
    """See `reference.moe.router_hash`."""
    return _moe.router_hash(x, gate_weight, tid2eid, token_ids, route_scale=route_scale)


@operator()
def swiglu(gate: Tensor, up: Tensor, row_weight: Optional[Tensor] = None, *, limit: float) -> Tensor:
    """See `reference.moe.swiglu`."""
    return _moe.swiglu(gate, up, row_weight, limit=limit)


@operator()
def swiglu_fp8(
    gate: Tensor, up: Tensor, row_weight: Optional[Tensor] = None, *, limit: float, group: int
) -> tuple[Tensor, Tensor]:
    """See `reference.moe.swiglu_fp8`."""
    return _moe.swiglu_fp8(gate, up, row_weight, limit=limit, group=group)


@operator()
def swiglu_nvfp4(
    gate: Tensor, up: Tensor, row_weight: Optional[Tensor] = None, global_scale: Optional[Tensor] = None, *, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.moe.swiglu_nvfp4`."""
    codes, block_scale, used = _moe.swiglu_nvfp4(gate, up, row_weight, global_scale, limit=limit)
    return codes, block_scale, used.clone() if used is global_scale else used


@operator(fake=lambda x, *_, **__: x.new_empty(x.shape, dtype=torch.float32))
def _moe_experts(
    x: Tensor,
    weights: Tensor,
    expert_idx: Tensor,
    fmts: str,
    codes: list[Tensor],
    scale: list[Tensor],
    global_scale: list[Tensor],
    input_scale: list[Tensor],
    *,
    limit: float,
    act: str,
) -> Tensor:
    w1, w3, w2 = weights_of(fmts, codes, scale, global_scale, input_scale)
    return _moe.moe(x, weights, expert_idx, w1, w3, w2, limit=limit, act=act)


def moe(
    x: Tensor,
    weights: Tensor,
    expert_idx: Tensor,
    w1: PackedWeight,
    w3: PackedWeight,
    w2: PackedWeight,
    *,
    limit: float,
    act: str,
) -> Tensor:
    """See `reference.moe.moe`."""
    return _moe_experts(x, weights, expert_idx, *pack_all(w1, w3, w2), limit=limit, act=act)


@operator(fake=lambda x, *_, **__: x.new_empty(x.shape))
def _shared_expert(
    x: Tensor,
    fmts: str,
    codes: list[Tensor],
    scale: list[Tensor],
    global_scale: list[Tensor],
    input_scale: list[Tensor],
    *,
    limit: float,
    act: str,
) -> Tensor:
    w1, w3, w2 = weights_of(fmts, codes, scale, global_scale, input_scale)
    return _moe.expert(x, w1, w3, w2, limit=limit, act=act)


def shared_expert(x: Tensor, w1: PackedWeight, w3: PackedWeight, w2: PackedWeight, *, limit: float, act: str) -> Tensor:
    """See `reference.moe.expert`."""
    return _shared_expert(x, *pack_all(w1, w3, w2), limit=limit, act=act)


@operator(fake=lambda x, *_, **__: x.new_empty(x.shape))
def _moe_layer(
    x: Tensor,
    weights: Tensor,
    expert_idx: Tensor,
    fmts: str,
    codes: list[Tensor],
    scale: list[Tensor],
    global_scale: list[Tensor],
    input_scale: list[Tensor],
    *,
    limit: float,
    act: str,
    shared_act: str,
) -> Tensor:
    matrices = weights_of(fmts, codes, scale, global_scale, input_scale)
    return _moe.moe_layer(x, weights, expert_idx, *matrices, limit=limit, act=act, shared_act=shared_act)


def moe_layer(
    x: Tensor,
    weights: Tensor,
    expert_idx: Tensor,
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
) -> Tensor:
    """See `reference.moe.moe_layer`. Inside of `starting`, the shared expert may run beside what comes before."""
    parts = pack_all(w1, w3, w2, shared_w1, shared_w3, shared_w2)
    return _moe_layer(x, weights, expert_idx, *parts, limit=limit, act=act, shared_act=shared_act)


@operator()
def moe_combine(routed: Tensor, shared: Tensor) -> Tensor:
    """See `reference.moe.moe_combine`."""
    return _moe.moe_combine(routed, shared)
