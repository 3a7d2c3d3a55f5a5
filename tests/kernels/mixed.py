"""Weights, routings and yardsticks that the tests of linears and experts share."""

from __future__ import annotations

import torch

from dsv4lab.formats import BF16, FP8_BLOCK, MXFP4, NVFP4, PackedWeight, get_format
from dsv4lab.reference import quant

F32_BOUND = 2.0**-18  # of the largest output: exact products, float32 sums
GPU_BOUND = 2.0**-15  # the tensor core truncates sums: up to 2^-22 of the largest one in each of K / 16 steps
BF16_BOUND = 2.0**-8
FORMATS = (NVFP4.name, MXFP4.name, FP8_BLOCK.name, BF16.name)


def random_weight(fmt: str, *shape: int, seed: int) -> PackedWeight:
    """(.., N, K) with every code, and scales from zero or the smallest to the largest that the format's kernel takes."""
    g = torch.Generator().manual_seed(seed)
    *lead, n, k = shape

    def some(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, (*lead, *size), dtype=torch.uint8, generator=g)

    if fmt == BF16.name:
        return PackedWeight(BF16, torch.randn(*lead, n, k, generator=g).bfloat16())
    if fmt == NVFP4.name:
        scale = some(0x30, 0x50, n, k // 16)
        scale[..., ::5] = some(0, 9, *scale[..., ::5].shape[-2:])
        scale[..., 0, 0] = 0x7E
        scale[..., 1, 1] |= 0x80  # a negative scale
        gain = torch.rand(lead, generator=g) + 0.1
        return PackedWeight(NVFP4, some(0, 256, n, k // 2), scale.view(torch.float8_e4m3fn), gain)
    rows, columns = get_format(fmt).scale_shape(n, k) or (0, 0)
    scale = some(110, 131, rows, columns)
    scale[..., 0, 0] = 90  # far below the largest
    codes = some(0, 256, n, k // 2)
    if fmt == FP8_BLOCK.name:
        codes = some(0, 256, n, k)
        codes = codes.masked_fill((codes & 127) == 127, 5).view(torch.float8_e4m3fn)  # no NaN
    return PackedWeight(get_format(fmt), codes, scale.view(torch.float8_e8m0fnu))


def trained_weight(fmt: str, *shape: int, seed: int) -> PackedWeight:
    """(.., N, K) whose products keep the size of their inputs."""
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5
    return quant.quantize(w, fmt)


def worst(y: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, of the largest value."""
    return float((y.double() - want.double()).abs().max() / want.double().abs().max())


def products(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x W^T in float64."""
    return x.double() @ quant.dequantize(weight).double().mT


def routing(tokens: int, num_experts: int, top_k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (M, k) f32 and different expert ids (M, k) i64."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(num_experts, generator=g)[:top_k] for _ in range(tokens)])
    return torch.rand(tokens, top_k, generator=g) + 0.2, ids
