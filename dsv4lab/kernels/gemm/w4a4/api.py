"""The NVFP4 x NVFP4 linear on any architecture that has a kernel for it: checks, shapes, grid, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.arguments import check_dense
from dsv4lab.formats import ATOM_COLUMNS, ATOM_ROWS
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.elements import ELEMENT
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.gemm.w4a4.config import SCALE_GROUP, TILE_M, W4A4Config

K_MULTIPLE = 32  # TMA: rows of codes begin at multiples of 16 bytes
N_MULTIPLE = 8  # TMA: rows of a BF16 output do, too


def linear_w4a4(
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    row_scale: torch.Tensor,
    w_codes: torch.Tensor,
    w_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype,
    config: W4A4Config | None = None,
) -> torch.Tensor:
    """y[m, n] = row_scale[m] * weight_scale * sum over k of (x code * block scale)[m, k] * (w code * block scale)[n, k].

    x_codes (M, K/2) u8, w_codes (N, K/2) u8: two E2M1 codes a byte, K % 32 == 0, N % 8 == 0; x_scale, w_scale: E4M3 per 16
    along K as atom128x4 tiles (ceil(rows/128), ceil(K/64), 512), finite in the padding too; row_scale (M,) f32; weight_scale ()
    f32 -> (M, N) bf16 or f32. Products are exact, sums in float32 in the tensor core's order.
    Raises ValueError on shapes, TypeError on dtypes.
    """
    rows, columns = x_codes.shape[0], w_codes.shape[0]
    depth = 2 * x_codes.shape[1]
    _check(x_codes, x_scale, w_codes, w_scale, row_scale, weight_scale, out_dtype)
    out = torch.empty(rows, columns, dtype=out_dtype, device=x_codes.device)
    if not out.numel():
        return out
    if not depth:
        return out.zero_()
    config = config or W4A4Config(out=ELEMENT[out_dtype])
    runtime = runtime_of(x_codes)
    tiles = -(-rows // TILE_M) * -(-columns // config.tile_n)
    runtime.call(
        _compiled(config, runtime),
        x_codes,
        x_scale.view(torch.uint8),
        w_codes,
        w_scale.view(torch.uint8),
        row_scale,
        weight_scale.reshape(1),
        out,
        min(tiles, runtime.multiprocessors),
    )
    return out


def _compiled(config: W4A4Config, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M, N and K left open. Raises ValueError for an architecture without a class."""
    if runtime.arch != "sm_100a":
        raise ValueError(f"linear_w4a4 needs sm_100a, got {runtime.arch}")

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.gemm.w4a4.sm100 import W4A4LinearSm100

        m, n, half_k = cute.sym_int(), cute.sym_int(divisibility=N_MULTIPLE), cute.sym_int(divisibility=K_MULTIPLE // 2)
        tiles_m, tiles_n, tiles_k = cute.sym_int(), cute.sym_int(), cute.sym_int()
        u8, f32 = cutlass.Uint8, cutlass.Float32
        tile_bytes = ATOM_ROWS * ATOM_COLUMNS
        examples = (
            fake(u8, m, half_k),
            fake(u8, tiles_m, tiles_k, tile_bytes),
            fake(u8, n, half_k),
            fake(u8, tiles_n, tiles_k, tile_bytes),
            fake(f32, m, align=4),
            fake(f32, 1, align=4),
            fake({"bf16": cutlass.BFloat16, "f32": f32}[config.out], m, n),
            cutlass.Int32(1),
            fake_stream(),
        )
        return W4A4LinearSm100(config), examples

    return cache.kernel(__name__, config, build, runtime)


def _check(
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    w_codes: torch.Tensor,
    w_scale: torch.Tensor,
    row_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    out_dtype: torch.dtype,
) -> None:
    rows, columns, depth = x_codes.shape[0], w_codes.shape[0], 2 * x_codes.shape[1]
    if out_dtype not in ELEMENT:
        raise TypeError(f"out_dtype must be bfloat16 or float32, got {out_dtype}")
    for name, codes in (("x_codes", x_codes), ("w_codes", w_codes)):
        check_dense(name, codes, ("rows", "K / 2"), torch.uint8)
    if w_codes.shape[1] != x_codes.shape[1]:
        raise ValueError(f"x and w must have the same K, got {depth} and {2 * w_codes.shape[1]}")
    if depth % K_MULTIPLE:
        raise ValueError(f"x must have K % {K_MULTIPLE} == 0, got K={depth}")
    if columns % N_MULTIPLE:
        raise ValueError(f"w must have N % {N_MULTIPLE} == 0, got N={columns}")
    for name, scale, count in (("x_scale", x_scale, rows), ("w_scale", w_scale, columns)):
        want = (-(-count // ATOM_ROWS), -(-depth // (SCALE_GROUP * ATOM_COLUMNS)), ATOM_ROWS * ATOM_COLUMNS)
        if tuple(scale.shape) != want or not scale.is_contiguous():
            raise ValueError(f"{name} of {count} rows and K={depth} must be contiguous {want}, got {tuple(scale.shape)}")
    if row_scale.shape != (rows,) or weight_scale.numel() != 1:
        raise ValueError(
            f"row_scale must be ({rows},) and weight_scale a scalar, got {tuple(row_scale.shape)}, {tuple(weight_scale.shape)}"
        )
