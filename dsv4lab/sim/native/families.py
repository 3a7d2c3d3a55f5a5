"""How each instruction family becomes a record of the C code: the forms that it has, operand by operand."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4lab.sim.decode import ORDER, TYPE_BYTES, Decoder, Form
from dsv4lab.sim.errors import UnknownInstruction
from dsv4lab.sim.memory import SHARED_WINDOW
from dsv4lab.sim.native.bytecode import FENCE, MEMORY, Code, family
from dsv4lab.sim.program import Address, Instruction, Operand, Register, Symbol, Vector
from dsv4lab.sim.startup import TIMERS


def _bits(type_name: str) -> int:
    return 8 * TYPE_BYTES[type_name]


def _plain(type_name: str) -> bool:
    return type_name[0] in "bus" and type_name[1:] in ("16", "32", "64")


def _kind(type_name: str) -> str:
    return "s" if type_name[0] == "s" else "u"


def _same(d: Decoder, type_name: str, *slots: int) -> bool:
    """Whether registers have just the type's size; handlers let some narrower types pass."""
    return all(d.width(slot) == TYPE_BYTES[type_name] for slot in slots)


def _operands(d: Decoder, i: Instruction, type_name: str, count: int) -> list[int]:
    slots = [d.register(i.operands[0]), *(d.source(o, type_name) for o in i.operands[1 : 1 + count])]
    if not _same(d, type_name, *slots):
        raise UnknownInstruction("registers of another size")
    return slots


# integers


@family("and", "or", "xor", "not")
def _logic(d: Decoder, i: Instruction, f: Form) -> Code | None:
    t = f.type()
    slots = _operands(d, i, t, 1 if f.family == "not" else 2)
    if t != "pred" and not _plain(t):
        return None
    return Code(f"{f.family}.{'p' if t == 'pred' else _bits(t)}", *slots)


@family("cnot")
def _cnot(d: Decoder, i: Instruction, f: Form) -> Code | None:
    t = f.type()
    return Code(f"cnot.{_bits(t)}", *_operands(d, i, t, 1))


@family("shl", "shr")
def _shift(d: Decoder, i: Instruction, f: Form) -> Code | None:
    t = f.type()
    target, a, b = d.register(i.operands[0]), d.source(i.operands[1], t), d.source(i.operands[2], "b32")
    name = "shl" if f.family == "shl" else f"{_kind(t)}shr"
    return Code(f"{name}.{_bits(t)}", target, a, b) if _plain(t) and _same(d, t, target, a) else None


@family("shf")
def _funnel(d: Decoder, i: Instruction, f: Form) -> Code | None:
    direction, mode = f.take("l", "r"), f.take("clamp", "wrap")
    return Code(f"shf.{direction}.{mode}", *_operands(d, i, f.type(), 3))


@family("lop3")
def _lop3(d: Decoder, i: Instruction, f: Form) -> Code | None:
    t = f.type()
    slots = _operands(d, i, t, 3)
    return Code("lop3", *slots, k=d.constants[d.source(i.operands[4], t)])


@family("prmt")
def _prmt(d: Decoder, i: Instruction, f: Form) -> Code | None:
    return Code("prmt", *_operands(d, i, f.type(), 3))


@family("popc", "clz", "bfind", "brev")
def _count_bits(d: Decoder, i: Instruction, f: Form) -> Code | None:
    t = f.type()
    target, a = d.register(i.operands[0]), d.source(i.operands[1], t)
    name = f"{_kind(t)}bfind" if f.family == "bfind" else f.family
    return Code(f"{name}.{_bits(t)}", target, a) if f.family == "brev" or d.width(target) == 4 else None


@family("bfe", "bfi")
def _bit_field(d: Decoder, i: Instruction, f: Form) -> Code | None:
    t = f.type()
    if f.family == "bfe":
        target, a = _operands(d, i, t, 1)
        position, length = (d.source(o, "b32") for o in i.operands[2:4])
        return Code(f"{_kind(t)}bfe.{_bits(t)}", target, a, position, length)
    target, a, b = _operands(d, i, t, 2)
    position, length = (d.source(o, "b32") for o in i.operands[3:5])
    return Code(f"bfi.{_bits(t)}", target, a, b, position, list=length)


