"""Launches as a whole: CTAs that wait for one another through global memory, module variables, device printf."""

from dataclasses import replace

import numpy as np
import pytest

from dsv4lab.sim import assembly, ptx
from dsv4lab.sim.assembly import launch_of, memory_of, run
from dsv4lab.sim.errors import Deadlock, ResourceError
from dsv4lab.sim.machine import Checks, Machine
from dsv4lab.sim.startup import capacity

# Every CTA counts itself in, then polls until `%r9` CTAs have come.
GRID_BARRIER = """
ld.param.b64 %d1, [p0];
ld.param.b64 %d2, [p1];
mov.u32 %r0, %ctaid.x;
mov.u32 %r8, %tid.x;
mov.u32 %r9, {expected};
setp.ne.u32 %p1, %r8, 0;
@%p1 bra $poll;
atom.add.release.gpu.global.u32 %r1, [%d1], 1;
$poll:
ld.acquire.gpu.global.u32 %r2, [%d1];
setp.lt.u32 %p2, %r2, %r9;
@%p2 bra $poll;
mul.wide.u32 %d3, %r0, 4;
add.s64 %d2, %d2, %d3;
st.global.b32 [%d2], %r2;
ret;
"""


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random:3"])
def test_ctas_may_wait_for_ctas_that_start_later(schedule):
    count, seen = np.zeros(1, np.uint32), np.zeros(6, np.uint32)
    run(GRID_BARRIER.format(expected=6), grid=6, schedule=schedule, count=count, seen=seen)
    np.testing.assert_array_equal(seen, 6)


@pytest.mark.parametrize("schedule", ["eager", "random:0", "random:1"])
def test_long_loops_without_barriers_are_no_deadlock(schedule):
    out = np.zeros(64, np.uint32)
    run(
        """
        ld.param.b64 %d1, [p0];
        mov.u32 %r0, %tid.x;
        mov.u32 %r1, 0;
        $loop:
        add.u32 %r1, %r1, 1;
        setp.lt.u32 %p1, %r1, 6000;
        @%p1 bra $loop;
        mul.wide.u32 %d2, %r0, 4;
        add.s64 %d1, %d1, %d2;
        st.global.b32 [%d1], %r1;
        ret;
        """,
        block=64,
        grid=1,
        schedule=schedule,
        out=out,
    )
    np.testing.assert_array_equal(out, 6000)


def test_a_lock_that_nobody_frees_is_a_deadlock():
    lock, seen = np.ones(1, np.uint32), np.zeros(1, np.uint32)
    with pytest.raises(Deadlock, match="spin"):
        run(
            """
            ld.param.b64 %d1, [p0];
            $again:
            atom.cas.b32 %r1, [%d1], 0, 1;
            setp.ne.u32 %p1, %r1, 0;
            @%p1 bra $again;
            ret;
            """,
            block=1,
            lock=lock,
            seen=seen,
        )


def test_waiting_for_more_ctas_than_a_gpu_holds_is_a_deadlock(monkeypatch):
    monkeypatch.setattr("dsv4lab.sim.startup._MULTIPROCESSORS", {"sm_10": 2})
    monkeypatch.setattr("dsv4lab.sim.cubin._MAX_WARPS", 2)
    count, seen = np.zeros(1, np.uint32), np.zeros(6, np.uint32)
    with pytest.raises(Deadlock, match=r"spin(.|\n)*not started: 2 clusters of CTAs; a GPU holds 4 of these at once"):
        run(GRID_BARRIER.format(expected=6), grid=6, count=count, seen=seen)
    count[:] = 0
    run(GRID_BARRIER.format(expected=4), grid=6, count=count, seen=seen)
    np.testing.assert_array_equal(seen[:4] >= 4, True)


