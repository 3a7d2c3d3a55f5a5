"""What the kernels of hyper-connections share: loads, words of two BF16, one product, and `post` of one column.

Two kernels compute new streams, one to project and one to store them, so that neither waits for the other's stores: both by
`new_words`, in the same order of operations, which gives the same bits.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Uint32

from dsv4lab.kernels.mhc.config import STREAMS
from dsv4lab.kernels.quant.rows import encode as enc

UNSET = 0xFFFFFFFF  # a sum that has not come yet: a NaN that no sum is stored as
NAN = 0x7FFFFFFF
_LOG2E, _LOG2E_LOW = 1.44269502162933349609375, 1.9259629911266174681e-08  # their sum is log2(e) to 48 bits
_LN2 = 0.693147180559945309


# ---- memory ------------------------------------------------------------------------------------------------------------
def load_two(address: Any) -> list[Any]:
    """Two words from L2. In assembly, since the compiler moves loads of its own down to where they are used."""
    return list(
        cute.arch.inline_ptx(
            "ld.global.cg.v2.b32 {{$w0}, {$w1}}, [{$r0}];", write_only_types=[Uint32] * 2, read_only_args=[address]
        )
    )


def load_four(address: Any) -> list[Any]:
    """Four words of global memory, likewise."""
    return list(
        cute.arch.inline_ptx(
            "ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", write_only_types=[Uint32] * 4, read_only_args=[address]
        )
    )


def load_relaxed(address: Any) -> Any:
    """A word that another kernel may be writing."""
    return cute.arch.inline_ptx(
        "ld.relaxed.gpu.global.b32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[address]
    )


def store_relaxed(address: Any, word: Any) -> None:
    """A word that another kernel may be waiting for."""
    cute.arch.inline_ptx("st.relaxed.gpu.global.b32 [{$r0}], {$r1};", read_only_args=[address, word])


def store_two_shared(address: Any, pair: list[Any]) -> None:
    """Two floats to shared memory."""
    cute.arch.inline_ptx("st.shared.v2.f32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, *pair])


def _send(form: str, values: str) -> str:
    """To the same place in CTA $r2's shared memory, counted by the mbarrier at $r1 there."""
    return (
        "{ .reg .b32 there, counter; mapa.shared::cluster.u32 there, {$r0}, {$r2}; "
        "mapa.shared::cluster.u32 counter, {$r1}, {$r2}; "
        f"st.async.shared::cluster.mbarrier::complete_tx::bytes.{form} [there], {values}, [counter]; }}"
    )


def send_four(target: Any, barrier: Any, rank: Any, four: list[Any]) -> None:
    """Four floats to another CTA of the cluster."""
    code = _send("v4.f32", "{{$r3}, {$r4}, {$r5}, {$r6}}")
    cute.arch.inline_ptx(code, read_only_args=[target, barrier, rank, *four])


def send_one(target: Any, barrier: Any, rank: Any, value: Any) -> None:
    """A float, likewise."""
    cute.arch.inline_ptx(_send("f32", "{$r3}"), read_only_args=[target, barrier, rank, value])


# ---- values ------------------------------------------------------------------------------------------------------------
def halves(word: Any) -> list[Any]:
    """The two BF16 of a word as float32."""
    return enc.floats([word], "bf16")


def new_words(y: Any, x: list[Any], post: list[Any], comb: list[Any]) -> list[Any]:
    """`mhc_post` of two neighbouring columns: words of y and of the streams -> words of the new streams.

    post: 4, comb: 16 float32, comb[4 j + i] from stream j to i.
    """
    added, old = halves(y), [halves(word) for word in x]
    found = []
    for i in range(STREAMS):
        pair = []
        for h in range(2):
            value = enc.mul(post[i], added[h])
            for j in range(STREAMS):
                value = enc.fma(comb[STREAMS * j + i], old[j][h], value)
            pair.append(value)
        found.append(enc.pack_bf16(*pair))
    return found


def mma(total: Any, first: int, a: list[Any], b: list[Any], kind: str = "bf16") -> None:
    """total[first .. first + 3] += a b, a 16 x 8 x 16 product of BF16 (or f16) in float32."""
    out = cute.arch.inline_ptx(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[*a, *b, *(total[first + i] for i in range(4))],
    )
    for i in range(4):
        total[first + i] = out[i]


