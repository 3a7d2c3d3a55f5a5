"""TMEM of two CTAs that work as a pair: allocated and freed by both together."""

import numpy as np
import pytest

from dsv4lab.sim.assembly import run
from dsv4lab.sim.errors import Deadlock, MemoryFault
from dsv4lab.sim.machine import Checks

# Rank 1 allocates long after rank 0; rank 0 then writes TMEM of its own, reads it back and gives it to the host.
PAIR = """
ld.param.b64 %d1, [p0];
mov.u32 %r0, %cluster_ctarank;
mov.u32 %r1, smem;
setp.eq.u32 %p1, %r0, {late};
mov.u32 %r9, 0;
@!%p1 bra $go;
$wait:
add.u32 %r9, %r9, 1;
setp.lt.u32 %p2, %r9, 50;
@%p2 bra $wait;
$go:
{alloc}
ld.shared.b32 %r2, [%r1];
mov.u32 %r3, %laneid;
add.u32 %r3, %r3, 7;
tcgen05.st.sync.aligned.32x32b.x1.b32 [%r2], {{%r3}};
tcgen05.wait::st.sync.aligned;
tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r4}}, [%r2];
tcgen05.wait::ld.sync.aligned;
{dealloc}
{after}
mul.wide.u32 %d2, %r0, 128;
add.s64 %d1, %d1, %d2;
mov.u32 %r5, %laneid;
mul.wide.u32 %d3, %r5, 4;
add.s64 %d1, %d1, %d3;
st.global.b32 [%d1], %r4;
ret;
"""
ALLOC = "tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%r1], 32;"
DEALLOC = "tcgen05.dealloc.cta_group::2.sync.aligned.b32 %r2, 32;"


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random:1", "random:2"])
@pytest.mark.parametrize("late", [0, 1])
def test_both_ctas_of_a_pair_allocate_and_free_together(schedule, late):
    out = np.zeros((2, 32), np.uint32)
    run(PAIR.format(alloc=ALLOC, dealloc=DEALLOC, after="", late=late), grid=2, cluster=2, schedule=schedule, out=out)
    np.testing.assert_array_equal(out, np.tile(np.arange(32) + 7, (2, 1)))


@pytest.mark.parametrize(("alloc", "dealloc"), [(f"@!%p1 {ALLOC}", DEALLOC), (ALLOC, f"@!%p1 {DEALLOC}")])
def test_one_cta_alone_waits_for_its_peer_for_ever(alloc, dealloc):
    out = np.zeros((2, 32), np.uint32)
    with pytest.raises(Deadlock, match=r"waits for CTA \(1, 0, 0\) \(rank 1\) to perform tcgen05"):
        run(
            PAIR.format(alloc=alloc, dealloc=dealloc, after="", late=1),
            grid=2,
            cluster=2,
            checks=Checks(uninitialized=False, tmem_columns=False),
            out=out,
        )


def test_tmem_is_gone_once_it_was_freed():
    after = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r4}, [%r2];"
    body = PAIR.format(alloc=ALLOC, dealloc=DEALLOC, after=after, late=1)
    out = np.zeros((2, 32), np.uint32)
    with pytest.raises(MemoryFault, match="touches TMEM columns 0 to 0; allocated are none"):
        run(body, grid=2, cluster=2, out=out)
    run(body, grid=2, cluster=2, checks=Checks(tmem_columns=False), out=out)
    np.testing.assert_array_equal(out, np.tile(np.arange(32) + 7, (2, 1)))
