"""Bulk and tensor copies (TMA): ranks, edges, swizzles, element types, reductions, multicast, `tensormap.replace`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from dsv4lab.sim.descriptor import TensorMap
from tests.sim.conformance.case import ANY_NAN, EXACT, Bound, Form, Group
from tests.sim.conformance.sync import wait
from tests.sim.conformance.values import arithmetic, bits, convert, floats

THREADS = 128
AT = 1024  # where a form's tensor begins in its source, after the descriptor, and its box in shared memory
_REGISTERS = """.reg .b32 w<24>; .reg .b64 x<16>; .reg .pred p<8>; .reg .b64 here, there; .reg .b32 at, box, far;
setp.eq.u32 p0, thread, 0; add.u32 box, smem, 1024;
"""
_BARRIER = "@p0 mbarrier.init.shared.b64 [smem], 1; fence.mbarrier_init.release.cluster; fence.proxy.async; bar.sync 0;\n"
_SIZES = dict(u8=1, u16=2, u32=4, s32=4, u64=8, s64=8, f16=2, bf16=2, f32=4, f64=8, f32_ftz=4, tf32=4, tf32_ftz=4)


def _copy(size: int, label: str, source: str, target: str, load: str, store: str) -> str:
    """All threads move `size` bytes, 4 at a time; addresses are registers of the spaces' widths."""
    wide = {"global": "b64", "shared": "b32"}
    one, other = wide[load], wide[store]
    step = {"b64": "mad.wide.u32", "b32": "mad.lo.u32"}
    return f"""
    {{ .reg .{one} from; .reg .{other} to; mov.u32 w20, thread;
    {label}: setp.ge.u32 p6, w20, {size // 4}; @p6 bra {label}END;
    {step[one]} from, w20, 4, {source}; {step[other]} to, w20, 4, {target}; ld.{load}.b32 w21, [from]; st.{store}.b32 [to], w21;
    add.u32 w20, w20, {THREADS}; bra {label}; {label}END: }}
    """


