"""sim.explore: expected results, restored inputs, collected findings, and what a finding says."""

import numpy as np
import pytest
import torch

from dsv4lab import sim
from dsv4lab.sim.assembly import kernel, launch_of, memory_of
from dsv4lab.sim.errors import DataRace, MemoryFault, ScheduleDependence, WrongResult

# Every warp takes a ticket and writes it to its place: which one it gets is the schedule's choice.
TICKETS = """
ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; and.b32 %r2, %r0, 31; setp.ne.u32 %p1, %r2, 0;
@%p1 bra E; atom.global.add.u32 %r3, [%d1], 1; shr.u32 %r4, %r0, 5;
mul.wide.u32 %d3, %r4, 4; add.s64 %d4, %d2, %d3; st.global.b32 [%d4], %r3; E: ret;
"""


def _tickets():
    arrays = {"counter": np.zeros(1, np.uint32), "out": np.full(8, 77, np.uint32)}
    return arrays, launch_of(kernel(TICKETS, 2), *arrays.values(), block=256), memory_of(**arrays)


def test_a_result_that_depends_on_the_schedule():
    arrays, launch, memory = _tickets()
    with pytest.raises(ScheduleDependence, match=r"bytes of out depend on the schedule: out\[\d\] .* between eager and"):
        sim.explore(launch, memory=memory)
    arrays["counter"][0] = 100
    assert sim.explore(launch, memory=memory, ignore=["out"])
    assert arrays["counter"][0] == 108  # restored before every run, and holding the last one's result


def test_a_schedule_dependent_result_is_not_called_wrong():
    _arrays, launch, memory = _tickets()
    found = sim.explore(launch, memory=memory, expect={"out": np.arange(8, dtype=np.uint32)[::-1]}, raising=False, first=False)
    assert found.kinds == ["schedule-dependent result"] and len(found.schedules) == 7


def test_a_wrong_result_names_the_first_element(compiled):
    a, b, c = torch.arange(300.0), torch.ones(300), torch.zeros(300)
    add = compiled("add", a, b, c)
    assert sim.explore(add, a, b, c, seeds=1, expect={"c": a + b})
    wanted = a + b
    wanted[260:] += 0.5
    with pytest.raises(WrongResult, match=r"c\[260\] is 261, expected 261.5; 40 of 300 elements are wrong"):
        sim.explore(add, a, b, c, seeds=1, expect={"c": wanted})
    assert sim.explore(add, a, b, c, seeds=1, expect={"c": wanted}, atol=0.5)
    with pytest.raises(ValueError, match="expect names d, but the tensors are a, b, c"):
        sim.explore(add, a, b, c, expect={"d": wanted})


def test_a_check_of_ones_own(compiled):
    a, b, c = torch.ones(300), torch.ones(300), torch.zeros(300)
    found = sim.explore(
        compiled("add", a, b, c), a, b, c, seeds=0, expect=lambda: f"c sums to {c.sum().item():g}", raising=False
    )
    assert found.kinds == ["wrong result"] and "c sums to 600" in found.findings[0].text


def test_findings_are_collected_once(compiled):
    a, b, c = torch.ones(128), torch.ones(128), torch.zeros(128)
    broken = compiled("add_past_the_end", a, b, c)
    with pytest.raises(MemoryFault, match=r"belongs to no tensor|out of bounds"):
        sim.explore(broken, a, b, c)
    found = sim.explore(broken, a, b, c, seeds=[4], raising=False, first=False)
    assert not found and found.kinds == ["memory fault"] and len(found.findings) == 1
    assert found.findings[0].schedules == ["eager", "lazy", "random:4"]
    assert "kernels.py" in str(found)
    assert sim.explore(broken, a, b, c, raising=False).schedules == ["eager"]


def test_captured_launches_and_memory_that_is_found_late(compiled):
    """Launches run one after another; tensors that nobody registered are restored too."""
    a, b, c = torch.ones(256), torch.ones(256), torch.zeros(256)
    launches = compiled("add", a, b, c).capture(a, b, c) + compiled("add", c, b, c).capture(c, b, c)
    memory = sim.session.current().tensors.memory()
    memory.allocations, memory._starts = [], []
    found = sim.explore(launches, memory=memory, seeds=2)
    assert found and len(found.kernels) == 2
    assert (c == 3).all()


def test_collecting_goes_on_after_a_race():
    """Two races of one run, and what they make of the result."""
    both = """
    ld.param.b64 %d1, [p0]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2;
    st.shared.b32 [%r3], 7; bar.sync 0; st.shared.b32 [%r3], %r0;
    xor.b32 %r5, %r2, 128; add.s32 %r5, %r1, %r5; ld.shared.b32 %r6, [%r5]; ld.shared.b32 %r7, [%r5];
    cvt.u64.u32 %d2, %r2; add.s64 %d3, %d1, %d2; st.global.b32 [%d3], %r6; ret;
    """
    out = np.zeros(64, np.uint32)
    launch, memory = launch_of(kernel(both), out, block=64), memory_of(out=out)
    assert sim.explore(launch, memory=memory, seeds=0, raising=False).kinds == ["race"]
    found = sim.explore(launch, memory=memory, seeds=6, raising=False, first=False)
    assert found.kinds == ["race", "schedule-dependent result"]
    assert len([finding for finding in found.findings if finding.kind == "race"]) >= 2
    with pytest.raises(DataRace, match="that nothing orders"):
        sim.explore(launch, memory=memory, first=False)


def test_constants_of_a_host_function_are_compiled_in(kernels):
    from tests.sim.mutants.pipelined_copy import case, pipelined_copy

    tensors, expected = case()
    assert sim.explore(pipelined_copy, *tensors.values(), "", seeds=0, expect=expected)
    found = sim.explore(pipelined_copy, *tensors.values(), "a buffer too few", seeds=0, expect=expected, raising=False)
    assert found.kinds == ["race"]
