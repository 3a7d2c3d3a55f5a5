"""Attention of a sequence whose keys are no numbers, as of a damaged cache: no other sequence of the call has anything of them.

A key that is masked is multiplied all the same, and 0 times NaN is NaN. So places of shared memory that a sequence does not
fill may not keep what the one before had there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.attention import Case, in_order, make_case
from tests.kernels.simulated import simulating

DAMAGED, CLEAN = (1100, 1), (18, 3)  # tokens, queries: one of each is a pair, where two queries are; the clean ones go on to
# another block of 16 tokens


def scene(record: str, kind: str, heads: int, pairs: int = 1, device: str = "cpu") -> tuple[Case, Case]:
    """Sequences with a whole window and entries, each before one that fills neither; and the same where all bytes of the former
    ones' keys are 255: NaN as E4M3, E8M0 and BF16.
    """
    case = in_order(make_case(record, kind, [DAMAGED, CLEAN] * pairs, heads, device=device))
    q, sinks, window, entries, table, positions, seq_idx, chosen = case.args
    near, far = window.clone(), None if entries is None else entries.clone()
    near.view(torch.uint8).unflatten(0, (2 * pairs, -1))[::2] = 255
    if far is not None:
        pages = table[::2].long()
        far.view(torch.uint8)[pages[pages >= 0]] = 255
    return case, replace(case, args=(q, sinks, near, far, table, positions, seq_idx, chosen))


GATHERED: dict[str, Any] = dict(parts=1, unpack=False, pair=False)
WAYS = [
    ("plain", "window", 64, 1, GATHERED),
    ("plain", "visible", 64, 1, GATHERED),
    ("fp8", "chosen", 64, 1, GATHERED),
    ("nvfp4", "visible", 64, 1, GATHERED),
    ("fp8", "chosen", 64, 1, dict(parts=1, unpack=True)),
    ("fp8", "chosen", 72, 2, dict(parts=1, unpack=False, pair=True)),
    ("nvfp4", "window", 72, 2, dict(parts=1, unpack=False, pair=True)),
    ("plain", "chosen", 4, 2, dict(parts=2, merge=False)),
    ("fp8", "chosen", 4, 2, dict(parts=2, unpack=False, merge=True)),
    ("fp8", "visible", 64, 2, dict(parts=1, share=True)),  # neighbouring queries
    ("plain", "window", 72, 2, dict(parts=1, share=True)),  # tiles of heads
    ("plain", "window", 64, 1, dict(parts=1, resident=True)),
    ("fp8", "visible", 64, 1, dict(parts=1, resident=True)),
]


@pytest.mark.parametrize(("record", "kind", "heads", "ctas", "way"), WAYS)
def test_a_damaged_sequence_spoils_no_other(record: str, kind: str, heads: int, ctas: int, way: dict[str, Any]) -> None:
    """One CTA, or two that work together, have all queries one after the other."""
    with simulating(multiprocessors=ctas):
        compare(*scene(record, kind, heads), way)


def compare(sound: Case, damaged: Case, way: dict[str, Any]) -> None:
    wanted, found = (case.run(**way) for case in (sound, damaged))
    spoilt = sound.args[6] % 2 == 0  # queries
    assert found[spoilt].isnan().all(), "their keys were not read"
    assert wanted.isfinite().all() and torch.equal(found[~spoilt], wanted[~spoilt])


@pytest.mark.gpu
@pytest.mark.parametrize(("record", "kind", "heads", "ctas", "way"), WAYS)
def test_damaged_sequences_spoil_no_other_on_the_gpu(
    record: str, kind: str, heads: int, ctas: int, way: dict[str, Any]
) -> None:
    """So many that every CTA has some of either."""
    compare(*scene(record, kind, heads, pairs=300, device="cuda"), way)
