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
from cutlass import Float32

from dsv4lab.kernels.quant.rows import encode as enc


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
def nvfp4_values(out: Any, words: Any, bits: Any, terms: Any) -> None:
    """A lane's words of a block of 16 -> out. bits: `largest_bits` of the block; terms: `enc.global_terms`."""
    count = cutlass.const_expr(2 * len(words))
    wide = enc.floats(enc.absolute(words, "bf16"), "bf16")
    values = cute.make_rmem_tensor((count,), Float32)
    for i in cutlass.range_constexpr(count):
        values[i] = wide[i]
    block_scale, _ = enc.block_quotients(values, None, "bf16", bits, enc.block_ratio(bits, terms), terms)
    counts = enc.e2m1_counts([values[i] for i in range(count)])
    pair = enc.pack_bf16(block_scale, block_scale)
    for i in cutlass.range_constexpr(count // 2):
        out[i] = enc.e2m1_pair_times(counts[2 * i], counts[2 * i + 1], words[i], pair)
