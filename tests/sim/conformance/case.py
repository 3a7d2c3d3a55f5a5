"""What a conformance case is, and how a group of cases becomes one CuTeDSL kernel that runs in the simulator and on a GPU.

A form is a few PTX instructions with their inputs and the bytes that they must leave behind, computed in plain numpy and
Python. A group packs forms into one kernel: CTA (or cluster) i runs form i on its own part of one input and one output tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ALIGNMENT = 1024  # bytes, of a form's part of the tensors
_REGISTERS = {1: ".b16", 2: ".b16", 4: ".b32", 8: ".b64"}


@dataclass(frozen=True)
class Bound:
    """How far a result may be from the expected one, and why.

    kind: "bits"; "nan", bits except for the payload of a NaN; "ulp", "relative" or "absolute", at most `limit`, any NaN for a
    NaN; for "absolute" the limit may be an array, one per element.
    """

    kind: str = "bits"
    limit: Any = 0.0
    reason: str = ""


EXACT = Bound()
ANY_NAN = Bound("nan", reason="a NaN's payload is not part of the instruction's result")


@dataclass(frozen=True)
class Form:
    """One case.

    text: PTX that sees the registers source and target (b64, addresses of this form's bytes), smem and thread (b32) and rank
    (b32, of the CTA in its cluster). source: input bytes, or a function of the two addresses that makes them. expected: what
    target holds afterwards. before: what it holds at first, by default zeros. element: "bf16" where 16-bit numbers are that.
    """

    label: str
    text: str
    source: np.ndarray | Callable[[int, int], np.ndarray]
    expected: np.ndarray
    before: np.ndarray | None = None
    bound: Bound = EXACT
    element: str = ""


@dataclass(frozen=True)
class Group:
    """Forms that share a kernel. threads: of a CTA; shared: bytes of shared memory; launch: more launch arguments."""

    name: str
    forms: tuple[Form, ...]
    threads: int = 128
    cluster: int = 1
    shared: int = 0
    arch: str = "sm_90a"
    launch: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The kernel's PTX: operands $0 and $1 are the tensors, $2 is shared memory."""
        parts, at_source, at_target = [], 0, 0
        for index, (form, size) in enumerate(zip(self.forms, self.sizes(), strict=True)):
            parts.append(
                f"{{ .reg .b64 source, target; .reg .b32 smem, thread, rank; .reg .pred skip;\n"
                f"mov.u32 thread, %clusterid.x; setp.ne.u32 skip, thread, {index}; @skip bra NEXT;\n"
                f"add.s64 source, $0, {at_source}; add.s64 target, $1, {at_target}; mov.b32 smem, $2;\n"
                f"mov.u32 thread, %tid.x; mov.u32 rank, %cluster_ctarank;\n{form.text}\nNEXT: }}"
            )
            at_source, at_target = at_source + size[0], at_target + size[1]
        return "\n".join(parts)

    def sizes(self) -> list[tuple[int, int]]:
        """Bytes of each form's input and output, rounded up."""
        out = []
        for form in self.forms:
            made = form.source(0, 0) if callable(form.source) else form.source
            out.append((_up(made.nbytes), _up(form.expected.nbytes)))
        return out

    def inputs(self, source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
        """Both tensors' bytes before the launch, for tensors that lie at the given addresses."""
        parts: tuple[list[np.ndarray], list[np.ndarray]] = [], []
        for form, (size, room) in zip(self.forms, self.sizes(), strict=True):
            made = form.source(source, target) if callable(form.source) else form.source
            before = np.zeros_like(form.expected) if form.before is None else form.before
            parts[0].append(_padded(made, size))
            parts[1].append(_padded(before, room))
            source, target = source + size, target + room
        return np.concatenate(parts[0]), np.concatenate(parts[1])

    def outputs(self, data: np.ndarray) -> list[np.ndarray]:
        """Each form's result, as its expected array's type."""
        out, at = [], 0
        for form, (_, room) in zip(self.forms, self.sizes(), strict=True):
            part = data[at : at + form.expected.nbytes]
            out.append(np.ascontiguousarray(part).view(form.expected.dtype).reshape(form.expected.shape))
            at += room
        return out

    def host(self) -> Any:
        """The CuTeDSL host function, which takes both tensors."""
        from tests.sim.conformance.kernel import host_function

        blocks = len(self.forms) * self.cluster
        return host_function(
            self.text(), blocks=blocks, threads=self.threads, cluster=self.cluster, shared=self.shared, **self.launch
        )


def _up(size: int) -> int:
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return np.concatenate([flat, np.zeros(size - len(flat), np.uint8)])


@dataclass(frozen=True)
class Difference:
    """How a result compares with another. ulp: in units in the last place, of the elements where neither is NaN."""

    equal: bool
    different: int
    ulp: float
    relative: float
    absolute: float
    nan: bool  # NaN where the other has a number
    payload: bool  # only NaNs differ, from other NaNs


def compare(got: np.ndarray, wanted: np.ndarray, element: str = "") -> Difference:
    """Compare two arrays of a form's type."""
    bits = f"u{got.dtype.itemsize}"
    a, b = np.ascontiguousarray(got).view(bits).reshape(-1), np.ascontiguousarray(wanted).view(bits).reshape(-1)
    changed = a != b
    if not changed.any():
        return Difference(True, 0, 0.0, 0.0, 0.0, False, True)
    if element == "bf16":
        x, y = ((v.astype(np.uint32) << np.uint32(16)).view(np.float32) for v in (a, b))
    elif got.dtype.kind == "f":
        x, y = got.reshape(-1), wanted.reshape(-1)
    else:
        return Difference(False, int(changed.sum()), float("nan"), float("nan"), float("nan"), False, False)
    nan = np.isnan(x) != np.isnan(y)
    real = changed & ~(np.isnan(x) | np.isnan(y))
    if not real.any():
        return Difference(False, int(changed.sum()), 0.0, 0.0, 0.0, bool(nan.any()), not nan.any())
    sign = np.array(1 << (8 * got.dtype.itemsize - 1), bits)
    rank = [np.where(v & sign, -(v & ~sign).astype(np.float64), (v & ~sign).astype(np.float64)) for v in (a, b)]
    with np.errstate(all="ignore"):
        gap = np.abs(x[real].astype(np.float64) - y[real].astype(np.float64))
        relative = gap / np.abs(y[real].astype(np.float64))
    steps = np.abs(rank[0] - rank[1])[real]
    return Difference(
        False, int(changed.sum()), float(steps.max()), float(relative.max()), float(gap.max()), bool(nan.any()), False
    )


def problem(form: Form, got: np.ndarray, wanted: np.ndarray | None = None) -> str:
    """Why a result is not within the form's bound of the expected one (or of `wanted`), or an empty string."""
    wanted = form.expected if wanted is None else wanted
    found, bound = compare(got, wanted, form.element), form.bound
    if found.equal:
        return ""
    if bound.kind == "nan":
        fine = found.payload
    elif bound.kind in ("ulp", "relative"):
        fine = not found.nan and getattr(found, bound.kind) <= bound.limit
    elif bound.kind == "absolute":
        gap = np.abs(got.astype(np.float64) - wanted.astype(np.float64))
        fine = not found.nan and bool((np.isnan(gap) | (gap <= bound.limit)).all())
    else:
        fine = False
    if fine:
        return ""
    bits = f"u{got.dtype.itemsize}"
    a, b = np.ascontiguousarray(got).view(bits).reshape(-1), np.ascontiguousarray(wanted).view(bits).reshape(-1)
    at = np.flatnonzero(a != b)
    shown = ", ".join(f"[{i}] 0x{int(a[i]):x} for 0x{int(b[i]):x}" for i in at[:4])
    return f"{form.label}: {len(at)} of {a.size} elements differ ({bound.kind}, {bound.limit}), ulp {found.ulp}: {shown}"


def digest(*arrays: np.ndarray) -> str:
    """A short hash of arrays' bytes."""
    out = hashlib.sha256()
    for array in arrays:
        out.update(np.ascontiguousarray(array).tobytes())
    return out.hexdigest()[:16]


def lanes(
    label: str,
    code: str,
    operands: Sequence[np.ndarray],
    results: np.ndarray | Sequence[np.ndarray],
    bound: Bound = EXACT,
    element: str = "",
) -> Form:
    """A form in which every thread has its own operands a, b, c, d and results r (or r0, r1 ...), by element size.

    code may use h0 .. h7 (b16), w0 .. w7 (b32), x0 .. x7 (b64) and p0 .. p7 (predicates).
    """
    outs = [results] if isinstance(results, np.ndarray) else list(results)
    names = ["r"] if len(outs) == 1 else [f"r{k}" for k in range(len(outs))]
    declare = ".reg .b16 h<8>; .reg .b32 w<8>; .reg .b64 x<8>; .reg .pred p<8>; .reg .b64 place;"
    load, save, at = [], [], 0
    for name, array in zip("abcd", operands, strict=False):
        size = array.itemsize
        declare += f" .reg {_REGISTERS[size]} {name};"
        load.append(_place("source", size) + f"ld.global.{'u8' if size == 1 else f'b{8 * size}'} {name}, [place+{at}];")
        at += array.nbytes
    at = 0
    for name, array in zip(names, outs, strict=True):
        size = array.itemsize
        declare += f" .reg {_REGISTERS[size]} {name};"
        save.append(_place("target", size) + f"st.global.b{8 * size} [place+{at}], {name};")
        at += array.nbytes
    source = np.concatenate([np.ascontiguousarray(o).view(np.uint8) for o in operands] or [np.zeros(1, np.uint8)])
    kinds = {o.dtype for o in outs}
    expected = np.concatenate(outs) if len(kinds) == 1 else np.concatenate([o.view(np.uint8) for o in outs])
    return Form(label, "\n".join([declare, *load, code, *save]), source, expected, bound=bound, element=element)


def _place(base: str, size: int) -> str:
    return f"mad.wide.u32 place, thread, {size}, {base};\n"


def run_simulated(group: Group, schedule: str = "eager") -> list[np.ndarray]:
    """The group's results in the simulator, which must be enabled. Keeps the compiled kernel."""
    import torch

    from dsv4lab import sim

    source, target = group.inputs(0, 0)
    tensors = torch.zeros(len(source), dtype=torch.uint8), torch.zeros(len(target), dtype=torch.uint8)
    pair = group.inputs(*(t.data_ptr() for t in tensors))
    for tensor, data in zip(tensors, pair, strict=True):
        tensor.copy_(torch.from_numpy(data))
    key = (group.name, group.arch)
    if key not in _compiled:
        _compiled[key] = sim.compile(group.host(), *tensors, arch=group.arch)
    _compiled[key](*tensors, schedule=schedule)
    return group.outputs(tensors[1].numpy())


_compiled: dict[tuple[str, str], Any] = {}


def problems(group: Group, results: Iterable[np.ndarray]) -> list[str]:
    """What is wrong with a group's results."""
    return [text for form, got in zip(group.forms, results, strict=True) if (text := problem(form, got))]
