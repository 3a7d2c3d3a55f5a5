"""The routers by score and by hash on any architecture: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.arguments import check_dense, check_top_k
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.counters import counters
from dsv4lab.kernels._common.elements import ELEMENT
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.moe.router.config import STEP, RouterConfig, choose
from dsv4lab.paging import check_range

_INTEGER = {torch.int32: "i32", torch.int64: "i64"}


def router_topk(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    top_k: int,
    route_scale: float,
    config: RouterConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route by score: the k largest of s + bias, s = sqrt(softplus(x W^T)); weights s / sum(s) * route_scale.

    x (M, D) and gate_weight (E, D) bf16 or f32, contiguous, D % 64 == 0; bias (E,) f32
    -> weights (M, k) f32, ids (M, k) i64 in descending order of s + bias, the lower id first where equal.
    A logit is within 2^-16 sum |w x| of the exact one whatever the numbers (2^-18 on random ones), s within 2^-20 of its
    function besides; ids differ from the exact ones only where s + bias are closer than that.
    Raises ValueError on shapes and top_k, TypeError on dtypes. Source: `reference.moe.router_topk`.
    """
    _, experts = _check_matrices(x, gate_weight)
    check_dense("bias", bias, (experts,), torch.float32)
    check_top_k(top_k, experts)
    table = torch.empty(1, top_k, dtype=torch.int64, device=x.device)
    return _launch(x, gate_weight, bias, table, table[0], top_k, route_scale, config, "score")


def router_hash(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    tid2eid: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    route_scale: float,
    config: RouterConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route by token id: ids are the table's row, the learned score still weighs them.

    x (M, D) and gate_weight (E, D) bf16 or f32, D % 64 == 0; tid2eid (V, k) and token_ids (M,) i32 or i64; all contiguous
    -> weights (M, k) f32, ids (M, k) i64. Errors as by score. Values are not checked, that would need the device: token ids
    outside the table take its first or last row, expert ids outside 0 .. E-1 weigh nothing.
    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.moe.router_hash`.
    """
    tokens, experts = _check_matrices(x, gate_weight)
    if tid2eid.dtype not in _INTEGER or token_ids.dtype not in _INTEGER:
        raise TypeError(f"tid2eid and token_ids must be int32 or int64, got {tid2eid.dtype} and {token_ids.dtype}")
    check_dense("tid2eid", tid2eid, ("V", "k"))
    if not tid2eid.numel():
        raise ValueError(f"tid2eid must have rows, got {tuple(tid2eid.shape)}")
    check_dense("token_ids", token_ids, (tokens,))
    check_range("token_ids", token_ids, tid2eid.shape[0], start=0)
    check_range("ids of tid2eid", tid2eid, experts, start=0)
    bias = torch.empty(experts, dtype=torch.float32, device=x.device)
    return _launch(x, gate_weight, bias, tid2eid, token_ids, tid2eid.shape[1], route_scale, config, "hash")


def _check_matrices(x: torch.Tensor, gate_weight: torch.Tensor) -> tuple[int, int]:
    """(M, E)."""
    if x.dtype not in ELEMENT or gate_weight.dtype not in ELEMENT:
        raise TypeError(f"x and gate_weight must be bfloat16 or float32, got {x.dtype} and {gate_weight.dtype}")
    check_dense("x", x, ("M", "D"))
    check_dense("gate_weight", gate_weight, ("E", "D"))
    if x.shape[1] != gate_weight.shape[1] or x.shape[1] % STEP or not x.shape[1]:
        raise ValueError(f"x and gate_weight must share D % {STEP} == 0, got D={x.shape[1]} and {gate_weight.shape[1]}")
    if max(x.numel(), gate_weight.numel()) >= 2**31:
        raise ValueError(f"x must have less than 2^31 elements, got {tuple(x.shape)}")
    return x.shape[0], gate_weight.shape[0]


def _launch(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    bias: torch.Tensor,
    table: torch.Tensor,
    token_ids: torch.Tensor,
    top_k: int,
    route_scale: float,
    config: RouterConfig | None,
    by: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, experts = x.shape[0], gate_weight.shape[0]
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
    if not tokens:
        return weights, ids
    runtime = runtime_of(x)
    kinds = (ELEMENT[x.dtype], ELEMENT[gate_weight.dtype])
    integers = dict(table=_INTEGER[table.dtype], token=_INTEGER[token_ids.dtype])
    if config is None:
        config = choose(tokens, x.shape[1], experts, top_k, by, *kinds, runtime.multiprocessors, **integers)
    config.check()
    given = (*kinds, experts, top_k, by, *integers.values())
    if (config.x, config.weight, config.experts, config.top_k, config.by, config.table, config.token) != given:
        raise ValueError(f"config must have x, weight, experts, top_k, by, table, token {given}, got {config}")
    splits = config.splits(tokens, x.shape[1], runtime.multiprocessors)
    partial = torch.empty(splits, tokens, config.padded, dtype=torch.float32, device=x.device)
    arrived = counters("router", x.device, -(-tokens // config.tokens) if config.fused else 1)
    tensors = (x, gate_weight, bias, table, token_ids, weights, ids, partial, arrived)
    runtime.call(_compiled(config, runtime), *tensors, route_scale)
    return weights, ids


def _compiled(config: RouterConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M, D, V and the parts of K left open."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.moe.router.kernel import Router

        f32 = cutlass.Float32
        types = {"bf16": cutlass.BFloat16, "f32": f32, "i32": cutlass.Int32, "i64": cutlass.Int64}
        m, d = cute.sym_int(), cute.sym_int(divisibility=STEP)
        examples = (
            fake(types[config.x], m, d),
            fake(types[config.weight], config.experts, d),
            fake(f32, config.experts, align=4),
            fake(types[config.table], cute.sym_int(), config.top_k, align=types[config.table].width // 8),
            fake(types[config.token], cute.sym_int(), align=types[config.token].width // 8),
            fake(f32, m, config.top_k, align=4),
            fake(cutlass.Int64, m, config.top_k, align=8),
            fake(f32, cute.sym_int(), m, config.padded),
            fake(cutlass.Int32, cute.sym_int(), align=4),
            f32(1.0),
            fake_stream(),
        )
        return Router(config), examples

    return cache.kernel("dsv4lab.kernels.moe.router.kernel", config, build, runtime)
