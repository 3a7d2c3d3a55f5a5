"""Index queries: rotated, turned by a Hadamard matrix, and as their quantised format has them; BF16 in, BF16 out.

    y = rotate(q, position), rounded;  z = H y / sqrt(128), rounded;  out = round(z / s) s

H is Sylvester's matrix. s = 2^ceil(log2(amax / 448)) of 128 values for "fp8", amax at least 1e-4, and 2^ceil(log2(amax / 6)) of
32 for "fp4"; with "plain" records out is y. Rounding steps and the order of sums are the reference's: all that follows the
rotation is equal to it in every bit. The rotation itself is within 2^-22 of a pair's length, see `rope.heads`.

Four lanes have a head. Lane l has columns 32 j + 8 (l % 4) + (0..7), j = 0..3: four vectors of 16 bytes. So butterflies at
distance 1, 2, 4 and 32, 64 stay within a lane, those at 8 and 16 are two shuffles a value; a lane rotates vectors 2 and 3, no
lane more than another; blocks of 32 are a vector of four lanes, and four lanes write 64 bytes together. Lane l of a warp finds
sine and cosine of pair l; shuffles hand every lane its eight.

No codes are made. In each binade a format's numbers are equally spaced, and all below the last binade like those in it: with
e = max(2^floor(log2 |z|), least normal s) the spacing u is e / 2 for E2M1 and e / 8 for E4M3, and (z + 192 u) - 192 u is z
rounded to multiples of u, ties to even, since BF16 in [128 u, 256 u) are u apart. Five instructions for two values. Where 192 u
may overflow, or something is no number, the same is done in float32, scaled down.

Bytes: 4 a value: 8192 tokens of 64 heads: 268 MB, 64 us of an H200's copy of 4.2 TB/s. Instructions a value, counted in
sm_90a's code: 20 for "fp4", 4.4 for "plain"; 61 us where three quarters of the slots are used. 80 registers at most.
sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32

from dsv4lab.kernels.indexer.query.config import HEAD_DIM, WARP, WARP_HEADS, QueryConfig
from dsv4lab.kernels.quant.rows import encode as enc
from dsv4lab.kernels.rope import angles

_LANES = 4  # of a head
_VECTOR = 8  # values; 16 bytes of BF16
_VECTORS = HEAD_DIM // (_LANES * _VECTOR)
_TURNED = 2  # vectors of a lane, the last ones, that are rotated
_PAIRS = _VECTOR // 2
_NORM = 128.0**-0.5
_VAST_BITS = 0x7C000000  # 2^121: what is below can be rounded as BF16
_LARGE_BITS = 0x6F800000  # 2^96: what is below can be rounded as float32; what is not, times 2^-32
_TWICE = 0x10001  # a number in both halves of a word
_VAST_TO_SIGN, _SIGNS, _EXPONENTS = (0x8000 - (_VAST_BITS >> 16)) * _TWICE, 0x8000 * _TWICE, 0x7F80 * _TWICE
_SHRINK, _GROW = 2.0**-32, 2.0**32


class _Format:
    """One of the formats: codes' largest value, where their binades end, and how they are spaced."""

    def __init__(self, largest: float, least: int, bits: int, floor: int, vectors: int) -> None:
        self.largest = largest
        self.largest_bits = {448.0: enc.E4M3_MAX_BITS, 6.0: enc.E2M1_MAX_BITS}[largest]
        self.least = least  # the last binade's exponent
        self.bits = bits  # of a mantissa: codes are 2^-bits of their binade apart
        self.floor = floor  # of amax, as bits of a float32
        self.vectors = vectors  # of a lane that share a scale


_FORMATS = {
    "fp8": _Format(448.0, -6, 3, enc.FP8_FLOOR_BITS, _VECTORS),
    "fp4": _Format(6.0, 0, 1, enc.MXFP4_FLOOR_BITS, 1),
}


