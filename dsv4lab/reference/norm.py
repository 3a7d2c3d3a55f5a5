"""RMSNorm, alone, with quantised output, and per query head with rotary embedding (spec 4.1)."""

from __future__ import annotations

import torch

from dsv4lab.arguments import check_eps, check_shape
from dsv4lab.reference.quant import quantize_fp8_rows, quantize_nvfp4
from dsv4lab.reference.rope import rope


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dim, rounded once.

    x (..., K) float; weight (K,) float; eps in x^2 units -> (..., K) of x.dtype.
    Raises ValueError on weight's shape.  Source: spec 4.1.
    """
    check_shape("weight", weight, x.shape[-1:])
    check_eps(eps, 0.0)
    xd = x.double()
    return (xd * torch.rsqrt(xd.square().mean(-1, keepdim=True) + eps) * weight.double()).to(x.dtype).contiguous()


def rmsnorm_fp8(x: torch.Tensor, weight: torch.Tensor, *, eps: float, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm, then FP8 rows: x (..., K) -> codes (..., K) e4m3, scale (..., ceil(K / group)) e8m0 (spec 8.2).

    Raises as both.
    """
    return quantize_fp8_rows(rmsnorm(x, weight, eps=eps), group=group)


def rmsnorm_nvfp4(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm, then NVFP4: x (..., K), K % 16 == 0 -> codes (..., K/2) u8, block_scale (..., K/16) e4m3, global_scale ().

    Raises as both.
    """
    return quantize_nvfp4(rmsnorm(x, weight, eps=eps), global_scale=global_scale)


def q_norm_rope(q: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalise every query head without a weight, then rotate its last dims.

    q (M, H, c) float; positions (M,) int; inv_freq (rd/2,) f32 -> (M, H, c) of q.dtype.  Raises as `rope`.  Source: spec 4.1.
    """
    check_eps(eps)
    qd = q.double()
    qd = qd * torch.rsqrt(qd.square().mean(-1, keepdim=True) + eps)
    return rope(qd, positions, inv_freq).to(q.dtype)
