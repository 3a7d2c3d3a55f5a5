"""Races and missing fences on hand-written PTX: each rule with a kernel that keeps it and one that breaks it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dsv4lab import sim
from dsv4lab.sim import ptx
from dsv4lab.sim.assembly import kernel, launch_of, memory_of, run
from dsv4lab.sim.errors import BarrierMisuse, DataRace, HazardError, MissingFence
from dsv4lab.sim.machine import Checks, Machine
from dsv4lab.sim.races import RaceChecker

SCHEDULES = ["eager", "lazy", "random:1", "random:2"]

# %r0 thread, %r6 warp, %r1 shared memory, %d1 and %d2 the parameters, %p1 thread 0, %p2 warp 0, %p3 thread 32.
# mbarriers of one arrival at +0, +8 and +16; %r3 is the thread's word of the buffer at +1024.
START = """
ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem; shr.u32 %r6, %r0, 5;
setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r6, 0; setp.eq.u32 %p3, %r0, 32;
shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; add.s32 %r3, %r3, 1024; cvt.u64.u32 %d3, %r2; add.s64 %d4, %d2, %d3;
@%p1 mbarrier.init.shared.b64 [%r1], 1; @%p1 mbarrier.init.shared.b64 [%r1+8], 1; @%p1 mbarrier.init.shared.b64 [%r1+16], 1;
@%p1 fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
WAIT = "W{n}: mbarrier.try_wait.parity.shared.b64 %p9, [{bar}], {parity}; @%p9 bra D{n}; bra W{n}; D{n}:"
EXIT = "X: ret;"
NEIGHBOUR = "xor.b32 %r10, %r2, 128; add.s32 %r11, %r1, %r10; ld.shared.b32 %r12, [%r11+1024];"  # the other warp's word
LOAD = """
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 256;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1+1024], [%d1], 256, [%r1];
"""
STORE = "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%d2], [%r1+1024], 256; @%p1 cp.async.bulk.commit_group;"
GLOBAL = "add.s64 %d5, %d1, %d3;"


def wait(bar: str, parity: int, n: int = 0) -> str:
    return WAIT.format(n=n, bar=bar, parity=parity)


USE = "add.s32 %r13, %r12, 1;"


def release(use: str, before: str = "", after: str = "") -> str:
    """Thread 32 reads a stage, uses it and releases it at +8; thread 0 loads it, waits for that, and loads it again."""
    return (
        f"{LOAD} @!%p3 bra A; {wait('%r1', 0)} {before} ld.shared.b32 %r12, [%r1+1024]; {use}"
        f"mbarrier.arrive.shared.b64 _, [%r1+8]; {after} A: @!%p1 bra E; {wait('%r1+8', 0, 1)}"
        f"{LOAD.replace('@%p1 ', '')} {wait('%r1', 1, 2)} E:"
    )


class Rule(NamedTuple):
    """body: after START; without `needed` (replaced by `instead`) it breaks the rule."""

    body: str
    needed: str
    error: type[HazardError]
    words: str
    instead: str = ""
    grid: int = 1
    cluster: int = 1
    block: int = 64


