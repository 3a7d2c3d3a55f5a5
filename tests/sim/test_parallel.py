"""Clusters spread over processes give what one process gives."""

from __future__ import annotations

import numpy as np
import pytest

from dsv4lab.sim import assembly, parallel
from dsv4lab.sim.errors import MemoryFault
from dsv4lab.sim.machine import Machine, Stats

GRID, THREADS = 12, 64
INDEX = """
ld.param.b64 %d1, [p0];
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mad.lo.s32 %r2, %r1, 64, %r0;
mul.wide.u32 %d2, %r2, 4;
add.s64 %d3, %d1, %d2;
"""
WRITES = (
    INDEX + "ld.global.b32 %r3, [%d3]; mad.lo.s32 %r3, %r3, 3, %r1; st.global.b32 [%d3], %r3; st.global.b32 [%d1], %r1; ret;"
)


def _launch(body: str, data: np.ndarray, schedule: str = "eager") -> Stats:
    made = assembly.kernel(body, 1)
    return Machine(assembly.memory_of(data=data), schedule).run(assembly.launch_of(made, data, block=THREADS, grid=GRID))


@pytest.fixture
def spreads(monkeypatch):
    """Spreads everything over three processes; a list of what `spread` returned."""
    done = []
    spread = parallel.spread

    def told(machine, workers):
        done.append(spread(machine, workers))
        return done[-1]

    monkeypatch.setenv(parallel.PROCESSES, "3")
    monkeypatch.setattr(parallel, "WORTHWHILE", -1.0)
    monkeypatch.setattr("dsv4lab.sim.machine.spread", told)
    return done


@pytest.mark.parametrize("schedule", ["eager", "lazy"])
def test_results_and_counts_are_the_same(spreads, monkeypatch, schedule):
    """Where clusters write one place, the last one's value stays, as it does when they run in order."""
    start = np.arange(GRID * THREADS, dtype=np.uint32)
    data = start.copy()
    stats = _launch(WRITES, data, schedule)
    assert spreads == [True] and data[0] == GRID - 1
    monkeypatch.setenv(parallel.PROCESSES, "1")
    alone = start.copy()
    assert _launch(WRITES, alone, schedule) == stats and len(spreads) == 1
    assert (alone == data).all()


def test_a_fault_in_a_process_is_met_again_in_this_one(spreads):
    data = np.zeros(9 * THREADS, np.uint32)  # CTAs 9, 10 and 11 are out of bounds
    with pytest.raises(MemoryFault, match=r"belongs to no tensor|out of bounds") as caught:
        _launch(WRITES, data)
    assert spreads == [False] and "CTA (9, 0, 0)" in caught.value.where
    assert data[8 * THREADS + 1] == 8  # those before it ran


@pytest.mark.parametrize(
    "line",
    [
        "atom.global.add.u32 %r4, [%d1], 1;",
        "ld.acquire.gpu.global.b32 %r4, [%d1];",
        "st.volatile.global.b32 [%d3], %r0;",
        "mov.u32 %r4, %clock;",
    ],
)
def test_clusters_that_may_see_one_another_stay_together(spreads, line):
    _launch(f"{INDEX} {line} ret;", np.zeros(GRID * THREADS, np.uint32))
    assert not spreads


def test_random_schedules_stay_in_one_process(spreads):
    _launch(WRITES, np.zeros(GRID * THREADS, np.uint32), "random:1")
    assert not spreads


def test_the_number_of_processes_is_checked(monkeypatch):
    monkeypatch.setenv(parallel.PROCESSES, "all")
    with pytest.raises(ValueError, match="positive number"):
        parallel.processes()
