"""Matrix products in the form of the operators: formats and activations come in, kernels of an architecture are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dsv4lab.formats import BF16, FP8_BLOCK, NVFP4, PackedWeight, get_format, to_atom128x4, weights_of
from dsv4lab.kernels._common.elements import FLOATS, dense
from dsv4lab.kernels.entry import Entry
from dsv4lab.kernels.gemm.mixed.api import linear, two_linears
from dsv4lab.kernels.gemm.mixed.layout import GROUP_ROWS, K_PAD, PLANES, SLAB
from dsv4lab.kernels.gemm.mixed.prepared import prepared, prepared_two
from dsv4lab.kernels.gemm.w4a4.api import K_MULTIPLE, N_MULTIPLE, linear_w4a4
from dsv4lab.kernels.quant.rows.api import activation_values, quantize_nvfp4

_PARTS = 3  # BF16 numbers whose sum is a float32


def activations(x: torch.Tensor, act: str, input_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is multiplied: x (M, K) quantised as `act` says -> values (M, K) bf16, factor f32 or None.

    An act of "none" takes bf16 alone. The factor is (M,), or (1,) where one input_scale is given: `factor_of`.
    """
    if act == "none":
        return dense(x), None
    values, factor = activation_values(x.contiguous(), act, input_scale)
    if factor is not None and input_scale is not None and input_scale.numel() == 1:
        return values, input_scale.reshape(1)
    return values, None if factor is None else factor.contiguous()


def factor_of(input_scale: torch.Tensor | None) -> str:
    """What `activations` has factors for, as `linear` names it: one for the matrix where its input's scale is given."""
    return "row" if input_scale is None else "matrix"


def _weight(fmt: str, *parts: torch.Tensor | None) -> PackedWeight:
    weight = PackedWeight(get_format(fmt), *parts)  # type: ignore[arg-type]
    weight.check_input()
    return weight


