"""Number formats, bit-exact both ways: E2M1, E4M3, E8M0 and the block formats built on them.

Every function is plain float32 torch without data-dependent control flow, so that it also runs on CUDA and meta tensors.
Scales point in the decode direction: x = code * block_scale * global_scale. Formats:

    NVFP4      E2M1 codes, E4M3 scale per 16 along K, one f32 scale a matrix
    MXFP4      E2M1 codes, E8M0 scale per 32 along K
    FP8_ROW    E4M3 codes, E8M0 scale per `group` along K
    FP8_BLOCK  E4M3 codes, E8M0 scale per 128x128 block (float32 scales are decoded too: the Base releases)

NaN: a NaN makes the scale of its own block NaN, so the block decodes to NaN and the damage stays visible and local. A NaN
never enters a computed global scale. An infinity counts as the largest finite float32 for its scale and saturates its code.
Source: the model specification, sections 8, 11 and 17.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from dsv4lab.formats import BF16, E2M1_MAX, E4M3_MAX, E8M0_BIAS, F32, FP8_BLOCK, FP8_ROW, MXFP4, NVFP4, PackedWeight, get_format

FP8_AMAX_FLOOR = 1e-4  # smallest amax of an FP8 group (spec 8.2)
MXFP4_AMAX_FLOOR = E2M1_MAX * 2.0**-126  # keeps the E8M0 scale at 2^-126 or above (spec 8.3)
E4M3_MIN = 2.0**-9  # smallest positive E4M3 value: the floor of an NVFP4 block scale (spec 11.2)
NVFP4_RANGE = E2M1_MAX * E4M3_MAX  # largest code * block_scale, 2688

_F32_MAX = torch.finfo(torch.float32).max
_F32_TINY = torch.finfo(torch.float32).tiny
_MANTISSA = 0x7FFFFF  # mantissa mask of a float32
_NAN_BITS = 0x7FC00000
# Midpoints of the E2M1 grid, and whether the tie belongs to the lower code (the even one of the two neighbours).
_E2M1_MIDPOINTS = ((0.25, True), (0.75, False), (1.25, True), (1.75, False), (2.5, True), (3.5, False), (5.0, True))


# ---- element formats -------------------------------------------------------------------------------------------------
def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest E2M1 value, ties to even, saturating at 6.

    x any float dtype -> codes uint8 of the same shape in 0..15, sign in bit 3 (kept for zeros). NaN gives magnitude 6.
    """
    x = x.float()
    magnitude = x.abs()
    codes = torch.full(x.shape, 7, dtype=torch.uint8, device=x.device)
    for midpoint, tie_to_lower in _E2M1_MIDPOINTS:
        below = (magnitude <= midpoint) if tie_to_lower else (magnitude < midpoint)
        codes -= below.to(torch.uint8)
    return codes | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """E2M1 codes uint8 in 0..15 -> float32 of the same shape."""
    index = (codes & 7).to(torch.int32)
    # Codes 2..7 are normal: exponent index >> 1 with bias 1, one mantissa bit. Codes 0 and 1 are 0 and 0.5.
    normal = ((((index >> 1) + 126) << 23) | ((index & 1) << 22)).view(torch.float32)
    magnitude = torch.where(index < 2, index * 0.5, normal)
    return torch.where(codes > 7, -magnitude, magnitude)


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 (..., K) -> bytes uint8 (..., K/2): the even element in the low nibble. K must be even."""
    if codes.shape[-1] % 2:
        raise ValueError(f"codes must have an even last dim to be packed, got K={codes.shape[-1]}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Bytes (..., K/2) uint8 or int8 -> codes uint8 (..., K)."""
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def encode_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest E4M3 value, ties to even, saturating at 448; NaN stays NaN. -> float8_e4m3fn, same shape."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)  # the cast alone overflows to NaN


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn -> float32, exact."""
    return codes.float()


def encode_e8m0_ceil(amax: torch.Tensor, max_code: float) -> torch.Tensor:
    """The smallest power of two s with amax / s <= max_code, as E8M0.

    amax >= 0, any float dtype, a normal float32 at least 4 * 2^-126 * max_code (callers floor it); NaN gives NaN (0xFF);
    infinity counts as the largest finite float32. max_code 6 or 448 -> float8_e8m0fnu of amax's shape.
    Integer arithmetic on the float32 bits: log2 or a rounded quotient can misplace exact powers of two.
    """
    bits = amax.float().clamp(max=_F32_MAX).view(torch.int32)
    limit = int(np.float32(max_code).view(np.int32))
    exponent = (bits >> 23) - (limit >> 23) + E8M0_BIAS + ((bits & _MANTISSA) > (limit & _MANTISSA))
    exponent = torch.where(amax.isnan(), 255, exponent)
    return exponent.to(torch.uint8).view(torch.float8_e8m0fnu)


def decode_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """float8_e8m0fnu (or its raw bytes as uint8) -> float32 2^(b - 127), 0xFF -> NaN. Exact; byte 0 is the subnormal 2^-127."""
    b = scale.view(torch.uint8).to(torch.int32)
    bits = torch.where(b == 0, 1 << 22, b << 23)
    return torch.where(b == 255, _NAN_BITS, bits).view(torch.float32)


# ---- NVFP4 -----------------------------------------------------------------------------------------------------------
def nvfp4_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """amax / (6 * 448) in float32, of amax's shape; 1 where amax is 0, and never subnormal."""
    finite = amax.float().clamp(max=_F32_MAX)
    # a divisor on the device: CUDA turns division by a Python number into a product with its reciprocal, one bit off
    scale = (finite / torch.full_like(finite, NVFP4_RANGE)).clamp(min=_F32_TINY)
    return torch.where(amax == 0, 1.0, scale)


