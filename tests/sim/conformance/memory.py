"""Loads and stores of every width, space and cache hint; matrix fragments; cp.async."""

from __future__ import annotations

from functools import cache

import numpy as np

from tests.sim.conformance.case import Form, Group
from tests.sim.conformance.values import bits

THREADS = 128
_REGISTERS = ".reg .b32 w<40>; .reg .b64 x<16>; .reg .b16 h<16>; .reg .pred p<4>; .reg .b64 here, there; .reg .b32 at, bt;\n"
_CACHE_LOADS = ("ca", "cg", "cs", "lu", "cv", "nc", "nc.L1::no_allocate", "L1::evict_first.L2::128B", "L1::evict_last")
_ORDER_LOADS = ("volatile", "relaxed.cta", "relaxed.gpu", "relaxed.sys", "acquire.cta", "acquire.gpu", "acquire.sys", "weak")
_CACHE_STORES = ("wb", "cg", "cs", "wt", "L1::no_allocate", "L1::evict_first")
_ORDER_STORES = ("volatile", "relaxed.cta", "relaxed.gpu", "relaxed.sys", "release.cta", "release.gpu", "release.sys", "weak")


def _names(prefix: str, count: int) -> str:
    names = [f"{prefix}{k}" for k in range(count)]
    return names[0] if count == 1 else "{" + ", ".join(names) + "}"


def _moved(label: str, width: int, code: str) -> Form:
    """Every thread moves `width` bytes from its place in the source to its place in the target."""
    data = bits(label, THREADS * width, np.uint8)
    place = f"mad.wide.u32 here, thread, {width}, source; mad.wide.u32 there, thread, {width}, target;\n"
    place += f"mad.lo.u32 at, thread, {width}, smem;\n"
    return Form(label, _REGISTERS + place + code, data, data)


def vectors() -> list[Form]:
    """Global memory, and through shared memory by shared and by generic addresses."""
    out = []
    for count, t in (
        (1, "b8"),
        (1, "b16"),
        (1, "b32"),
        (1, "b64"),
        (2, "b8"),
        (2, "b16"),
        (2, "b32"),
        (2, "b64"),
        (4, "b8"),
        (4, "b16"),
        (4, "b32"),
    ):
        size = int(t[1:]) // 8
        prefix = {1: "h", 2: "h", 4: "w", 8: "x"}[size]
        form = f"{f'v{count}.' if count > 1 else ''}{t}"
        names = _names(prefix, count)
        width = count * size
        code = f"ld.global.{form} {names}, [here]; st.global.{form} [there], {names};"
        out.append(_moved(f"ld.global.{form}, st.global.{form}", width, code))
        code = f"""
        ld.global.{form} {names}, [here]; st.shared.{form} [at], {names}; bar.sync 0;
        ld.shared.{form} {names}, [at]; st.global.{form} [there], {names};
        """
        out.append(_moved(f"st.shared.{form}, ld.shared.{form}", width, code))
        code = f"""
        cvt.u64.u32 x8, at; cvta.shared.u64 x8, x8;
        ld.{form} {names}, [here]; st.{form} [x8], {names}; bar.sync 0; ld.{form} {names}, [x8]; st.{form} [there], {names};
        """
        out.append(_moved(f"ld.{form}, st.{form} (generic)", width, code))
    code = "{ .reg .b128 q; ld.global.b128 q, [here]; mov.b128 {x0, x1}, q; st.global.v2.b64 [there], {x0, x1}; }"
    out.append(_moved("ld.global.b128", 16, code))
    return out


