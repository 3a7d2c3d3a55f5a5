"""The compressor's step on any architecture: checks, plan, launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dsv4lab.arguments import check_dense, check_eps, check_state
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.elements import ELEMENT
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.cache.plan import ROPE_DIM
from dsv4lab.kernels.cache.pool import bytes_of, plan_of
from dsv4lab.kernels.compressor.config import LANE, MAX_ELEMENTS, CompressConfig
from dsv4lab.paging import check_completed, check_steps

ARCHITECTURES = ("sm_90a", "sm_100a")


def compress(
    values: torch.Tensor,
    scores: torch.Tensor,
    ape: torch.Tensor,
    state: torch.Tensor,
    norm_weight: torch.Tensor,
    inv_freq: torch.Tensor,
    pages: torch.Tensor,
    positions: torch.Tensor,
    seq_idx: torch.Tensor,
    first_row: torch.Tensor,
    last_position: torch.Tensor,
    block_table: torch.Tensor,
    *,
    ratio: int,
    overlap: bool,
    eps: float,
    record: str,
    page_size: int,
    key: str,
    rounded: bool,
    settled: bool = True,
    config: CompressConfig | None = None,
) -> None:
    """Pool the entries that a step's tokens complete, store them as keys, move the tokens into the ring; in place.

    values, scores (M, o d) f32, columns together, rows a multiple of 4 floats apart; ape (ratio, o d), state (num_seqs, R, 2,
    o d) f32, R at least the tokens that an entry pools; norm_weight (d,) bf16 or f32; inv_freq (32,) f32; pages: a pool of
    `record`, plain ones bf16 or f32; positions, seq_idx, first_row, last_position (M,) i64; block_table (num_seqs, nb) i32,
    all contiguous. ratio 4 with overlap or 128 without; d is 512 for kv keys, 128 for index keys. State is the reference's in
    every bit, pooled values are within 2^-20 of the largest value pooled, the rest as in `kernels.cache.key`. settled: ape,
    norm_weight and inv_freq are no results of the kernel before, which may still run when they are read.
    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.compressor.compress`.
    """
    tokens, width = _check_tokens(values, scores)
    if norm_weight.dtype not in ELEMENT:
        raise TypeError(f"norm_weight must be bfloat16 or float32, got {norm_weight.dtype}")
    keys = plan_of(
        pages,
        kind=key,
        record=record,
        page_size=page_size,
        dim=width // 2 if overlap else width,
        element="bf16" if rounded else "f32",
        weight=ELEMENT[norm_weight.dtype],
    )
    config = replace(config or CompressConfig.for_shape(tokens, ratio, keys, overlap=overlap), settled=settled)
    config.check()
    if (config.ratio, config.overlap, config.keys) != (ratio, overlap, keys):
        raise ValueError(f"config must be for ratio {ratio}, overlap {overlap} and {keys}, got {config}")
    check_eps(eps)
    _check(config, ape, state, norm_weight, inv_freq, block_table)
    plans = dict(positions=positions, seq_idx=seq_idx, first_row=first_row, last_position=last_position)
    for name, plan in plans.items():
        check_dense(name, plan, (tokens,), torch.int64)
    if not tokens:
        return
    check_completed(block_table, positions, seq_idx, pages, page_size, ratio)
    check_steps(positions, seq_idx, first_row, last_position)
    runtime = runtime_of(values)
    runtime.call(
        _compiled(config, runtime),
        values,
        scores,
        ape,
        state,
        norm_weight.view(torch.uint32),
        inv_freq,
        bytes_of(pages),
        positions,
        seq_idx,
        first_row,
        last_position,
        block_table,
        eps,
    )


def _check_tokens(values: torch.Tensor, scores: torch.Tensor) -> tuple[int, int]:
    """(M, width) of the projections, each with rows of its own distance."""
    for name, value in (("values", values), ("scores", scores)):
        if value.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {value.dtype}")
        if value.dim() != 2 or value.shape != values.shape:
            raise ValueError(f"{name} must be (M, o d), like values, got {tuple(value.shape)}")
        together = value.stride(1) == 1 and value.stride(0) % LANE == 0
        if value.numel() and (not together or value.data_ptr() % 16):
            raise ValueError(f"{name} must have columns together and rows {LANE} floats apart, got strides {value.stride()}")
    if values.shape[0] >= MAX_ELEMENTS:
        raise ValueError(f"values must have fewer than 2^31 rows, got {values.shape[0]}")
    return values.shape[0], values.shape[1]


def _check(
    config: CompressConfig,
    ape: torch.Tensor,
    state: torch.Tensor,
    norm_weight: torch.Tensor,
    inv_freq: torch.Tensor,
    block_table: torch.Tensor,
) -> None:
    seqs, ring = (state.shape[0], state.shape[1]) if state.dim() == 4 else (0, 0)
    for name, value, dtype, shape in (
        ("ape", ape, torch.float32, (config.ratio, config.width)),
        ("state", state, torch.float32, (seqs, ring, 2, config.width)),
        ("norm_weight", norm_weight, norm_weight.dtype, (config.keys.dim,)),
        ("inv_freq", inv_freq, torch.float32, (ROPE_DIM // 2,)),
        ("block_table", block_table, torch.int32, (seqs, block_table.shape[1] if block_table.dim() == 2 else 1)),
    ):
        check_dense(name, value, shape, dtype)
        if value.data_ptr() % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes, got {value.data_ptr():#x}")
    check_state(state, config.ratio, config.overlap)
    if seqs * ring >= MAX_ELEMENTS:
        raise ValueError(f"state must have fewer than 2^31 places, got {seqs} sequences, R={ring}")
    if not block_table.numel():
        raise ValueError(f"block_table must have a column, got {tuple(block_table.shape)}")


def _compiled(config: CompressConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with numbers of tokens, sequences, ring places and pages left open."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute
        from cutlass.cute.runtime import make_fake_tensor

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.compressor.kernel import Compress

        keys, tokens, seqs = config.keys, cute.sym_int(), cute.sym_int()
        rows = [
            make_fake_tensor(cutlass.Float32, (tokens, config.width), (cute.sym_int64(divisibility=LANE), 1), assumed_align=16)
            for _ in range(2)
        ]
        examples = (
            *rows,
            fake(cutlass.Float32, config.ratio, config.width),
            fake(cutlass.Float32, seqs, cute.sym_int(), 2, config.width),
            fake(cutlass.Uint32, keys.dim // (2 if keys.weight == "bf16" else 1)),
            fake(cutlass.Float32, ROPE_DIM // 2),
            fake(cutlass.Uint8, cute.sym_int(), keys.page_bytes),
            *(fake(cutlass.Int64, tokens, align=8) for _ in range(4)),
            fake(cutlass.Int32, seqs, cute.sym_int(), align=4),
            cutlass.Float32(0.0),
            fake_stream(),
        )
        return Compress(config), examples

    return cache.kernel("dsv4lab.kernels.compressor.kernel", config, build, runtime)
