"""The combination of experts' rows on any architecture: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.arguments import check_dense
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.elements import ELEMENT
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.moe.combine.config import DEPTH_MULTIPLE, MAX_ELEMENTS, CombineConfig


def combine(
    y: torch.Tensor,
    position: torch.Tensor,
    *,
    top_k: int,
    shared: torch.Tensor | None = None,
    num_experts: int | None = None,
    config: CombineConfig | None = None,
) -> torch.Tensor:
    """Sum each token's rows in the order of their positions, which is that of expert ids; add `shared`, rounding once.

    y (N, D) bf16 or f32; position (M k,) i32, below N or -1, which adds nothing; shared (M, D) bf16 or f32; all contiguous,
    D % 8 == 0 -> (M, D) of shared's dtype, f32 without one. num_experts E: position has expert ids instead, i64, and y the
    slots' rows in order, N = M k; ids outside 0 .. E-1 add nothing. Equal to the reference's sum in every bit: float32, from
    zero, one row after another, `shared` last.  Raises ValueError on shapes, TypeError on dtypes.
    """
    kind = torch.int32 if num_experts is None else torch.int64
    check_dense("position", position, ("M k",), kind)
    if top_k < 1 or position.shape[0] % top_k:
        raise ValueError(f"position must be (M k,), got {tuple(position.shape)}, k={top_k}")
    _check_rows("y", y)
    if num_experts is not None and (num_experts < 1 or y.shape[0] != position.shape[0]):
        raise ValueError(f"y must have the {position.shape[0]} rows of the slots for {num_experts} experts, got {y.shape[0]}")
    tokens = position.shape[0] // top_k
    if tokens and not y.shape[0]:
        raise ValueError(f"y must have rows to sum, got none for {tokens} tokens")
    return _launch(y, position, tokens, shared, top_k, config, indexed=True, experts=num_experts or 0)


def moe_combine(routed: torch.Tensor, shared: torch.Tensor, *, config: CombineConfig | None = None) -> torch.Tensor:
    """Routed sum plus shared expert, rounded once. routed (M, D) f32, shared (M, D) bf16 or f32 -> like shared.

    Both contiguous, D % 8 == 0. Equal to the reference in every bit.  Raises ValueError on shapes, TypeError on dtypes.
    """
    _check_rows("routed", routed)
    if routed.dtype != torch.float32:
        raise TypeError(f"routed must be float32, got {routed.dtype}")
    none = torch.empty(1, dtype=torch.int32, device=routed.device)
    return _launch(routed, none, routed.shape[0], shared, 1, config, indexed=False)


def _check_rows(name: str, value: torch.Tensor) -> None:
    if value.dtype not in ELEMENT:
        raise TypeError(f"{name} must be bfloat16 or float32, got {value.dtype}")
    check_dense(name, value, ("M", "D"))
    if value.shape[1] % DEPTH_MULTIPLE:
        raise ValueError(f"{name} must be (M, D) with D % {DEPTH_MULTIPLE} == 0, got {tuple(value.shape)}")


def _launch(
    y: torch.Tensor,
    position: torch.Tensor,
    tokens: int,
    shared: torch.Tensor | None,
    top_k: int,
    config: CombineConfig | None,
    *,
    indexed: bool,
    experts: int = 0,
) -> torch.Tensor:
    depth = y.shape[1]
    if shared is not None:
        _check_rows("shared", shared)
        if shared.shape != (tokens, depth):
            raise ValueError(f"shared must be ({tokens}, {depth}), got {tuple(shared.shape)}")
    if max(y.shape[0], tokens) * depth >= MAX_ELEMENTS:
        raise ValueError(f"y and the result must have less than 2^31 elements, got {tuple(y.shape)} and {tokens} tokens")
    dtype = torch.float32 if shared is None else shared.dtype
    out = torch.empty(tokens, depth, dtype=dtype, device=y.device)
    if not out.numel():
        return out
    element, kind = ELEMENT[y.dtype], None if shared is None else ELEMENT[shared.dtype]
    config = config or CombineConfig.for_shape(tokens, depth, element, top_k, kind, indexed=indexed, experts=experts)
    config.check()
    want = (element, top_k, kind, indexed, experts)
    if (config.y, config.top_k, config.shared, config.indexed, config.experts) != want:
        raise ValueError(f"config must be for (y, top_k, shared, indexed, experts) = {want}, got {config}")
    runtime = runtime_of(y)
    runtime.call(_compiled(config, runtime), y, position, out if shared is None else shared, out)
    return out


def _compiled(config: CombineConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M, N and D left open."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.moe.combine.kernel import Combine

        types = {"bf16": cutlass.BFloat16, "f32": cutlass.Float32}
        tokens, depth = cute.sym_int(), cute.sym_int(divisibility=DEPTH_MULTIPLE)
        examples = (
            fake(types[config.y], cute.sym_int(), depth),
            fake(cutlass.Int64, cute.sym_int(), align=8) if config.experts else fake(cutlass.Int32, cute.sym_int(), align=4),
            fake(types[config.out], tokens, depth),
            fake(types[config.out], tokens, depth),
            fake_stream(),
        )
        return Combine(config), examples

    return cache.kernel("dsv4lab.kernels.moe.combine.kernel", config, build, runtime)
