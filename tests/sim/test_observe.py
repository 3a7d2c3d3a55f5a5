"""Observers are told what happens: accesses, barrier events and asynchronous operations of real kernels, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv4lab import sim
from dsv4lab.sim.observe import Access, Observer, Operation

SCHEDULES = ["eager", "lazy", "random"]


class Log(Observer):
    """Every event with its arguments, and which machine step it came at."""

    wants = frozenset({"access", "touch"})

    def __init__(self) -> None:
        self.events: list[tuple[str, tuple[Any, ...]]] = []
        self.steps: list[int] = []

    def launch_begin(self, machine: Any) -> None:
        self.machine = machine

    def count(self) -> Counter[str]:
        return Counter(name for name, _ in self.events)

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [values for event, values in self.events if event == name]


def _record(name: str) -> Callable[..., None]:
    def handler(self: Log, *values: Any) -> None:
        self.events.append((name, values))
        self.steps.append(self.machine.step)

    return handler


for event in vars(Observer):
    if not event.startswith("_") and event not in ("wants", "launch_begin"):
        setattr(Log, event, _record(event))


def halves(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float16)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tcgen05_tile(compiled: Callable[..., sim.Compiled], schedule: str) -> None:
    a, b, c = halves(128, 128), halves(64, 128), torch.zeros(128, 64)
    log = Log()
    compiled("tcgen05_tile", a, b, c, arch="sm_100a")(a, b, c, schedule=schedule, observers=[log])
    torch.testing.assert_close(c, torch.full((128, 64), 128.0))
    operations: list[Operation] = [values[0] for values in log.of("issued")]
    kinds = Counter(operation.kind for operation in operations)
    # 2 steps along K, 4 products in each; 4 warps read the result.
    assert kinds == {"TMA load": 4, "tcgen05.mma": 8, "tcgen05.commit": 2, "tcgen05.ld": 4}
    assert [values[0] for values in log.of("performed")] != [] and all(o.performed is not None for o in operations)
    assert {o.serial for o in operations} == {values[0].serial for values in log.of("performed")}
    load = next(o for o in operations if o.kind == "TMA load")
    assert [(t.space, t.bytes) for t in load.reads] == [("global", 128 * 64 * 2)]
    assert [(t.space, t.bytes) for t in load.writes] == [("shared", 128 * 64 * 2)]
    product = next(o for o in operations if o.kind == "tcgen05.mma")
    assert sorted((t.space, t.bytes) for t in product.reads) == [("shared", 64 * 32), ("shared", 128 * 32)]
    assert [(t.space, t.bytes) for t in product.writes] == [("tmem", 128 * 64 * 4)]
    last = [o for o in operations if o.kind == "tcgen05.mma"][-1]
    assert ("tmem", 128 * 64 * 4) in [(t.space, t.bytes) for t in last.reads], "it accumulates"
    counts = log.count()
    assert counts["mbarrier_init"] == 2 and counts["mbarrier_flip"] == 4 and counts["warp_exit"] == 4
    assert counts["barrier_pass"] == counts["barrier_arrive"] == 12 and counts["tmem_alloc"] == counts["tmem_free"] == 1
    assert counts["wait_begin"] >= counts["wait_end"] > 0 and counts["tcgen05_wait"] == 4
    stores = [values[0] for values in log.of("access") if values[0].space == "global"]
    assert sum(len(s.addresses) * s.bytes for s in stores) == c.numel() * 4 and {s.kind for s in stores} == {"write"}
    assert log.steps == sorted(log.steps) and log.events[0][0] == "cluster_begin" and log.events[-1][0] == "launch_end"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_wgmma_tile(compiled: Callable[..., sim.Compiled], schedule: str) -> None:
    a, b, c = halves(64, 64), halves(64, 64), torch.zeros(64, 64)
    log = Log()
    compiled("wgmma_tile", a, b, c)(a, b, c, schedule=schedule, observers=[log])
    kinds = Counter(values[0].kind for values in log.of("issued"))
    assert kinds == {"TMA load": 2, "wgmma": 4}
    assert len(log.of("contributed")) == 16 and {site.warp for site, _ in log.of("contributed")} == {0, 1, 2, 3}
    assert log.count()["wgmma_fence"] == 4
    passed = [(site.warp, phase) for site, _, phase in log.of("mbarrier_pass")]
    assert sorted(passed) == [(warp, 0) for warp in range(4)]
    order = [name for name, _ in log.events]
    assert order.index("mbarrier_expect" if "mbarrier_expect" in order else "mbarrier_arrive") < order.index("mbarrier_flip")


def test_generic_accesses_name_lanes_and_addresses(compiled: Callable[..., sim.Compiled]) -> None:
    a, b, c = torch.ones(200), torch.ones(200), torch.zeros(200)
    log = Log()
    compiled("add", a, b, c)(a, b, c, observers=[log])
    accesses: list[Access] = [values[0] for values in log.of("access")]
    writes = [access for access in accesses if access.kind == "write"]
    assert sorted(int(x) for w in writes for x in w.addresses) == [c.data_ptr() + 4 * i for i in range(200)]
    tail = next(w for w in writes if w.site.cta.index == (1, 0, 0) and w.site.warp == 2)
    assert tail.site.lanes == tuple(range(8)) and tail.lanes.tolist() == list(range(8))
    assert sum(len(access.addresses) for access in accesses if access.kind == "read") == 400


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_executed_instructions_add_up_to_what_the_machine_counts(compiled: Callable[..., sim.Compiled], schedule: str) -> None:
    class Count(Observer):
        wants = frozenset({"executed"})
        total = 0

        def executed(self, cta: Any, warp: int, start: int, end: int) -> None:
            self.total += end - start

    a, b, c = halves(64, 128), halves(64, 128), torch.zeros(64, 64)
    count = Count()
    (run,) = compiled("wgmma_tile", a, b, c)(a, b, c, schedule=schedule, observers=[count])
    assert count.total == run.stats.instructions
