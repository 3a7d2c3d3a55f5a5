"""Small device functions of the sampler: arithmetic, shared memory of the CTA and of the cluster, loads of a group.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

import math
import struct
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Int64, Uint32, Uint64

from dsv4lab.kernels.head.sampler.config import GROUP


# ---- arithmetic --------------------------------------------------------------------------------------------------------
def magnitude(value: Any) -> Any:
    return _unary("abs.f32", value)


def fma(a: Any, b: Any, c: Any) -> Any:
    return cute.arch.inline_ptx(
        "fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Float32],
        read_only_args=[Float32(a), Float32(b), Float32(c)],
    )


def nearest_uint(value: Any) -> Any:
    return cute.arch.inline_ptx("cvt.rni.u32.f32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[value])


def double(value: Any) -> Any:
    """A uint32 as float64."""
    return cute.arch.inline_ptx("cvt.rn.f64.u32 {$w0}, {$r0};", write_only_types=[Float64], read_only_args=[value])


def widened(value: Any) -> Any:
    """A float32 as float64."""
    return cute.arch.inline_ptx("cvt.f64.f32 {$w0}, {$r0};", write_only_types=[Float64], read_only_args=[value])


def shuffle_up_double(value: Any, lanes: int) -> Any:
    """A float64 of the lane that many below; the own one where there is none."""
    code = "{ .reg .b32 low, high; mov.b64 {low, high}, {$r0}; "
    code += f"shfl.sync.up.b32 low, low, {lanes}, 0, -1; shfl.sync.up.b32 high, high, {lanes}, 0, -1; "
    code += "mov.b64 {$w0}, {low, high}; }"
    return cute.arch.inline_ptx(code, write_only_types=[Float64], read_only_args=[value])


def _unary(operation: str, value: Any) -> Any:
    return cute.arch.inline_ptx(operation + " {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[Float32(value)])


# ---- integers ----------------------------------------------------------------------------------------------------------
def low_high(value: Any) -> tuple[Any, Any]:
    """The words of an int64."""
    code = "mov.b64 {{$w0}, {$w1}}, {$r0};"
    low, high = cute.arch.inline_ptx(code, write_only_types=[Uint32, Uint32], read_only_args=[Int64(value)])
    return low, high


def significant_bits(value: Any) -> Any:
    """Bits of a uint32 without its leading zeros, int32."""
    code = "{ .reg .b32 zeros; clz.b32 zeros, {$r0}; sub.s32 {$w0}, 32, zeros; }"
    return cute.arch.inline_ptx(code, write_only_types=[Int32], read_only_args=[value])


def part(groups: Any, index: Any, count: Any) -> tuple[Any, Any]:
    """Groups of one of `count` CTAs: (first, end)."""
    each = cute.ceil_div(groups, count)
    first = cutlass.min(index * each, groups)
    return first, cutlass.min(first + each, groups)


# ---- memory ------------------------------------------------------------------------------------------------------------
_TYPES = {"u32": Uint32, "u64": Uint64, "f64": Float64}


def remote(address: Any, rank: Any, kind: str) -> Any:
    """A number in shared memory of another CTA of the cluster, at the same place as here."""
    code = "{ .reg .b32 there; mapa.shared::cluster.u32 there, {$r0}, {$r1}; "
    code += f"ld.shared::cluster.{kind} {{$w0}}, [there]; }}"
    return cute.arch.inline_ptx(code, write_only_types=[_TYPES[kind]], read_only_args=[address, Int32(rank)])


def shared_max(address: Any, value: Any) -> None:
    """One of many writers of a uint64 in shared memory."""
    cute.arch.inline_ptx("red.relaxed.cta.shared.max.u64 [{$r0}], {$r1};", read_only_args=[address, value])


def shared_add(address: Any, value: Any) -> None:
    cute.arch.inline_ptx("red.relaxed.cta.shared.add.u32 [{$r0}], {$r1};", read_only_args=[address, Uint32(value)])


def shared_now(address: Any) -> Any:
    """What a uint64 in shared memory is while others raise it."""
    return cute.arch.inline_ptx(
        "ld.relaxed.cta.shared.u64 {$w0}, [{$r0}];", write_only_types=[Uint64], read_only_args=[address]
    )


def load_group(row: Any, group: Any, end: Any, vector: bool) -> list[Any]:
    """Elements 4 group .. + 3 of a row; past its end its last ones, which the caller leaves out."""
    if vector:
        held = cute.make_rmem_tensor((GROUP,), Float32)
        cute.autovec_copy(cute.local_tile(row, (GROUP,), (group,)), held)
        return [held[j] for j in range(GROUP)]
    return [row[cutlass.min(GROUP * group + j, end - 1)] for j in range(GROUP)]


def leave(address: Any, rank: Any, value: Any) -> None:
    """Write a uint64 to an address in shared memory of another CTA of the cluster, where nobody else writes.

    `red.max.u64` there would save the reader a loop, but ptxas makes it a load, a comparison and a store: it loses numbers.
    """
    code = "{ .reg .b32 there; mapa.shared::cluster.u32 there, {$r0}, {$r1}; st.shared::cluster.u64 [there], {$r2}; }"
    cute.arch.inline_ptx(code, read_only_args=[address, Int32(rank), value])


@cute.jit
def arrive(cluster: cutlass.Constexpr) -> None:
    """The first half of a barrier of the CTAs that share a row."""
    if cutlass.const_expr(cluster > 1):
        cute.arch.cluster_arrive()


@cute.jit
def wait(cluster: cutlass.Constexpr) -> None:
    """The second half."""
    if cutlass.const_expr(cluster > 1):
        cute.arch.cluster_wait()
    else:
        cute.arch.barrier()


# ---- float64 -----------------------------------------------------------------------------------------------------------
_TERMS = 13  # of e^r, |r| <= 0.35: 0.35^13 / 13! is 2^-51


def exp_minus(number: Any, unit: int) -> Any:
    """e^(-number / unit), number int32 from 0, within 2^-49 of itself: 2^-n e^r with n the nearest integer."""
    code = "{ .reg .f64 y, n, r, sum; .reg .b64 power; .reg .s32 k; "
    code += f"cvt.rn.f64.s32 y, {{$r0}}; mul.rn.f64 y, y, {_hex(-1.0 / (unit * math.log(2.0)))}; "
    code += f"cvt.rni.s32.f64 k, y; cvt.rn.f64.s32 n, k; sub.rn.f64 r, y, n; mul.rn.f64 r, r, {_hex(math.log(2.0))}; "
    code += f"mov.f64 sum, {_hex(1.0 / math.factorial(_TERMS - 1))}; "
    for n in range(_TERMS - 2, -1, -1):
        code += f"fma.rn.f64 sum, sum, r, {_hex(1.0 / math.factorial(n))}; "
    code += "add.s32 k, k, 1023; cvt.u64.u32 power, k; shl.b64 power, power, 52; mov.b64 n, power; "
    code += "mul.rn.f64 {$w0}, sum, n; }"
    return cute.arch.inline_ptx(code, write_only_types=[Float64], read_only_args=[number])


def _hex(value: float) -> str:
    return f"0d{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
