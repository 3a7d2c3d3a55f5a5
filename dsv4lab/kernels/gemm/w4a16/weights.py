"""Weights as Hopper's tensor cores want to read them: reordered once, bit for bit, and decoded in registers.

A stored matrix is cut into tiles of 64 rows by 64 columns: four warps of 16 rows by four blocks of 16 columns. The tensor
core's A operand is 16 x 16: lane (g, q) = (lane // 4, lane % 4) holds rows g, g + 8 of columns 2q, 2q + 1, 2q + 8, 2q + 9.
Those eight values of one (warp, block, g, q) are one word, and a tile is its words in the order (warp, block, g ^ 2 block, q).
Two readers like that:

- a warpgroup (`wgmma`) takes block after block, a word a lane, from all 32 banks;
- a warp on its own (`mma.sync`) may pair columns with lanes as it likes, if it reads the tokens alike. It gives block q to lane
  (g, q), whose four words are then 16 consecutive bytes and share one scale a row. Eight lanes in turn use all banks.

Inside a word, codes lie so that a shift and a mask put them on BF16's sign, lower exponent and upper mantissa bits (`_FIELDS`).
The size never changes.
"""

from __future__ import annotations

import torch

from dsv4lab.kernels.gemm.w4a16.config import TILE

GROUP = 16  # columns that share a scale
BLOCKS = 4  # of 16 columns in a tile
LANES = 128
_ROWS_AT_ONCE = 4096  # a few bytes of scratch for every code
# Bits of (sign, upper exponent, lower exponent, mantissa) in a half word, of the four codes (row g, column 2q + e), (row g + 8,
# same), (row g, column 2q + 8 + e), (row g + 8, same); half e has column parity e. 16 + n: bit n of the other half.
_FIELDS = ((9, 2, 1, 0), (13, 6, 5, 4), (16 + 3, 12, 11, 10), (15, 8, 7, 14))
SCALE_EXPONENT = 107  # decoded scales are 2^107 too large, decoded codes 2^126 too small


def prepare_codes(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """E2M1 codes (N, K / 2) u8 and their E4M3 scales (N, K / 16), N and K multiples of 64 -> (N / 64, K / 64, 512) i32."""
    parts = [_words(c, s) for c, s in zip(codes.split(_ROWS_AT_ONCE), scale.split(_ROWS_AT_ONCE), strict=True)]
    return torch.cat(parts)


def _words(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    zero = ((scale.view(torch.uint8) & 127) == 0).repeat_interleave(GROUP // 2, dim=1)
    codes = codes.masked_fill(zero, 0)  # prepared scales cannot say zero
    n = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).to(torch.int64)
    # (row tile, warp, high row, g, column tile, block, high column, q, parity)
    n = n.view(rows // TILE, 4, 2, 8, columns // TILE, BLOCKS, 2, 4, 2).permute(0, 4, 1, 5, 3, 7, 8, 6, 2).flatten(-2)
    word = torch.zeros(n.shape[:-2], dtype=torch.int64, device=codes.device)
    for parity in range(2):
        for code, places in enumerate(_FIELDS):
            for bit, place in zip((3, 2, 1, 0), places, strict=True):
                word |= ((n[..., parity, code] >> bit) & 1) << ((place + 16 * parity) % 32)
    block = torch.arange(BLOCKS, device=codes.device)[:, None]
    word = word[:, :, :, block, torch.arange(8, device=codes.device) ^ (2 * block)]
    word = torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)
    return word.reshape(rows // TILE, columns // TILE, LANES * BLOCKS).contiguous()


def prepare_scales(scale: torch.Tensor) -> torch.Tensor:
    """E4M3 scales (N, K / 16) -> (N / 64, K / 64, 64) i32, bytes in the order (warp, g, block, high row).

    A byte is a 5-bit exponent and a 3-bit mantissa. A denormal scale becomes normal in this form, which has the exponents for
    it; zero cannot be told from 2^-10, so `prepare_codes` clears the codes under a zero scale.
    """
    bits = scale.view(torch.uint8).to(torch.int64)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    shift = torch.tensor([0, 3, 2, 2, 1, 1, 1, 1], device=bits.device)[
        mantissa
    ]  # makes a denormal's leading bit the implicit one
    denormal = (exponent == 0) & (mantissa > 0)
    exponent = torch.where(denormal, 4 - shift, exponent + 3)
    mantissa = torch.where(denormal, (mantissa << shift) & 7, mantissa)
    byte = torch.where((bits & 127) == 0, 0, (exponent << 3) | mantissa)
    rows, columns = scale.shape
    byte = byte.view(rows // TILE, 4, 2, 8, columns // BLOCKS, BLOCKS).permute(0, 4, 1, 3, 5, 2).contiguous()
    return byte.to(torch.uint8).flatten(2).view(torch.int32)
