"""Lifetimes of memory pieces, worked out by hand."""

from __future__ import annotations

import numpy as np

from dsv4lab.sim.occupancy import Lifetimes, Occupancy


def rows(lifetimes: Lifetimes) -> set[tuple[int, ...]]:
    return {tuple(int(x) for x in row) for row in lifetimes.pieces()}


def test_a_piece_lives_from_its_write_to_the_last_read_before_the_next_write() -> None:
    memory = Lifetimes(10)
    memory.write(np.arange(2, 6), 10, 1)
    memory.read(np.arange(2, 6), 12)
    memory.read(np.arange(2, 4), 15)
    assert rows(memory) == {(2, 4, 10, 15, 1), (4, 6, 10, 12, 1)}
    memory.write(np.arange(3, 5), 20, 2)
    assert rows(memory) == {(2, 3, 10, 15, 1), (3, 4, 10, 15, 1), (4, 5, 10, 12, 1), (5, 6, 10, 12, 1), (3, 5, 20, 20, 2)}


def test_parts_written_one_by_one_before_any_read_are_one_piece_with_the_first_write() -> None:
    memory = Lifetimes(4)
    for step in (5, 6, 7):
        memory.write(np.array([1]), step, 0)
    memory.read(np.array([1]), 9)
    memory.read(np.array([2]), 9)  # never written: nothing is held there
    assert rows(memory) == {(1, 2, 5, 9, 0)}


def test_what_is_held_at_a_step() -> None:
    memory = Lifetimes(8)
    memory.write(np.arange(4), 1, 0)
    memory.write(np.arange(4, 8), 3, 1)
    memory.read(np.arange(8), 5)
    memory.end()
    memory.write(np.arange(2), 9, 0)
    held = Occupancy(memory.pieces(), "bytes", 8, ("TMA", "threads"))
    assert [held.at(step).held for step in (0, 1, 2, 3, 4, 5, 9)] == [0, 4, 4, 8, 8, 0, 0]
    assert held.most() == (3, 8)
    assert held.figure()["kinds"] == ["TMA", "threads"] and held.figure()["extent"] == 8 / 1024
