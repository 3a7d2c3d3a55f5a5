"""mbarriers, named barriers and their reductions, fences, thread block clusters and distributed shared memory."""

from __future__ import annotations

from functools import cache

import numpy as np

from tests.sim.conformance.case import Form, Group
from tests.sim.conformance.values import bits

THREADS = 128
_REGISTERS = """.reg .b32 w<24>; .reg .b64 x<16>; .reg .pred p<8>; .reg .b64 here, there; .reg .b32 at, far;
mad.wide.u32 here, thread, 4, source; mad.wide.u32 there, thread, 4, target; mad.lo.u32 at, thread, 4, smem;
setp.eq.u32 p0, thread, 0;
"""
_START = "@p0 mbarrier.init.shared.b64 [smem], {count}; bar.sync 0;\n"
_EXCHANGE = "ld.global.b32 w0, [here]; st.shared.b32 [at+64], w0;\n"
_REVERSED = "sub.u32 w1, 127, thread; mad.lo.u32 w1, w1, 4, smem; ld.shared.b32 w2, [w1+64]; st.global.b32 [there], w2;"


def wait(barrier: str, parity: str | int, n: int = 0, form: str = "try_wait.parity") -> str:
    return f"W{n}: mbarrier.{form}.shared.b64 p7, [{barrier}], {parity}; @!p7 bra W{n};\n"


def _reversing(label: str, code: str, count: int = THREADS) -> Form:
    """Every thread writes a word to shared memory and, after the code's barrier, reads another thread's."""
    data = bits(label, THREADS, np.uint32)
    return Form(label, _REGISTERS + _START.format(count=count) + _EXCHANGE + code + _REVERSED, data, data[::-1].copy())