def nvfp4_row_scale(x: torch.Tensor) -> torch.Tensor:
    """A global scale for each row, from its own amax: x (..., K) float -> (...) f32. NaNs do not count."""
    return nvfp4_global_scale(x.float().abs().nan_to_num(nan=0.0, posinf=_F32_MAX).amax(-1))


def nvfp4_power_scale(x: torch.Tensor) -> torch.Tensor:
    """A global scale for each row in one byte: the smallest power of two at or above amax / 2688, at least 2^-117.

    x (..., K) float -> (...) float8_e8m0fnu; 1 where amax is 0. NaNs do not count. From 2^-117 on, the product with a block
    scale is a normal float32, too.
    """
    amax = x.float().abs().nan_to_num(nan=0.0, posinf=_F32_MAX).amax(-1)
    power = encode_e8m0_ceil(amax.clamp(min=NVFP4_RANGE * _F32_TINY / E4M3_MIN), NVFP4_RANGE)
    return torch.where(amax == 0, E8M0_BIAS, power.view(torch.uint8)).to(torch.uint8).view(torch.float8_e8m0fnu)


def quantize_nvfp4(
    x: torch.Tensor, *, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise to NVFP4.

    x (..., K) float, K % 16 == 0; global_scale f32 () or x.shape[:-2], positive, computed over the whole of x if absent
    -> codes uint8 (..., K/2), block_scale float8_e4m3fn (..., K/16), global_scale f32.
    block_scale = E4M3(amax_block / (6 * global_scale)), at least 2^-9, 1 for a zero block; code = E2M1(x / (block_scale *
    global_scale)). Raises ValueError on K and global_scale's shape.
    """
    blocks = _grouped(x, NVFP4.group)
    if global_scale is None:
        magnitude = blocks.abs().nan_to_num(nan=0.0, posinf=_F32_MAX)
        amax = magnitude.amax() if magnitude.numel() else magnitude.new_zeros(())
        global_scale = nvfp4_global_scale(amax)
    if global_scale.shape not in ((), x.shape[:-2]):
        raise ValueError(f"global_scale must be () or x.shape[:-2] = {tuple(x.shape[:-2])}, got {tuple(global_scale.shape)}")
    global_scale = global_scale.float()
    factor = _over_matrix(global_scale)
    amax = blocks.abs().amax(-1).clamp(max=_F32_MAX)
    ratio = amax / (E2M1_MAX * factor)
    ratio = torch.where(ratio == 0, 1.0, ratio).clamp(min=E4M3_MIN)
    block_scale = encode_e4m3(ratio)
    step = decode_e4m3(block_scale) * factor
    codes = encode_e2m1(blocks / step.unsqueeze(-1))
    return pack_e2m1(codes.flatten(-2)), block_scale, global_scale


def dequantize_nvfp4(codes: torch.Tensor, block_scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """codes (..., K/2), block_scale (..., K/16), global_scale () or the leading dims -> float32 (..., K).

    (code * block_scale) is exact, so the product has one rounding.
    """
    blocks = decode_e2m1(unpack_e2m1(codes)).unflatten(-1, (block_scale.shape[-1], -1))
    factor = _over_matrix(global_scale.float()).unsqueeze(-1)
    return (blocks * decode_e4m3(block_scale).unsqueeze(-1) * factor).flatten(-2)


# ---- MXFP4 -----------------------------------------------------------------------------------------------------------
def quantize_mxfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to MXFP4: scale 2^ceil(log2(amax / 6)) per 32 values, amax floored at 6 * 2^-126.

    x (..., K) float, K % 32 == 0 -> codes uint8 (..., K/2), scale float8_e8m0fnu (..., K/32). Raises ValueError on K.
    """
    blocks = _grouped(x, MXFP4.group)
    scale = encode_e8m0_ceil(blocks.abs().amax(-1).clamp(min=MXFP4_AMAX_FLOOR), E2M1_MAX)
    codes = encode_e2m1(blocks / decode_e8m0(scale).unsqueeze(-1))
    return pack_e2m1(codes.flatten(-2)), scale


def dequantize_mxfp4(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes (..., K/2), scale (..., K/32) -> float32 (..., K), exact."""
    blocks = decode_e2m1(unpack_e2m1(codes)).unflatten(-1, (scale.shape[-1], -1))
    return (blocks * decode_e8m0(scale).unsqueeze(-1)).flatten(-2)


# ---- FP8 -------------------------------------------------------------------------------------------------------------
def quantize_fp8_rows(x: torch.Tensor, *, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise to E4M3 with one power-of-two scale a row and `group` consecutive values (spec 8.2).

    x (..., K) float; the last group may be partial -> codes float8_e4m3fn (..., K), scale float8_e8m0fnu (..., ceil(K/group)).
    Raises ValueError on group.
    """
    if group < 1:
        raise ValueError(f"group must be at least 1, got {group}")
    columns = x.shape[-1]
    padded = functional.pad(x.float(), (0, -columns % group))
    blocks = padded.unflatten(-1, (padded.shape[-1] // group, group))
    scale = encode_e8m0_ceil(blocks.abs().amax(-1).clamp(min=FP8_AMAX_FLOOR), E4M3_MAX)
    codes = encode_e4m3(blocks / decode_e8m0(scale).unsqueeze(-1))
    return codes.flatten(-2)[..., :columns].contiguous(), scale


def dequantize_fp8_rows(codes: torch.Tensor, scale: torch.Tensor, *, group: int) -> torch.Tensor:
    """codes (..., K), scale (..., ceil(K/group)) E8M0 or float32 -> float32 (..., K)."""
    factor = _scale_to_f32(scale).repeat_interleave(group, dim=-1)
    return decode_e4m3(codes) * factor[..., : codes.shape[-1]]


def quantize_fp8_blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix to E4M3 with one power-of-two scale a 128x128 block, by the rule of `quantize_fp8_rows`.

    w (..., R, C) float; edge blocks may be partial -> codes float8_e4m3fn (..., R, C), scale float8_e8m0fnu
    (..., ceil(R/128), ceil(C/128)).
    """
    rows, columns = w.shape[-2:]
    r, c = FP8_BLOCK.block_shape
    padded = functional.pad(w.float(), (0, -columns % c, 0, -rows % r))
    grid = padded.shape[-2] // r, padded.shape[-1] // c
    blocks = padded.unflatten(-1, (grid[1], c)).unflatten(-3, (grid[0], r))  # (..., R/128, 128, C/128, 128)
    scale = encode_e8m0_ceil(blocks.abs().amax((-3, -1)).clamp(min=FP8_AMAX_FLOOR), E4M3_MAX)
    codes = encode_e4m3(blocks / decode_e8m0(scale)[..., :, None, :, None])
    codes = codes.flatten(-2).flatten(-3, -2)
    return codes[..., :rows, :columns].contiguous(), scale


def dequantize_fp8_blocks(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes (..., R, C), scale (..., ceil(R/128), ceil(C/128)) E8M0 or float32 -> float32 (..., R, C)."""
    r, c = FP8_BLOCK.block_shape
    factor = _scale_to_f32(scale).repeat_interleave(r, dim=-2).repeat_interleave(c, dim=-1)
    return decode_e4m3(codes) * factor[..., : codes.shape[-2], : codes.shape[-1]]


# ---- whole matrices --------------------------------------------------------------------------------------------------
def dequantize(weight: PackedWeight) -> torch.Tensor:
    """Any packed weight -> float32 (..., rows, columns). Raises as `PackedWeight.check`."""
    weight.check()
    name, codes, scale = weight.format.name, weight.codes, weight.scale
    if scale is None:
        return codes.float()
    if weight.global_scale is not None:
        return dequantize_nvfp4(codes, scale, weight.global_scale)
    if name == MXFP4.name:
        return dequantize_mxfp4(codes, scale)
    if name == FP8_ROW.name:
        return dequantize_fp8_rows(codes, scale, group=weight.format.group)
    return dequantize_fp8_blocks(codes, scale)


def quantize(x: torch.Tensor, format_name: str, *, global_scale: torch.Tensor | None = None) -> PackedWeight:
    """A float matrix (rows, columns), or a stack of them with leading dims, in the named format.

    NVFP4 gets one global scale a matrix of the stack, unless `global_scale` (the leading dims) is given.
    Raises ValueError on an unknown format or a K that the format's blocks do not divide.
    """
    fmt = get_format(format_name)
    if fmt is NVFP4:
        if global_scale is None:
            magnitude = x.float().abs().nan_to_num(nan=0.0, posinf=_F32_MAX)
            global_scale = nvfp4_global_scale(magnitude.amax((-2, -1)))
        codes, scale, global_scale = quantize_nvfp4(x, global_scale=global_scale)
        return PackedWeight(fmt, codes, scale, global_scale)
    if fmt is MXFP4:
        return PackedWeight(fmt, *quantize_mxfp4(x))
    if fmt is FP8_ROW:
        return PackedWeight(fmt, *quantize_fp8_rows(x, group=FP8_ROW.group))
    if fmt is FP8_BLOCK:
        return PackedWeight(fmt, *quantize_fp8_blocks(x))
    assert fmt in (BF16, F32)
    return PackedWeight(fmt, x.to(fmt.code_dtype))


# ---- fake quantisation: quantise, dequantise, round to the input's dtype ---------------------------------------------
def fake_fp8_rows(x: torch.Tensor, *, group: int) -> torch.Tensor:
    """x (..., K) after `quantize_fp8_rows`, in x's dtype (exact in bf16 wherever the value is a normal bf16)."""
    return dequantize_fp8_rows(*quantize_fp8_rows(x, group=group), group=group).to(x.dtype)


def fake_nvfp4(x: torch.Tensor, *, global_scale: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., K), K % 16 == 0, after `quantize_nvfp4`, in x's dtype."""
    return dequantize_nvfp4(*quantize_nvfp4(x, global_scale=global_scale)).to(x.dtype)


def fake_mxfp4(x: torch.Tensor) -> torch.Tensor:
    """x (..., K), K % 32 == 0, after `quantize_mxfp4`, in x's dtype (exact in bf16 wherever the value is a normal bf16)."""
    return dequantize_mxfp4(*quantize_mxfp4(x)).to(x.dtype)


# ---- private ---------------------------------------------------------------------------------------------------------
def _grouped(x: torch.Tensor, group: int) -> torch.Tensor:
    """(..., K) -> float32 (..., K/group, group)."""
    if x.shape[-1] % group:
        raise ValueError(f"x must have K % {group} == 0, got K={x.shape[-1]}")
    return x.float().unflatten(-1, (x.shape[-1] // group, group))


def _over_matrix(global_scale: torch.Tensor) -> torch.Tensor:
    """A per-matrix scale, broadcast over rows and columns; a scalar as it is."""
    return global_scale[..., None, None] if global_scale.ndim else global_scale


def _scale_to_f32(scale: torch.Tensor) -> torch.Tensor:
    return scale.float() if scale.dtype in (torch.float32, torch.bfloat16) else decode_e8m0(scale)