def _exp2(x: Any) -> Any:
    """2^x within 2^-22, small ones too: `_common.ptx.exp2` makes them 0."""
    return cute.arch.inline_ptx("ex2.approx.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def exponential(x: Any) -> Any:
    """e^x within 2^-21, from 0 to e^88, where float32 nearly ends; of a NaN a NaN."""
    # no farther: where the power is infinite or 0 nothing changes, or its correction would be a NaN
    x = cute.arch.fmax(cute.arch.fmin(x, Float32(88.0), nan=True), Float32(-120.0), nan=True)
    high = enc.mul(x, Float32(_LOG2E))
    low = enc.fma(x, Float32(_LOG2E_LOW), enc.fma(x, Float32(_LOG2E), enc.negative(high)))
    power = _exp2(high)
    return enc.fma(power, enc.mul(low, Float32(_LN2)), power)


def rsqrt(square: Any) -> Any:
    """1 / sqrt within 2^-22."""
    return cute.arch.inline_ptx("rsqrt.approx.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[square])


def rsqrt32(square: Any) -> Any:
    """1 / sqrt within 2^-23: one step more."""
    seed = rsqrt(square)
    error = enc.fma(enc.mul(square, seed), enc.negative(seed), Float32(1.0))
    return enc.fma(enc.mul(seed, Float32(0.5)), error, seed)


def rsqrt64(square: Any) -> Any:
    """1 / sqrt within 2^-50 of a float64 in float32's range: one step takes a float32 seed's error to the third power."""
    seed = rsqrt(square.to(Float32)).to(Float64)
    error = Float64(1.0) - square * seed * seed
    return seed + seed * error * (Float64(0.5) + Float64(0.375) * error)


def sigmoid(z: Any) -> Any:
    """1 / (1 + e^-z) of a float32, within 2^-20 but for what z's own last place makes of it."""
    return cute.arch.rcp_approx(enc.add(Float32(1.0), _exp2(enc.mul(z, Float32(-_LOG2E)))))


def shuffle64(value: Any, lane: Any) -> Any:
    """A float64 of another lane."""
    low, high = cute.arch.inline_ptx(
        "mov.b64 {{$w0}, {$w1}}, {$r0};", write_only_types=[Uint32, Uint32], read_only_args=[value]
    )
    low, high = (cute.arch.shuffle_sync(half, lane) for half in (low, high))
    return cute.arch.inline_ptx("mov.b64 {$w0}, {{$r0}, {$r1}};", write_only_types=[Float64], read_only_args=[low, high])


def larger_pair(a: Any, b: Any) -> Any:
    """Of two pairs of BF16 the larger magnitudes; signs mean nothing."""
    code = "max.xorsign.abs.bf16x2 {$w0}, {$r0}, {$r1};"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a, b])


def pack_f16(low: Any, high: Any) -> Any:
    """Two float32, rounded, in a word of two FP16."""
    return cute.arch.inline_ptx("cvt.rn.f16x2.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[high, low])


def collapsed(x: list[Any], pre: list[Any]) -> Any:
    """sum_j pre[j] X[j] of two neighbouring columns, rounded to a word."""
    pairs = [halves(word) for word in x]
    u = [enc.mul(pre[0], pairs[0][h]) for h in range(2)]
    for j in range(1, STREAMS):
        u = [enc.fma(pre[j], pairs[j][h], u[h]) for h in range(2)]
    return enc.pack_bf16(*u)


def inverse_rms(square: Any, columns: int, eps: Any) -> Any:
    """1 / sqrt(square / columns + eps), float32."""
    return rsqrt64(square.to(Float64) * Float64(1.0 / columns) + eps.to(Float64)).to(Float32)


def normed(word: Any, inverse: Any, low_weight: Any, high_weight: Any) -> Any:
    """Two collapsed columns times 1 / rms, then times their weights, rounded to a word."""
    low, high = halves(word)
    return enc.pack_bf16(
        enc.mul(enc.mul(low, inverse), low_weight.to(Float32)), enc.mul(enc.mul(high, inverse), high_weight.to(Float32))
    )


def over_lanes(value: Any, distances: tuple[int, ...], combine: Any) -> Any:
    """Combined over lanes whose numbers differ in the given bits."""
    for distance in distances:
        value = combine(value, cute.arch.shuffle_sync_bfly(value, distance))
    return value


def finite_mark(value: Any) -> Any:
    """The bits of a sum, a NaN as one that is not `UNSET`."""
    bits = value.bitcast(Uint32)
    return cutlass.select_(value == value, bits, Uint32(NAN))
