"""Interleaved rotary embedding on the last dims of a head, its inverse, and the two frequency tables (spec 4.2)."""

from __future__ import annotations

import math

import torch

from dsv4lab.arguments import check_shape
from dsv4lab.config import RopeScaling
from dsv4lab.paging import check_positions
from dsv4lab.reference.quant import quantize_fp8_rows, quantize_nvfp4


def rope_frequencies(*, rope_dim: int, theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Frequencies f_i = theta^(-2i/rope_dim), blended with f_i / factor by YaRN where `scaling` is given.

    Pairs that turn more than beta_fast times over the original context stay, those under beta_slow are divided by `factor`,
    and a linear ramp joins them. -> (rope_dim / 2,) f32.
    """
    freq = 1.0 / theta ** (torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim)
    if scaling is None:
        return freq

    def pair_of(turns: float) -> float:
        """Index of the pair that makes this many turns over the original context length."""
        length = scaling.original_max_position_embeddings
        return rope_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), rope_dim - 1)
    ramp = (torch.arange(rope_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    keep = 1.0 - ramp.clamp(0.0, 1.0)
    return freq * keep + freq / scaling.factor * (1.0 - keep)


def rope(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, sign: int = 1) -> torch.Tensor:
    """Rotate pairs (2i, 2i+1) of the last dims by sign * positions * inv_freq[i]; the leading dims pass through.

    x (M, ..., c) float, c >= rd; positions (M,) int, 0 to 2^20; inv_freq (rd/2,) f32 -> like x.
    The angle is a float32 product, as the model's reference has it, also near position one million; its sine and cosine and the
    rotation are exact to the last bit.  Raises ValueError on shapes.
    """
    check_shape("positions", positions, x.shape[:1])
    if 2 * inv_freq.shape[0] > x.shape[-1]:
        raise ValueError(f"inv_freq must have at most c / 2 frequencies for c={x.shape[-1]}, got {inv_freq.shape[0]}")
    check_positions(positions)
    angle = sign * positions.float()[:, None] * inv_freq.float()
    angle = angle.view(positions.shape[0], *[1] * (x.dim() - 2), inv_freq.shape[0])
    cos, sin = angle.double().cos(), angle.double().sin()
    split = x.shape[-1] - 2 * inv_freq.shape[0]
    pairs = x[..., split:].double().unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    # (a, b) -> (a cos t - b sin t, a sin t + b cos t)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.cat((x[..., :split], turned.to(x.dtype)), dim=-1)


def inverse_rope(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotate by the negative angle: undoes `rope`, raises as it does. For attention's output, which carries the keys' turns."""
    return rope(x, positions, inv_freq, sign=-1)


def inverse_rope_fp8(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse rotation, then FP8 rows for `o_a`: x (M, H, c) -> codes (M, H, c) e4m3, scale (M, H, ceil(c / group)) e8m0.

    Raises as both.
    """
    return quantize_fp8_rows(inverse_rope(x, positions, inv_freq), group=group)


def inverse_rope_nvfp4(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inverse rotation, then NVFP4 for `o_a`: x (M, H, c) -> codes (M, H, c/2) u8, block_scale (M, H, c/16) e4m3, global.

    Raises as both.
    """
    return quantize_nvfp4(inverse_rope(x, positions, inv_freq), global_scale=global_scale)
