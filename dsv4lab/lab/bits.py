"""Which bit of its input a reordering puts where, found by asking it: no second copy of its rule is needed.

A reordering sends every bit of n small codes to a place of its output or drops it. Feed it codes of which one bit each spells
out a digit of the code's number: what comes out at a place, digit by digit, is the number of the code that went there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Reorder = Callable[[torch.Tensor], torch.Tensor]


class Owners(NamedTuple):
    """For every bit of the output, bytes in order, lowest bits first: whose it is, and which of that code's; -1: none."""

    code: NDArray[np.int64]
    bit: NDArray[np.int64]


def owners(reorder: Reorder, count: int, bits: int) -> Owners:
    """Ask `reorder`, which takes (count,) u8 codes of so many bits and gives bytes. Raises ValueError if it makes up bits."""
    ones = (1 << bits) - 1
    empty, full = (
        _ask(reorder, torch.zeros(count, dtype=torch.uint8)),
        _ask(reorder, torch.full((count,), ones, dtype=torch.uint8)),
    )
    if (empty & ~full).any():
        raise ValueError("reorder must pass bits on, got some that are set where no code has any")
    moved = full & ~empty
    number, place = torch.arange(count), np.zeros(len(full), np.int64)
    code, bit = place.copy(), place.copy()
    for digit in range(max((count - 1).bit_length(), 1)):
        code |= _ask(reorder, ((number >> digit & 1) * ones).to(torch.uint8)).astype(np.int64) << digit
    for digit in range(max((bits - 1).bit_length(), 1)):
        pattern = sum((b >> digit & 1) << b for b in range(bits))
        bit |= _ask(reorder, torch.full((count,), pattern, dtype=torch.uint8)).astype(np.int64) << digit
    return Owners(np.where(moved, code, -1), np.where(moved, bit, -1))


def _ask(reorder: Reorder, codes: torch.Tensor) -> NDArray[np.bool_]:
    found = np.ascontiguousarray(reorder(codes).cpu().numpy()).view(np.uint8).ravel()
    return np.unpackbits(found, bitorder="little").astype(bool)


def moved(word: NDArray[np.int64], left: int, mask: int) -> NDArray[np.int64]:
    """A word's 32 owners after a shift to the left (negative: right) and a mask: (32,), -1 for zeros."""
    found = np.full(32, -1)
    for at in range(32):
        if 0 <= at - left < 32 and mask >> at & 1:
            found[at] = word[at - left]
    return found
