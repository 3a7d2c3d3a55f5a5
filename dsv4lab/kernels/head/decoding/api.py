"""Between a decode step and the next, on any architecture: checks, plans, launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.head.decoding.config import MAX_TOKENS, AdvanceConfig, MatchConfig, PlanConfig


def decode_plan(
    known: torch.Tensor, seqs: torch.Tensor, *, tokens: int, offset: int, ring_len: int, ratios: list[int]
) -> torch.Tensor:
    """Addresses of a step's tokens: contiguous (B,) int64 -> (4 + len(ratios), B tokens) int64, as the reference has them.

    known + offset must be >= 0. Raises ValueError on shapes and counts, TypeError on dtypes.
    Source: `reference.decoding.decode_plan`.
    """
    _check(known.shape[0], known=known, seqs=seqs)
    if ring_len < 1:
        raise ValueError(f"ring_len must be >= 1, got {ring_len}")
    config = PlanConfig(tokens, tuple(ratios))
    config.check()
    rows = known.shape[0] * tokens
    if rows >= MAX_TOKENS:
        raise ValueError(f"B * tokens must be < {MAX_TOKENS}, got {rows}")
    out = known.new_empty((4 + len(ratios), rows))
    if rows:
        runtime = runtime_of(known)
        runtime.call(_compiled(config, runtime), known, seqs, out, offset, ring_len)
    return out


def match_drafts(choices: torch.Tensor, step_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many drafts stand, and the token after them: contiguous (B, n + 1) int64, n <= 15 -> (B,), (B,) int64.

    Raises ValueError on shapes, TypeError on dtypes.  Source: `reference.decoding.match_drafts`.
    """
    batch, drafts = _steps(step_ids)
    _check(batch, drafts + 1, choices=choices, step_ids=step_ids)
    accepted, next_ids = choices.new_empty(batch), choices.new_empty(batch)
    if batch:
        config = MatchConfig(drafts)
        config.check()
        runtime = runtime_of(choices)
        runtime.call(_compiled(config, runtime), choices, step_ids, accepted, next_ids)
    return accepted, next_ids


def advance_decode(
    step_ids: torch.Tensor, known: torch.Tensor, limit: torch.Tensor, num_accepted: torch.Tensor, next_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count what a step has brought, in place: step_ids (B, n + 1), n <= 15, others (B,), contiguous int64; num_accepted 0 to n
    -> new ids (B, n + 1), rows (B,) int64. Raises ValueError on shapes, TypeError on dtypes.

    Source: `reference.decoding.advance_decode`.
    """
    batch, drafts = _steps(step_ids)
    _check(batch, drafts + 1, step_ids=step_ids)
    _check(batch, known=known, limit=limit, num_accepted=num_accepted, next_ids=next_ids)
    new_ids, rows = torch.empty_like(step_ids), torch.empty_like(known)
    if batch:
        config = AdvanceConfig(drafts)
        config.check()
        runtime = runtime_of(known)
        args = (step_ids, known, limit, num_accepted, next_ids, new_ids, rows)
        runtime.call(_compiled(config, runtime), *args)
    return new_ids, rows


def _steps(step_ids: torch.Tensor) -> tuple[int, int]:
    if step_ids.ndim != 2 or not step_ids.shape[1]:
        raise ValueError(f"step_ids must be (B, n + 1), got {tuple(step_ids.shape)}")
    return step_ids.shape[0], step_ids.shape[1] - 1


def _check(*shape: int, **tensors: torch.Tensor) -> None:
    for name, value in tensors.items():
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {value.dtype}")
        if tuple(value.shape) != shape or not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous {shape}, got {tuple(value.shape)}, strides {value.stride()}")


def _compiled(config: PlanConfig | MatchConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with B left open."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.head.decoding import kernel

        batch = cute.sym_int()

        def i64(*shape: Any) -> Any:
            return fake(cutlass.Int64, *shape, align=8)

        if isinstance(config, PlanConfig):
            where = (i64(batch), i64(batch), i64(4 + len(config.ratios), cute.sym_int()))
            return kernel.Plan(config), (*where, cutlass.Int64(0), cutlass.Int64(1), fake_stream())
        step = (batch, config.drafts + 1)
        if isinstance(config, AdvanceConfig):
            vectors = (i64(batch) for _ in range(4))
            return kernel.Advance(config), (i64(*step), *vectors, i64(*step), i64(batch), fake_stream())
        return kernel.Match(config), (i64(*step), i64(*step), i64(batch), i64(batch), fake_stream())

    return cache.kernel("dsv4lab.kernels.head.decoding.kernel", config, build, runtime)