def barriers() -> list[Form]:
    out = []
    for arrive in (
        "mbarrier.arrive.shared.b64 x0, [smem];",
        "mbarrier.arrive.shared::cta.b64 _, [smem];",
        "mbarrier.arrive.release.cta.shared::cta.b64 x0, [smem];",
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [smem];",
        "mbarrier.arrive.release.cta.shared::cta.b64 x0, [smem], 1;",
        "mbarrier.arrive_drop.shared.b64 x0, [smem];",
        "mbarrier.arrive.noComplete.shared.b64 x0, [smem], 1;",
    ):
        if "noComplete" in arrive:
            # The last arrival must be one that completes the phase.
            code = f"@!p0 {arrive} bar.sync 0; @p0 mbarrier.arrive.shared.b64 x0, [smem];\n" + wait("smem", 0)
        else:
            code = arrive + "\n" + wait("smem", 0)
        out.append(_reversing(arrive.rstrip(";"), code))
    for form in ("try_wait", "test_wait", "try_wait.acquire.cta", "test_wait.acquire.cluster"):
        space = "shared::cta" if "acquire" in form else "shared"
        loop = f"WAIT: mbarrier.{form}.{space}.b64 p7, [smem], x0; @!p7 bra WAIT;\n"
        out.append(_reversing(f"mbarrier.{form} of a state", "mbarrier.arrive.shared.b64 x0, [smem];\n" + loop))
        parity = f"WAIT: mbarrier.{form.replace('wait', 'wait.parity')}.{space}.b64 p7, [smem], 0; @!p7 bra WAIT;\n"
        out.append(
            _reversing(f"mbarrier.{form.replace('wait', 'wait.parity')}", "mbarrier.arrive.shared.b64 _, [smem];\n" + parity)
        )
    code = "mbarrier.arrive.shared.b64 x0, [smem]; WAIT: mbarrier.try_wait.shared.b64 p7, [smem], x0, 1000000; @!p7 bra WAIT;\n"
    out.append(_reversing("mbarrier.try_wait with a time limit", code))
    code = """
    @p0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [smem], 64; @!p0 mbarrier.arrive.shared.b64 _, [smem];
    @p0 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [smem], 16;
    @p0 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [smem], 16;
    @p0 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [smem], 64;
    """
    out.append(_reversing("mbarrier.expect_tx, complete_tx, arrive.expect_tx", code + wait("smem", 0)))
    code = """
    mbarrier.arrive.shared.b64 x0, [smem]; WAIT: mbarrier.try_wait.shared.b64 p7, [smem], x0; @!p7 bra WAIT;
    mbarrier.arrive.shared.b64 x1, [smem]; AGAIN: mbarrier.try_wait.shared.b64 p7, [smem], x1; @!p7 bra AGAIN;
    mbarrier.arrive.shared.b64 _, [smem]; THIRD: mbarrier.try_wait.parity.shared.b64 p7, [smem], 0; @!p7 bra THIRD;
    bar.sync 0; @p0 mbarrier.inval.shared.b64 [smem];
    """
    out.append(_reversing("mbarrier, three phases, inval", code))
    counted = (
        _REGISTERS
        + _START.format(count=5)
        + """
    @p0 mbarrier.arrive.noComplete.shared.b64 x0, [smem], 2; @p0 mbarrier.pending_count.b64 w0, x0;
    @p0 mbarrier.arrive.shared.b64 x1, [smem]; @p0 mbarrier.pending_count.b64 w1, x1;
    @p0 st.global.v2.b32 [target], {w0, w1};
    """
    )
    out.append(Form("mbarrier.pending_count", counted, np.zeros(1, np.uint32), np.array([5, 3], np.uint32)))
    dropped = (
        _REGISTERS
        + _START.format(count=3)
        + """
    mov.b32 w5, 0; @p0 mbarrier.arrive_drop.shared.b64 _, [smem]; @p0 mbarrier.arrive.shared.b64 _, [smem];
    @p0 mbarrier.arrive.shared.b64 _, [smem];
    """
        + wait("smem", 0)
        + """
    bar.sync 0; @p0 mbarrier.arrive.shared.b64 _, [smem]; @p0 mbarrier.test_wait.parity.shared.b64 p1, [smem], 1;
    selp.b32 w5, 100, 0, p1; @p0 mbarrier.arrive.shared.b64 _, [smem]; bar.sync 0;
    """
        + wait("smem", 1, 1)
        + "add.u32 w5, w5, 1; @p0 st.global.b32 [target], w5;"
    )
    dropped = dropped.replace("selp.b32 w5, 100, 0, p1;", "@p0 selp.b32 w5, 100, 0, p1;")
    out.append(
        Form("mbarrier.arrive_drop lowers the count for good", dropped, np.zeros(1, np.uint32), np.array([1], np.uint32))
    )
    return out


_FENCES = """
membar.cta; membar.gl; membar.sys; fence.acq_rel.cta; fence.acq_rel.cluster; fence.acq_rel.gpu; fence.sc.cta; fence.sc.gpu;
fence.proxy.async; fence.proxy.alias; fence.proxy.async.shared::cta; fence.proxy.async.global; bar.sync 0;
"""