def hints() -> list[Form]:
    out = []
    for hint in (*_CACHE_LOADS, *_ORDER_LOADS):
        parts = hint.split(".")
        opcode = f"ld.{hint}.global.b32" if hint in _ORDER_LOADS else f"ld.global.{hint}.b32"
        if parts[0] == "L1::evict_first":
            opcode = "ld.global.L1::evict_first.L2::128B.b32"
        out.append(_moved(opcode, 4, f"{opcode} w0, [here]; st.global.b32 [there], w0;"))
    for hint in (*_CACHE_STORES, *_ORDER_STORES):
        opcode = f"st.{hint}.global.b32" if hint in _ORDER_STORES else f"st.global.{hint}.b32"
        out.append(_moved(opcode, 4, f"ld.global.b32 w0, [here]; {opcode} [there], w0;"))
    for order in ("volatile", "relaxed.cta", "acquire.cta"):
        store = {"volatile": "volatile", "relaxed.cta": "relaxed.cta", "acquire.cta": "release.cta"}[order]
        code = f"ld.global.b32 w0, [here]; st.{store}.shared.b32 [at], w0; bar.sync 0; "
        code += f"ld.{order}.shared.b32 w1, [at]; st.global.b32 [there], w1;"
        out.append(_moved(f"st.{store}.shared, ld.{order}.shared", 4, code))
    code = """
    createpolicy.fractional.L2::evict_last.b64 x0, 0f3F800000; ld.global.L2::cache_hint.b32 w0, [here], x0;
    st.global.L2::cache_hint.b32 [there], w0, x0;
    """
    out.append(_moved("ld and st with L2::cache_hint", 4, code))
    code = "prefetch.global.L2 [here]; prefetch.global.L1 [here]; ld.global.b32 w0, [here]; st.global.b32 [there], w0;"
    out.append(_moved("prefetch", 4, code))
    return out


def widening() -> list[Form]:
    """Loads of narrow types into wide registers, stores of wide registers' low parts, local memory."""
    out = []
    for t in ("s8", "u8", "s16", "u16", "s32", "u32"):
        kind = np.dtype(f"{'i' if t[0] == 's' else 'u'}{int(t[1:]) // 8}")
        data = bits(f"widen {t}", THREADS, kind.type)
        code = f"""
        mad.wide.u32 here, thread, {kind.itemsize}, source; mad.wide.u32 there, thread, 8, target;
        ld.global.{t} x0, [here]; st.global.b64 [there], x0;
        """
        out.append(
            Form(f"ld.global.{t} to 64 bits", _REGISTERS + code, data, data.astype(np.int64 if t[0] == "s" else np.uint64))
        )
    data = bits("narrow store", THREADS, np.uint32)
    code = """
    mad.wide.u32 here, thread, 4, source; add.u64 there, target, 0; cvt.u64.u32 x0, thread; add.u64 there, there, x0;
    ld.global.b32 w0, [here]; st.global.b8 [there], w0;
    """
    out.append(Form("st.global.b8 of a 32-bit register", _REGISTERS + code, data, data.astype(np.uint8)))
    code = """
    .local .align 8 .b8 own[64]; mov.u64 x1, own; ld.global.v2.b32 {w0, w1}, [here];
    st.local.b32 [own+8], w0; st.local.b32 [own+12], w1; ld.local.b64 x0, [own+8];
    cvta.local.u64 x2, x1; st.b64 [x2+16], x0; ld.b64 x3, [x2+16]; st.global.b64 [there], x3;
    """
    out.append(_moved("st.local, ld.local", 8, code))
    return out


def _fill_shared(data_bytes: int) -> str:
    """Copy the source to shared memory, 16 bytes per thread and turn."""
    return f"""
    mov.u32 w30, thread;
    FILL: setp.ge.u32 p0, w30, {data_bytes // 16}; @p0 bra FILLED;
    mad.wide.u32 here, w30, 16, source; mad.lo.u32 at, w30, 16, smem; ld.global.v4.b32 {{w31, w32, w33, w34}}, [here];
    st.shared.v4.b32 [at], {{w31, w32, w33, w34}}; add.u32 w30, w30, {THREADS}; bra FILL;
    FILLED: bar.sync 0;
    """


def _rows(label: str, lines: int) -> tuple[np.ndarray, np.ndarray]:
    """64 rows of 16 bytes, and which row each of `lines` addresses of every warp names."""
    return bits(label, 64 * 16, np.uint8), np.stack([(np.arange(lines) * 5 + 11 * w) % 64 for w in range(4)])


