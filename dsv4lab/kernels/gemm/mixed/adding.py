"""A token's rows, which are the tiles of one product, added up by the CTA that comes last to a tile of their columns.

What `moe.combine` makes of them, to the bit, and without a launch of its own: rows in the order of their experts' ids, the
row of the matrix beside last, in float32, rounded once. Rows of no expert add nothing.

    arrived[tile of columns]   how many rows have it in memory; the last one reads them all, and leaves zero

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from dsv4lab.kernels.moe.combine.kernel import in_order

VECTOR = 4  # columns of a lane


@cute.jit
def add_rows(plan: cutlass.Constexpr, y: Any, tiles: Any, alpha: Any, added: Any, arrived: Any, row_tile: Any) -> None:
    """By one warp, once all have stored a tile. y (rows + 1, N), tiles (rows, 2) the rows' ids -> added (1, N)."""
    lane = cute.arch.lane_idx()
    before: Any = Int32(0)
    if lane == 0:  # releases what the CTA's barrier has made known to it, and acquires the others'
        before = cute.arch.atomic_add(arrived.iterator + row_tile, Int32(1), sem="acq_rel", scope="gpu")
        if before == plan.adds:
            arrived[row_tile] = Int32(0)
    before = cute.arch.shuffle_sync(before, 0)
    if before == plan.adds:
        for quad in cutlass.range(lane, plan.rows_out // VECTOR, 32, unroll=1):
            column = row_tile * plan.rows_out + quad * VECTOR
            if column < y.shape[1]:
                _add(plan, y, tiles, alpha, added, column)


@cute.jit
def _add(plan: cutlass.Constexpr, y: Any, tiles: Any, alpha: Any, added: Any, column: Any) -> None:
    """`VECTOR` columns; all loads at once."""
    words = VECTOR * y.element_type.width // 32
    held = cute.make_rmem_tensor((words, plan.adds + 1), Uint32)
    ids = [tiles[s, 0] for s in range(plan.adds)]
    known = [cutlass.and_(tiles[s, 1] == 0, cutlass.and_(i >= 0, i < alpha.shape[0])) for s, i in enumerate(ids)]
    rows = [*in_order(ids, known, Uint32(0)), Uint32(plan.adds)]
    for s in cutlass.range_constexpr(plan.adds + 1):
        _load_fresh(held[None, s], y[cutlass.max(Int32(rows[s]), 0), None].iterator + column)
    total = cute.make_rmem_tensor((VECTOR,), Float32)
    total.fill(0.0)
    for s in cutlass.range_constexpr(plan.adds + 1):
        for w in cutlass.range_constexpr(words):
            held[w, s] = held[w, s] if Int32(rows[s]) >= 0 else Uint32(0)
        total.store(total.load() + cute.recast_tensor(held[None, s], y.element_type).load().to(Float32))
    result = cute.make_rmem_tensor((VECTOR,), added.element_type)
    result.store(total.load().to(added.element_type))
    cute.autovec_copy(result, cute.local_tile(added[0, None], (VECTOR,), (column // VECTOR,)))


def _load_fresh(held: Any, address: Any) -> None:
    """Two or four words from L2, past this SM's cache."""
    count = cute.size(held)
    names = ", ".join(f"{{$w{i}}}" for i in range(count))
    code = f"ld.global.cg.v{count}.b32 {{{names}}}, [{{$r0}}];"
    found = cute.arch.inline_ptx(code, write_only_types=[Uint32] * count, read_only_args=[address])
    for i in range(count):
        held[i] = found[i]