RULES = {
    "shared memory between warps": Rule(
        "st.shared.b32 [%r3], %r0; bar.sync 1;" + NEIGHBOUR, "bar.sync 1;", DataRace, "write by CTA"
    ),
    "shared memory read, then overwritten": Rule(
        "st.shared.b32 [%r3], %r0; bar.sync 1;" + NEIGHBOUR + "bar.sync 2; st.shared.b32 [%r3], 1;",
        "bar.sync 2;",
        DataRace,
        "read by CTA",
    ),
    "two writes": Rule(
        "@%p2 st.shared.b32 [%r3], %r0; bar.sync 1; @!%p2 st.shared.b32 [%r3+-128], 7;",
        "bar.sync 1;",
        DataRace,
        "write and write that nothing orders",
    ),
    "arrival on an mbarrier": Rule(
        f"@%p1 st.shared.b32 [%r3], 5; @%p1 mbarrier.arrive.shared.b64 _, [%r1]; {wait('%r1', 0)} "
        "ld.shared.b32 %r12, [%r1+1024];",
        wait("%r1", 0),
        DataRace,
        "write by CTA .* warp 0 lane 0",
    ),
    "a relaxed arrival carries nothing": Rule(
        f"@%p1 st.shared.b32 [%r3], 5; @%p1 mbarrier.arrive.release.cta.shared.b64 _, [%r1]; {wait('%r1', 0)} "
        "ld.shared.b32 %r12, [%r1+1024];",
        "arrive.release.cta",
        DataRace,
        "nothing orders",
        "arrive.relaxed.cta",
    ),
    "bulk load, then read": Rule(
        LOAD + wait("%r1", 0) + "ld.shared.b32 %r12, [%r3];", wait("%r1", 0), DataRace, "the bulk load of CTA"
    ),
    "read, then bulk load": Rule(
        "st.shared.b32 [%r3], 0; fence.proxy.async; bar.sync 1; ld.shared.b32 %r12, [%r3]; bar.sync 2;" + LOAD + wait("%r1", 0),
        "bar.sync 2;",
        DataRace,
        "bulk load",
    ),
    "read and used, then released for a bulk load": Rule(
        release(USE), USE, DataRace, "released while a load of it was under way"
    ),
    "a fence instead of a use": Rule(release("fence.proxy.async;"), "fence.proxy.async;", DataRace, "does not wait for loads"),
    "used before the release, not after it": Rule(release(USE, after=USE), USE, DataRace, "released while a load"),
    "a move is no use": Rule(release(USE), USE, DataRace, "released while a load", "mov.b32 %r13, %r12;"),
    "a later load's value is there": Rule(
        release("ld.shared.b32 %r14, [%r1+2048]; add.s32 %r13, %r14, 1;"), "add.s32 %r13, %r14, 1;", DataRace, "released while"
    ),
    "an earlier load's value is not enough": Rule(
        release(USE, before="ld.shared.b32 %r14, [%r1+2048];"), USE, DataRace, "released while", "add.s32 %r13, %r14, 1;"
    ),
    "store, then bulk store": Rule(
        "st.shared.b32 [%r3], %r0; fence.proxy.async; bar.sync 1;" + STORE + "@%p1 cp.async.bulk.wait_group 0;",
        "fence.proxy.async;",
        MissingFence,
        "fence.proxy.async between",
    ),
    "the fence may stand on the other side": Rule(
        "st.shared.b32 [%r3], %r0; bar.sync 1; fence.proxy.async.shared::cta;" + STORE + "@%p1 cp.async.bulk.wait_group 0;",
        "fence.proxy.async.shared::cta;",
        MissingFence,
        "written by an ordinary store",
    ),
    "bulk store, then overwrite": Rule(
        "st.shared.b32 [%r3], %r0; fence.proxy.async; bar.sync 1;" + STORE + "@%p1 cp.async.bulk.wait_group.read 0; bar.sync 2;"
        "st.shared.b32 [%r3], 1;",
        "@%p1 cp.async.bulk.wait_group.read 0;",
        DataRace,
        "the bulk store of CTA",
    ),
    "a group too many left open": Rule(
        "st.shared.b32 [%r3], %r0; fence.proxy.async; bar.sync 1;" + STORE + "@%p1 cp.async.bulk.wait_group.read 0; bar.sync 2;"
        "st.shared.b32 [%r3], 1;",
        "wait_group.read 0",
        DataRace,
        "the bulk store of CTA",
        "wait_group.read 1",
    ),
    "bulk store, then read of the target": Rule(
        "st.shared.b32 [%r3], %r0; fence.proxy.async; bar.sync 1;" + STORE + "@%p1 cp.async.bulk.wait_group 0; bar.sync 2;"
        "ld.global.b32 %r12, [%d4];",
        "wait_group 0",
        DataRace,
        "bulk store has completed",
        "wait_group.read 0",
    ),
    "cp.async, then read": Rule(
        GLOBAL
        + "cp.async.ca.shared.global [%r3], [%d5], 4; cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %r12, [%r3];",
        "cp.async.wait_group 0;",
        DataRace,
        "the cp.async of CTA",
    ),
    "cp.async, then read by another warp": Rule(
        GLOBAL + "cp.async.ca.shared.global [%r3], [%d5], 4; cp.async.wait_all; bar.sync 1;" + NEIGHBOUR,
        "bar.sync 1;",
        DataRace,
        "the cp.async of CTA",
    ),
    "cp.async is not of the asynchronous proxy": Rule(
        GLOBAL
        + "cp.async.ca.shared.global [%r3], [%d5], 4; cp.async.wait_all; fence.proxy.async; bar.sync 1;"
        + STORE
        + "@%p1 cp.async.bulk.wait_group 0;",
        "fence.proxy.async;",
        MissingFence,
        "fence.proxy.async",
    ),
    "global memory between CTAs": Rule(
        "mov.u32 %r7, %ctaid.x; shl.b32 %r8, %r7, 8; cvt.u64.u32 %d6, %r8; add.s64 %d7, %d4, %d6; st.global.b32 [%d7], %r0;",
        "shl.b32 %r8, %r7, 8;",
        DataRace,
        r"out\[32\] of shape",
        "shl.b32 %r8, %r7, 7;",
        grid=2,
    ),
    "a flag between CTAs": Rule(
        "mov.u32 %r7, %ctaid.x; setp.eq.u32 %p4, %r7, 0; @!%p4 bra C; @%p1 st.global.b32 [%d2], 9; @%p1 membar.gl;"
        "@%p1 red.global.add.u32 [%d2+128], 1; bra X;"
        "C: ld.acquire.gpu.global.b32 %r9, [%d2+128]; setp.eq.u32 %p5, %r9, 0; @%p5 bra C; ld.global.b32 %r12, [%d2];",
        "@%p1 membar.gl;",
        DataRace,
        "nothing orders",
        grid=2,
        block=32,
    ),
    "a flag read without acquire": Rule(
        "mov.u32 %r7, %ctaid.x; setp.eq.u32 %p4, %r7, 0; @!%p4 bra C; @%p1 st.global.b32 [%d2], 9;"
        "@%p1 red.release.gpu.global.add.u32 [%d2+128], 1; bra X;"
        "C: ld.relaxed.gpu.global.b32 %r9, [%d2+128]; setp.eq.u32 %p5, %r9, 0; @%p5 bra C; fence.acq_rel.gpu;"
        "ld.global.b32 %r12, [%d2];",
        "fence.acq_rel.gpu;",
        DataRace,
        "nothing orders",
        grid=2,
        block=32,
    ),
    "distributed shared memory": Rule(
        "mov.u32 %r7, %cluster_ctarank; xor.b32 %r8, %r7, 1; mapa.shared::cluster.u32 %r9, %r3, %r8;"
        "st.shared::cluster.b32 [%r9], %r0;"
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; ld.shared.b32 %r12, [%r3];"
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; ld",
        DataRace,
        "nothing orders|read of never-written",
        "ld",
        grid=2,
        cluster=2,
    ),
    "tcgen05.fence makes a relaxed arrival carry": Rule(
        f"@%p1 st.shared.b32 [%r3], 5; tcgen05.fence::before_thread_sync; @%p1 mbarrier.arrive.relaxed.cta.shared.b64 _, [%r1];"
        f"{wait('%r1', 0).replace('try_wait.parity', 'try_wait.parity.relaxed.cta')} tcgen05.fence::after_thread_sync;"
        "ld.shared.b32 %r12, [%r1+1024];",
        "tcgen05.fence::after_thread_sync;",
        DataRace,
        "nothing orders",
    ),
    "an mbarrier used before its initialisation is known": Rule(
        "@%p1 mbarrier.init.shared.b64 [%r1+32], 1; @%p1 mbarrier.arrive.release.cta.shared.b64 _, [%r1];"
        f"{wait('%r1', 0)} @%p3 mbarrier.arrive.shared.b64 _, [%r1+32];",
        "arrive.release",
        DataRace,
        "nothing orders its initialisation",
        "arrive.relaxed",
    ),
}


