"""Keys into the paged cache and out of it: norm, RoPE, quantise, write; read, dequantise (spec 8.3, 12).

Window keys and compressed entries share one record and one pair of functions. Page pools and records: `dsv4lab.records`.
"""

from __future__ import annotations

import torch

from dsv4lab.arguments import check_eps, check_shape
from dsv4lab.formats import NVFP4
from dsv4lab.paging import check_slots
from dsv4lab.records import NOPE_GROUP, check_pool
from dsv4lab.reference.norm import rmsnorm
from dsv4lab.reference.quant import (
    decode_e8m0,
    dequantize_fp8_rows,
    dequantize_nvfp4,
    nvfp4_power_scale,
    quantize_fp8_rows,
    quantize_nvfp4,
)
from dsv4lab.reference.rope import rope


def kv_norm_rope(
    x: torch.Tensor, norm_weight: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """RMSNorm, then rotation of the last dims: x (M, c), norm_weight (c,), positions (M,), inv_freq (rd/2,) -> like x."""
    check_eps(eps)
    return rope(rmsnorm(x, norm_weight, eps=eps), positions, inv_freq)


def addressed(key: torch.Tensor, slots: torch.Tensor, pages: torch.Tensor, page_size: int) -> tuple[torch.Tensor, ...]:
    """The rows that have a slot, with their page and place: key (M, c), slots (M,), -1 = none -> (N, c), (N,), (N,)."""
    check_shape("slots", slots, key.shape[:1])
    check_slots(slots, pages.shape[0], page_size, written=True)
    stored = slots >= 0
    return key[stored], slots[stored] // page_size, slots[stored] % page_size


def cache_write(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    eps: float,
    record: str,
    page_size: int,
) -> None:
    """Normalise, rotate, quantise and store keys, in place.

    x (M, c) float: the kv projection's rows, or pooled entries; positions (M,): a token's own, or an entry's first token's;
    slots (M,) int64, -1 = do not store; pages: a pool of `record` ("plain", "fp8" or "nvfp4").
    Raises ValueError on the name, the pool, shapes, eps, positions, and slots beyond the pool or named twice (see `paging`),
    TypeError on the pool's dtype.
    """
    rope_dim = 2 * inv_freq.shape[0]
    packed = check_pool(pages, "key", record, page_size=page_size, dim=x.shape[1], rope_dim=rope_dim)
    key = kv_norm_rope(x, norm_weight, positions, inv_freq, eps=eps)
    key, page, place = addressed(key, slots, pages, page_size)
    if packed is None:
        pages[page, place] = key.to(pages.dtype)
        return
    data, scales = packed.parts(pages, page_size)
    nope = key[:, : x.shape[1] - rope_dim]
    if record == "fp8":
        codes, scale = (part.view(torch.uint8) for part in quantize_fp8_rows(nope, group=NOPE_GROUP))
    else:
        codes, scale = _to_nvfp4(nope)
    rotary = key[:, nope.shape[1] :].to(torch.bfloat16).contiguous()
    data[page, place] = torch.cat((codes, rotary.view(torch.uint8)), dim=1)
    scales[page, place] = torch.nn.functional.pad(scale, (0, scales.shape[2] - scale.shape[1]))


def cache_read(
    pages: torch.Tensor, slots: torch.Tensor, *, record: str, page_size: int, dim: int, rope_dim: int
) -> torch.Tensor:
    """Gather and dequantise keys: slots (N,) int64 -> (N, dim) f32; slot -1 gives zeros. Raises as `cache_write`."""
    packed = check_pool(pages, "key", record, page_size=page_size, dim=dim, rope_dim=rope_dim)
    check_slots(slots, pages.shape[0], page_size)
    page, place = slots.clamp(min=0) // page_size, slots.clamp(min=0) % page_size
    if packed is None:
        key = pages[page, place].float()
    else:
        data, scales = packed.parts(pages, page_size)
        rows, scale = data[page, place], scales[page, place]
        codes, rotary = (part.contiguous() for part in rows.split([rows.shape[1] - 2 * rope_dim, 2 * rope_dim], dim=1))
        if record == "fp8":
            groups = -(-codes.shape[1] // NOPE_GROUP)
            e8m0 = scale[:, :groups].contiguous().view(torch.float8_e8m0fnu)
            nope = dequantize_fp8_rows(codes.view(torch.float8_e4m3fn), e8m0, group=NOPE_GROUP)
        else:
            nope = _from_nvfp4(codes, scale)
        key = torch.cat((nope, rotary.view(torch.bfloat16).float()), dim=1)
    return torch.where((slots >= 0)[:, None], key, 0.0)


def _to_nvfp4(nope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, n) -> codes (M, n/2) u8 and scale bytes (M, n/16 + 1): block scales, then the record's global scale."""
    power = nvfp4_power_scale(nope)
    codes, block_scale, _ = quantize_nvfp4(nope[:, None], global_scale=decode_e8m0(power))
    return codes[:, 0], torch.cat((block_scale[:, 0].view(torch.uint8), power.view(torch.uint8)[:, None]), dim=1)


def _from_nvfp4(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The way back: codes (M, n/2) and a record's whole scale part -> (M, n) f32."""
    blocks = 2 * codes.shape[1] // NVFP4.group
    block_scale = scale[:, :blocks].contiguous().view(torch.float8_e4m3fn)
    return dequantize_nvfp4(codes[:, None], block_scale[:, None], decode_e8m0(scale[:, blocks].contiguous()))[:, 0]
