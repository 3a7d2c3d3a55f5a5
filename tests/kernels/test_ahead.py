"""What the first product of one token has L2 fetch of the second one's weights: which bytes, once each; no bit changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from dsv4lab import sim
from dsv4lab.formats import PackedWeight
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.gemm.mixed import api as mixed_api
from dsv4lab.kernels.gemm.mixed.api import Slots, Tiles, grouped
from dsv4lab.kernels.gemm.mixed.config import MixedConfig, choose_grouped
from dsv4lab.kernels.gemm.mixed.layout import PreparedWeight, prepare
from dsv4lab.kernels.gemm.mixed.prepared import prepared
from dsv4lab.kernels.moe.experts import Three, experts, layer
from dsv4lab.sim.memory import GlobalMemory
from tests.kernels.mixed import random_weight, trained_weight

ARCH, CTAS = "sm_90a", 3
HIDDEN, INNER, EXPERTS = 512, 128, 5  # 32 slabs of a second product's matrix, of two tiles
OFF = dict(ahead=0, ahead_beside=False, passing=False)


def simulated(call: Callable[[], torch.Tensor], **how: Any) -> torch.Tensor:
    sim.enable(ARCH, multiprocessors=CTAS)
    with sim.simulating(ARCH, **how), running_on(sim.Host(ARCH)):
        return call()


def changed(**how: Any) -> Any:
    """A token's first product is chosen like this; the second one's weights, too, stay in L2 or do not."""

    def choose(*args: Any, **more: Any) -> MixedConfig:
        config = choose_grouped(*args, **more)
        return replace(config, **(how if config.slotted else {k: v for k, v in how.items() if k == "passing"}))

    return mock.patch.object(mixed_api, "choose_grouped", choose)


def spans(call: Callable[[], torch.Tensor]) -> Counter[tuple[int, int]]:
    """(address, bytes) of every run of packed weights that a bulk copy or prefetch asks for."""
    packed = [prepared(*w).records for three in (ROUTED, SHARED) for w in (three[:2], three[2:])]
    found: Counter[tuple[int, int]] = Counter()
    span = GlobalMemory.span

    def keeping(memory: GlobalMemory, address: int, size: int) -> Any:
        if any(p.data_ptr() <= address < p.data_ptr() + p.nbytes for p in packed):
            found[address, size] += 1
        return span(memory, address, size)

    with mock.patch.object(GlobalMemory, "span", keeping):
        simulated(call)
    return found


def stacks(*lead: int) -> Three:
    w1, w3, w2 = (
        trained_weight("nvfp4", lead[0] if lead else 1, *shape, seed=i)
        for i, shape in enumerate(((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)))
    )
    return (w1, w3, w2) if lead else (w1[0], w3[0], w2[0])


ROUTED, SHARED = stacks(EXPERTS), stacks()
WEIGHTS, IDS = torch.tensor([[0.5, 0.7, 0.2, 0.4]]), torch.tensor([[4, -1, 2, 4]])
X = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(9)).bfloat16()


def of_layer() -> torch.Tensor:
    return layer(X, WEIGHTS, IDS, ROUTED, SHARED, limit=1.0, act="none", shared_act="none")


def of_experts() -> torch.Tensor:
    return experts(X, WEIGHTS, IDS, *ROUTED, limit=1.0, act="none")


def slab(weight: PackedWeight, matrix: int, number: int) -> tuple[int, int]:
    """(address, bytes) of one of a matrix's slabs of 16 rows."""
    ready = prepared(weight)
    row = ready.records[matrix * ready.slabs + number]
    return row.data_ptr(), row.nbytes


