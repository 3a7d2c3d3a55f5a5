"""`fn` as the projection holds it: float32 as three BF16, in the order of `mma.sync` fragments; made once, kept beside `fn`.

A float32 is the sum of three BF16: it rounded, what is left rounded, the rest; 8 bits each, of the 24. The streams are BF16, so
that a float32 times them is three exact products. Two parts would leave comb 1.1e-5 off, relative, for `scale` 1 and products
of unit size, and 5e-5 for 4 (1,024 random tokens of 4096).

A block is 16 columns of D in all four streams. Lane (g, q) = (lane // 4, lane % 4) has, of output 8 n + g and stream j, columns
4 q .. 4 q + 3 of the block: two words for each part, the two halves of the product's K. The streams' fragments are permuted
along K alike, which a sum does not mind, and are read 8 bytes a lane.
"""

from __future__ import annotations

import torch

from dsv4lab.kernels._common.kept import kept
from dsv4lab.kernels.mhc.config import BLOCK, HALVES, PARTS, STREAMS, WARP, products


def _parts(numbers: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """(N, 4 D) float64 -> (count, ceil(N / 8), 8, 4, D / 16, 16): each rounded, then what is left, and so on. Rows past N
    are zero.
    """
    tiles = -(-numbers.shape[0] // 8)
    rest = numbers.new_zeros(tiles * 8, numbers.shape[1])
    rest[: numbers.shape[0]] = numbers
    parts = []
    for _ in range(count):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].double()
    return torch.stack(parts).view(count, tiles, 8, STREAMS, -1, BLOCK)


def _words(fragments: torch.Tensor) -> torch.Tensor:
    """(block, .., g, q, pair) of 16 bits -> (blocks, words / 4, 32, 4) i32, four of a lane's words at a time."""
    return fragments.contiguous().view(torch.int32).view(fragments.shape[0], -1, 4, WARP).transpose(2, 3).contiguous()


def prepare(fn: torch.Tensor) -> torch.Tensor:
    """fn (N, 4 D) f32, N 24 or 4, D % 16 == 0 -> (D / 16, words / 4, 32, 4) i32: words of a lane, four at a time.

    A lane's words run over (stream, part, tile of 8 outputs, half), the last fastest; rows past N are zero.
    """
    parts = _parts(fn.double(), PARTS, torch.bfloat16).unflatten(-1, (4, 2, 2))
    # (part, tile, g, stream, block, q, half, pair) -> (block, stream, part, tile, half, g, q, pair)
    return _words(parts.permute(4, 3, 0, 1, 6, 2, 5, 7))


def prepare_fragments(fn: torch.Tensor, *, scaled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """fn (N, 4 D) f32 -> (D / 16, words / 4, 32, 4) i32, and what each of its rows is to be multiplied by (20 or 4,) f32.

    A softmax does not change when all its logits are less the first: of comb's rows the first `fn` is taken from the other
    three, and is left out. As three BF16; or, scaled, as two FP16: a row's numbers are then scaled by a power of two, so that
    the largest lies in 2^14 .. 2^15. Lane (g, q) has, of row 8 n + g and stream j, columns 2 q, 2 q + 1 and 8 + 2 q, 9 + 2 q of
    the block: fragments as `ldmatrix` has the streams'. Words run over (stream, product, half): see `products`.
    """
    rows = fn.double()
    if fn.shape[0] > STREAMS:
        comb = rows[2 * STREAMS :].unflatten(0, (STREAMS, STREAMS))
        rows = torch.cat([rows[: 2 * STREAMS], (comb[:, 1:] - comb[:, :1]).flatten(0, 1)])
    exponent = torch.full((rows.shape[0],), 15, device=fn.device)
    count, dtype = PARTS, torch.bfloat16
    if scaled:  # as if all zeros were below 2^-100, so that the powers of two remain float32
        exponent = torch.frexp(rows.abs().amax(1)).exponent.clamp(min=-100)
        count, dtype = HALVES, torch.float16
    parts = _parts(torch.ldexp(rows, (15 - exponent)[:, None]), count, dtype)
    parts = torch.cat([parts, torch.zeros_like(parts[:1])])
    last = parts.shape[1] - 1
    parts[:-1, last, 4:] = parts[1:, last, :4]
    found = torch.stack([parts[at] for at in products(last + 1, count)])
    # (product, g, stream, block, half, q, pair) -> (block, stream, product, half, g, q, pair)
    words = _words(found.unflatten(-1, (2, 4, 2)).permute(3, 2, 0, 4, 1, 5, 6))
    return words, torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 15)


def prepared(fn: torch.Tensor) -> torch.Tensor:
    """`prepare`, from memory where `fn` has not changed since."""
    return kept((id(fn), "parts"), [fn], lambda: prepare(fn))


def prepared_fragments(fn: torch.Tensor, *, scaled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`prepare_fragments`, likewise."""
    return kept((id(fn), scaled), [fn], lambda: prepare_fragments(fn, scaled=scaled))
