"""Attention of a sequence whose keys are no numbers, as of a damaged cache: no other sequence of the call has anything of them.

A key that is masked is multiplied all the same, and 0 times NaN is NaN. So places of shared memory that a sequence does not
fill may not keep what the one before had there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.attention.core import api
from tests.kernels.attention import Case, in_order, make_case

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


def simulated(case: Case, ctas: int, **way: Any) -> torch.Tensor:
    how: dict[str, Any] = {name: value for name, value in case.how.items() if name != "rope_dim"}
    sim.enable("sm_90a", multiprocessors=ctas)
    with sim.simulating("sm_90a"), running_on(sim.Host("sm_90a")):  # type: ignore[arg-type]
        return api.attention(*case.args, **how, **way)


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
    sound, damaged = scene(record, kind, heads)
    found, wanted = (simulated(case, ctas, **way) for case in (damaged, sound))
    judge(found, wanted, sound.args[6] % 2 == 0)


def judge(found: torch.Tensor, wanted: torch.Tensor, damaged: torch.Tensor) -> None:
    """damaged: which queries are."""
    assert found[damaged].isnan().all(), "their keys were not read"
    assert wanted.isfinite().all() and torch.equal(found[~damaged], wanted[~damaged])


@pytest.mark.gpu
@pytest.mark.parametrize(("record", "kind", "heads", "ctas", "way"), WAYS)
def test_damaged_sequences_spoil_no_other_on_the_gpu(
    record: str, kind: str, heads: int, ctas: int, way: dict[str, Any]
) -> None:
    """So many that every CTA has some of either."""
    sound, damaged = scene(record, kind, heads, pairs=300, device="cuda")
    found, wanted = (
        api.attention(*case.args, **{name: value for name, value in case.how.items() if name != "rope_dim"}, **way)
        for case in (damaged, sound)
    )
    judge(found, wanted, sound.args[6] % 2 == 0)