def named() -> list[Form]:
    out = []
    for label, code in (
        ("bar.sync 0", "bar.sync 0;"),
        ("bar.sync 3, 128", "bar.sync 3, 128;"),
        ("barrier.sync 5", "barrier.sync 5;"),
        ("barrier.sync.aligned 15, 128", "barrier.sync.aligned 15, 128;"),
        ("barrier.cta.sync.aligned of a register", "mov.b32 w9, 7; barrier.cta.sync.aligned w9, 128;"),
        ("bar.arrive, bar.sync", "setp.lt.u32 p1, thread, 64; @p1 bra FIRST; bar.arrive 2, 128; bar.sync 4, 128; bra DONE; "
         "FIRST: bar.sync 2, 128; bar.sync 4, 128; DONE:"),
        ("membar, fence and a barrier", _FENCES),
        ("nanosleep and a barrier", "nanosleep.u32 100; bar.sync 0;"),
    ):  # fmt: skip
        data = bits(label, THREADS, np.uint32)
        out.append(Form(label, _REGISTERS + _EXCHANGE + code + "\n" + _REVERSED, data, data[::-1].copy()))
    data = bits("bar.warp.sync", THREADS, np.uint32)
    code = (
        _EXCHANGE
        + "bar.warp.sync -1; xor.b32 w1, thread, 31; mad.lo.u32 w1, w1, 4, smem; ld.shared.b32 w2, [w1+64]; "
        + "st.global.b32 [there], w2;"
    )
    out.append(Form("bar.warp.sync", _REGISTERS + code, data, data[np.arange(THREADS) ^ 31]))
    for name, held in (("mixed", lambda v: v % 3 == 0), ("all", lambda v: v >= 0), ("none", lambda v: v < 0)):
        data = bits(f"bar.red {name}", THREADS, np.uint32)
        truth = held(data.astype(np.int64))
        code = """
        ld.global.b32 w0, [here]; setp.ne.u32 p1, w0, 0;
        barrier.cta.red.popc.aligned.u32 w1, 1, 128, p1; bar.red.and.pred p2, 2, p1; bar.red.or.pred p3, 3, 128, p1;
        barrier.red.popc.u32 w2, 4, 128, !p1; selp.b32 w3, 1000, 2000, p2; selp.b32 w4, 10000, 20000, p3;
        add.u32 w1, w1, w3; add.u32 w1, w1, w4; mad.lo.u32 w1, w2, 100000, w1; st.global.b32 [there], w1;
        """
        total = int(truth.sum())
        result = total + (1000 if truth.all() else 2000) + (10000 if truth.any() else 20000) + (THREADS - total) * 100000
        out.append(
            Form(
                f"bar.red.{{popc,and,or}} {name}",
                _REGISTERS + code,
                truth.astype(np.uint32),
                np.full(THREADS, result, np.uint32),
            )
        )
    return out


def registers() -> list[Form]:
    """setmaxnreg, griddepcontrol and special registers."""
    data = bits("setmaxnreg", THREADS, np.uint32)
    # One warpgroup: it gives registers up and takes some back.
    code = """
    setmaxnreg.dec.sync.aligned.u32 40; ld.global.b32 w0, [here]; setmaxnreg.inc.sync.aligned.u32 96; st.global.b32 [there], w0;
    """
    moved = "griddepcontrol.wait; ld.global.b32 w0, [here]; griddepcontrol.launch_dependents; st.global.b32 [there], w0;"
    special = """
    mov.u32 w0, %laneid; shr.u32 w1, thread, 5; mad.lo.u32 w2, w1, 32, w0; mov.u32 w3, %ntid.x; mad.lo.u32 w2, w3, 1000, w2;
    mov.u32 w4, %lanemask_lt; popc.b32 w4, w4; mad.lo.u32 w2, w4, 1000000, w2; mov.u32 w5, %lanemask_ge; popc.b32 w5, w5;
    mad.lo.u32 w2, w5, 10000000, w2; mov.u32 w6, %tid.y; add.u32 w2, w2, w6; mov.u32 w7, %nctaid.y; add.u32 w2, w2, w7;
    st.global.b32 [there], w2;
    """
    lane = np.arange(THREADS) % 32
    wanted = np.arange(THREADS) + 128000 + lane * 1000000 + (32 - lane) * 10000000 + 1
    return [
        Form("griddepcontrol.wait, launch_dependents", _REGISTERS + moved, data, data),
        Form("setmaxnreg.dec, inc", _REGISTERS + code, data, data),
        Form("special registers", _REGISTERS + special, data, wanted.astype(np.uint32)),
    ]


