"""Indices that kernels follow without looking: slots, block tables, sequences, positions, ids. Here they are looked at.

Values on the CPU always, hence all of the reference's and the simulator's there. Values on a GPU within `checked()`, and
everywhere with DSV4LAB_CHECK_INDICES=1 in the environment: each such call then waits for the device. While a CUDA graph is
recorded nothing is looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

_EVERYWHERE = os.environ.get("DSV4LAB_CHECK_INDICES") == "1"
_asked: ContextVar[bool | None] = ContextVar("dsv4lab_check_indices", default=None)


@contextmanager
def checked(on: bool = True) -> Iterator[None]:
    """Have indices looked at on any device, or on none."""
    token = _asked.set(on)
    try:
        yield
    finally:
        _asked.reset(token)


def check_range(name: str, values: torch.Tensor, end: int, *, start: int | None = None) -> None:
    """Raises ValueError where one of the values (any shape, integers) is not in [start, end), or not below end."""
    if not _looks(values) or not values.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(values))
    if high >= end or (start is not None and low < start):
        rule = f"below {end}" if start is None else f"{start} to {end - 1}"
        raise ValueError(f"{name} must be {rule}, got {high if high >= end else low}")


def check_positions(positions: torch.Tensor) -> None:
    """As far as angles are exact. Raises ValueError."""
    check_range("positions", positions, 2**20 + 1, start=0)


def check_slots(slots: torch.Tensor, num_pages: int, page_size: int, *, written: bool = False) -> None:
    """Slots (N,) must be in a pool of so many pages, or negative; none twice where they are written. Raises ValueError, as
    for slots that are read in no page.
    """
    if slots.dim() != 1 or (slots.numel() and not (num_pages or written)):
        raise ValueError(f"slots must be (N,) in at least one page, got {tuple(slots.shape)} in {num_pages}")
    check_range("slots", slots, num_pages * page_size, start=-(2**31))  # of 32 bits
    if written and _looks(slots):
        used, count = slots[slots >= 0].unique(return_counts=True)
        if (count > 1).any():
            raise ValueError(f"slots must name no place twice, got {int(used[count > 1][0])} {int(count[count > 1][0])} times")


def check_entries(
    block_table: torch.Tensor,
    seq_idx: torch.Tensor,
    num_pages: int,
    page_size: int,
    *,
    visible: torch.Tensor | None = None,
    most: int | None = None,
    chosen: torch.Tensor | None = None,
) -> None:
    """What a query reads must have a page: entries 0 .. visible - 1, `most` at most, or those chosen (-1: none).

    block_table (num_seqs, nb) of page numbers below num_pages, -1 where there is none; seq_idx, visible (M,); chosen (M, k),
    integers.  Raises ValueError naming the first query without.
    """
    if not _looks(block_table) or not seq_idx.numel():
        return
    check_range("seq_idx", seq_idx, block_table.shape[0], start=0)
    check_range("block_table", block_table, num_pages)
    seq_idx, there = seq_idx.long(), block_table >= 0
    if visible is not None:
        visible = visible if most is None else visible.clamp(max=most)
        whole = there.long().cumprod(1).sum(1) * page_size  # entries before the first hole
        wrong, entry = visible > whole[seq_idx], whole[seq_idx]
    elif chosen is not None and chosen.numel():
        there = torch.nn.functional.pad(there, (0, 1))  # beyond the table there is no page
        column = (chosen.clamp(min=0) // page_size).clamp(max=block_table.shape[1]).long()
        missing = (chosen >= 0) & ~there[seq_idx[:, None], column]
        wrong, entry = missing.any(1), chosen.gather(1, missing.long().argmax(1, keepdim=True))[:, 0]
    else:
        return
    if wrong.any():
        m = int(wrong.nonzero()[0])
        seq, at = int(seq_idx[m]), int(entry[m])
        raise ValueError(
            f"block_table must have a page for every entry read, got none for entry {at} of sequence {seq} (query {m})"
        )


def check_completed(
    block_table: torch.Tensor, positions: torch.Tensor, seq_idx: torch.Tensor, pages: torch.Tensor, page_size: int, ratio: int
) -> None:
    """Entries that tokens complete must be in the block table, no two in one place. Raises ValueError."""
    check_range("seq_idx", seq_idx, block_table.shape[0], start=0)
    check_range("block_table", block_table, pages.shape[0])
    check_positions(positions)
    if _looks(positions):
        last = (positions + 1) % ratio == 0
        entries = positions[last] // ratio
        check_range("entries of block_table", entries, block_table.shape[1] * page_size)
        page = block_table[seq_idx[last], entries // page_size].long()
        check_slots(page * page_size + entries % page_size, pages.shape[0], page_size, written=True)


def check_steps(positions: torch.Tensor, seq_idx: torch.Tensor, first_row: torch.Tensor, last_position: torch.Tensor) -> None:
    """A step's tokens of a sequence must lie in rows and positions in a row, from first_row on up to last_position; all (M,).
    Raises ValueError naming the first token that does not.
    """
    if not _looks(positions) or not positions.numel():
        return
    rows = torch.arange(len(positions), device=positions.device)
    first = first_row.clamp(min=0).minimum(rows)
    inside = (first == first_row) & (seq_idx[first] == seq_idx) & (positions[first] + rows - first == positions)
    for name, values, right in (("first_row", first_row, inside), ("last_position", last_position, last_position >= positions)):
        if not right.all():
            m = int((~right).nonzero()[0])
            at = int(positions[m])
            raise ValueError(
                f"{name} must agree with positions and seq_idx, got {int(values[m])} for position {at} (token {m})"
            )


def check_keys(
    block_table: torch.Tensor,
    positions: torch.Tensor,
    seq_idx: torch.Tensor,
    topk_indices: torch.Tensor | None,
    *,
    rings: int,
    num_pages: int | None,
    page_size: int,
    ratio: int,
    max_entries: int | None = None,
) -> None:
    """What attention's queries read must be there: one of so many rings, and entries' pages as in `check_entries`.

    max_entries: no query may see more; None: no matter. num_pages: of the entries' pool, None without one.  Raises ValueError.
    """
    if num_pages is not None and min(ratio, page_size) < 1:
        raise ValueError(f"ratio and entry_page must be at least 1, got {ratio} and {page_size}")
    check_range("seq_idx", seq_idx, rings, start=0)
    check_positions(positions)
    if num_pages is not None and _looks(positions):
        seen = (positions + 1) // ratio
        if max_entries is not None and seen.numel() and int(seen.max()) > max_entries:
            m = int((seen > max_entries).nonzero()[0])
            raise ValueError(
                f"max_entries must be at least what a query sees, got {max_entries} for {int(seen[m])} (query {m})"
            )
        visible = seen if topk_indices is None else None
        check_entries(block_table, seq_idx, num_pages, page_size, visible=visible, chosen=topk_indices)
        if topk_indices is not None and topk_indices.numel():
            ids = topk_indices.sort(1).values
            wrong = (ids[:, -1] >= seen) | ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).any(1)
            if wrong.any():
                raise ValueError(f"topk_indices must be entries seen, none twice, got {ids[wrong][0].tolist()}")


def _looks(values: torch.Tensor) -> bool:
    if isinstance(values, FakeTensor) or values.is_meta:
        return False
    asked = _asked.get()
    if asked is None:
        asked = values.device.type == "cpu" or _EVERYWHERE
    return asked and not (values.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
