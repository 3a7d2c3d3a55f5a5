"""Bank conflicts against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dsv4lab.sim.banks import passes
from dsv4lab.sim.layouts import swizzle

LANE = np.arange(32)


@pytest.mark.parametrize(
    ("stride_words", "degree"),
    [(0, 1), (1, 1), (2, 2), (3, 1), (4, 4), (8, 8), (16, 16), (31, 1), (32, 32), (33, 1), (48, 16)],
)
def test_words_at_a_stride(stride_words: int, degree: int) -> None:
    found = passes(1024 + 4 * stride_words * LANE, 4)
    assert (found.phases, found.passes, found.degree, found.excess) == (1, degree, degree, degree - 1)
    assert found.words.sum() == (1 if stride_words == 0 else 32)  # a word that all lanes read is served once


def test_lanes_that_share_words_do_not_conflict() -> None:
    assert passes(LANE, 1).degree == 1  # 32 bytes are 8 words
    assert passes(2 * LANE, 2).passes == 1
    assert passes(4 * (LANE % 2) * 32, 4).degree == 2  # two words, both in bank 0
    assert passes(4 * (LANE // 16 * 33), 4).degree == 1


def test_wide_elements_go_in_phases() -> None:
    eight, sixteen = passes(8 * LANE, 8), passes(16 * LANE, 16)
    assert (eight.phases, eight.passes, eight.degree) == (2, 2, 1)
    assert (sixteen.phases, sixteen.passes, sixteen.degree) == (4, 4, 1)
    assert passes(16 * LANE, 8).passes == 4  # 16 lanes x 16 bytes: every bank has two words in each half
    assert passes(128 * LANE, 16).degree == 8  # rows of 128 bytes: the eight lanes of a quarter meet in four banks
    assert passes(128 * LANE, 16).passes == 32
    assert passes(144 * LANE, 16).passes == 4  # one chunk of padding a row


@pytest.mark.parametrize(
    ("mode", "row_bytes", "degree"), [(3, 128, 1), (0, 128, 8), (2, 64, 1), (0, 64, 4), (1, 32, 1), (0, 32, 2)]
)
def test_the_rows_of_a_matrix_and_what_swizzles_do(mode: int, row_bytes: int, degree: int) -> None:
    rows = swizzle(4096 + row_bytes * np.arange(8), mode)
    found = passes(rows, 16)
    assert (found.phases, found.degree) == (1, degree)


def test_inactive_lanes_cost_nothing() -> None:
    odd = LANE[1::2]
    assert passes(128 * odd, 4, odd).degree == 16
    found = passes(np.array([0, 128]), 16, np.array([3, 9]))
    assert (found.phases, found.passes) == (2, 2)  # different quarters of the warp never meet
    assert passes(np.array([], int), 4).passes == 0


def test_warps_are_served_one_after_another() -> None:
    two = passes(np.concatenate([4 * LANE, 8 * LANE]), 4)
    assert (two.phases, two.passes, two.degree) == (2, 3, 2)


def test_the_words_say_where() -> None:
    found = passes(4 * 8 * LANE, 4)
    np.testing.assert_array_equal(np.flatnonzero(found.words), [0, 8, 16, 24])
    assert set(found.words[found.words > 0]) == {8}


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"width must be 1, 2, 4, 8 or 16 bytes, got 3"):
        passes(LANE, 3)
