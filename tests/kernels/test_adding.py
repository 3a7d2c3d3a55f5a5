"""Product 2 of one token adds up its rows: the bits of `moe.combine`, time and again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels._common.counters import counters
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.gemm.mixed.api import Tiles, grouped
from dsv4lab.kernels.gemm.mixed.config import choose_grouped
from dsv4lab.kernels.gemm.mixed.layout import prepare
from dsv4lab.kernels.moe import experts as module
from dsv4lab.kernels.moe.experts import layer
from tests.kernels.mixed import random_weight, trained_weight

ARCH, EXPERTS, HIDDEN, INNER = "sm_90a", 5, 208, 64  # four tiles of columns, the last of 16


def stacks(*lead: int) -> Any:
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    made = (trained_weight("nvfp4", max(lead, default=1), *shape, seed=i) for i, shape in enumerate(shapes))
    return tuple(w if lead else w[0] for w in made)


@pytest.mark.parametrize(
    ("dtype", "schedule"), [(torch.bfloat16, "lazy"), (torch.bfloat16, "random"), (torch.float32, "random")]
)
def test_sums_are_combine_s(dtype: torch.dtype, schedule: str) -> None:
    """Ids in no order, one twice, two of no expert; the next launch finds its counters as this one did."""
    routed, shared = stacks(EXPERTS), stacks()
    act = "none" if dtype == torch.bfloat16 else "nvfp4"
    g = torch.Generator().manual_seed(3)
    inputs = [
        (torch.randn(1, HIDDEN, generator=g).to(dtype), torch.rand(1, 6, generator=g), torch.tensor([ids]))
        for ids in ([4, -1, 2, 4, 2**33 + 1, 0], [0, 1, 2, 3, 4, 5])
    ]

    def call() -> torch.Tensor:
        how: dict[str, Any] = dict(limit=1.0, act=act, shared_act=act)
        return torch.cat([layer(x, w, ids, routed, shared, **how) for x, w, ids in inputs])

    sim.enable(ARCH, multiprocessors=3)
    with mock.patch.object(module, "adds_up", lambda top_k: False), sim.simulating(ARCH), running_on(sim.Host(ARCH)):
        want = call()
    how: dict[str, Any] = dict(schedule=schedule, seed=5, checks=sim.Checks(races=True))
    with sim.simulating(ARCH, **how), running_on(sim.Host(ARCH)):
        got = call()
    assert got.dtype == dtype and torch.equal(got, want)
    assert not counters("mixed", torch.device("cpu"), 4).any()


def test_what_cannot_be_added_is_refused() -> None:
    how: dict[str, Any] = dict(slotted=False, gather=False, scaled="no", single=True)
    plan = replace(choose_grouped("nvfp4", "bf16", 6, 8, 128, paired=False, beside=True, **how), adds=6)
    plan.check()
    for wrong in (dict(adds=17), dict(adds=-1), dict(beside=False), dict(slotted=True)):
        with pytest.raises(ValueError, match="adds must be 0, or up to 16 of a second product with a matrix beside"):
            replace(plan, **wrong).check()
    weight, more = prepare(random_weight("nvfp4", 3, 64, 128, seed=0)), prepare(random_weight("nvfp4", 64, 128, seed=1))
    tiles, x = Tiles.of_rows(torch.zeros(2, dtype=torch.int64), 8), torch.zeros(3, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"config must have \(tokens, single, gather, scaled, beside, adds\)"):
        grouped(x, weight, tiles, rows=2, out_dtype=x.dtype, beside=more, adds=True, config=plan)
    with pytest.raises(ValueError, match="adds needs a matrix beside, no slots and 16 rows at most, got 2"):
        grouped(x[:2], weight, tiles, rows=2, out_dtype=x.dtype, adds=True)