@pytest.mark.parametrize(("ahead", "beside"), [(0, True), (11, True), (1000, True), (11, False)])
def test_every_slab_once_in_the_order_of_need(ahead: int, beside: bool) -> None:
    """Rows of no expert take the nearest one's weights, as the second product does."""
    call = of_layer if beside else of_experts
    with changed(**OFF):
        before = spans(call)
    with changed(ahead=ahead, ahead_beside=beside):
        more = spans(call) - before
    slabs = HIDDEN // 16
    routed = [slab(ROUTED[2], e, n) for e in (4, 0, 2, 4) for n in range(slabs)]
    want = Counter(routed[: ahead * CTAS])
    if beside:
        want += Counter(slab(SHARED[2], 0, n) for n in range(slabs))
    assert more == want


@pytest.mark.parametrize(
    ("call", "schedule"), [(of_layer, "eager"), (of_layer, "lazy"), (of_layer, "random"), (of_experts, "random")]
)
def test_bits_stay(call: Callable[[], torch.Tensor], schedule: str) -> None:
    with changed(**OFF):
        want = simulated(call)
    beside = call is of_layer
    with changed(ahead=11, ahead_beside=beside):
        got = simulated(call, schedule=schedule, seed=4, checks=sim.Checks(races=True))
    assert torch.equal(got, want)


def test_how_much_is_fetched() -> None:
    """Of Flash and Pro what memory delivers in some 4 us; with several tokens nothing."""
    how: dict[str, Any] = dict(paired=True, slotted=True, gather=True, scaled="no")
    for k, inner in ((4096, 2048), (7168, 3072)):
        following = inner // 64 * 576
        for beside in (False, True):
            config = choose_grouped("nvfp4", "bf16", 6, 256, k, single=True, beside=beside, following=following, **how)
            config.check()
            assert 16e6 < config.ahead * 132 * following < 22e6
            assert config.passing and config.ahead_beside == beside
        for plan in (
            choose_grouped("nvfp4", "bf16", 6, 256, k, single=True, **how),
            choose_grouped("nvfp4", "bf16", 18, 256, k, **how),
        ):
            assert (plan.ahead, plan.ahead_beside) == (0, False) and plan.passing == plan.single


def test_what_cannot_be_fetched_is_refused() -> None:
    how: dict[str, Any] = dict(slotted=True, gather=True, scaled="no")
    plan = choose_grouped("nvfp4", "bf16", 6, 8, 128, paired=True, single=True, following=1152, **how)
    for wrong in (dict(ahead=-1), dict(ahead=1, single=False), dict(ahead=1, slotted=False, gather=False)):
        with pytest.raises(ValueError, match="ahead must be >= 0, and 0 but for the first product of one token"):
            replace(plan, **wrong).check()
    with pytest.raises(ValueError, match="ahead_beside needs a first product with a matrix beside"):
        replace(plan, ahead_beside=True).check()
    pair = prepare(random_weight("nvfp4", 3, 64, 128, seed=0), random_weight("nvfp4", 3, 64, 128, seed=1))
    x, ids = torch.zeros(1, 128, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    tiles, slots = Tiles.of_rows(ids, 8), Slots(None, torch.ones(1, 1), 1)

    def call(following: tuple[PreparedWeight, PreparedWeight | None] | None, **more: Any) -> torch.Tensor:
        given: dict[str, Any] = dict(slots=slots, gather=True, limit=1.0, following=following)
        return grouped(x, pair, tiles, rows=1, out_dtype=x.dtype, **given, **more)

    then = prepare(random_weight("nvfp4", 3, 128, 64, seed=2))
    one = prepare(random_weight("nvfp4", 128, 64, seed=2))
    with pytest.raises(ValueError, match="following must have 3 matrices of nvfp4, got 1 of nvfp4"):
        call((one, None))
    with pytest.raises(ValueError, match="following must have 3 matrices of nvfp4, got 3 of mxfp4"):
        call((prepare(random_weight("mxfp4", 3, 128, 64, seed=2)), None))
    with pytest.raises(ValueError, match="following must have a matrix beside like its others where this product has one"):
        call((then, one))
    with pytest.raises(ValueError, match="following must be given for ahead=16, ahead_beside=False, got None"):
        call(None, config=replace(plan, ahead=16))