@dataclass(frozen=True)
class Tile:
    """A tensor (extents innermost first) and a box of it; the first coordinate must name a multiple of 16 bytes."""

    element: str
    extents: tuple[int, ...]
    box: tuple[int, ...]
    at: tuple[int, ...]
    swizzle: str = "none"
    pad: int = 0  # elements added to each row
    nan_fill: bool = False

    @property
    def size(self) -> int:
        return _SIZES[self.element]

    @property
    def pitches(self) -> list[int]:
        """Elements from one index of a dimension to the next."""
        out = [1, -(-(self.extents[0] + self.pad) * self.size // 16) * 16 // self.size]
        for extent in self.extents[1:]:
            out.append(out[-1] * extent)
        return out

    @property
    def count(self) -> int:
        return self.pitches[len(self.extents)] if len(self.extents) > 1 else self.pitches[1]

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * self.size

    def descriptor(self, address: int) -> np.ndarray:
        strides = tuple(p * self.size for p in self.pitches[1 : len(self.extents)])
        base = self.element.replace("tf32", "f32")
        encoded = bytearray(
            TensorMap(address, base, self.extents, strides, self.box, self.swizzle, nan_fill=self.nan_fill).encode()
        )
        if base != self.element:  # the driver writes tf32 as float32 with this bit
            encoded[10] |= 1
        return np.frombuffer(bytes(encoded), np.uint8)

    def places(self, written: bool = False) -> np.ndarray:
        """Element index in the tensor of each element of the box, in its order; -1 outside.

        written: by a store, which writes rows up to a multiple of 16 bytes.
        """
        index = np.zeros(self.box[::-1], np.int64)
        inside = np.ones(self.box[::-1], bool)
        for k, (extent, width, start, pitch) in enumerate(zip(self.extents, self.box, self.at, self.pitches, strict=False)):
            axis = len(self.box) - 1 - k
            if k == 0 and written:
                extent = -(-extent * self.size // 16) * 16 // self.size
            place = (start + np.arange(width)).reshape([-1 if a == axis else 1 for a in range(len(self.box))])
            index = index + place * pitch
            inside = inside & (place >= 0) & (place < extent)
        return np.where(inside, index, -1).reshape(-1)

    def __str__(self) -> str:
        words = [f"{self.element} {'x'.join(map(str, self.extents))} box {'x'.join(map(str, self.box))} at {list(self.at)}"]
        words += [f"swizzle {self.swizzle}"] if self.swizzle != "none" else []
        words += ["NaN fill"] if self.nan_fill else []
        return ", ".join(words)


def swizzled(size: int, mode: str) -> np.ndarray:
    """Where byte i of a box lies: 16-byte chunks of a row are exchanged by the number of the 128-byte line."""
    offset = np.arange(size)
    line, chunk = offset // 128, offset // 16 % 8
    if mode == "128B":
        chunk = chunk ^ (line % 8)
    elif mode == "64B":
        chunk = chunk ^ (line % 4)
    elif mode == "32B":
        chunk = chunk ^ (line % 2)
    return line * 128 + chunk * 16 + offset % 16


_FILL = {"f16": 0x7FF7, "bf16": 0x7FF7, "f32": 0x7FF77FF7}  # as the H200 shows


def load(tile: Tile, expected: np.ndarray | None = None, *, more: str = "", data: np.ndarray | None = None) -> Form:
    """One box into shared memory, then all of it to the target."""
    label = f"cp.async.bulk.tensor.{len(tile.box)}d load, {tile}{more}"
    kind = np.dtype(f"u{tile.size}")
    data = bits(label, tile.count, kind.type) if data is None else data
    where = tile.places()
    fill = _FILL[tile.element] if tile.nan_fill else 0
    box = np.where(where >= 0, data[where], kind.type(fill)) if expected is None else expected
    result = np.zeros(tile.box_bytes, np.uint8)
    result[swizzled(tile.box_bytes, tile.swizzle)] = np.ascontiguousarray(box).view(np.uint8)

    def source(address: int, _: int) -> np.ndarray:
        return np.concatenate([tile.descriptor(address + AT), np.zeros(AT - 128, np.uint8), data.view(np.uint8)])

    names = ", ".join(f"w{k}" for k in range(len(tile.at)))
    hint = ".L2::cache_hint" if more else ""
    policy = ", x0" if more else ""
    code = "".join(f"mov.b32 w{k}, {c};" for k, c in enumerate(tile.at))
    code += "createpolicy.fractional.L2::evict_first.b64 x0, 0f3F800000;\n" if more else ""
    code += f"""
    @p0 mbarrier.arrive.expect_tx.shared.b64 _, [smem], {tile.box_bytes};
    @p0 cp.async.bulk.tensor.{len(tile.at)}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{hint}
        [box], [source, {{{names}}}], [smem]{policy};
    """
    finish = wait("smem", 0) + _copy(tile.box_bytes, "OUT", "box", "target", "shared", "global")
    return Form(label, _REGISTERS + _BARRIER + code + finish, source, result)


def store(tile: Tile, reduction: str = "", bound: Bound = EXACT) -> Form:
    """Shared memory to one box of the target, plain or reduced."""
    name = f"cp.reduce.async.bulk.tensor {reduction}" if reduction else "cp.async.bulk.tensor"
    label = f"{name}.{len(tile.box)}d store, {tile}"
    kind = np.dtype(f"u{tile.size}")
    count = int(np.prod(tile.box))
    if tile.element in ("f16", "bf16", "f32") and reduction:
        # No NaN and no subnormal numbers: what a reduction makes of them is another form's subject.
        box, before = (
            _ordinary(floats(label + k, tile.element, n), tile.element) for k, n in (("/box", count), ("/old", tile.count))
        )
    else:
        box, before = bits(label + "/box", count, kind.type), bits(label + "/old", tile.count, kind.type)
        before = np.where(np.arange(len(before)) % 5 == 0, before % kind.type(3), before)
    where = tile.places(written=True)
    inside = where >= 0
    after = before.copy()
    new = box[inside]
    after[where[inside]] = _reduced(reduction, tile.element, before[where[inside]], new) if reduction else new
    arranged = np.zeros(tile.box_bytes, np.uint8)
    arranged[swizzled(tile.box_bytes, tile.swizzle)] = np.ascontiguousarray(box).view(np.uint8)

    def source(_: int, address: int) -> np.ndarray:
        return np.concatenate([tile.descriptor(address), np.zeros(AT - 128, np.uint8), arranged])

    names = ", ".join(f"w{k}" for k in range(len(tile.at)))
    code = "".join(f"mov.b32 w{k}, {c};" for k, c in enumerate(tile.at))
    opcode = (
        f"cp.reduce.async.bulk.tensor.{len(tile.at)}d.global.shared::cta.{reduction}"
        if reduction
        else f"cp.async.bulk.tensor.{len(tile.at)}d.global.shared::cta"
    )
    code += f"add.s64 here, source, {AT};" + _copy(tile.box_bytes, "IN", "here", "box", "global", "shared")
    code += f"""
    fence.proxy.async.shared::cta; bar.sync 0; @p0 {opcode}.tile.bulk_group [source, {{{names}}}], [box];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    """
    # Numbers of a type of their own, so that a NaN's payload can be left out of the comparison.
    own = {"f16": np.float16, "f32": np.float32}.get(tile.element, kind.type)
    element = "bf16" if tile.element == "bf16" else ""
    return Form(label, _REGISTERS + code, source, after.view(own), before.view(own), bound, element)


def _ordinary(codes: np.ndarray, t: str) -> np.ndarray:
    exponent = {"f16": 0x7C00, "bf16": 0x7F80, "f32": 0x7F800000}[t]
    one = {"f16": 0x3C00, "bf16": 0x3F80, "f32": 0x3F800000}[t]
    field = codes & codes.dtype.type(exponent)
    odd = (field == exponent) | (field <= (exponent >> 1) - (exponent >> 2)) | (field > (exponent >> 1) + (exponent >> 2))
    kind = codes.dtype.type
    rest = (1 << (8 * codes.itemsize)) - 1 ^ exponent  # sign and mantissa
    return np.where(odd, (codes & kind(rest)) | kind(one), codes)


def _reduced(name: str, element: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    if element in ("f16", "bf16", "f32"):
        if name == "add":
            return arithmetic("add", element, "rn", False, False, old, new)
        top = old.dtype.type(1 << (8 * old.itemsize - 1))
        order = [np.where(v & top, -(v & ~top).astype(np.int64), (v & ~top).astype(np.int64)) for v in (old, new)]
        return np.where((order[0] <= order[1]) == (name == "min"), old, new)
    signed = old.view(f"i{old.itemsize}") if element[0] == "s" else old
    other = new.view(signed.dtype)
    if name == "inc":
        return np.where(old >= new, 0, old + old.dtype.type(1)).astype(old.dtype)
    if name == "dec":
        return np.where((old == 0) | (old > new), new, old - old.dtype.type(1)).astype(old.dtype)
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]
    return function(signed, other).view(old.dtype)


_EDGES = (
    Tile("u16", (72,), (64,), (0,)),
    Tile("u16", (72,), (64,), (40,)),
    Tile("u16", (72,), (64,), (-24,)),
    Tile("u32", (20, 11), (8, 4), (4, 3)),
    Tile("u32", (20, 11), (8, 4), (16, 9)),
    Tile("u32", (20, 11), (8, 4), (-4, -2)),
    Tile("u32", (20, 11), (8, 4), (20, 0)),
    Tile("u32", (17, 11), (8, 4), (12, -4), pad=3),
    Tile("f16", (24, 5, 7), (16, 3, 2), (16, 3, -1)),
    Tile("f16", (24, 5, 7), (16, 3, 2), (-8, -1, 6)),
    Tile("u8", (48, 5, 3, 4), (32, 2, 2, 3), (32, 4, -1, 2)),
    Tile("u8", (48, 5, 3, 4), (32, 2, 2, 3), (-16, 1, 2, -2)),
    Tile("u32", (12, 3, 4, 2, 3), (8, 2, 2, 2, 2), (8, -1, 3, 1, 2)),
    Tile("u32", (12, 3, 4, 2, 3), (8, 2, 2, 2, 2), (-4, 2, -1, -1, 0)),
)


def edges() -> list[Form]:
    out = [load(tile) for tile in _EDGES] + [store(tile) for tile in _EDGES if min(tile.at) >= 0]
    out.append(load(Tile("u32", (20, 11), (8, 4), (4, 5)), more=", L2::cache_hint"))
    out += [load(Tile(t, (24, 9), (16, 8), (16, 4), nan_fill=True)) for t in ("f16", "bf16", "f32")]
    return out


def swizzles() -> list[Form]:
    out = []
    for mode, width in (("none", 16), ("32B", 16), ("64B", 32), ("128B", 64)):
        for rows, at in ((32, (0, 0)), (32, (8, 5)), (13, (-8, -3))):
            tile = Tile("f16", (80, 40), (width, rows), at, mode)
            out += [load(tile), store(tile)] if min(at) >= 0 else [load(tile)]
    out += [load(Tile("u8", (200, 20), (128, 16), (96, 2), "128B")), load(Tile("f32", (40, 20), (32, 16), (12, 2), "128B"))]
    out += [
        load(Tile("u16", (64, 9, 3), (64, 4, 2), (0, 7, 1), "128B")),
        store(Tile("u16", (64, 9, 3), (64, 4, 2), (0, 7, 1), "128B")),
    ]
    return out


def _converted(element: str, data: np.ndarray) -> np.ndarray:
    """What a load makes of float32 words of other types, as the H200 shows: f32_ftz flushes nothing."""
    if element == "tf32_ftz":
        data = np.where((data & 0x7F800000) == 0, data & 0x80000000, data).astype(np.uint32)
    if not element.startswith("tf32"):
        return data
    return np.array(convert(data.tolist(), "f32", "tf32"), np.uint32) << np.uint32(13)


def elements() -> list[Form]:
    out = []
    for element in ("u8", "u16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64"):
        width = max(16 // _SIZES[element], 2) * 2
        tile = Tile(element, (width + 8, 7), (width, 5), (max(16 // _SIZES[element], 2), 3))
        out += [load(tile), store(tile)]
    for element in ("f32_ftz", "tf32", "tf32_ftz"):
        tile = Tile(element, (24, 9), (16, 8), (4, 1))
        data = floats(f"tma {element}", "f32", tile.count)
        out.append(load(tile, _converted(element, data)[tile.places()], data=data))
    return out


def reductions() -> list[Form]:
    out = []
    for element, names in (
        ("u32", ("add", "min", "max", "inc", "dec", "and", "or", "xor")),
        ("s32", ("add", "min", "max")),
        ("u64", ("add", "min", "max", "and", "or", "xor")),
        ("s64", ("min", "max")),
        ("f16", ("add", "min", "max")),
        ("bf16", ("add", "min", "max")),
        ("f32", ("add",)),
    ):
        width = max(16 // _SIZES[element], 2)
        for name in names:
            out.append(
                store(Tile(element, (width + 4, 6), (width, 4), (width, 3)), name, ANY_NAN if element[0] in "fb" else EXACT)
            )
    out.append(store(Tile("u32", (12, 3, 4, 2, 3), (8, 2, 2, 2, 2), (8, 2, 3, 1, 0)), "add"))
    out.append(store(Tile("f16", (80, 40), (64, 8), (32, 35), "128B"), "add", ANY_NAN))
    return out


def runs() -> list[Form]:
    """cp.async.bulk without a tensor: loads, stores, reductions, the read form of the wait, prefetches."""
    out = []
    for size in (16, 240, 4096):
        data = bits(f"bulk {size}", size, np.uint8)
        code = f"""
        @p0 mbarrier.arrive.expect_tx.shared.b64 _, [smem], {size};
        @p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [box], [source], {size}, [smem];
        """
        text = _REGISTERS + _BARRIER + code + wait("smem", 0) + _copy(size, "OUT", "box", "target", "shared", "global")
        out.append(Form(f"cp.async.bulk.shared::cluster.global {size}", text, data, data))
        code = (
            _copy(size, "IN", "source", "box", "global", "shared")
            + f"""
        fence.proxy.async.shared::cta; bar.sync 0; @p0 cp.async.bulk.global.shared::cta.bulk_group [target], [box], {size};
        cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; cp.async.bulk.wait_group 0;
        """
        )
        out.append(Form(f"cp.async.bulk.global.shared::cta {size}", _REGISTERS + code, data, data))
    data = bits("bulk prefetch", 256, np.uint8)
    code = """
    @p0 cp.async.bulk.prefetch.L2.global [source], 256; @p0 mbarrier.arrive.expect_tx.shared.b64 _, [smem], 256;
    @p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [box], [source], 256, [smem];
    """
    text = _REGISTERS + _BARRIER + code + wait("smem", 0) + _copy(256, "OUT", "box", "target", "shared", "global")
    out.append(Form("cp.async.bulk.prefetch.L2", text, data, data))
    for element, names in (
        ("u32", ("add", "min", "max", "inc", "dec")),
        ("s32", ("add", "min", "max")),
        ("u64", ("add", "min", "max")),
        ("s64", ("min", "max")),
        ("b32", ("and", "or", "xor")),
        ("b64", ("and", "or", "xor")),
        ("f16", ("add", "min", "max")),
        ("bf16", ("add", "min", "max")),
        ("f32", ("add",)),
        ("f64", ("add",)),
    ):
        out += [_reduce(name, element) for name in names]
    return out


def _reduce(name: str, element: str) -> Form:
    size = {"b32": 4, "b64": 8}.get(element) or _SIZES[element]
    count = 512 // size
    noftz = "noftz." if element in ("f16", "bf16") and name == "add" else ""
    opcode = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{name}.{noftz}{element}"
    kind = np.dtype(f"u{size}").type
    if element in ("f16", "bf16", "f32"):
        old, new = (_ordinary(floats(opcode + k, element, count), element) for k in "ab")
    elif element == "f64":
        old, new = ((bits(opcode + k, count, np.uint64) >> np.uint64(12)) | np.uint64(0x3FF0000000000000) for k in "ab")
    else:
        old, new = bits(opcode + "a", count, kind), bits(opcode + "b", count, kind)
        old = np.where(np.arange(count) % 4 == 0, new % kind(5), old)
    if element == "f64":
        result = (old.view(np.float64) + new.view(np.float64)).view(np.uint64)
    else:
        result = _reduced(name, element, old, new)
    code = (
        _copy(512, "IN", "source", "box", "global", "shared")
        + f"""
    fence.proxy.async.shared::cta; bar.sync 0; @p0 {opcode} [target], [box], 512;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    """
    )
    return Form(opcode, _REGISTERS + code, new, result, old)


def _pair(label: str, code: str, source, expected: np.ndarray) -> Form:  # type: ignore[no-untyped-def]
    start = """
    xor.b32 w23, rank, 1; @p0 mbarrier.init.shared.b64 [smem], 1; fence.mbarrier_init.release.cluster; fence.proxy.async;
    barrier.cluster.arrive; barrier.cluster.wait; mapa.shared::cluster.u32 far, smem, w23;
    """
    return Form(label, _REGISTERS + start + code + "barrier.cluster.arrive; barrier.cluster.wait;", source, expected)


def clusters() -> list[Form]:
    """Multicast loads; copies and reductions from one CTA's shared memory to the other's. Rank 1's words follow rank 0's."""
    out = []
    finish = (
        wait("smem", 0) + "mad.wide.u32 there, rank, 1024, target;" + _copy(1024, "OUT", "box", "there", "shared", "global")
    )
    data = bits("multicast", 1024, np.uint8)
    both = np.concatenate([data, data])
    expect = "@p0 mbarrier.arrive.expect_tx.shared.b64 _, [smem], 1024;\n"
    code = (
        expect
        + """
    mov.b16 mask, 3; setp.eq.u32 p1, rank, 0; and.pred p1, p1, p0; barrier.cluster.arrive; barrier.cluster.wait;
    @p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [box], [source], 1024, [smem], mask;
    """
    )
    out.append(_pair("cp.async.bulk multicast", ".reg .b16 mask;" + code + finish, data, both))
    tile = Tile("f16", (72, 16), (64, 8), (24, 10), "128B")
    form = load(tile)
    words = form.source
    code = (
        expect
        + f"""
    mov.b16 mask, 3; setp.eq.u32 p1, rank, 1; and.pred p1, p1, p0; mov.b32 w0, {tile.at[0]}; mov.b32 w1, {tile.at[1]};
    barrier.cluster.arrive; barrier.cluster.wait;
    @p1 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
        [box], [source, {{w0, w1}}], [smem], mask;
    """
    )
    out.append(
        _pair(
            "cp.async.bulk.tensor.2d multicast", ".reg .b16 mask;" + code + finish, words, np.concatenate([form.expected] * 2)
        )
    )
    # Each CTA loads its half of the rows for both.
    code = (
        expect
        + f"""
    mov.b16 mask, 3; mov.b32 w0, {tile.at[0]}; mad.lo.u32 w1, rank, 4, {tile.at[1]}; mad.lo.u32 w2, rank, 512, box;
    barrier.cluster.arrive; barrier.cluster.wait;
    @p0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
        [w2], [source, {{w0, w1}}], [smem], mask;
    """
    )
    half = Tile("f16", (72, 16), (64, 4), (24, 10), "128B")
    grid = bits("multicast halves", half.count, np.uint16)
    whole = Tile("f16", (72, 16), (64, 8), (24, 10), "128B")
    where = whole.places()
    block = np.zeros(1024, np.uint8)
    block[swizzled(1024, "128B")] = np.where(where >= 0, grid[where], 0).astype(np.uint16).view(np.uint8)

    def source(address: int, _: int) -> np.ndarray:
        return np.concatenate([half.descriptor(address + AT), np.zeros(AT - 128, np.uint8), grid.view(np.uint8)])

    out.append(
        _pair(
            "cp.async.bulk.tensor.2d multicast by both CTAs",
            ".reg .b16 mask;" + code + finish,
            source,
            np.concatenate([block] * 2),
        )
    )
    data = bits("to the other CTA", 2048, np.uint8)
    swapped = np.concatenate([data[1024:], data[:1024]])
    move = "mad.wide.u32 here, rank, 1024, source;" + _copy(1024, "IN", "here", "box", "global", "shared")
    code = (
        expect
        + move
        + """
    fence.proxy.async.shared::cta; barrier.cluster.arrive; barrier.cluster.wait; add.u32 w3, far, 4096;
    @p0 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [w3], [box], 1024, [far];
    """
    )
    there = finish.replace("box", "other")
    out.append(
        _pair(
            "cp.async.bulk.shared::cluster.shared::cta",
            ".reg .b32 other; add.u32 other, smem, 4096;" + code + there,
            data,
            swapped,
        )
    )
    values = bits("reduce into the other CTA", 512, np.uint32)
    base = (np.arange(256) * 99).astype(np.uint32)
    other = np.concatenate([values[256:], values[:256]])
    for name, function in (("add.u32", np.add), ("min.u32", np.minimum), ("max.s32", np.maximum), ("xor.b32", np.bitwise_xor)):
        fill = "mul.lo.u32 w4, thread, 99; add.u32 w5, w4, 12672; mad.lo.u32 w6, thread, 4, other; st.shared.b32 [w6], w4;"
        fill += "st.shared.b32 [w6+512], w5;"
        code = f"""
        .reg .b32 other; add.u32 other, smem, 4096; {fill} {expect} {move}
        fence.proxy.async.shared::cta; barrier.cluster.arrive; barrier.cluster.wait; add.u32 w3, far, 4096;
        @p0 cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.{name} [w3], [box], 1024, [far];
        """
        first = np.tile(base, 2)
        result = (
            function(first.view(np.int32), other.view(np.int32)).view(np.uint32) if ".s32" in name else function(first, other)
        )
        out.append(_pair(f"cp.reduce.async.bulk.shared::cluster.{name}", code + there, values, result))
    return out


def replaced() -> list[Form]:
    """tensormap.replace on a copy in shared memory, written back to global memory by cp_fenceproxy."""
    out = []
    before = Tile("u32", (20, 11), (8, 4), (4, 3))
    for label, after, change in (
        ("global_dim", Tile("u32", (9, 11), (8, 4), (4, 3), pad=11), "global_dim.shared::cta.b1024.b32 [box], 0, 9"),
        ("box_dim", Tile("u32", (20, 11), (8, 2), (4, 3)), "box_dim.shared::cta.b1024.b32 [box], 1, 2"),
        ("swizzle_mode", Tile("u32", (20, 11), (8, 4), (4, 3), "32B"), "swizzle_mode.shared::cta.b1024.b32 [box], 1"),
        ("elemtype", Tile("f32", (20, 11), (8, 4), (16, 8)), "elemtype.shared::cta.b1024.b32 [box], 7"),
        (
            "fill_mode",
            Tile("f32", (20, 11), (8, 4), (16, 8), nan_fill=True),
            "elemtype.shared::cta.b1024.b32 [box], 7; tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [box], 1",
        ),
        (
            "global_stride",
            Tile("u32", (20, 9), (8, 4), (4, 3), pad=4),
            "global_stride.shared::cta.b1024.b64 [box], 0, x1; "
            "tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [box], 1, 9",
        ),
        ("global_address", before, "global_address.shared::cta.b1024.b64 [box], x2"),
    ):  # fmt: skip
        data = bits(f"replace {label}", max(after.count, before.count) + 64, np.uint32)
        shift = 32 if label == "global_address" else 0
        where = after.places()
        box = np.where(where >= 0, data[where + shift], _FILL["f32"] if after.nan_fill else 0).astype(np.uint32)
        result = np.zeros(after.box_bytes, np.uint8)
        result[swizzled(after.box_bytes, after.swizzle)] = box.view(np.uint8)

        def source(address: int, _: int, data: np.ndarray = data) -> np.ndarray:
            return np.concatenate([before.descriptor(address + AT), np.zeros(AT - 128, np.uint8), data.view(np.uint8)])

        code = (
            _copy(128, "IN", "source", "box", "global", "shared")
            + f"""
        bar.sync 0; mov.b64 x1, {after.pitches[1] * 4}; add.s64 x2, source, {AT + 4 * shift}; add.s64 x3, source, 128;
        setp.ge.u32 p1, thread, 32; @p1 bra CHANGED; @p0 tensormap.replace.tile.{change}; bar.warp.sync -1;
        tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [x3], [box], 128;
        fence.proxy.tensormap::generic.acquire.gpu [x3], 128;
        CHANGED: bar.sync 0; mov.b32 w0, {after.at[0]}; mov.b32 w1, {after.at[1]};
        @p0 mbarrier.arrive.expect_tx.shared.b64 _, [smem], {after.box_bytes};
        @p0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [box], [x3, {{w0, w1}}], [smem];
        """
        )
        code = code.replace("; tensormap.replace", "; @p0 tensormap.replace")
        finish = wait("smem", 0) + _copy(after.box_bytes, "OUT", "box", "target", "shared", "global")
        out.append(Form(f"tensormap.replace.tile.{label}", _REGISTERS + _BARRIER + code + finish, source, result))
    return out


@cache
def groups() -> tuple[Group, ...]:
    families = (edges, swizzles, elements, reductions, runs, replaced)
    made = [Group(f"bulk {f.__name__}", tuple(f()), threads=THREADS, shared=8192) for f in families]
    return (*made, Group("bulk clusters", tuple(clusters()), threads=THREADS, shared=8192, cluster=2))