def _integer(d: Decoder, i: Instruction, f: Form) -> Code | None:
    """add, sub, div, rem, min, max, neg and abs of integers."""
    t = f.type()
    if not _plain(t):
        return None
    slots = _operands(d, i, t, 1 if f.family in ("neg", "abs") else 2)
    name = f"{_kind(t)}{f.family}" if f.family in ("div", "rem", "min", "max") else f.family
    return Code(f"{name}.{_bits(t)}", *slots)


def _product(d: Decoder, i: Instruction, f: Form) -> Code | None:
    """mul and mad of integers."""
    part = f.take("lo", "hi", "wide")
    t = f.type()
    if not _plain(t):
        return None
    add = f.family == "mad"
    if part == "lo":
        return Code(f"{f.family}.{_bits(t)}", *_operands(d, i, t, 3 if add else 2))
    if part == "hi":
        name = f"{'mad' if add else ''}{_kind(t)}high.{_bits(t)}"
        return Code(name, *_operands(d, i, t, 3 if add else 2))
    wide = f"b{2 * _bits(t)}"
    target, a, b = d.register(i.operands[0]), d.source(i.operands[1], t), d.source(i.operands[2], t)
    c = d.source(i.operands[3], wide) if add else -1
    if not _same(d, wide, target) or not _same(d, t, a, b):
        return None
    return Code(f"{'mad' if add else ''}{_kind(t)}wide.{_bits(t)}", target, a, b, c)


@family("rem")
def _remainder(d: Decoder, i: Instruction, f: Form) -> Code | None:
    return _integer(d, i, f)


@family("selp")
def _selp(d: Decoder, i: Instruction, f: Form) -> Code | None:
    t = f.type()
    target, a, b = _operands(d, i, t, 2)
    p, negated = d.predicate(i.operands[3])
    return Code(f"selp.{_bits(t)}", target, a, b, p, variant=negated)


_INTEGER_COMPARE = {name: n for n, name in enumerate(("eq", "ne", "lt", "le", "gt", "ge"))}
_INTEGER_COMPARE |= {"lo": 2, "ls": 3, "hi": 4, "hs": 5}
_FLOAT_COMPARE = ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
_COMBINE = {None: 0, "and": 1, "or": 2, "xor": 3}


@family("setp")
def _setp(d: Decoder, i: Instruction, f: Form) -> Code | None:
    f.drop("ftz")
    t = f.type()
    name = f.left.pop(0)
    combine = f.take("and", "or", "xor")
    first, second = d.pair(i.operands[0])
    a, b = d.source(i.operands[1], t), d.source(i.operands[2], t)
    c, negated = d.predicate(i.operands[3]) if combine else (-1, False)
    if t in ("f16", "bf16", "f32", "f64"):
        variant, kind = _FLOAT_COMPARE.index(name), t
    elif _plain(t):
        variant, kind = _INTEGER_COMPARE[name], f"{_kind(t)}{_bits(t)}"
    else:
        return None
    if not _same(d, t, a, b):
        return None
    return Code(
        f"setp.{kind}",
        -1 if first is None else first,
        a,
        b,
        c,
        size=_COMBINE[combine],
        count=negated,
        variant=variant,
        list=-1 if second is None else second,
    )


# floating point

_FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f32x2", "f64")
_FTZ, _SAT, _RELU = 1, 2, 4


def _modifiers(f: Form, t: str) -> int:
    """Step.variant of an arithmetic operation; raises for roundings other than to nearest."""
    f.drop("rn")
    ftz, saturate, relu = f.has("ftz"), f.has("sat"), f.has("relu")
    if ftz and not t.startswith("f32"):
        raise UnknownInstruction("ftz of a narrow type")
    return ftz * _FTZ | saturate * _SAT | relu * _RELU


