"""Linear layers y = x W^T for every weight format, the grouped `o_a`, and the language-model head (spec 4.7, 6, 8.2, 8.4)."""

from __future__ import annotations

import torch

from dsv4lab.arguments import check_shape
from dsv4lab.formats import PackedWeight
from dsv4lab.reference.quant import dequantize, fake_fp8_rows, fake_nvfp4, nvfp4_row_scale

FP8_GROUP = 128  # activations: columns that share a scale, spec 8.2


def matmul_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T, accumulated in float64 and rounded once: x (M, K) f32, weight (N, K) f32 -> (M, N) f32.

    Float32 libraries choose the order of summation by the number of rows and of threads (9 rows on two cores differ from 8),
    and padding does not cure it; in float64 the order is gone after rounding.
    """
    check_shape("x", x, (*x.shape[:1], weight.shape[-1]))
    return (x.double() @ weight.double().t()).float()


def quantize_activation(x: torch.Tensor, act: str, input_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Quantise and dequantise activations: `act` is "none", "fp8" (rows per 128) or "nvfp4" (per 16, 4 bits).

    x (M, K) float -> like x. input_scale () f32 is NVFP4's static global scale; absent, every row gets its own from its amax,
    so that a token does not depend on its neighbours.  Raises ValueError on act, K and input_scale's shape.
    """
    if act == "none":
        return x
    if act == "fp8":
        return fake_fp8_rows(x, group=FP8_GROUP)
    if act == "nvfp4":
        if input_scale is not None:
            return fake_nvfp4(x, global_scale=input_scale)
        return fake_nvfp4(x[:, None], global_scale=nvfp4_row_scale(x))[:, 0]
    raise ValueError(f"act must be none, fp8 or nvfp4, got {act!r}")


def linear(x: torch.Tensor, weight: PackedWeight, *, act: str, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """y = x W^T, rounded to float32 and then to the output dtype.

    x (M, K) float; weight (N, K) of any format; act: activation quantisation, see `quantize_activation`
    -> (M, N) of out_dtype, x.dtype where None.  Raises as `PackedWeight.check` and `quantize_activation`.
    """
    w = dequantize(weight)
    return matmul_rows(quantize_activation(x, act, weight.input_scale).float(), w).to(out_dtype or x.dtype)


def two_linears(
    x: torch.Tensor, first: PackedWeight, second: PackedWeight, *, act: str, out_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear` of one x with two weights, (M, N1) and (M, N2): what a kernel quantises once for both. Raises as that."""
    return linear(x, first, act=act, out_dtype=out_dtype), linear(x, second, act=act, out_dtype=out_dtype)


def grouped_linear(x: torch.Tensor, weight: PackedWeight, *, act: str) -> torch.Tensor:
    """One matrix a group: z[g] = W[g] x[g], the low-rank half of the output projection.

    x (M, G, K) float; weight (G*N, K), rows of group g contiguous; act as in `linear` -> (M, G, N) like x.  Raises as that.
    Source: spec 4.7.
    """
    groups = x.shape[1]
    w = dequantize(weight).unflatten(0, (groups, -1))
    xq = quantize_activation(x.flatten(0, 1), act, weight.input_scale).float().view_as(x)
    return torch.stack([matmul_rows(xq[:, g], w[g]) for g in range(groups)], dim=1).to(x.dtype)


def lm_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits: x (M, D) float, weight (V, D) float -> (M, V) f32, product of the values as stored (spec 6)."""
    return matmul_rows(x.float(), weight.float())