@pytest.mark.parametrize(("registers", "held"), [(0, 296), (168, 148)])
def test_registers_bound_the_ctas_that_a_gpu_holds(registers, held):
    """Two of 320 threads fit on a multiprocessor by all but their registers (an H200 ran such a kernel into a deadlock)."""
    made = replace(assembly.kernel(GRID_BARRIER.format(expected=1), 2), compiled_registers=registers)
    count, seen = np.zeros(1, np.uint32), np.zeros(6, np.uint32)
    assert capacity(replace(launch_of(made, count, seen, grid=400, block=320), shared_bytes=100_000)) == held


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random:3"])
def test_who_waits_for_ctas_that_start_later_needs_a_cooperative_launch(schedule):
    count, seen = np.zeros(1, np.uint32), np.zeros(6, np.uint32)
    made = assembly.kernel(GRID_BARRIER.format(expected=3), 2)
    launch = launch_of(made, count, seen, grid=6)
    machine = Machine(memory_of(count=count, seen=seen), schedule, Checks(residency=True))
    with pytest.raises(Deadlock, match="wait for CTAs that start later, and nothing promises that these find a place"):
        machine.run(launch)
    count[:] = 0
    launch.attributes["cooperative"] = True
    machine.run(launch)
    count[:] = 5  # who comes last waits for nobody
    launch.attributes["cooperative"] = False
    machine.run(launch)


def test_cooperative_launches_must_fit():
    count, seen = np.zeros(1, np.uint32), np.zeros(6, np.uint32)
    made = assembly.kernel(GRID_BARRIER.format(expected=1), 2)
    launch = launch_of(made, count, seen, grid=148 * 32 + 1)
    launch.attributes["cooperative"] = True
    for bad, message in ((launch, "cooperative launch must fit"), (replace(launch, grid=(3, 0, 1)), "has no CTA")):
        with pytest.raises(ResourceError, match=message):
            Machine(memory_of(count=count, seen=seen)).run(bad)


PRINTING = """
.version 9.0
.target sm_100a
.address_size 64
.extern .func (.param .b32 func_retval0) vprintf (.param .b64 vprintf_param_0, .param .b64 vprintf_param_1);
.global .align 1 .b8 text[48] = {format};
.global .align 4 .b32 total = 5;
.visible .entry kernel(.param .u64 p0)
{{
.local .align 8 .b8 depot[32];
.reg .pred %p<4>;
.reg .b32 %r<8>;
.reg .b64 %d<12>;
mov.b64 %d1, depot;
cvta.local.u64 %d2, %d1;
mov.u32 %r1, %tid.x;
setp.gt.u32 %p1, %r1, 1;
@%p1 bra $done;
mov.b64 %d3, total;
atom.global.add.u32 %r2, [%d3], 10;
st.local.b32 [%d1], %r1;
mov.b64 %d4, 0d3FF8000000000000;
st.local.b64 [%d1+8], %d4;
sub.s32 %r3, 0, %r2;
st.local.b32 [%d1+16], %r3;
mov.b64 %d5, word;
cvta.global.u64 %d6, %d5;
st.local.b64 [%d1+24], %d6;
{{
.param .b64 param0;
.param .b64 param1;
.param .b32 retval0;
st.param.b64 [param1], %d2;
mov.b64 %d7, text;
cvta.global.u64 %d8, %d7;
st.param.b64 [param0], %d8;
call.uni (retval0), vprintf, (param0, param1);
}}
$done:
ret;
}}
"""


def _bytes(text: str) -> str:
    return "{" + ", ".join(str(b) for b in text.encode()) + "}"


def test_printf_formats_each_threads_arguments():
    source = PRINTING.format(format=_bytes("%u: %-6.2f|%+d %s 100%%\n"))
    source = source.replace(".global .align 4", f".global .align 1 .b8 word[6] = {_bytes('words')};\n.global .align 4")
    made = ptx.parse(source)
    out = np.zeros(1, np.uint32)
    machine = Machine(memory_of(out=out))
    machine.run(launch_of(made, out))
    assert machine.printed == ["0: 1.50  |-5 words 100%\n", "1: 1.50  |-15 words 100%\n"]
    machine.run(launch_of(made, out))  # module variables keep their values, printed text does not
    assert machine.printed == ["0: 1.50  |-25 words 100%\n", "1: 1.50  |-35 words 100%\n"]
