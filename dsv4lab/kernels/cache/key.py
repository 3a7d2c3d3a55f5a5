"""A key in the registers of a warp: norm, rotation, quantisation, and its record in a page. Device functions.

    key = RoPE(x / sqrt(mean(x^2) + eps) * weight), rounded to `element` after each of the two

Lane l holds dims [16 l, 16 l + 16) of a kv key, [4 l, 4 l + 4) of an index key, as float32; lanes past the last dim hold zeros.
Of a rotary part of 32 pairs every lane turns one: it gets the two values by shuffles and knows the one angle it needs. The
norm's sum, its root and its products are float32, where the reference has float64: before they are rounded, values are within
2^-22 of the reference's. From there on every byte is the reference's:

    kv     fp8    E4M3 under 2^ceil(log2(amax of 64 / 448)), agreed on by 4 lanes; the rotary part as BF16
           nvfp4  one power of two g for the record, 2688 g >= amax; y = x / g is exact, and so is the quantisation of y by
                  blocks of 16, a lane's own: scale = E4M3(amax / 6), at least 2^-9, 1 for zeros, code = E2M1(y / scale)
    index  fp8    a Hadamard turn of the 128 dims (2 steps in a lane, 5 between lanes, in the reference's order), rounded to
           fp4    `element`; E4M3 and one float32 scale, or E2M1 and a power of two for 32 dims, agreed on by 8 lanes

A NaN or an infinity of x makes the whole key NaN; rows whose squares add up to 2^128 count as such. A weight's NaN stays in its
block, of which nothing counts for g then, and so does its infinity, which becomes one.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint16, Uint32

from dsv4lab.kernels.cache.memory import at, load_words, put_byte, put_words
from dsv4lab.kernels.cache.plan import ROPE_DIM, WARP, KeyPlan
from dsv4lab.kernels.quant.rows import blocks as blk
from dsv4lab.kernels.quant.rows import encode as enc
from dsv4lab.kernels.quant.rows import table
from dsv4lab.kernels.rope.angles import cos_sin, rotated
from dsv4lab.records import INDEX_FP4_GROUP, NOPE_GROUP

_RANGE_BITS, _RANGE_FLOOR_BITS = 0x45280000, 0x0AA80000  # 6 * 448, 2688 * 2^-117
_LEAST_BITS, _MOST_BITS = (127 - 60) << 23, (127 + 60) << 23  # of a record whose steps are usual numbers
_LEAST_RATIO = 7.5 * 2.0**-9  # the E4M3 is 2^-6 or more
_E4M3_MIN, _E4M3_ONE, _E4M3_NAN = 2.0**-9, 0x38, 0x7F
_SIXTH_BITS = 0x7DAAAAAB  # 2^127 / 6
_BY_SIX = (0xAAAAAB * 2.0**-26, -(2.0**-25) / 6)  # a divisor of `encode`, by 6
_COUNTS_OF_FOUR = (0x4B400000 * 0x1111) & 0xFFFFFFFF  # what four counts of `encode` carry besides the codes


class KeyRow:
    """Device functions for the keys of one `KeyPlan`, each for a whole warp with one key."""

    def __init__(self, plan: KeyPlan) -> None:
        plan.check()
        self.plan = plan

    # ---- values ----------------------------------------------------------------------------------------------------------
    @cute.jit
    def load(self, row: Any, lane: Any, element: cutlass.Constexpr) -> Any:
        """The lane's dims of a row, at an address in global memory, as float32."""
        plan = self.plan
        words = plan.width // 2 if element == "bf16" else plan.width
        begin = row + Int64(cutlass.min(lane, plan.lanes - 1)) * (4 * words)
        found = []
        for i in cutlass.range_constexpr(0, words, 4):
            found += load_words(begin + 4 * i, min(words, 4))
        if cutlass.const_expr(plan.lanes < WARP):
            found = [word if lane < plan.lanes else Uint32(0) for word in found]
        return enc.floats(found, element)

    def rounded(self, values: list[Any]) -> list[Any]:
        """The lane's values rounded to `element`, which pooled ones are before their norm."""
        return enc.floats(enc.words_of(values, self.plan.element), self.plan.element)

    def key(self, values: list[Any], weights: list[Any], position: Any, freq: Any, eps: Any, lane: Any) -> tuple[Any, Any]:
        """Norm and rotation. values, weights: the lane's dims; position: of the key; freq: inv_freq[lane]; eps Float32
        -> the lane's dims as words of `element`, not rotated; and its rotated pair, Float32, already rounded to `element`.
        """
        words = self._normed(values, weights, eps)
        cos, sin = cos_sin(position, freq)
        a, b = self._pair(words, lane)
        a, b = rotated(a, b, cos, sin)
        a, b = enc.floats(enc.words_of([a, b], self.plan.element), self.plan.element)
        return words, (a, b)

    def _normed(self, values: list[Any], weights: list[Any], eps: Any) -> list[Any]:
        """x w / sqrt(mean(x^2) + eps), as words; x w is exact where both are BF16."""
        strands = [enc.mul(v, v) for v in values[:4]]
        for i in range(4, len(values)):
            strands[i % 4] = enc.fma(values[i], values[i], strands[i % 4])
        total = enc.tree(enc.add, strands)
        for distance in (16, 8, 4, 2, 1):
            total = enc.add(total, cute.arch.shuffle_sync_bfly(total, distance))
        inverse = _rsqrt(enc.fma(total, Float32(1.0 / self.plan.dim), eps))
        scaled = [enc.mul(enc.mul(v, w), inverse) for v, w in zip(values, weights, strict=True)]
        return enc.words_of(scaled, self.plan.element)

    @cute.jit
    def _pair(self, words: Any, lane: Any) -> Any:
        """Dims nope + 2 lane and the next, from the lanes that hold them."""
        plan = self.plan
        pairs_a_lane = plan.width // 2
        source = plan.nope_lanes + lane // pairs_a_lane
        mine = lane % pairs_a_lane
        size = plan.words // pairs_a_lane  # words of a pair
        chosen = []
        for part in cutlass.range_constexpr(size):
            found = [Uint32(cute.arch.shuffle_sync(words[i * size + part], source)) for i in range(pairs_a_lane)]
            for bit in cutlass.range_constexpr(pairs_a_lane.bit_length() - 1):
                odd = mine & (1 << bit)
                found = [found[2 * i] if odd == 0 else found[2 * i + 1] for i in range(len(found) // 2)]
            chosen.append(found[0])
        return enc.floats(chosen, plan.element)

    # ---- records ---------------------------------------------------------------------------------------------------------
    @cute.jit
    def store(self, words: Any, pair: Any, pages: Any, slot: Any, lane: Any) -> None:
        """Quantise what `key` gave and put it into a slot of a pool; a slot outside the pool is nowhere.

        pages: (P, page_bytes) u8, or (P, page_size, dim) of a plain pool; slot: 32 bits.
        """
        plan = self.plan
        last = Int32(pages.shape[0]) * plan.page_size - 1
        here = Int32(slot) >= 0 and Int32(slot) <= last
        place = Uint32(cutlass.max(cutlass.min(Int32(slot), last), 0))
        page, inside = place // Uint32(plan.page_size), place % Uint32(plan.page_size)
        layout = plan.layout
        start = pages.iterator.toint() + Int64(page) * plan.page_bytes
        data = start + Int64(inside * layout.data_bytes)
        scales = start + Int64(inside * layout.scale_bytes) + plan.page_size * layout.data_bytes
        if cutlass.const_expr(plan.kind == "kv"):
            if cutlass.const_expr(plan.record == "plain"):
                self._plain(words, data, lane, here)
            elif cutlass.const_expr(plan.record == "fp8"):
                self._fp8(words, data, scales, lane, here)
            else:
                self._nvfp4(words, data, scales, lane, here)
            self._rotary(pair, data, lane, here)
        else:
            values = self._with_rotary(words, pair, lane)
            if cutlass.const_expr(plan.record == "plain"):
                self._put_values(values, data, lane, here)
            else:
                self._index(self._turned(values, lane), data, scales, lane, here)

    @cute.jit
    def _plain(self, words: Any, data: Any, lane: Any, here: Any) -> None:
        """The dims that are not rotary, as they are."""
        plan = self.plan
        if cutlass.const_expr(plan.stored == "bf16" and plan.nope_lanes % 2 == 0):
            # Neighbours swap halves, so that a store of the warp fills sectors of 32 bytes.
            mine = words if plan.element == "bf16" else enc.words_of(enc.floats(words, "f32"), "bf16")
            odd = lane % 2 == 1
            first, second = [], []
            for i in cutlass.range_constexpr(4):
                got = Uint32(cute.arch.shuffle_sync_bfly(mine[i] if odd else mine[4 + i], 1))
                first.append(got if odd else mine[i])
                second.append(mine[4 + i] if odd else got)
            inside = here and lane < plan.nope_lanes
            begin = data + Int64(lane // 2 * 64 + lane % 2 * 16)
            put_words(first, begin, inside)
            put_words(second, begin + 32, inside)
        else:
            self._put_values(enc.floats(words, plan.element), data, lane, here and lane < plan.nope_lanes)

    @cute.jit
    def _put_values(self, values: Any, data: Any, lane: Any, here: Any) -> None:
        """The lane's dims in a plain row, in pieces of up to 16 bytes."""
        words = enc.words_of(values, self.plan.stored)
        begin = data + Int64(lane * (4 * len(words)))
        for i in cutlass.range_constexpr(0, len(words), 4):
            put_words(words[i : i + 4], begin + 4 * i, here)

    @cute.jit
    def _rotary(self, pair: Any, data: Any, lane: Any, here: Any) -> None:
        """A pair a lane, behind what is not rotary: BF16, or what a plain pool holds."""
        plan = self.plan
        words = enc.words_of(list(pair), plan.stored if plan.record == "plain" else "bf16")
        size = 4 * len(words)
        put_words(words, data + Int64(lane) * size + (plan.layout.data_bytes - size * ROPE_DIM // 2), here)

    @cute.jit
    def _fp8(self, words: Any, data: Any, scales: Any, lane: Any, here: Any) -> None:
        """Sixteen E4M3 codes a lane, one scale for four lanes; then zeros to the end of the scale part."""
        plan = self.plan
        bits = self._among_nope(enc.amax_bits(enc.absolute(words, plan.element), plan.element), lane)
        for distance in (1, 2):
            bits = enc.max_u32(bits, cute.arch.shuffle_sync_bfly(bits, distance))
        byte, inverse = enc.e8m0_ceil(bits, enc.E4M3_MAX_BITS, enc.FP8_FLOOR_BITS)
        codes = blk.e4m3_of_numbers(words, inverse, plan.element)
        put_words(codes, data + Int64(lane * plan.width), here and lane < plan.nope_lanes)
        sharing = NOPE_GROUP // plan.width
        byte = byte if lane < plan.nope_lanes else Uint32(0)
        put_byte(byte, scales + Int64(lane // sharing), here and lane % sharing == 0)

    @cute.jit
    def _nvfp4(self, words: Any, data: Any, scales: Any, lane: Any, here: Any) -> None:
        """Sixteen E2M1 codes and a block scale a lane; the global scale behind the last of those, then zeros."""
        plan = self.plan
        first = second = byte = power = Uint32(0)
        if cutlass.const_expr(plan.element == "f32"):
            first, second, byte, power = self._careful(words, lane)
        else:
            bits = self._among_nope(enc.amax_bits_of_bf16(words), lane)
            top = Uint32(cute.arch.warp_redux_sync(bits, "umax"))
            power = enc.e8m0_byte(top, _RANGE_BITS)
            inverse = Uint32(_SIXTH_BITS) - (power << 23)
            ratio = enc.mul(bits.bitcast(Float32), inverse.bitcast(Float32))  # on amax / 6's side of every midpoint
            byte = enc.to_e4m3(ratio)
            rare = ratio < Float32(_LEAST_RATIO) and lane < plan.nope_lanes
            if cute.arch.vote_any_sync(rare or top - Uint32(_LEAST_BITS) > Uint32(_MOST_BITS - _LEAST_BITS)):
                first, second, byte, power = self._careful(words, lane)
            else:
                factors = table.round_factors(byte, inverse)
                first, second = (table.nibbles_of_round(words[i : i + 4], factors) for i in (0, 4))
        put_words([first, second], data + Int64(lane) * (plan.width // 2), here and lane < plan.nope_lanes)
        byte = byte if lane < plan.nope_lanes else power if lane == plan.nope_lanes else Uint32(0)
        put_byte(byte, scales + Int64(lane), here and lane < plan.layout.scale_bytes)

    @cute.jit
    def _careful(self, words: Any, lane: Any) -> tuple[Any, Any, Any, Any]:
        """Codes and scales of a key of any kind."""
        element = self.plan.element
        bits = enc.amax_bits(enc.absolute(words, element), element)
        numbers = self._among_nope(Uint32(0) if bits > Uint32(enc.INFINITY_BITS) else enc.finite(bits).bitcast(Uint32), lane)
        numbers = Uint32(cute.arch.warp_redux_sync(numbers, "umax"))
        power, inverse = enc.e8m0_ceil(numbers, _RANGE_BITS, _RANGE_FLOOR_BITS)
        if numbers == Uint32(0):
            power, inverse = Uint32(127), Float32(1.0)
        by_six = (Float32(_BY_SIX[0]), Float32(_BY_SIX[1]))
        largest = enc.mul(bits.bitcast(Float32), inverse)  # far below g it is zero
        ratio = cute.arch.fmax(enc.quotient(largest, by_six), Float32(_E4M3_MIN))
        byte = Uint32(_E4M3_ONE) if largest == Float32(0.0) else enc.to_e4m3(ratio)
        byte = Uint32(_E4M3_NAN) if bits >= Uint32(enc.INFINITY_BITS) else byte
        block_scale, _ = enc.from_e4m3(byte)
        step = enc.divisor(block_scale)
        count = cutlass.const_expr(len(words) // 2)
        held = cute.make_rmem_tensor((2 * count,), Uint32)
        for i in cutlass.range_constexpr(2 * count):
            held[i] = words[i]
        first = second = Uint32(0)
        for _ in cutlass.range(2, unroll=1):  # in the registers of one half
            half = [held[i] for i in range(count)]
            values = [enc.mul(v, inverse) for v in enc.floats(enc.absolute(half, element), element)]
            quotients = [cute.arch.fmin(enc.quotient(v, step), Float32(enc.LARGEST)) for v in values]
            first, second = second, blk.nibbles(quotients, half, element, "sm_90a")[0]
            for i in cutlass.range_constexpr(count):
                held[i] = held[count + i]
        return first, second, byte, power

    @cute.jit
    def _among_nope(self, bits: Any, lane: Any) -> Any:
        """A maximum, of rotary dims nothing."""
        return bits if lane < self.plan.nope_lanes else Uint32(0)

    # ---- index keys ------------------------------------------------------------------------------------------------------
    @cute.jit
    def _with_rotary(self, words: Any, pair: Any, lane: Any) -> Any:
        """The lane's dims as float32, the rotated ones from the lanes that turned them."""
        plan = self.plan
        values = enc.floats(words, plan.element)
        found = []
        for i in cutlass.range_constexpr(plan.width):
            source = (lane - plan.nope_lanes) * (plan.width // 2) + i // 2
            turned = Float32(cute.arch.shuffle_sync(pair[i % 2], source))
            found.append(turned if lane >= plan.nope_lanes else values[i])
        return found

    @cute.jit
    def _turned(self, values: Any, lane: Any) -> Any:
        """The Hadamard turn of the whole key: (a, b) -> (a + b, a - b) at distances 1, 2, 4 .. 64, over sqrt(128)."""
        y = list(values)
        for i, j in ((0, 1), (2, 3), (0, 2), (1, 3)):
            y[i], y[j] = enc.add(y[i], y[j]), enc.add(y[i], enc.negative(y[j]))
        for distance in (1, 2, 4, 8, 16):
            upper = lane & distance
            for i in cutlass.range_constexpr(4):
                other = Float32(cute.arch.shuffle_sync_bfly(y[i], distance))
                y[i] = enc.add(other, y[i] if upper == 0 else enc.negative(y[i]))
        return self.rounded([enc.mul(v, Float32(self.plan.dim**-0.5)) for v in y])

    @cute.jit
    def _index(self, values: Any, data: Any, scales: Any, lane: Any, here: Any) -> None:
        """Four codes a lane: E4M3 and a float32 scale, or E2M1 and a byte for 8 lanes."""
        plan = self.plan
        words = enc.words_of(values, "f32")
        magnitudes = enc.absolute(words, "f32")
        bits = enc.amax_bits(magnitudes, "f32")
        if cutlass.const_expr(plan.record == "fp8"):
            bits = Uint32(cute.arch.warp_redux_sync(bits, "umax"))
            byte, inverse = enc.e8m0_ceil(bits, enc.E4M3_MAX_BITS, enc.FP8_FLOOR_BITS)
            put_words(blk.e4m3_of_numbers(words, inverse, "f32"), data + Int64(lane * 4), here)
            put_words([byte << 23], scales, here and lane == 0)
        else:
            sharing = INDEX_FP4_GROUP // plan.width
            for distance in (1, 2, 4):
                bits = enc.max_u32(bits, cute.arch.shuffle_sync_bfly(bits, distance))
            byte, inverse = enc.e8m0_ceil(bits, enc.E2M1_MAX_BITS, enc.MXFP4_FLOOR_BITS)
            byte = Uint32(255) if bits >= Uint32(enc.INFINITY_BITS) else byte
            counts = enc.e2m1_counts([enc.mul(v, inverse) for v in enc.floats(magnitudes, "f32")])
            codes = counts[3]
            for i in cutlass.range_constexpr(3):
                codes = codes * Uint32(16) + counts[2 - i]
            codes = codes - Uint32(_COUNTS_OF_FOUR)
            for i in cutlass.range_constexpr(4):
                codes = codes | ((words[i] >> (28 - 4 * i)) & Uint32(8 << 4 * i))
            if here:
                at(data + Int64(lane * 2), Uint16, 1)[0] = Uint16(codes & Uint32(0xFFFF))
            put_byte(byte, scales + Int64(lane // sharing), here and lane % sharing == 0)


# ---- arithmetic --------------------------------------------------------------------------------------------------------
def _rsqrt(x: Any) -> Any:
    """1 / sqrt(x) within 2^-23 of it, by one step from the approximation."""
    seed = cute.arch.inline_ptx("rsqrt.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])
    error = enc.fma(enc.negative(enc.mul(x, seed)), seed, Float32(1.0))
    return enc.fma(enc.mul(seed, Float32(0.5)), error, seed)
