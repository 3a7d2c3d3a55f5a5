"""Results of SwiGLU, rounded to BF16, as the NVFP4 values that the next product multiplies, also BF16.

    block of 16 columns   block_scale = E4M3(amax / (6 global)), at least 2^-9, 1 for zeros;  step = block_scale global
    value                 E2M1(h / step) block_scale

The global scale, given, comes back as a factor of the next product. Bit for bit what `quant.rows.api.activation_values` makes
of the same BF16: the same steps, see `quant.rows.encode`, but for blocks that lie in several lanes, a few columns each, whose
maximum goes by shuffles.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Uint32

from dsv4lab.kernels.quant.rows import encode as enc

_E2M1_MAX = 6.0
_E4M3_MIN = 2.0**-9
_LOW, _HIGH = 2.0**-60, 2.0**60  # global scales and steps between which nothing under- or overflows
_LEAST_BITS, _MOST_BITS = (127 - 6) << 23, (127 + 9) << 23  # 2^-6 and 512: block scales with three exact bits
_NAN_BITS, _NO_BITS = 0x7FC00000, 0xFFFFFFFF  # the latter: of no magnitude


def largest_bits(words: Any, lanes: int) -> Any:
    """The largest magnitude of a block, which `lanes` neighbouring lanes have words of, as float32 bits; a NaN's is above all.

    All lanes of the warp come here.
    """
    bits = enc.amax_bits(enc.absolute(words, "bf16"), "bf16")
    distance = lanes // 2
    while distance > 0:
        bits = enc.max_u32(bits, cute.arch.shuffle_sync_bfly(bits, distance))
        distance //= 2
    return bits


@cute.jit
def global_terms(scale: Any) -> Any:
    """What blocks of a global scale share: (scale, 6 scale, 1 / (6 scale) in two parts, bits of an amax that is never rare)."""
    sixfold = enc.mul(scale, Float32(_E2M1_MAX))
    high, low = enc.divisor(sixfold)
    plain = scale >= Float32(_LOW) and scale <= Float32(_HIGH)
    high = high if plain else Uint32(_NAN_BITS).bitcast(Float32)  # makes every block a rare one,
    usual = Uint32(0) if plain else Uint32(_NO_BITS)  # blocks of zeros, too, which otherwise are not
    return scale, sixfold, high, low, usual


@cute.jit
def nvfp4_values(out: Any, words: Any, bits: Any, terms: Any) -> None:
    """A lane's words of a block of 16 -> out. bits: `largest_bits` of the block; terms: `global_terms`."""
    scale, sixfold, high, low, usual = terms
    ratio = enc.quotient(enc.finite(bits), (high, low))
    unusual = ratio.bitcast(Uint32) - Uint32(_LEAST_BITS) > Uint32(_MOST_BITS - _LEAST_BITS)
    nan = bits > Uint32(enc.INFINITY_BITS)
    rare = (unusual and bits != usual) or bits >= Uint32(enc.INFINITY_BITS)
    count = cutlass.const_expr(2 * len(words))
    wide = enc.floats(enc.absolute(words, "bf16"), "bf16")
    values = cute.make_rmem_tensor((count,), Float32)
    for i in cutlass.range_constexpr(count):
        values[i] = wide[i]
    if rare:
        ratio = enc.finite(bits) / sixfold
        if nan:
            ratio = Uint32(_NAN_BITS).bitcast(Float32)
    ratio = Float32(1.0) if ratio == 0.0 else cute.arch.fmax(ratio, Float32(_E4M3_MIN), nan=True)
    block_scale, _ = enc.from_e4m3(enc.to_e4m3(ratio))
    step = enc.mul(block_scale, scale)
    if rare:
        gain = Float32(1.0)
        if step < Float32(_LOW):
            gain = Float32(2.0**64)
        if step > Float32(_HIGH):
            gain = Float32(2.0**-64)
        step = Float32(1.0) if nan else enc.mul(step, gain)
        most = enc.mul(step, Float32(enc.LARGEST))
        for i in cutlass.range_constexpr(count):
            values[i] = most if nan else cute.arch.fmin(enc.mul(values[i], gain), most)
    by_step = enc.divisor(step)
    counts = enc.e2m1_counts([enc.quotient(values[i], by_step) for i in range(count)])
    pair = enc.pack_bf16(block_scale, block_scale)
    for i in cutlass.range_constexpr(count // 2):
        out[i] = enc.e2m1_pair_times(counts[2 * i], counts[2 * i + 1], words[i], pair)