def execute(body: str, rule: Rule, schedule: str, collect: bool = False) -> list:
    source, out = np.arange(64, dtype=np.uint32), np.zeros(128, np.uint32)
    made = kernel(START + body + EXIT, 2)
    launch = launch_of(made, source, out, block=rule.block, grid=rule.grid, cluster=rule.cluster)
    machine = Machine(memory_of(source=source, out=out), schedule, Checks(races=not collect, uninitialized=False))
    checker = RaceChecker(collect=True)
    if collect:
        machine.observers.append(checker)
    machine.run(launch)
    return checker.findings


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_kept_is_silent(name: str, schedule: str) -> None:
    execute(RULES[name].body, RULES[name], schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_broken_is_reported_whatever_the_schedule(name: str, schedule: str) -> None:
    rule = RULES[name]
    assert rule.needed in rule.body
    with pytest.raises(rule.error, match=rule.words) as caught:
        execute(rule.body.replace(rule.needed, rule.instead, 1), rule, schedule)
    assert "one: " in str(caught.value) and "other: " in str(caught.value) and "missing: " in str(caught.value)


def test_neighbouring_bytes_are_not_one() -> None:
    """Warps that write the two halves of the same words, as transposed 16-bit stores do."""
    rule = RULES["shared memory between warps"]
    body = """mov.b16 %h1, 3; and.b32 %r4, %r0, 31; shl.b32 %r4, %r4, 2; add.s32 %r4, %r4, %r1; shl.b32 %r5, %r6, 1;
    add.s32 %r4, %r4, %r5; st.shared.b16 [%r4+1024], %h1;"""
    execute(body, rule, "eager")
    with pytest.raises(DataRace, match="1024"):
        execute(body.replace("st.shared.b16 [%r4+1024], %h1", "st.shared.b32 [%r1+1024], %r0"), rule, "eager")


def test_stores_of_one_value_may_cross() -> None:
    rule = RULES["two writes"]
    execute("st.shared.b32 [%r1+1024], 5; st.global.b32 [%d2], 6;", rule, "eager")
    with pytest.raises(DataRace, match="write and write"):
        execute("st.shared.b32 [%r1+1024], %r6;", rule, "eager")


def test_an_mbarrier_overwritten_by_other_means() -> None:
    rule = RULES["two writes"]
    execute("@%p1 mbarrier.inval.shared.b64 [%r1+8]; bar.sync 1; @%p1 st.shared.b64 [%r1+8], %d3;", rule, "eager")
    with pytest.raises(BarrierMisuse, match=r"mbarrier at .* \+ 8 .* is overwritten without mbarrier.inval"):
        execute("@%p1 st.shared.b64 [%r1+8], %d3;", rule, "eager")
    load = LOAD.replace("[%r1+1024]", "[%r1]")
    with pytest.raises(BarrierMisuse, match="write by the bulk load"):
        execute(load + wait("%r1", 0), rule, "eager")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_parity_is_that_of_an_older_phase_to_who_does_not_know_of_the_one_between(schedule: str) -> None:
    """Warp 0 waits for the first load and issues the second, which the other warp waits for, late. It reads what came if the
    wait ended as it should; had the first load been late, the wait would have ended before anything came.
    """
    rule = RULES["two writes"]
    late = "mov.b32 %r60, 0; K: add.s32 %r60, %r60, 1; setp.lt.u32 %p6, %r60, 9000; @%p6 bra K;"

    def run(own: str, known: str) -> None:
        first = f"@!%p2 bra B; {wait('%r1', 0)} bar.sync 1, 64; {LOAD} {known} bra C; B: {own} bar.arrive 1, 64; {known} C:"
        execute(f"{LOAD} {first} {late} {wait('%r1', 1, 2)} ld.shared.b32 %r12, [%r3];", rule, schedule)

    run("", "bar.sync 2;")
    run(wait("%r1", 0, 3), "")
    if schedule == "lazy":  # the first load is late
        with pytest.raises(DataRace, match="read and write that nothing orders"):
            run("", "")
        return
    with pytest.raises(BarrierMisuse, match="that an older phase may satisfy") as caught:
        run("", "")
    said = str(caught.value)
    assert "went on after phase 1, whose parity is that of phase -1" in said
    assert "phase 0 completed: last arrival by the bulk load of CTA (0, 0, 0) warp 0" in said
    assert "warp 1 of CTA (0, 0, 0) does not know that phase 0 has completed" in said


def test_arrivals_at_a_cta_that_is_gone() -> None:
    """CTA 0 exits at once; CTA 1 arrives on its mbarrier after a while, with or without a cluster barrier at the end."""
    rule = RULES["distributed shared memory"]
    remote = """mov.b32 %r60, 0; K: bar.sync 2; add.s32 %r60, %r60, 1; setp.lt.u32 %p6, %r60, 20; @%p6 bra K;
    mov.u32 %r8, 0; mapa.shared::cluster.u32 %r9, %r1, %r8;
    @%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r9];"""
    sync = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    body = sync + "mov.u32 %r7, %cluster_ctarank; setp.eq.u32 %p4, %r7, 0; @%p4 bra E;" + remote + "E:"
    execute(body + sync, rule, "eager")
    with pytest.raises(HazardError, match="after all threads of that CTA exited"):
        execute(body, rule, "eager")


def test_every_race_is_collected_once() -> None:
    rule = RULES["shared memory between warps"]
    body = "st.shared.b32 [%r3], %r0;" + NEIGHBOUR + "st.shared.b32 [%r3], %r0;" + NEIGHBOUR
    findings = execute(body, rule, "eager", collect=True)
    assert len(findings) >= 2 and len({str(f) for f in findings}) == len(findings)
    assert all(isinstance(f, DataRace) and f.kind == "race" for f in findings)


TMEM = (
    START
    + """
@!%p2 bra G; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1+64], 64; G: bar.sync 0; ld.shared.b32 %r9, [%r1+64];
"""
)
FREE = "bar.sync 0; @!%p2 bra Q; tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r9, 64; Q: ret;"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tensor_memory_between_warps(schedule: str) -> None:
    """Warps 0 and 4 share a quarter of TMEM: one stores, the other loads."""
    body = """setp.eq.u32 %p5, %r6, 4; @!%p2 bra S; tcgen05.st.sync.aligned.32x32b.x1.b32 [%r9], {%r0};
    tcgen05.wait::st.sync.aligned; S: bar.sync 1; @!%p5 bra L; tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r20}, [%r9];
    tcgen05.wait::ld.sync.aligned; L:"""

    def go(text: str, end: str = FREE) -> None:
        source, out = np.zeros(64, np.uint32), np.zeros(128, np.uint32)
        made = kernel(TMEM + text + end, 2)
        Machine(memory_of(source=source, out=out), schedule, Checks(races=True, uninitialized=False)).run(
            launch_of(made, source, out, block=160)
        )

    go(body)
    with pytest.raises(DataRace, match=r"TMEM of CTA .*(tcgen05.wait::st|nothing orders)"):
        go(body.replace("tcgen05.wait::st.sync.aligned;", ""))
    with pytest.raises(DataRace, match=r"tcgen05\.st has completed|tcgen05\.ld has read its source"):
        go(body.replace("bar.sync 1;", ""))
    with pytest.raises(DataRace, match=r"tcgen05\.wait::ld"):
        go(body.replace("tcgen05.wait::ld.sync.aligned;", ""))


def rewritten(launch: sim.Launch, old: str, new: str) -> sim.Launch:
    """The launch of a kernel with one text of its PTX replaced everywhere."""
    assert old in launch.kernel.source
    return dataclasses.replace(launch, kernel=ptx.parse(launch.kernel.source.replace(old, new), launch.kernel.name))


def test_a_wgmma_needs_a_fence_after_its_registers_were_written(compiled: Callable[..., sim.Compiled]) -> None:
    a, b, c = torch.ones(64, 128).half(), torch.ones(64, 128).half(), torch.zeros(64, 64)
    (launch,) = compiled("wgmma_tile", a, b, c).capture(a, b, c)
    checks = Checks(races=True)
    sim.execute(launch, schedule="lazy", checks=checks)
    with pytest.raises(MissingFence, match=r"first wgmma of CTA 0 warp 0 has no wgmma.fence") as caught:
        sim.execute(rewritten(launch, "wgmma.fence.sync.aligned;", ""), checks=checks)
    assert "kernels.py" in str(caught.value)
    scaled = "mul.f32 {0}, {0}, {0};".format(re.findall(r"wgmma\.mma_async[^;]*?\{\s*(%\w+)", launch.kernel.source)[0])
    with pytest.raises(MissingFence, match="touched before, and no wgmma"):
        sim.execute(rewritten(launch, "wgmma.fence.sync.aligned;", f"wgmma.fence.sync.aligned; {scaled}"), checks=checks)


@pytest.mark.parametrize(
    ("name", "arch", "shapes"),
    [
        ("tile_copy", "sm_90a", [(100, 136), (100, 136)]),
        ("wgmma_tile", "sm_90a", [(64, 192), (64, 192), (64, 64)]),
        ("tcgen05_tile", "sm_100a", [(128, 192), (64, 192), (128, 64)]),
    ],
)
@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
def test_correct_kernels_are_silent(
    compiled: Callable[..., sim.Compiled], name: str, arch: str, shapes: list[tuple[int, int]], schedule: str
) -> None:
    tensors = [torch.ones(shape).half() for shape in shapes]
    if name != "tile_copy":
        tensors[-1] = tensors[-1].float()
    compiled(name, *tensors, arch=arch)(*tensors, schedule=schedule, checks=Checks(races=True))


@pytest.mark.parametrize("seed", range(6))
def test_a_warp_may_leave_a_named_barrier_many_generations_late(seed):
    """Warps 0 and 1 meet once at barrier 1, where warps 0 and 2 then meet twenty times before warp 1 may have gone on."""
    out = np.zeros(1, np.uint32)
    body = """
    mov.u32 %r0, %tid.x; shr.u32 %r0, %r0, 5; mov.u32 %r1, 0;
    setp.eq.u32 %p1, %r0, 1; @%p1 bra ONE; setp.eq.u32 %p2, %r0, 2; @%p2 bra TWO;
    bar.sync 1, 64;
    TWO: bar.sync 2, 64;
    L: bar.sync 1, 64; add.u32 %r1, %r1, 1; setp.lt.u32 %p3, %r1, 20; @%p3 bra L; ret;
    ONE: bar.sync 1, 64; ret;
    """
    run(body, block=96, schedule=f"random:{seed}", checks=Checks(races=True), out=out)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lanes_of_one_cp_async_in_two_tensors(schedule: str) -> None:
    """The upper half of a warp copies from the second tensor, which is written afterwards by the other warp."""
    body = """
    ld.param.b64 %d1, [p0]; ld.param.b64 %d2, [p1]; mov.u32 %r0, %tid.x; mov.b32 %r1, smem; shr.u32 %r6, %r0, 5;
    setp.eq.u32 %p2, %r6, 0; @!%p2 bra W;
    setp.lt.u32 %p1, %r0, 16; selp.b64 %d3, %d1, %d2, %p1; shl.b32 %r2, %r0, 2; cvt.u64.u32 %d4, %r2; add.s64 %d3, %d3, %d4;
    add.s32 %r3, %r1, %r2; cp.async.ca.shared.global [%r3], [%d3], 4; cp.async.wait_all;
    W: bar.sync 1; @%p2 bra X; st.global.b32 [%d2+68], 1; X: ret;
    """
    first, second = np.arange(32, dtype=np.uint32), np.arange(32, dtype=np.uint32)
    how = dict(block=64, schedule=schedule, checks=Checks(races=True))
    run(body, first=first, second=second, **how)
    with pytest.raises(DataRace, match=r"data race on second\[17\] of shape"):
        run(body.replace("bar.sync 1;", ""), first=first, second=second, **how)