def fragments() -> list[Form]:
    out = []
    for count in (1, 2, 4):
        for transpose in (False, True):
            label = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transpose else ''}.shared.b16"
            data, chosen = _rows(label, 32)
            words = data.view(np.uint16).reshape(64, 8)
            expected = np.zeros((THREADS, count), np.uint32)
            for warp in range(4):
                for k in range(count):
                    matrix = words[chosen[warp, 8 * k : 8 * k + 8]]
                    matrix = matrix.T if transpose else matrix
                    flat = np.ascontiguousarray(matrix).view(np.uint32).reshape(-1)  # thread t: row t / 4, columns 2 (t % 4)
                    expected[32 * warp : 32 * warp + 32, k] = flat
            names = _names("w", count)
            code = f"""
            and.b32 w20, thread, 31; shr.u32 w21, thread, 5; mul.lo.u32 w20, w20, 5; mad.lo.u32 w20, w21, 11, w20;
            and.b32 w20, w20, 63; mad.lo.u32 bt, w20, 16, smem;
            {label} {{{names.strip("{}")}}}, [bt];
            mad.wide.u32 there, thread, {4 * count}, target; st.global.{f"v{count}." if count > 1 else ""}b32 [there], {names};
            """
            out.append(Form(label, _REGISTERS + _fill_shared(1024) + code, data, expected))
            out.append(_stored(count, transpose))
    a = bits("movmatrix", THREADS, np.uint32)
    turned = np.ascontiguousarray(a.view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1)).view(np.uint32).reshape(-1)
    code = """
    mad.wide.u32 here, thread, 4, source; mad.wide.u32 there, thread, 4, target; ld.global.b32 w0, [here];
    movmatrix.sync.aligned.m8n8.trans.b16 w1, w0; st.global.b32 [there], w1;
    """
    out.append(Form("movmatrix.sync.aligned.m8n8.trans.b16", _REGISTERS + code, a, turned))
    return out


def _stored(count: int, transpose: bool) -> Form:
    label = f"stmatrix.sync.aligned.m8n8.x{count}{'.trans' if transpose else ''}.shared.b16"
    a = bits(label, THREADS * count, np.uint32).reshape(THREADS, count)
    expected = np.zeros((4, 32, 8), np.uint16)
    order = (np.arange(32) * 7 + 3) % 32  # the row of a warp's block that each lane's address names
    for warp in range(4):
        for k in range(count):
            flat = np.ascontiguousarray(a[32 * warp : 32 * warp + 32, k]).view(np.uint16).reshape(8, 8)
            expected[warp, order[8 * k : 8 * k + 8]] = flat.T if transpose else flat
    names = _names("w", count)
    code = f"""
    mad.lo.u32 at, thread, 16, smem; mov.b32 w30, 0; st.shared.v4.b32 [at], {{w30, w30, w30, w30}}; bar.sync 0;
    mad.wide.u32 here, thread, {4 * count}, source; ld.global.{f"v{count}." if count > 1 else ""}b32 {names}, [here];
    and.b32 w20, thread, 31; mad.lo.u32 w20, w20, 7, 3; and.b32 w20, w20, 31; and.b32 w21, thread, 96; add.u32 w20, w20, w21;
    mad.lo.u32 bt, w20, 16, smem; {label} [bt], {{{names.strip("{}")}}}; bar.sync 0;
    ld.shared.v4.b32 {{w0, w1, w2, w3}}, [at]; mad.wide.u32 there, thread, 16, target;
    st.global.v4.b32 [there], {{w0, w1, w2, w3}};
    """
    return Form(label, _REGISTERS + code, a, expected)


