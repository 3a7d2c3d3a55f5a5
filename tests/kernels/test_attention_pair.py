"""Attention by pairs of CTAs, each of which decodes half of the keys for both: the same bits as where each decodes all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.attention.core import api
from tests.kernels.attention import Case, judge, make_case


def run(case: Case, parts: int | None = None, *, pair: bool | None) -> torch.Tensor:
    """Keys are decoded in the kernel."""
    how: dict[str, Any] = {name: value for name, value in case.how.items() if name != "rope_dim"}
    return api.attention(*case.args, **how, parts=parts, unpack=False, pair=pair)


def simulated(case: Case, parts: int | None = None, ctas: int = 4, *, pair: bool | None = True, **how: object) -> torch.Tensor:
    sim.enable("sm_90a", multiprocessors=ctas)
    with sim.simulating("sm_90a", **how), running_on(sim.Host("sm_90a")):  # type: ignore[arg-type]
        return run(case, parts, pair=pair)


# ---- in the simulator --------------------------------------------------------------------------------------------------
SAME = [
    # no entry yet; windows that are not full, full, have one more; several blocks, several items of a pair; a part without keys
    ("fp8", "chosen", [(1, 1), (127, 1), (128, 1), (129, 1), (1000, 2)], 128, 200, 1),
    ("nvfp4", "visible", [(1, 1), (129, 2), (40_000, 1)], 72, 0, 1),
    ("fp8", "window", [(65, 2), (1000, 1)], 128, 0, 3),
]


@pytest.mark.parametrize(("record", "kind", "sequences", "heads", "k", "parts"), SAME)
def test_pairs_give_the_same_bits(
    record: str, kind: str, sequences: list[tuple[int, int]], heads: int, k: int, parts: int
) -> None:
    case = make_case(record, kind, sequences, heads, k=k)
    found = simulated(case, parts)
    judge(case, found)
    assert torch.equal(found, simulated(case, parts, pair=False))


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
@pytest.mark.parametrize(
    ("record", "kind", "k", "parts", "ctas"), [("fp8", "chosen", 200, 2, 4), ("nvfp4", "chosen", 70, 1, 2)]
)
def test_any_schedule_and_no_race(record: str, kind: str, k: int, parts: int, ctas: int, schedule: str) -> None:
    case = make_case(record, kind, [(700, 2)], 128, k=k)
    found = simulated(case, parts, ctas, schedule=schedule, checks=sim.Checks(races=True))
    assert judge(case, found) < 0.004
