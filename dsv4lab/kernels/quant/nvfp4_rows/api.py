"""The NVFP4 row quantiser on any architecture that has a kernel for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.formats import ATOM_COLUMNS, ATOM_ROWS
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.quant.nvfp4_rows.config import GROUP, QuantizeRowsConfig

_ELEMENT = {torch.bfloat16: "bf16", torch.float32: "f32"}


def quantize_nvfp4_rows(
    x: torch.Tensor, static_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise rows to NVFP4, each with a global scale of its own or all with the static one.

    x (M, K) bf16 or f32, contiguous, K % 16 == 0; static_scale () f32, decode direction
    -> codes (M, K/2) u8, block_scale e4m3 as atom128x4 tiles (ceil(M/128), ceil(K/64), 512) with zeros in the padding,
    row_scale (M,) f32. Equal to `reference.quant.quantize_nvfp4` in every bit, except blocks that hold a NaN or an infinity.
    Raises ValueError on shapes, TypeError on dtypes.
    """
    if x.dtype not in _ELEMENT:
        raise TypeError(f"x must be bfloat16 or float32, got {x.dtype}")
    if x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"x must be a contiguous matrix, got shape {tuple(x.shape)}, strides {x.stride()}")
    rows, depth = x.shape
    if depth % GROUP:
        raise ValueError(f"x must have K % {GROUP} == 0, got K={depth}")
    tiles = (-(-rows // ATOM_ROWS), -(-depth // (GROUP * ATOM_COLUMNS)), ATOM_ROWS * ATOM_COLUMNS)
    codes = torch.empty(rows, depth // 8, dtype=torch.uint32, device=x.device)
    scale = torch.empty(tiles, dtype=torch.uint8, device=x.device)
    row_scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if x.numel():
        static = row_scale[:1] if static_scale is None else static_scale.reshape(1)
        runtime = runtime_of(x)
        config = QuantizeRowsConfig(_ELEMENT[x.dtype], static=static_scale is not None)
        runtime.call(_compiled(config, runtime), x, static, codes, scale, row_scale)
    return codes.view(torch.uint8), scale.view(torch.float8_e4m3fn), row_scale


def _compiled(config: QuantizeRowsConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with M and K left open. Raises ValueError for an architecture without a class."""
    if runtime.arch != "sm_100a":
        raise ValueError(f"quantize_nvfp4_rows needs sm_100a, got {runtime.arch}")

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.quant.nvfp4_rows.sm100 import QuantizeRowsSm100

        f32 = cutlass.Float32
        m, k, words = cute.sym_int(), cute.sym_int(divisibility=GROUP), cute.sym_int(divisibility=2)
        examples = (
            fake({"bf16": cutlass.BFloat16, "f32": f32}[config.element], m, k),
            fake(f32, 1, align=4),
            fake(cutlass.Uint32, m, words),
            fake(cutlass.Uint8, cute.sym_int(), cute.sym_int(), ATOM_ROWS * ATOM_COLUMNS),
            fake(f32, m, align=4),
            fake_stream(),
        )
        return QuantizeRowsSm100(config), examples

    return cache.kernel(__name__, config, build, runtime)
