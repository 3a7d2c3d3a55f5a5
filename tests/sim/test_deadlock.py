"""Deadlock reports say who waits, who has arrived, and who could still arrive."""

from __future__ import annotations

import numpy as np
import pytest

from dsv4lab.sim.assembly import run
from dsv4lab.sim.errors import Deadlock

START = """
mov.u32 %r0, %tid.x; mov.b32 %r1, smem; shr.u32 %r6, %r0, 5; setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r6, 0;
setp.eq.u32 %p3, %r0, 32;
@%p1 mbarrier.init.shared.b64 [%r1], 1; @%p1 mbarrier.init.shared.b64 [%r1+8], 1; bar.sync 0;
"""


def wait(bar: str, parity: int, n: int) -> str:
    return f"W{n}: mbarrier.try_wait.parity.shared.b64 %p9, [{bar}], {parity}; @%p9 bra D{n}; bra W{n}; D{n}:"


def report(body: str, **launch: int) -> str:
    with pytest.raises(Deadlock) as caught:
        run(START + body + " ret;", out=np.zeros(4, np.uint32), **{"block": 64, **launch})
    return str(caught.value)


def test_nobody_is_left_to_arrive() -> None:
    text = report(wait("%r1", 0, 0))
    assert "arrived so far: nobody" in text and "could still arrive: nobody has such an instruction ahead" in text
    assert "asynchronous operations in flight: 0" in text


def test_two_warps_wait_for_each_other() -> None:
    body = f"""
    @!%p2 bra B; {wait("%r1", 0, 0)} @%p1 mbarrier.arrive.shared.b64 _, [%r1+8]; bra E;
    B: {wait("%r1+8", 0, 1)} @%p3 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 0; E:"""
    text = report(body)
    assert "warp 1: mbarrier.arrive.expect_tx.shared.b64" in text
    assert "warp 0: mbarrier.arrive.shared.b64" in text
    assert text.count("could still arrive:") == 2


def test_who_arrived_before_and_is_gone() -> None:
    body = f"""
    @%p3 mbarrier.arrive.shared.b64 _, [%r1]; @!%p2 bra E; {wait("%r1", 0, 0)} {wait("%r1", 1, 1)} E:"""
    text = report(body)
    assert "arrived so far: CTA 0 warp 1 1x by mbarrier.arrive.shared.b64" in text and ", exited)" in text
    assert "exited already: CTA (0, 0, 0) warps 1" in text
    assert "could still arrive: nobody" in text


def test_a_warp_that_waits_elsewhere_could_reach_the_named_barrier() -> None:
    text = report(f"@%p2 bra B; {wait('%r1', 0, 0)} B: bar.sync 3, 64;")
    assert "named barrier 3: 32 of 64 threads arrived" in text
    barrier = text[text.index("named barrier 3") :]
    assert "warp 1: bar.sync" in barrier and "warp 0: bar.sync" not in barrier


def test_the_cluster_barrier() -> None:
    body = f"""
    mov.u32 %r7, %cluster_ctarank; setp.eq.u32 %p4, %r7, 0; @%p4 bra B; {wait("%r1", 0, 0)}
    B: barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"""
    text = report(body, grid=2, cluster=2)
    assert "cluster barrier: 64 threads arrived" in text
    assert "CTA (1, 0, 0) (rank 1) warp" in text[text.index("cluster barrier: 64 threads arrived\n") :]


def test_operations_count_as_arrivals() -> None:
    """A bulk copy that brings too few bytes: its issuer is named as the one who arrived."""
    body = f"""
    ld.param.b64 %d1, [p0]; @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 32;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1+128], [%d1], 16, [%r1]; {wait("%r1", 0, 0)}"""
    text = report(body)
    assert "complete 16 bytes by bulk copy of CTA 0 warp 0 lane 0" in text
    assert "CTA 0 warp 0 1x by cp.async.bulk.shared::cluster" in text