class IndexQuery:
    """The kernel of one `QueryConfig`; M and the number of heads are the call's."""

    def __init__(self, config: QueryConfig) -> None:
        config.check()
        self.config = config
        self.words = _VECTOR // 2 if config.element == "bf16" else _VECTOR  # of a vector

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        positions: cute.Tensor,
        inv_freq: cute.Tensor,
        out: cute.Tensor,
        stride: Int32,
        heads: Int32,
        stream: Any,
    ) -> None:
        """q and out (M heads, 128) as u32 words; positions: token m's is the i32 word m stride; inv_freq (32,) f32."""
        config = self.config
        blocks = (heads + config.heads - 1) // config.heads
        self.kernel(q, positions, inv_freq, out, stride, heads, blocks).launch(
            grid=[cute.size(q, mode=[0]) // heads * blocks, 1, 1],
            block=[config.warps * WARP, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, q: Any, positions: Any, inv_freq: Any, out: Any, stride: Int32, heads: Int32, blocks: Int32) -> None:
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = thread % WARP
        token = block // blocks
        first = token * heads + block % blocks * config.heads + thread // _LANES
        end = (token + 1) * heads
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        held = cute.make_rmem_tensor((config.passes * _VECTORS * self.words,), Uint32)
        for i in cutlass.range_constexpr(config.passes):
            row = cutlass.min(first + i * config.warps * WARP_HEADS, end - 1)  # lanes past the last head repeat it
            for j in cutlass.range_constexpr(_VECTORS):
                source = cute.local_tile(q[row, None], (self.words,), (j * _LANES + lane % _LANES,))
                cute.autovec_copy(source, self._vector(held, i, j))
        cos, sin = angles.cos_sin(positions[token * stride], inv_freq[lane])
        firsts = [(j * _LANES + lane % _LANES) * _PAIRS for j in range(_TURNED)]
        pairs = [pair for first_pair in firsts for pair in angles.shared_over_lanes(cos, sin, first_pair, _PAIRS)]
        for i in cutlass.range_constexpr(config.passes):
            self._rotate(held, i, pairs)
            if cutlass.const_expr(config.record != "plain"):
                self._hadamard(held, i, lane)
                self._quantise(held, i)
            row = first + i * config.warps * WARP_HEADS
            if row < end:
                for j in cutlass.range_constexpr(_VECTORS):
                    target = cute.local_tile(out[row, None], (self.words,), (j * _LANES + lane % _LANES,))
                    cute.autovec_copy(self._vector(held, i, j), target)

    def _vector(self, held: Any, i: int, j: int) -> Any:
        """The words of vector j of a lane's i-th head."""
        return cute.local_tile(held, (self.words,), (i * _VECTORS + j,))

    def _floats(self, vector: Any) -> list[Any]:
        return enc.floats([vector[k] for k in range(self.words)], self.config.element)

    @cute.jit
    def _put(self, vector: Any, values: Any) -> None:
        """Float32 values, rounded, in place of a vector's."""
        words = enc.words_of(values, self.config.element)
        for k in cutlass.range_constexpr(self.words):
            vector[k] = words[k]

    @cute.jit
    def _rotate(self, held: Any, i: int, pairs: Any) -> None:
        for j in cutlass.range_constexpr(_TURNED):
            vector = self._vector(held, i, _VECTORS - _TURNED + j)
            values = self._floats(vector)
            turned: list[Any] = []
            for k in cutlass.range_constexpr(_PAIRS):
                turned += angles.rotated(values[2 * k], values[2 * k + 1], *pairs[j * _PAIRS + k])
            self._put(vector, turned)

    @cute.jit
    def _hadamard(self, held: Any, i: int, lane: Any) -> None:
        """Seven stages of float32 butterflies, nearest neighbours first."""
        values = [value for j in range(_VECTORS) for value in self._floats(self._vector(held, i, j))]
        for distance in (1, 2, 4):
            values = _butterflies(values, distance)
        for distance in (1, 2):  # lanes: columns 8 and 16 apart
            sign = Float32(1.0) if lane & distance == 0 else Float32(-1.0)
            values = [enc.fma(v, sign, Float32(cute.arch.shuffle_sync_bfly(v, distance))) for v in values]
        for distance in (_VECTOR, 2 * _VECTOR):  # vectors: columns 32 and 64 apart
            values = _butterflies(values, distance)
        for j in cutlass.range_constexpr(_VECTORS):
            self._put(self._vector(held, i, j), [enc.mul(v, Float32(_NORM)) for v in values[j * _VECTOR : (j + 1) * _VECTOR]])

    @cute.jit
    def _quantise(self, held: Any, i: int) -> None:
        """The values that codes stand for, in place."""
        own = [self._vector(held, i, j) for j in range(_VECTORS)]
        peaks = [enc.absolute([vector[k] for k in range(self.words)], self.config.element) for vector in own]
        if cutlass.const_expr(self.config.record == "fp8"):
            peaks = [[word for words in peaks for word in words]]
        if cutlass.const_expr(self.config.element == "f32"):
            self._careful(own, [_over_head(enc.max_u32, enc.amax_bits(words, "f32")) for words in peaks])
        else:
            self._quantise_bf16(own, [enc.tree(enc._max_u16x2, words) for words in peaks])

    @cute.jit
    def _quantise_bf16(self, own: Any, peaks: Any) -> None:
        """Two blocks at a time: the halves of a word have one's largest magnitude each. peaks: two of each block."""
        kind = _FORMATS[self.config.record]
        joint = []
        for p in cutlass.range_constexpr((len(peaks) + 1) // 2):
            one, two = peaks[2 * p], peaks[min(2 * p + 1, len(peaks) - 1)]
            both = enc._max_u16x2(enc.prmt(one, two, 0x5410), enc.prmt(one, two, 0x7632))
            joint.append(_over_head(enc._max_u16x2, both))
        vast = (enc.tree(enc._max_u16x2, list(joint)) + Uint32(_VAST_TO_SIGN)) & Uint32(_SIGNS) != Uint32(0)
        if vast:
            self._careful(own, [half for word in joint for half in (word << 16, word & Uint32(0xFFFF0000))][: len(peaks)])
        else:
            # The scale is the next binade's where a mantissa is above the largest code's.
            carry = Uint32((0x7F - (kind.largest_bits >> 16 & 0x7F)) * _TWICE)
            floor, down = (kind.floor >> 16 & 0x7F80) * _TWICE, ((kind.largest_bits >> 23) - 127 - kind.least) * 0x80 * _TWICE
            binades = [(word + carry) & Uint32(_EXPONENTS) for word in joint]
            least = [enc._max_u16x2(word, Uint32(floor)) - Uint32(down) for word in binades]
            for j in cutlass.range_constexpr(_VECTORS):
                block = j // kind.vectors
                mine = enc.prmt(least[block // 2], Uint32(0), (0x1010, 0x3232)[block % 2])
                for k in cutlass.range_constexpr(self.words):
                    own[j][k] = _nearest(own[j][k], mine, kind.bits)

    @cute.jit
    def _careful(self, own: Any, peaks: Any) -> None:
        """Blocks of any kind. peaks: their largest magnitudes, as bits of a float32."""
        kind = _FORMATS[self.config.record]
        for j in cutlass.range_constexpr(_VECTORS):
            bits = peaks[j // kind.vectors]
            byte, _ = enc.e8m0_ceil(bits, kind.largest_bits, kind.floor)
            large, nan = bits >= Uint32(_LARGE_BITS), bits > Uint32(enc.INFINITY_BITS)
            shrink = Float32(_SHRINK) if large else Float32(1.0)
            grow = Float32(_GROW) if large else Float32(1.0)
            step = enc.mul((byte << 23).bitcast(Float32), shrink)
            largest, least = enc.mul(step, Float32(kind.largest)), enc.mul(step, Float32(2.0**kind.least)).bitcast(Uint32)
            more = Uint32(((23 - kind.bits) << 23) + 0x400000)  # times 1.5 * 2^23 of the spacing
            found = []
            for value in self._floats(own[j]):
                size = (value.bitcast(Uint32) & Uint32(0x7FFFFFFF)).bitcast(Float32)
                size = cute.arch.fmin(enc.mul(size, shrink), largest)
                shift = (enc.max_u32(size.bitcast(Uint32) & Uint32(enc.INFINITY_BITS), least) + more).bitcast(Float32)
                near = enc.mul(enc.add(enc.add(size, shift), enc.negative(shift)), grow)
                signed = near.bitcast(Uint32) | (value.bitcast(Uint32) & Uint32(0x80000000))
                found.append((Uint32(enc.NAN_BITS) if nan else signed).bitcast(Float32))
            self._put(own[j], found)


def _over_head(combine: Any, value: Any) -> Any:
    """The words of a head's four lanes, combined."""
    for distance in (1, 2):
        value = combine(value, cute.arch.shuffle_sync_bfly(value, distance))
    return value


def _butterflies(values: list[Any], distance: int) -> list[Any]:
    """(a, b) -> (a + b, a - b) of values that far apart."""
    found = list(values)
    for i in range(len(values)):
        if not i & distance:
            a, b = values[i], values[i + distance]
            found[i], found[i + distance] = enc.add(a, b), enc.add(a, enc.negative(b))
    return found


def _nearest(word: Any, least: Any, bits: int) -> Any:
    """Two BF16, rounded to `bits` bits of mantissa, or to the spacing of numbers of magnitude `least`; zeros keep signs."""
    spacings = 0x4340 - bits * 0x80  # 192 of them, a BF16, in a binade's magnitude
    code = "{ .reg .b32 e, sum, n; and.b32 e, {$r0}, 0x7F807F80; max.u16x2 e, e, {$r1};"
    code += f" mov.b32 n, {spacings * _TWICE}; fma.rn.bf16x2 sum, e, n, {{$r0}};"
    code += f" mov.b32 n, {(spacings | 0x8000) * _TWICE}; fma.rn.bf16x2 sum, e, n, sum;"
    code += " lop3.b32 {$w0}, sum, {$r0}, 0x80008000, 0xF8; }"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[word, least])