def linear_sm90(
    x: torch.Tensor,
    fmt: str,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    act: str,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """`linear` on Hopper: quantised activations are exact in BF16; those of float32 that are not go as three BF16 parts.

    Raises ValueError on shapes, TypeError on dtypes, here and below.
    """
    weight, out = prepared(_weight(fmt, codes, scale, global_scale, input_scale)), out_dtype or x.dtype
    if act == "none" and x.dtype == torch.float32:
        return _exact(x, weight).to(out)
    values, factor = activations(x, act, input_scale)
    return linear(values, weight, out_dtype=out, factor=factor, factor_of=factor_of(input_scale))


def two_linears_sm90(
    x: torch.Tensor,
    fmts: str,
    *parts: list[torch.Tensor],
    act: str,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`two_linears` on Hopper: x is quantised once, but for NVFP4 whose given scales are not one and the same tensor; and one
    launch multiplies by both weights, where they have one format and no global scales.
    """
    (first, second), out = weights_of(fmts, *parts), out_dtype or x.dtype
    if act == "none" and x.dtype == torch.float32:
        y, z = (_exact(x, prepared(w)).to(out) for w in (first, second))
        return y, z
    values, factor = activations(x, act, first.input_scale)
    of, rows = factor_of(first.input_scale), first.codes.shape[0]
    alike = first.format == second.format and first.codes.shape[1:] == second.codes.shape[1:]
    if alike and first.global_scale is None and act != "nvfp4" and rows % SLAB == 0:
        return two_linears(values, prepared_two(first, second), rows, out_dtype=out, factor=factor, factor_of=of)
    y = linear(values, prepared(first), out_dtype=out, factor=factor, factor_of=of)
    if act == "nvfp4" and not _same(first.input_scale, second.input_scale):
        values, factor = activations(x, act, second.input_scale)
    return y, linear(values, prepared(second), out_dtype=out, factor=factor, factor_of=factor_of(second.input_scale))


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two scales are one, as far as the host can see."""
    return a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr())


def _exact(x: torch.Tensor, weight: Any) -> torch.Tensor:
    """x W^T in float32 for float32 x, whose three parts are rows of one product."""
    most = torch.finfo(torch.bfloat16).max
    high = torch.where(x.isfinite(), x.clamp(-most, most), x).bfloat16()
    rest = torch.where(high.isfinite(), x - high, 0.0)
    middle = rest.bfloat16()
    parts = torch.cat([high, middle, (rest - middle).bfloat16()])
    return linear(parts, weight, out_dtype=torch.float32).unflatten(0, (_PARTS, -1)).flip(0).sum(0)


def grouped_linear_sm90(
    x: torch.Tensor,
    fmt: str,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    act: str,
) -> torch.Tensor:
    """`grouped_linear` on Hopper, all groups in one launch."""
    weight = prepared(_weight(fmt, codes, scale, global_scale, input_scale))
    if act == "none" and x.dtype == torch.float32:
        return _exact(x, weight)
    values, factor = activations(x.flatten(0, 1), act, input_scale)
    return linear(values.view(x.shape), weight, out_dtype=x.dtype, factor=factor, factor_of=factor_of(input_scale))


def lm_head_sm90(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`lm_head` on Hopper."""
    ready = prepared(PackedWeight(BF16, weight))
    return _exact(x, ready) if x.dtype == torch.float32 else linear(dense(x), ready, out_dtype=torch.float32)


def two_linears_sm100(
    x: torch.Tensor,
    fmts: str,
    *parts: list[torch.Tensor],
    act: str,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`two_linears` with NVFP4 weights and activations, one after the other."""
    y, z = (
        linear_sm100(x, w.format.name, w.codes, w.scale, w.global_scale, w.input_scale, act, out_dtype)  # type: ignore[arg-type]
        for w in weights_of(fmts, *parts)
    )
    return y, z


def linear_sm100(
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
    _weight(fmt, codes, scale, global_scale, input_scale).check()
    rows = x.contiguous()
    if input_scale is None:
        x_codes, x_scale, row_scale = quantize_nvfp4(rows, layout="atom128x4", per_row=True)
    else:
        x_codes, x_scale, row_scale = quantize_nvfp4(rows, input_scale, layout="atom128x4")
        row_scale = row_scale.reshape(1).expand(rows.shape[0]).contiguous()
    return linear_w4a4(
        x_codes,
        x_scale,
        row_scale,
        dense(codes).view(torch.uint8),
        to_atom128x4(scale),
        global_scale,
        out_dtype=out_dtype or x.dtype,
    )


# ---- what they refuse --------------------------------------------------------------------------------------------------
def why_not_mixed(x: torch.Tensor, fmt: str, codes: torch.Tensor, scale: torch.Tensor | None, act: str) -> str | None:
    """Why the mixed kernel takes no such operands; None where it does."""
    if fmt not in PLANES:
        return f"weight must be one of {', '.join(PLANES)}, got {fmt}"
    if fmt == FP8_BLOCK.name and scale is not None and scale.element_size() > 1:
        return f"scale of an fp8_block weight must be float8_e8m0fnu, got {scale.dtype}"
    rows, columns = codes.shape[-2], codes.shape[-1] * get_format(fmt).codes_per_byte
    if rows % 8 or columns % 8:
        return f"weight must have N % 8 == 0 and K % 8 == 0, got N={rows}, K={columns}"
    if x.dtype not in FLOATS:
        return f"x must be bfloat16 or float32, got {x.dtype}"
    if act != "none" and columns % NVFP4.group:
        return f"x must have K % {NVFP4.group} == 0 for act {act}, got K={columns}"
    return None


def _linear_sm90_refuses(
    x: torch.Tensor,
    fmt: str,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    act: str,
    out_dtype: torch.dtype | None,
) -> str | None:
    if x.ndim != 2 or codes.ndim != 2 or out_dtype not in (None, *FLOATS):
        shapes = f"{tuple(x.shape)}, {tuple(codes.shape)}"
        return f"x must be (M, K), weight (N, K) and the output bfloat16 or float32, got {shapes} and {out_dtype}"
    return why_not_mixed(x, fmt, codes, scale, act)


def _grouped_sm90_refuses(
    x: torch.Tensor,
    fmt: str,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    act: str,
) -> str | None:
    if x.ndim != 3 or not x.shape[1]:
        return f"x must be (M, G, K) with a group at least, got {tuple(x.shape)}"
    groups = x.shape[1]
    if x.shape[2] % K_PAD or codes.shape[0] % (groups * GROUP_ROWS):
        return (
            f"weight must have K % {K_PAD} == 0 and N % {groups * GROUP_ROWS} == 0 for {groups} groups, "
            f"got K={x.shape[2]}, N={codes.shape[0]}"
        )
    return why_not_mixed(x, fmt, codes, scale, act)


def why_not_head(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the mixed kernel is no head for such operands; None where it is."""
    if weight.dtype != torch.bfloat16 or x.ndim != 2:
        return f"weight must be bfloat16 and x (M, K), got {weight.dtype} and {tuple(x.shape)}"
    return why_not_mixed(x, BF16.name, weight, None, "none")


def _linear_sm100_refuses(
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


def _two_refused(refuses: Callable[..., str | None]) -> Callable[..., str | None]:
    """Of an operator with two weights, what `refuses` says of either."""

    def refuse(
        x: torch.Tensor,
        fmts: str,
        *parts: list[torch.Tensor],
        act: str,
        out_dtype: torch.dtype | None,
    ) -> str | None:
        of = ((w.format.name, w.codes, w.scale, w.global_scale, w.input_scale) for w in weights_of(fmts, *parts))
        return next((why for part in of if (why := refuses(x, *part, act, out_dtype))), None)

    return refuse


ENTRIES = (
    Entry("linear", "sm_90a", linear_sm90, _linear_sm90_refuses),
    Entry("linear", "sm_100a", linear_sm100, _linear_sm100_refuses),
    Entry("two_linears", "sm_90a", two_linears_sm90, _two_refused(_linear_sm90_refuses)),
    Entry("two_linears", "sm_100a", two_linears_sm100, _two_refused(_linear_sm100_refuses)),
    Entry("grouped_linear", "sm_90a", grouped_linear_sm90, _grouped_sm90_refuses),
    Entry("lm_head", "sm_90a", lm_head_sm90, why_not_head),
)