def _arithmetic(d: Decoder, i: Instruction, f: Form, count: int, name: str | None = None) -> Code | None:
    t = f.type()
    return Code(f"{name or f.family}.{t}", *_operands(d, i, t, count), variant=_modifiers(f, t))


def _mixed(d: Decoder, i: Instruction, f: Form, count: int) -> Code | None:
    narrow = f.type()
    f.take("f32")
    target, last = d.register(i.operands[0]), d.source(i.operands[count], "f32")
    sources = [d.source(o, narrow) for o in i.operands[1:count]]
    if not _same(d, "f32", target, last):
        return None
    return Code(f"mixed.{f.family}.{narrow}", target, sources[0], sources[-1], last, variant=_modifiers(f, "f32"))


@family("add", "sub", "mul", "mad", "fma", "div")
def _add(d: Decoder, i: Instruction, f: Form) -> Code | None:
    count = 3 if f.family in ("mad", "fma") else 2
    if f.left[-1] not in _FLOATS:
        return _product(d, i, f) if f.family in ("mul", "mad") else _integer(d, i, f)
    if f.left[-2:] in (["f32", "f16"], ["f32", "bf16"]):
        return _mixed(d, i, f, count) if f.family != "mad" else None
    if f.family == "div":
        f.drop("approx", "full")
    return _arithmetic(d, i, f, count, "fma" if f.family == "mad" else None)


@family("min", "max")
def _minmax(d: Decoder, i: Instruction, f: Form) -> Code | None:
    if f.left[-1] not in _FLOATS:
        return _integer(d, i, f)
    count = len(i.operands) - 1
    name = f"{f.family}{'nan' if f.has('NaN') else ''}{'3' if count == 3 else ''}"
    if f.has("xorsign"):
        if not f.has("abs") or count != 2:
            return None
        name += "cross"
    return _arithmetic(d, i, f, count, name)


@family("neg", "abs")
def _sign(d: Decoder, i: Instruction, f: Form) -> Code | None:
    if f.left[-1] not in _FLOATS:
        return _integer(d, i, f)
    t = f.type()
    bit = {2: 0x8000, 4: 1 << 31, 8: -(1 << 63)}[TYPE_BYTES[t]]
    if t in ("f16x2", "bf16x2"):
        bit = 0x80008000
    elif t == "f32x2":
        bit = 0x8000000080000000 - (1 << 64)
    return Code(f"sign.{f.family}.{t}", *_operands(d, i, t, 1), k=bit)


@family("copysign")
def _copysign(d: Decoder, i: Instruction, f: Form) -> Code | None:
    t = f.type()
    return Code(f"copysign.{t}", *_operands(d, i, t, 2))


@family("rcp", "rsqrt", "sqrt", "ex2")
def _special(d: Decoder, i: Instruction, f: Form) -> Code | None:
    f.drop("approx")
    return _arithmetic(d, i, f, 1)


# conversions

_INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_TO_INTEGER = ("rni", "rzi", "rmi", "rpi")
_FORMATS = {name: n for n, name in enumerate(("e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "f16", "bf16", "tf32"))}
_ROUNDINGS = ("rn", "rna", "rz", "rp", "rm")


def _encoding(f: Form) -> int:
    rounding = f.take(*_ROUNDINGS) or "rn"
    return _ROUNDINGS.index(rounding) + 8 * f.has("satfinite") + 16 * f.has("relu")


@family("cvt")
def _cvt(d: Decoder, i: Instruction, f: Form) -> Code | None:
    source = f.type()
    if f.left[-1] in ("e4m3x4", "e5m2x4", "e2m1x4"):
        return _narrow(d, i, f, f.left.pop()[:-2], 4)
    t = f.type()
    if t.endswith("x2") and source == "f32":
        return _narrow(d, i, f, t[:-2], 2)
    if t in ("f16x2", "bf16x2") and source.endswith("x2"):
        return _widen(d, i, f, source[:-2], t == "bf16x2")
    if t.endswith("x2") or source.endswith("x2") or source == "tf32":
        return None
    target = d.register(i.operands[0])
    if source in _INTEGERS:
        return _from_integer(d, i, f, t, source, target)
    a = d.source(i.operands[1], source)
    if t in _INTEGERS:
        rounding = _TO_INTEGER.index(f.take(*_TO_INTEGER) or "rzi")
        f.drop("sat")
        flush = 4 * (f.has("ftz") and source == "f32")
        return Code(f"cvt.{t}.{source}", target, a, variant=rounding + flush) if _same(d, t, target) else None
    if t == source == "f32":
        rounding = _TO_INTEGER.index(f.left.pop(0))
        return Code("integral.f32", target, a, variant=rounding) if _same(d, t, target) else None
    how = _encoding(f)
    if not _same(d, t, target):
        return None
    if t == "tf32":
        return Code("cvt.tf32.f32", target, a, variant=how) if source == "f32" else None
    if how and source == "f32" and t in ("f16", "bf16"):
        return Code("encode.f32", target, a, k=_FORMATS[t], variant=how)
    return Code(f"cvt.{t}.{source}", target, a) if not how else None


def _from_integer(d: Decoder, i: Instruction, f: Form, t: str, source: str, target: int) -> Code | None:
    try:
        a = d.source(i.operands[1], source)
    except UnknownInstruction:
        a = d.register(i.operands[1])
    if t not in _INTEGERS:
        f.drop("rn")
        if not _same(d, t, target):
            return None
    if TYPE_BYTES[source] == 1:
        if d.width(a) not in (2, 4) or not _same(d, t, target) or (t not in _INTEGERS and t != "f32"):
            return None
        return Code(f"byte.{source}.{8 * d.width(a)}.{'f32' if t == 'f32' else 8 * d.width(target)}", target, a)
    if not _same(d, source, a):
        return None
    if t not in _INTEGERS:
        return Code(f"cvt.{t}.{source}", target, a)
    return Code(f"cvt.{t}.{8 * d.width(target)}.{source}", target, a)


def _narrow(d: Decoder, i: Instruction, f: Form, narrow: str, parts: int) -> Code | None:
    """Float32 values to a packed narrow type."""
    target = d.register(i.operands[0])
    operands = i.operands[1].items if parts == 4 and isinstance(i.operands[1], Vector) else i.operands[1 : 1 + parts]
    sources = [d.source(o, "f32") for o in operands]
    how = _encoding(f)
    if narrow in ("f16", "bf16") and not how and d.width(target) == 4:
        return Code(f"pair.{narrow}", target, *sources)
    size = 4 if narrow == "e2m1" else 16 if narrow in ("f16", "bf16") else 8
    return Code("pack.narrow", target, items=sources, size=size, k=_FORMATS[narrow], variant=how)


def _widen(d: Decoder, i: Instruction, f: Form, narrow: str, brain: bool) -> Code | None:
    f.drop("rn", "satfinite")
    relu = f.has("relu")
    target, a = d.register(i.operands[0]), d.source(i.operands[1], f"{narrow}x2")
    if d.width(target) != 4:
        return None
    return Code("unpack.narrow", target, a, size=4 if narrow == "e2m1" else 8, k=_FORMATS[narrow], variant=brain | relu << 1)


@family("cvta")
def _cvta(d: Decoder, i: Instruction, f: Form) -> Code | None:
    to = f.has("to")
    space = f.take("shared", "shared::cta", "shared::cluster", "global", "local", "param", "const")
    t = f.type()
    target, a = d.register(i.operands[0]), d.source(i.operands[1], t)
    move = SHARED_WINDOW if space is not None and space.startswith("shared") else 0
    return Code(f"cvta.{_bits(t)}", target, a, k=-move if to else move) if _same(d, t, target, a) else None


@family("mapa")
def _mapa(d: Decoder, i: Instruction, f: Form) -> Code | None:
    shared = f.take("shared::cluster", "shared::cta", "shared") is not None
    t = f.type()
    target, a, rank = d.register(i.operands[0]), d.source(i.operands[1], t), d.source(i.operands[2], "b32")
    return Code(f"mapa.{_bits(t)}", target, a, rank, variant=shared) if _same(d, t, target, a) else None


# moves, memory, instructions without an effect


@family("mov")
def _mov(d: Decoder, i: Instruction, f: Form) -> Code | None:
    t = f.type()
    to, value = i.operands[0], i.operands[1]
    if isinstance(value, Vector):
        target, size = d.register(to), TYPE_BYTES[t] // len(value.items)
        items = [d.source(item, f"b{8 * size}") for item in value.items]
        return Code(f"pack.{8 * size}", target, items=items) if _whole(d, t, target, size, items) else None
    if isinstance(to, Vector):
        source, size = d.source(value, t), TYPE_BYTES[t] // len(to.items)
        targets = [d.sink(item) for item in to.items]
        used = [slot for slot in targets if slot is not None]
        return Code(f"unpack.{8 * size}", a=source, items=targets) if _whole(d, t, source, size, used) else None
    if isinstance(value, Register) and str(value) in TIMERS:
        return None
    slots = d.register(to), d.source(value, t)
    return Code(f"mov.{_bits(t) or 8}", *slots) if _same(d, t, *slots) else None


def _whole(d: Decoder, type_name: str, wide: int, size: int, parts: Sequence[int]) -> bool:
    """Whether parts of `size` bytes have registers of just that size, and make up the wide one."""
    return _same(d, type_name, wide) and wide not in parts and all(d.width(part) == size for part in parts)


_SPACES = {None: 0, "global": 1, "shared": 2, "shared::cta": 2, "shared::cluster": 2, "local": 3, "param": 4}
_CACHE: tuple[str, ...] = ("ca", "cg", "cs", "cv", "lu", "wb", "wt")
_CACHE += tuple(f"L1::{x}" for x in ("no_allocate", "evict_first", "evict_last", "evict_normal", "evict_unchanged"))
_CACHE += tuple(f"L2::{x}" for x in ("64B", "128B", "256B", "evict_first", "evict_last", "evict_normal"))
_NARROW_BASE, _SIGNED, _TRANSPOSED = 8, 16, 32


def _access(d: Decoder, operand: Operand, space: str | None) -> tuple[int, int, int]:
    """(slot of the base, offset, Step.variant)."""
    base, offset = d.address(operand)
    if d.width(base) not in (4, 8):
        raise UnknownInstruction("an address of another size")
    return base, offset, _SPACES[space] | (_NARROW_BASE if d.width(base) == 4 else 0)


def _element(f: Form) -> tuple[str | None, str, int]:
    """Space, type and vector length of ld and st."""
    f.drop(*ORDER, *_CACHE, "cluster")
    vector = f.take("v2", "v4", "v8")
    space = f.take(*(name for name in _SPACES if name))
    return space, f.type(), int(vector[1:]) if vector else 1


@family("ld", "ldu")
def _ld(d: Decoder, i: Instruction, f: Form) -> Code | None:
    space, t, count = _element(f)
    size = TYPE_BYTES[t]
    targets = [d.sink(o) for o in d.items(i.operands[0])]
    if size not in (1, 2, 4, 8) or any(slot is not None and d.width(slot) < size for slot in targets):
        return None
    sign = _SIGNED if t[0] == "s" else 0
    operand = i.operands[1]
    if space == "param" and isinstance(operand, Address) and isinstance(operand.base, Symbol):
        name = operand.base.name
        start = next(p.offset for p in d.kernel.params if p.name == name) + operand.offset
        return Code("load.param", k=start, items=targets, size=size, variant=sign)
    base, offset, variant = _access(d, operand, space)
    return Code("load", a=base, k=offset, items=targets, count=count, size=size, variant=variant | sign, traffic=MEMORY)


@family("st")
def _st(d: Decoder, i: Instruction, f: Form) -> Code | None:
    space, t, count = _element(f)
    if space == "param":  # an argument of a call
        return None
    base, offset, variant = _access(d, i.operands[0], space)
    sources = [d.source(o, t, wider=True) for o in d.items(i.operands[1])]
    size = TYPE_BYTES[t]
    if size not in (1, 2, 4, 8) or any(d.width(slot) < size for slot in sources):
        return None
    return Code("store", a=base, k=offset, items=sources, count=count, size=size, variant=variant, traffic=MEMORY)


@family("ldmatrix", "stmatrix")
def _matrix(d: Decoder, i: Instruction, f: Form) -> Code | None:
    f.drop("sync", "aligned", "shared", "shared::cta")
    if f.take("m8n8") is None:
        return None
    f.take("x1", "x2", "x4")
    transposed, load = f.has("trans"), f.family == "ldmatrix"
    f.type()
    registers = [d.register(o) for o in d.items(i.operands[0 if load else 1])]
    base, offset, variant = _access(d, i.operands[1 if load else 0], "shared")
    variant |= _TRANSPOSED if transposed else 0
    name = "load.matrix" if load else "store.matrix"
    return Code(name, a=base, k=offset, items=registers, size=16, variant=variant, traffic=MEMORY)


@family("mbarrier")
def _try_wait(d: Decoder, i: Instruction, f: Form) -> Code | None:
    if f.left[0] not in ("try_wait", "test_wait"):
        return None
    parity = "b32" if "parity" in f.left else "b64"
    f.left.clear()
    target = d.register(i.operands[0])
    base, offset, variant = _access(d, i.operands[1], "shared")
    wanted = d.source(i.operands[2], parity)
    return Code("try.wait", target, base, wanted, k=offset, size=TYPE_BYTES[parity], variant=variant, traffic=FENCE)


@family("nop", "pragma", "nanosleep", "prefetch", "prefetchu", "discard", "applypriority")
def _no_effect(d: Decoder, i: Instruction, f: Form) -> Code | None:
    f.left.clear()
    return Code("nothing")


@family("fence", "membar", "griddepcontrol")
def _fence(d: Decoder, i: Instruction, f: Form) -> Code | None:
    f.left.clear()
    return Code("nothing", traffic=FENCE)


@family("tcgen05")
def _tensor_fence(d: Decoder, i: Instruction, f: Form) -> Code | None:
    if f.left[0] not in ("fence::before_thread_sync", "fence::after_thread_sync", "wait::ld", "wait::st"):
        return None
    return _fence(d, i, f)


# whole warps


@family("elect")
def _elect(d: Decoder, i: Instruction, f: Form) -> Code | None:
    f.drop("sync")
    lane, elected = d.pair(i.operands[0])
    return Code("elect", -1 if lane is None else lane, b=-1 if elected is None else elected)


@family("vote")
def _vote(d: Decoder, i: Instruction, f: Form) -> Code | None:
    f.drop("sync")
    mode = f.take("all", "any", "uni", "ballot")
    f.type()
    p, negated = d.predicate(i.operands[1])
    variant = ("all", "any", "uni", "ballot").index(mode or "")
    return Code("vote", d.register(i.operands[0]), p, variant=variant + 4 * negated)


@family("shfl")
def _shfl(d: Decoder, i: Instruction, f: Form) -> Code | None:
    f.drop("sync")
    mode = f.take("idx", "bfly", "up", "down")
    f.type()
    target, valid = d.pair(i.operands[0])
    a, b, c = (d.source(o, "b32") for o in i.operands[1:4])
    variant = ("idx", "bfly", "up", "down").index(mode or "")
    return Code("shuffle", -1 if target is None else target, a, b, c, variant=variant, list=-1 if valid is None else valid)


@family("redux")
def _redux(d: Decoder, i: Instruction, f: Form) -> Code | None:
    f.drop("sync")
    name = f.take("add", "min", "max", "and", "or", "xor")
    t = f.type()
    variant = ("add", "min", "max", "and", "or", "xor").index(name or "") + 8 * (t[0] == "s")
    if not _plain(t):
        return None
    return Code("reduce", *_operands(d, i, t, 1), variant=variant)


@family("bar")
def _warp_barrier(d: Decoder, i: Instruction, f: Form) -> Code | None:
    f.drop("sync")
    return Code("nothing", traffic=FENCE) if f.has("warp") else None