def _pairwise(label: str, code: str, data: np.ndarray | None = None, expected: np.ndarray | None = None) -> Form:
    """A form of a cluster of two; by default each CTA gets the other one's words (source and target have both CTAs' words)."""
    data = bits(label, 2 * THREADS, np.uint32) if data is None else data
    start = """
    mad.lo.u32 w20, rank, 128, thread; mad.wide.u32 here, w20, 4, source; mad.wide.u32 there, w20, 4, target;
    xor.b32 w21, rank, 1;
    @p0 mbarrier.init.shared.b64 [smem], 1; @p0 fence.mbarrier_init.release.cluster; ld.global.b32 w0, [here];
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; mapa.shared::cluster.u32 far, smem, w21;
    mad.lo.u32 at, thread, 4, smem; mad.lo.u32 w19, thread, 4, far;
    """
    finish = "barrier.cluster.arrive; barrier.cluster.wait;"
    if expected is None:
        expected = np.concatenate([data[THREADS:], data[:THREADS]])
    return Form(label, _REGISTERS + start + code + finish, data, expected)


_CLUSTER = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;\n"


def clusters() -> list[Form]:
    own = "ld.shared.b32 w2, [at+64]; st.global.b32 [there], w2;\n"
    out = [
        _pairwise("st.shared::cluster", "st.shared::cluster.b32 [w19+64], w0;" + _CLUSTER + own),
        _pairwise("ld.shared::cluster",
                  "st.shared.b32 [at+64], w0;" + _CLUSTER + "ld.shared::cluster.b32 w2, [w19+64]; st.global.b32 [there], w2;"),
        _pairwise(
            "ld.shared::cluster.v4",
            "st.shared.b32 [at+64], w0;" + _CLUSTER + """
            and.b32 w3, thread, 3; and.b32 w4, thread, 124; mad.lo.u32 w4, w4, 4, far;
            ld.shared::cluster.v4.b32 {w5, w6, w7, w8}, [w4+64];
            setp.eq.u32 p1, w3, 0; selp.b32 w9, w5, w6, p1; setp.lt.u32 p1, w3, 2; selp.b32 w10, w9, w7, p1;
            setp.lt.u32 p1, w3, 3;
            selp.b32 w10, w10, w8, p1; st.global.b32 [there], w10;
            """,
        ),
        _pairwise(
            "mapa.u64 of a generic address",
            "cvt.u64.u32 x0, at; cvta.shared.u64 x0, x0; mapa.u64 x1, x0, w21; st.b32 [x1+64], w0;" + _CLUSTER + own,
        ),
        _pairwise("barrier.cluster.arrive.relaxed",
                  "st.shared::cluster.b32 [w19+64], w0; fence.acq_rel.cluster; barrier.cluster.arrive.relaxed.aligned;"
                  + "barrier.cluster.wait.aligned;" + own),
        _pairwise(
            "mbarrier.arrive of another CTA",
            """
            st.shared::cluster.b32 [w19+64], w0; fence.acq_rel.cluster; bar.sync 0;
            @p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [far];
            """ + "W0: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p7, [smem], 0; @!p7 bra W0;\n" + own,
        ),
        _pairwise(
            "mbarrier.arrive.expect_tx of another CTA, complete_tx",
            """
            st.shared::cluster.b32 [w19+64], w0; fence.acq_rel.cluster; bar.sync 0;
            @p0 mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [far], 32;
            @p0 mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [far], 32;
            """ + wait("smem", 0) + "fence.acq_rel.cluster;" + own,
        ),
    ]  # fmt: skip
    for t, registers, count in (
        ("b32", "w0", 1),
        ("v2.b32", "{w0, w1}", 2),
        ("v4.b32", "{w0, w1, w2, w3}", 4),
        ("b64", "x0", 2),
    ):
        code = f"""
        @p0 mbarrier.arrive.expect_tx.shared.b64 _, [smem], 512; rem.u32 w10, thread, {count}; setp.ne.u32 p1, w10, 0;
        ld.global.b32 w1, [here+4]; ld.global.b32 w2, [here+8]; ld.global.b32 w3, [here+12]; mov.b64 x0, {{w0, w1}};
        @!p1 st.async.shared::cluster.mbarrier::complete_tx::bytes.{t} [w19+64], {registers}, [far];
        """
        data = bits(f"st.async {t}", 2 * THREADS, np.uint32)
        padded = np.concatenate([data, np.zeros(4, np.uint32)])  # the loads reach beyond the last thread's word
        swapped = np.concatenate([data[THREADS:], data[:THREADS]])
        out.append(_pairwise(f"st.async.{t}", code + wait("smem", 0) + own, padded, swapped))
    values = bits("red.async", 2 * THREADS, np.uint32) % np.uint32(1 << 20)
    first, other = (np.arange(THREADS) * 77 + 5).astype(np.uint32), np.concatenate([values[THREADS:], values[:THREADS]])
    ready = f"mad.lo.u32 w4, thread, 77, 5; st.shared.b32 [at+64], w4; {_CLUSTER}"
    for name, function in (
        ("add.u32", np.add),
        ("min.u32", np.minimum),
        ("max.s32", np.maximum),
        ("xor.b32", np.bitwise_xor),
        ("or.b32", np.bitwise_or),
        ("and.b32", np.bitwise_and),
    ):
        opcode = f"red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.{name}"
        code = f"@p0 mbarrier.arrive.expect_tx.shared.b64 _, [smem], 512; {ready} {opcode} [w19+64], w0, [far];\n"
        out.append(_pairwise(f"red.async.{name}", code + wait("smem", 0) + own, values, function(np.tile(first, 2), other)))
    for name, function in (("add.u32", np.add), ("max.u32", np.maximum), ("exch.b32", lambda a, b: b)):
        code = f"{ready} atom.relaxed.cluster.shared::cluster.{name} w5, [w19+64], w0; {_CLUSTER}" + own
        out.append(_pairwise(f"atom.shared::cluster.{name}", code, values, function(np.tile(first, 2), other)))
    code = """
    mov.u32 w2, %cluster_ctarank; mov.u32 w3, %cluster_nctarank; mov.u32 w4, %cluster_ctaid.x; mov.u32 w5, %cluster_nctaid.x;
    mad.lo.u32 w2, w3, 10, w2; mad.lo.u32 w2, w4, 100, w2; mad.lo.u32 w2, w5, 1000, w2; getctarank.shared::cluster.u32 w6, w19;
    mad.lo.u32 w2, w6, 10000, w2; cvt.u64.u32 x0, at; cvta.shared.u64 x0, x0; mapa.u64 x1, x0, w21; getctarank.u64 w7, x1;
    mad.lo.u32 w2, w7, 100000, w2; isspacep.shared p1, x0; isspacep.shared::cluster p2, x1; isspacep.global p3, here;
    selp.b32 w8, 1, 0, p1;
    mad.lo.u32 w2, w8, 1000000, w2; selp.b32 w8, 1, 0, p2; mad.lo.u32 w2, w8, 2000000, w2; selp.b32 w8, 1, 0, p3;
    mad.lo.u32 w2, w8, 4000000, w2;
    st.global.b32 [there], w2;
    """
    ranks = [r + 20 + 100 * r + 2000 + 10000 * (1 - r) + 100000 * (1 - r) + 7000000 for r in (0, 1)]
    out.append(_pairwise("cluster registers, getctarank, isspacep", code, None, np.repeat(np.array(ranks, np.uint32), THREADS)))
    return out


@cache
def groups() -> tuple[Group, ...]:
    return (
        Group("synchronisation mbarrier", tuple(barriers()), threads=THREADS, shared=1024),
        Group("synchronisation named barriers", tuple(named()), threads=THREADS, shared=1024),
        Group("synchronisation registers", tuple(registers()), threads=THREADS, shared=1024),
        Group("synchronisation clusters", tuple(clusters()), threads=THREADS, shared=1024, cluster=2),
    )