def asynchronous() -> list[Form]:
    """cp.async with its groups, zero fill and mbarrier arrival."""
    out = []
    finish = "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
    for kind, size in (("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)):
        t, names = {4: ("b32", "w0"), 8: ("b64", "x0"), 16: ("v2.b64", "{x0, x1}")}[size]
        label = f"cp.async.{kind}.shared.global {size}"
        read = f"ld.shared.{t} {names}, [at]; st.global.{t} [there], {names};"
        out.append(_moved(label, size, f"cp.async.{kind}.shared.global [at], [here], {size}; {finish} {read}"))
        hinted = f"cp.async.{kind}.shared.global.L2::128B [at], [here], {size}; cp.async.wait_all; bar.sync 0;"
        out.append(_moved(f"{label} L2::128B, wait_all", size, f"{hinted} {read}"))
        data = bits(label, THREADS * size, np.uint8).reshape(THREADS, size)
        part = np.arange(THREADS)[:, None] % (size + 1)
        expected = np.where(np.arange(size)[None, :] < part, data, 0).astype(np.uint8)
        code = f"""
        mad.wide.u32 here, thread, {size}, source; mad.wide.u32 there, thread, {size}, target;
        mad.lo.u32 at, thread, {size}, smem;
        rem.u32 w8, thread, {size + 1}; cp.async.{kind}.shared.global [at], [here], {size}, w8; {finish} {read}
        """
        out.append(Form(f"{label} with a source size", _REGISTERS + code, data, expected))
        code = f"""
        mad.wide.u32 here, thread, {size}, source; mad.wide.u32 there, thread, {size}, target;
        mad.lo.u32 at, thread, {size}, smem;
        and.b32 w8, thread, 1; setp.eq.u32 p1, w8, 1; cp.async.{kind}.shared.global [at], [here], {size}, p1; {finish} {read}
        """
        ignored = np.where(np.arange(THREADS)[:, None] % 2 == 1, 0, data).astype(np.uint8)
        out.append(Form(f"{label} ignoring the source", _REGISTERS + code, data, ignored))
    code = """
    setp.eq.u32 p0, thread, 0; @p0 mbarrier.init.shared.b64 [smem], 128; bar.sync 0; add.u32 at, at, 64;
    cp.async.ca.shared.global [at], [here], 4; cp.async.mbarrier.arrive.noinc.shared.b64 [smem];
    WAIT: mbarrier.try_wait.parity.shared.b64 p1, [smem], 0; @!p1 bra WAIT;
    ld.shared.b32 w0, [at]; st.global.b32 [there], w0;
    """
    out.append(_moved("cp.async.mbarrier.arrive.noinc", 4, code))
    plain = (
        code.replace("], 128;", "], 128;")
        .replace(".noinc", "")
        .replace(
            "cp.async.mbarrier.arrive.shared.b64 [smem];",
            "cp.async.mbarrier.arrive.shared.b64 [smem]; mbarrier.arrive.shared.b64 _, [smem];",
        )
    )
    out.append(_moved("cp.async.mbarrier.arrive", 4, plain))
    code = """
    cp.async.ca.shared.global [at], [here], 4; cp.async.commit_group; add.u32 bt, at, 512;
    cp.async.ca.shared.global [bt], [here], 4; cp.async.commit_group; cp.async.wait_group 1;
    ld.shared.b32 w0, [at]; cp.async.wait_group 0; ld.shared.b32 w1, [bt]; and.b32 w0, w0, w1; st.global.b32 [there], w0;
    """
    out.append(_moved("cp.async.wait_group 1", 4, code))
    return out


def blackwell() -> list[Form]:
    """sm_100a: 256-bit global accesses, ldmatrix and stmatrix of bytes."""
    out = []
    for form, names in (("v8.b32", _names("w", 8)), ("v4.b64", _names("x", 4))):
        out.append(
            _moved(
                f"ld.global.{form}, st.global.{form}",
                32,
                f"ld.global.{form} {names}, [here]; st.global.{form} [there], {names};",
            )
        )
    return out


@cache
def groups() -> tuple[Group, ...]:
    families = (vectors, hints, widening, fragments, asynchronous)
    made = [Group(f"memory {f.__name__}", tuple(f()), threads=THREADS, shared=4096) for f in families]
    return (*made, Group("memory sm_100a", tuple(blackwell()), threads=THREADS, shared=4096, arch="sm_100a"))
