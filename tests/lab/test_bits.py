"""Owners of bits, found by asking a reordering, on reorderings whose rule is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4lab.lab import bits


def test_a_packing_of_nibbles_names_its_owners() -> None:
    found = bits.owners(lambda codes: codes[0::2] | (codes[1::2] << 4), count=6, bits=4)
    assert found.code.reshape(3, 8).tolist() == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4, [4] * 4 + [5] * 4]
    assert found.bit.reshape(3, 8).tolist() == [[0, 1, 2, 3] * 2] * 3


def test_bits_that_are_dropped_or_never_set_have_no_owner() -> None:
    """Of every code only the upper bit goes to a byte of words of two; the other byte is constant."""

    def reorder(codes: torch.Tensor) -> torch.Tensor:
        upper = (codes >> 1) & 1
        return torch.stack([upper, torch.full_like(codes, 5)], dim=-1).flatten()

    found = bits.owners(reorder, count=3, bits=2)
    by_byte = found.code.reshape(3, 2, 8)
    assert by_byte[:, 0, 0].tolist() == [0, 1, 2] and (by_byte[:, 0, 1:] == -1).all() and (by_byte[:, 1] == -1).all()
    assert set(found.bit[found.code >= 0]) == {1}


def test_wider_elements_are_taken_as_their_bytes() -> None:
    found = bits.owners(lambda codes: codes.to(torch.int32) << 20, count=2, bits=3)
    assert np.flatnonzero(found.code >= 0).tolist() == [20, 21, 22, 52, 53, 54]
    assert found.code[[20, 54]].tolist() == [0, 1] and found.bit[[20, 54]].tolist() == [0, 2]


def test_a_reordering_that_makes_up_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="must pass bits on"):
        bits.owners(lambda codes: codes ^ 1, count=4, bits=1)


def test_moved_follows_shifts_and_masks() -> None:
    word = np.arange(32)
    assert bits.moved(word, 6, 0xFFFFFFFF).tolist() == [-1] * 6 + list(range(26))
    assert bits.moved(word, -4, 0x00000003)[:3].tolist() == [4, 5, -1]
    assert (bits.moved(word, -4, 0)[:] == -1).all()
