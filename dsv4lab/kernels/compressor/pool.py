"""What a lane does with the tokens of an entry: a softmax for each of its channels. Device functions on values in registers.

Scores are taken as powers of two: with L = log2(e) and M = L max(z), rounded, a token weighs 2^(L z - M), one `fma` and one
`ex2`. What M was rounded by is common to all tokens that share it, so it cancels; parts with different M meet by 2^(M - M'),
a difference of what was really subtracted. A part is (M, sum of weights, weighted sum of values), for each channel.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from dsv4lab.kernels._common.ptx import exp2
from dsv4lab.kernels.compressor.config import LANE, TOKENS
from dsv4lab.kernels.quant.rows import encode as enc

LOG2_E = 1.4426950408889634
LOWEST = -1e38  # below all scores that count, finite when multiplied by log2(e): tokens of score -inf weigh nothing
MINUS_INFINITY = float("-inf")


def load(address: Any, hint: str = "") -> list[Any]:
    """Four floats of global memory; hint: of the instruction, such as ".L1::no_allocate"."""
    code = "ld.global" + hint + ".v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];"
    return list(cute.arch.inline_ptx(code, write_only_types=[Float32] * LANE, read_only_args=[address]))


def store(address: Any, values: list[Any]) -> None:
    """Four floats to global memory."""
    code = "st.global.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};"
    cute.arch.inline_ptx(code, read_only_args=[address, *values])


def part_of(z: list[list[Any]], a: list[list[Any]]) -> list[tuple[Any, Any, Any]]:
    """The parts of a lane's channels: z and a by token and channel."""
    found = []
    for c in range(LANE):
        largest = enc.tree(cute.arch.fmax, [z[t][c] for t in range(TOKENS)] + [Float32(LOWEST)])
        most = enc.mul(largest, Float32(LOG2_E))
        minus = enc.negative(most)
        weights = [exp2(enc.fma(z[t][c], Float32(LOG2_E), minus)) for t in range(TOKENS)]
        total = weights[0]
        pooled = enc.mul(weights[0], a[0][c])
        for t in range(1, TOKENS):
            total = enc.add(total, weights[t])
            pooled = enc.fma(weights[t], a[t][c], pooled)
        found.append((most, total, pooled))
    return found


def joined(parts: list[tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
    """Parts of one channel as one."""
    most = enc.tree(cute.arch.fmax, [part[0] for part in parts])
    minus = enc.negative(most)
    total = pooled = Float32(0.0)
    for part in parts:
        factor = exp2(enc.add(part[0], minus))
        total = enc.fma(part[1], factor, total)
        pooled = enc.fma(part[2], factor, pooled)
    return most, total, pooled


def quotient(part: tuple[Any, Any, Any]) -> Any:
    """The pooled value of a part: within 1 unit in the last place of its weighted sum over the sum of weights."""
    _, total, pooled = part
    inverse = cute.arch.rcp_approx(total)
    found = enc.mul(pooled, inverse)
    return enc.fma(enc.fma(enc.negative(found), total, pooled), inverse, found)


@cute.jit
def plus(z: Any, ape: Any, present: Any) -> list[Any]:
    """Four scores with their embeddings where `present`; -0 leaves every score as it is."""
    return [enc.add(z[c], cutlass.select_(present, ape[c], Float32(-0.0))) for c in range(LANE)]


@cute.jit
def without(values: Any, missing: Any, other: cutlass.Constexpr) -> list[Any]:
    """Four values, or `other` in their place where they are missing."""
    return [cutlass.select_(missing, Float32(other), values[c]) for c in range(LANE)]
