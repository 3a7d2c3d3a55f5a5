"""Weights as Hopper's tensor cores want to read them: reordered once, at no cost in size, for every format.

A matrix is cut into slabs of 16 rows and tiles of 64 columns. The record of a (slab, tile) holds its codes, then its scales;
records of a slab follow each other along K, so that one bulk copy takes any number of them.

Codes. The tensor core's A operand is 16 x 16: lane (g, q) = (lane // 4, lane % 4) holds rows g, g + 8 of columns 2q, 2q + 1,
2q + 8, 2q + 9. A tile has four such blocks of 16 columns. The eight values of one (block, g, q) are `planes` words: one in a
4-bit format, two in FP8 (by upper and lower columns), four in BF16 (the operand's registers themselves). A plane of a record
is its 128 words in the order (block, g ^ 2 block, q). Two readers like that:

- a warp of a warpgroup (`wgmma`) takes block after block, a word a lane and plane, from all 32 banks;
- a warp on its own (`mma.sync`) may pair columns with lanes as it likes, if it reads the tokens alike. It gives block q to lane
  (g, q), whose four words of a plane are then 16 consecutive bytes. Eight lanes in turn use all banks.

Inside a word, bits lie so that a shift and a mask, of a 4-bit format's fourth pair a product, put them on BF16's sign, exponent
and mantissa: `_nibble_words` and `_byte_words` say where. A decoded code is then its value times a power of two that no
exponent field can hold beside it; the decoded scale brings the rest, and `alpha`, in the epilogue, what the scale could not:

    format     code decodes to      scale decodes to            alpha
    nvfp4      2^-126 code          2^107 block_scale           2^19 global_scale
    mxfp4      2^-126 code          2^(127 + s - s_max)         2^(s_max - 1)      s: exponent of the scale
    fp8_block  2^-120 code          2^(120 + s - s_max)         2^s_max
    bf16       itself               -                           1

so a code times its scale is exact in BF16; scales 133 octaves and more below a matrix's largest are lost. A weight with a NaN
anywhere has a NaN for alpha: the damage stays visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from dsv4lab.formats import BF16, FP8_BLOCK, MXFP4, NVFP4, PackedWeight

SLAB, TILE = 16, 64  # rows and columns of a record
GROUP_ROWS = 64  # a group's rows come in multiples of this: what a warpgroup multiplies at a time
K_PAD = 128  # prepared weights have whole pairs of tiles, of zeros where the matrix has ended
BLOCKS = 4  # of 16 columns in a tile
PLANE_WORDS = 128
PLANES = {NVFP4.name: 1, MXFP4.name: 1, FP8_BLOCK.name: 2, BF16.name: 4}
SCALE_WORDS = {NVFP4.name: 16, MXFP4.name: 8, FP8_BLOCK.name: 4, BF16.name: 0}
_ROWS_AT_ONCE = 4096  # the scratch of a matrix of 16,384 columns is then below 1 GB
# Bits of (sign, upper exponent, lower exponent, mantissa) in a half word, of the four codes (row g, column 2q + e), (row g + 8,
# same), (row g, column 2q + 8 + e), (row g + 8, same); half e has column parity e. 16 + n: bit n of the other half. Shifts by
# 0, 3 and 6 bring three of them onto BF16's fields (15, 8, 7, 6); no fourth shift finds all bits left over.
_FIELDS = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (16 + 13, 16 + 11, 16 + 10, 16 + 14))
_NVFP4_ALPHA = 2.0**19


def record_words(fmt: str) -> int:
    """32-bit words of a record."""
    return PLANES[fmt] * PLANE_WORDS + SCALE_WORDS[fmt]


@dataclass(frozen=True)
class PreparedWeight:
    """Matrices of one format in the order of this module.

    records (E * slabs, tiles, record_words) i32; alpha (E, 2) f32, of rows 0-7 and 8-15 of every slab; shape (E, N, K).
    paired: rows of two matrices (gate, up) take turns, eight by eight; N counts the rows of one.
    """

    format: str
    records: torch.Tensor
    alpha: torch.Tensor
    shape: tuple[int, int, int]
    paired: bool = False

    @property
    def slabs(self) -> int:
        """Of one matrix, or of one pair."""
        return self.records.shape[0] // self.alpha.shape[0]

    @property
    def nbytes(self) -> int:
        return self.records.nbytes + self.alpha.nbytes


def prepare(weight: PackedWeight, up: PackedWeight | None = None, top: torch.Tensor | None = None) -> PreparedWeight:
    """Reorder a matrix (N, K), or a stack (E, N, K): nvfp4, mxfp4, fp8_block with power-of-two scales, or bf16.

    up: a second one of the same shape and format; gate and up rows then take turns. N % 8 == 0, K % 8 == 0. top (E,): s_max,
    where it is to be larger than the matrix's own.
    Raises ValueError on formats, shapes and missing parts, TypeError on dtypes, as float32 scales of fp8_block.
    """
    for part in (weight, up):
        if part is not None:
            part.check()
    parts = [_stack(w) for w in (weight, up) if w is not None]
    first = parts[0]
    if first.format.name not in PLANES:
        raise ValueError(f"weight must be one of {', '.join(PLANES)}, got {first.format.name}")
    matrices, n, k = first.shape
    if len(weight.shape) not in (2, 3) or n % 8 or k % 8:
        raise ValueError(f"weight must be (N, K) or (E, N, K) with N % 8 == 0 and K % 8 == 0, got {tuple(weight.shape)}")
    if any(part.format != first.format or part.shape != first.shape for part in parts):
        found = [(part.format.name, tuple(part.shape)) for part in parts]
        raise ValueError(f"gate and up must have one format and shape, got {found[0]} and {found[1]}")
    name = first.format.name
    if first.scale is not None and first.scale.element_size() > 1:
        raise TypeError(f"scale of an {name} weight must be float8_e8m0fnu, got {first.scale.dtype}: powers of two only")
    tops = torch.stack([_largest_exponent(part) if top is None else top for part in parts], dim=1)  # (E, 1 or 2)
    alpha = torch.stack([_alpha(part, tops[:, i]) for i, part in enumerate(parts)], dim=1)
    codes = _rows(torch.stack([_codes(part) for part in parts], dim=1), first.format.codes_per_byte, k)
    scales = _rows(torch.stack([_scales(part, tops[:, i]) for i, part in enumerate(parts)], dim=1), _SCALE_COLUMNS[name], k)
    chunks = zip(codes.split(_ROWS_AT_ONCE), scales.split(_ROWS_AT_ONCE), strict=True)
    records = torch.cat([_records(c, s, name) for c, s in chunks])
    return PreparedWeight(name, records, alpha.expand(-1, 2).contiguous(), (matrices, n, k), up is not None)


def prepare_two(first: PackedWeight, second: PackedWeight) -> PreparedWeight:
    """(N1, K) and (N2, K) of one format without global scales, one behind the other, with one alpha. N1 % 16 == 0."""
    for part in (first, second):
        part.check()
    top = torch.maximum(*(_largest_exponent(_stack(part)) for part in (first, second)))
    a, b = (prepare(part, top=top) for part in (first, second))
    alpha = torch.maximum(a.alpha, b.alpha)  # of which either may be NaN
    return PreparedWeight(a.format, torch.cat([a.records, b.records]), alpha, (1, a.shape[1] + b.shape[1], a.shape[2]))


_WORD = {NVFP4.name: torch.uint8, MXFP4.name: torch.uint8, FP8_BLOCK.name: torch.uint8, BF16.name: torch.int16}
_SCALE_COLUMNS = {NVFP4.name: 16, MXFP4.name: 32, FP8_BLOCK.name: TILE, BF16.name: TILE}  # columns that share a scale byte


def _stack(weight: PackedWeight) -> PackedWeight:
    """A single matrix as a stack of one."""
    if len(weight.shape) == 3:
        return weight
    return PackedWeight(weight.format, **{name: t.unsqueeze(0) for name, t in weight.tensors().items()})


def _codes(part: PackedWeight) -> torch.Tensor:
    """Codes as bytes or halfwords; the sign of an NVFP4 scale, which records have no room for, goes to its codes."""
    codes = part.codes.view(_WORD[part.format.name])
    if part.format != NVFP4:
        return codes
    assert part.scale is not None
    signs = (part.scale.view(torch.uint8) >> 7) * 0x88  # of both codes of a byte
    return codes ^ signs.repeat_interleave(NVFP4.group // 2, dim=-1)


# ---- scales ------------------------------------------------------------------------------------------------------------
def _exponents(part: PackedWeight) -> torch.Tensor:
    assert part.scale is not None
    return part.scale.view(torch.uint8).to(torch.int32)


def _largest_exponent(part: PackedWeight) -> torch.Tensor:
    """The largest E8M0 byte of each matrix that is no NaN, (E,) i32; 127 in other formats."""
    if part.format not in (MXFP4, FP8_BLOCK):
        return torch.full(part.codes.shape[:1], 127, dtype=torch.int32, device=part.codes.device)
    exponents = _exponents(part)
    return torch.where(exponents == 255, 0, exponents).amax((1, 2))


def _alpha(part: PackedWeight, top: torch.Tensor) -> torch.Tensor:
    """The factor of each matrix, (E,) f32; NaN for one that holds a NaN."""
    if part.format == BF16:
        return torch.ones_like(top, dtype=torch.float32)
    bits = part.scale.view(torch.uint8) if part.scale is not None else part.codes
    if part.format == NVFP4:
        assert part.global_scale is not None
        broken = ((bits & 127) == 127).any((1, 2))
        alpha = part.global_scale.float() * _NVFP4_ALPHA
    else:
        broken = (bits == 255).any((1, 2))
        alpha = torch.exp2((top - (128 if part.format == MXFP4 else 127)).float())
    if part.format == FP8_BLOCK:
        broken = broken | ((part.codes.view(torch.uint8) & 127) == 127).any((1, 2))
    return torch.where(broken, torch.nan, alpha)


def _scales(part: PackedWeight, top: torch.Tensor) -> torch.Tensor:
    """Scale bytes for every row (E, N, K / group) u8, as records keep them; fp8_block: one for a row and tile."""
    if part.format == BF16:
        return part.codes.new_zeros((*part.shape[:2], 0), dtype=torch.uint8)
    if part.format == NVFP4:
        assert part.scale is not None
        return _nvfp4_scale_bytes(part.scale)
    shift = {MXFP4.name: 254, FP8_BLOCK.name: 247}[part.format.name]  # field of BF16's exponent for the largest scale
    field = (_exponents(part) - top[:, None, None] + shift).clamp(0, 254).to(torch.uint8)
    if part.format == MXFP4:
        return field
    n, k = part.shape[1:]
    rows, columns = part.format.block_shape
    return field.repeat_interleave(rows, dim=1)[:, :n].repeat_interleave(columns // TILE, dim=2)[:, :, : -(-k // TILE)]


def _nvfp4_scale_bytes(scale: torch.Tensor) -> torch.Tensor:
    """E4M3 -> a 5-bit exponent and a 3-bit mantissa, same shape.

    A denormal becomes normal in this form, which has the exponents for it; zero cannot be told from 2^-10, so the codes under a
    zero scale are cleared.
    """
    bits = scale.view(torch.uint8).to(torch.int32)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    # makes a denormal's leading bit the implicit one
    shift = torch.tensor([0, 3, 2, 2, 1, 1, 1, 1], dtype=torch.int32, device=bits.device)[mantissa]
    denormal = (exponent == 0) & (mantissa > 0)
    exponent = torch.where(denormal, 4 - shift, exponent + 3)
    mantissa = torch.where(denormal, (mantissa << shift) & 7, mantissa)
    return torch.where((bits & 127) == 0, 0, (exponent << 3) | mantissa).to(torch.uint8)


# ---- records -----------------------------------------------------------------------------------------------------------
def _rows(stacked: torch.Tensor, unit: int, k: int) -> torch.Tensor:
    """(E, parts, N, K / unit) -> (rows, columns), eights of the parts taking turns; whole slabs, whole pairs of tiles."""
    matrices, parts, n, columns = stacked.shape
    rows = stacked.unflatten(2, (n // 8, 8)).transpose(1, 2).reshape(matrices, n * parts, columns)
    wanted = -(-k // K_PAD) * K_PAD // unit if columns else 0
    return functional.pad(rows, (0, wanted - columns, 0, -(n * parts) % SLAB)).flatten(0, 1)


def _records(codes: torch.Tensor, scales: torch.Tensor, name: str) -> torch.Tensor:
    """Rows of codes and scale bytes -> records (slabs, tiles, words) i32."""
    if name == NVFP4.name:
        zero = (scales == 0).repeat_interleave(NVFP4.group // 2, dim=1)
        codes = codes.masked_fill(zero, 0)
    if name in (NVFP4.name, MXFP4.name):
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    slabs, tiles = codes.shape[0] // SLAB, codes.shape[1] // TILE
    # (slab, upper rows, g, tile, block, upper columns, q, parity) -> (slab, tile, block, g, q, parity, upper c., upper r.)
    n = codes.view(slabs, 2, 8, tiles, BLOCKS, 2, 4, 2).permute(0, 3, 4, 2, 6, 7, 5, 1)
    if name == BF16.name:
        words = n.permute(0, 1, 6, 7, 2, 3, 4, 5).contiguous().view(torch.int32).reshape(slabs, tiles, 4, BLOCKS, 8, 4)
    elif name == FP8_BLOCK.name:
        words = _byte_words(n)
    else:
        words = _nibble_words(n)[:, :, None]
    block = torch.arange(BLOCKS, device=codes.device)[:, None]
    words = words[:, :, :, block, torch.arange(8, device=codes.device) ^ (2 * block)]
    return torch.cat([words.flatten(2), _scale_words(scales, slabs, tiles, name)], dim=2).contiguous()


def _byte_words(n: torch.Tensor) -> torch.Tensor:
    """E4M3 codes: plane by upper columns; half e has parity e, its upper byte row g, its lower byte row g + 8."""
    return n.flip(-1).permute(0, 1, 6, 2, 3, 4, 5, 7).contiguous().flatten(-2).view(torch.int32).squeeze(-1)


def _nibble_words(n: torch.Tensor) -> torch.Tensor:
    """E2M1 codes, eight a word, their bits at `_FIELDS`."""
    n = n.flatten(-2).to(torch.int64)  # (.., parity, code of _FIELDS)
    word = torch.zeros(n.shape[:-2], dtype=torch.int64, device=n.device)
    for parity in range(2):
        for code, places in enumerate(_FIELDS):
            for bit, place in zip((3, 2, 1, 0), places, strict=True):
                word |= ((n[..., parity, code] >> bit) & 1) << ((place + 16 * parity) % 32)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def _scale_words(scales: torch.Tensor, slabs: int, tiles: int, name: str) -> torch.Tensor:
    """nvfp4 and mxfp4: bytes in the order (g, group, upper row); fp8_block: BF16 pairs for rows 0-7, for rows 8-15."""
    if name == BF16.name:
        return scales.new_empty((slabs, tiles, 0), dtype=torch.int32)
    if name == FP8_BLOCK.name:
        field = scales.view(slabs, 2, 8, tiles)[:, :, 0].to(torch.int32).transpose(1, 2)  # (slab, tile, upper rows)
        return functional.pad((field << 7) | (field << 23), (0, 2))
    groups = scales.shape[1] // tiles
    ordered = scales.view(slabs, 2, 8, tiles, groups).permute(0, 3, 2, 4, 1).contiguous()
    return ordered.flatten(2).view(torch.int32)
