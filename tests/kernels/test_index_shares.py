"""How single queries' entries are divided among CTAs, on the simulated GPU against a search over all lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import runtime_of
from tests.kernels.simulated import simulating

UNIT = 128
PARTS = 700  # that are asked for
QUERIES = 1024  # at most
THREADS = 64


@dataclass(frozen=True)
class Asked:
    unit: int
    parts: int
    queries: int


def divided(visible: torch.Tensor, entries: int, ctas: int) -> tuple[int, int, list[list[int]]]:
    """The length, how many parts a CTA may have, and (query, first entry, end) of the first parts, to the first that is
    none.
    """
    asked = Asked(UNIT, PARTS, QUERIES)
    length, several, found = (torch.zeros(*shape, dtype=torch.int32) for shape in ((1,), (1,), (PARTS, 3)))
    runtime = runtime_of(visible)
    function = cache.kernel(__name__, asked, lambda: _build(asked), runtime)
    runtime.call(function, visible, length, several, found, entries, ctas)
    parts = found.tolist()
    return int(length), int(several), parts[: [row for row, *_ in parts].index(-1)]


def _build(asked: Asked) -> tuple[Any, tuple[Any, ...]]:
    import cutlass
    import cutlass.cute as cute
    from cutlass.memory import SmemAllocator

    from dsv4lab.kernels._common.fakes import fake, fake_stream
    from dsv4lab.kernels.indexer.scores.shares import Shares

    @cute.kernel
    def kernel(visible: Any, length: Any, several: Any, found: Any, entries: Any, ctas: Any) -> None:
        thread, _, _ = cute.arch.thread_idx()
        memory = SmemAllocator()
        seen, whose = (memory.allocate_tensor(cutlass.Int32, cute.make_layout(asked.queries)) for _ in range(2))
        shares = Shares(seen, whose, visible.shape[0], asked.unit)
        shares.look(visible, visible, entries, thread, THREADS)
        cute.arch.barrier()
        if thread < 32:
            length[0], several[0] = shares.length(ctas)
            for part in cutlass.range(asked.parts, unroll=1):
                row, low, high = shares.find(part, length[0])
                found[part, 0], found[part, 1], found[part, 2] = row, low, high

    @cute.jit
    def launch(visible: Any, length: Any, several: Any, found: Any, entries: Any, ctas: Any, stream: Any) -> None:
        kernel(visible, length, several, found, entries, ctas).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)

    integers = (fake(cutlass.Int32, *shape, align=4) for shape in ((1,), (1,), (asked.parts, 3)))
    examples = (fake(cutlass.Int64, cute.sym_int(), align=8), *integers, cutlass.Int32(1), cutlass.Int32(1), fake_stream())
    return launch, examples


CASES = [
    ([4096] * 64, 262144, 264),  # a graph's step: as even as it would be alone
    ([4224] * 64, 262144, 264),
    ([4096] * 8 + [262144], 262144, 264),  # one long among short
    ([5, 0, 0, 130, 129, 128, 127, 1], 200, 2),
    ([1] * 40, 64, 3),  # more queries than CTAs, and than lanes
    ([-3, 2**40, 0], 3000, 7),  # cut to what there can be
    ([0] * 33, 512, 4),
    ([262144], 262144, 264),
    ([262144] * 8, 262144, 20),  # much for each CTA: as many parts as it may have
    ([70000, 9, 70001], 262144, 21),  # or as are worth one
    (list(range(0, 5000, 77)), 4096, 20),
]


@pytest.mark.parametrize(("visible", "entries", "ctas"), CASES)
def test_parts_are_the_shortest_that_are_few_enough_and_cover_all(visible: list[int], entries: int, ctas: int) -> None:
    with simulating("sm_90a"):
        length, several, parts = divided(torch.tensor(visible), entries, ctas)
    seen = [min(max(n, 0), entries) for n in visible]
    units = [-(-n // UNIT) for n in seen]
    budget = ctas * max(-(-2 * len(visible) // ctas), min(sum(units) // (4 * ctas), 8))
    assert several * ctas == budget

    def count(of: int) -> int:
        return sum(-(-n // of) for n in units)

    assert length == next(of for of in range(1, 4096) if count(of) <= budget)
    assert parts == [
        [row, low, min(low + length * UNIT, n)] for row, n in enumerate(seen) for low in range(0, n, length * UNIT)
    ]  # in order, none twice, none empty
    assert len(parts) == count(length)
