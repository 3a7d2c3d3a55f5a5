"""Which kernels there are: for each an operation, an architecture, a function in the operator's form, and what it refuses.

Importing this module imports no CuTeDSL; that happens when a kernel is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dsv4lab.formats import NVFP4, to_atom128x4
from dsv4lab.kernels.gemm.w4a4.api import K_MULTIPLE, N_MULTIPLE, linear_w4a4
from dsv4lab.kernels.quant.nvfp4_rows.api import quantize_nvfp4_rows

FLOATS = (torch.bfloat16, torch.float32)


class Entry(NamedTuple):
    """A kernel of an operation. refuses: says why it does not take these arguments, None where it does."""

    operation: str
    arch: str
    function: Callable[..., Any]
    refuses: Callable[..., str | None]


def linear_nvfp4(
    x: torch.Tensor,
    fmt: str,
    codes: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    act: str,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """`linear` with NVFP4 weights and activations, in two kernels: x is quantised row by row, then codes are multiplied.

    x enters the product as code * block scale * global scale, exactly; the reference rounds that to x's dtype first. Block
    scales of the weight are brought into atom128x4 order by torch, at every call.
    """
    x_codes, x_scale, row_scale = quantize_nvfp4_rows(x.contiguous(), input_scale)
    tiles = to_atom128x4(scale)
    return linear_w4a4(
        x_codes, x_scale, row_scale, codes.view(torch.uint8), tiles, global_scale, out_dtype=out_dtype or x.dtype
    )


def _linear_nvfp4_refuses(
    x: torch.Tensor,
    fmt: str,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    act: str,
    out_dtype: torch.dtype | None,
) -> str | None:
    if fmt != NVFP4.name or act != NVFP4.name:
        return f"weight and act must be nvfp4, got a {fmt} weight and act {act}"
    if x.dtype not in FLOATS or out_dtype not in (None, *FLOATS):
        return f"x and the output must be bfloat16 or float32, got {x.dtype} and {out_dtype or x.dtype}"
    if x.ndim != 2 or x.shape[1] % K_MULTIPLE or codes.shape[0] % N_MULTIPLE:
        return (
            f"x must be (M, K) with K % {K_MULTIPLE} == 0 and N % {N_MULTIPLE} == 0, got {tuple(x.shape)}, N={codes.shape[0]}"
        )
    return None


KERNELS = (Entry("linear", "sm_100a", linear_nvfp4, _linear_nvfp4_refuses),)
