"""A stored key in the lanes of a warp: its record in a page, decoded to float32. Device functions.

Of every 128 dims a lane has four consecutive ones, so that a store of the warp is one piece of memory; codes come in words of
four. Numbers are the reference's in every bit. All loads of a record can be in flight before the first value is decoded.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint16, Uint32

from dsv4lab.formats import NVFP4
from dsv4lab.kernels.cache.memory import at, load_words
from dsv4lab.kernels.cache.plan import ROPE_DIM, WARP, KeyPlan
from dsv4lab.kernels.quant.rows import encode as enc
from dsv4lab.records import NOPE_GROUP

FOUR = 4  # dims of a lane at a time
SPAN = WARP * FOUR
_SMALLEST = 1 << 22  # bits of 2^-127


class StoredKey:
    """Device functions for the kv records of one `KeyPlan`, each for a whole warp with one key."""

    def __init__(self, key: KeyPlan) -> None:
        key.check()
        self.key = key
        self.nope = key.dim - ROPE_DIM
        self.steps = -(-key.dim // SPAN)
        self.packed = key.record != "plain"

    def place(self, pages: Any, slot: Any) -> tuple[Any, Any]:
        """(address of the data of a slot's record, of its scales). pages (P, page_bytes) u8; slot below P * page_size, one
        that is negative as slot 0, which is there as in any pool.
        """
        key, layout = self.key, self.key.layout
        place = Uint32(cutlass.max(Int32(slot), 0))
        page, inside = place // Uint32(key.page_size), place % Uint32(key.page_size)
        start = pages.iterator.toint() + Int64(page) * key.page_bytes
        data = start + Int64(inside * layout.data_bytes)
        return data, start + Int64(key.page_size * layout.data_bytes + inside * layout.scale_bytes)

    def load(self, data: Any, scales: Any, lane: Any) -> list[Any]:
        """What `values` needs of a record, step by step of 128 dims."""
        return [self._load(data, scales, self._dim(step, lane), step) for step in range(self.steps)]

    def values(self, loaded: list[Any], step: int, lane: Any) -> Any:
        """The lane's four values of a step, float32. loaded: all that `load` gave."""
        return self._values(loaded[step], self._dim(step, lane), step)

    def has(self, step: int, lane: Any) -> Any:
        """Whether the lane has dims of its own in a step."""
        return step * SPAN + lane * FOUR < self.key.dim

    def _dim(self, step: int, lane: Any) -> Any:
        return cutlass.min(step * SPAN + lane * FOUR, self.key.dim - FOUR)

    def _parts(self, step: int) -> tuple[bool, bool]:
        """Whether the dims of a step hold some that are not rotary, and some that are."""
        return step * SPAN < self.nope, min((step + 1) * SPAN, self.key.dim) > self.nope

    @cute.jit
    def _load(self, data: Any, scales: Any, dim: Any, step: cutlass.Constexpr) -> Any:
        """What four dims need: words, a block's scale, the record's."""
        key, nope = self.key, self.nope
        codes, rotary = self._parts(step)
        words, scale, power = [], Uint32(0), Uint32(0)
        if cutlass.const_expr(not self.packed):
            size = 4 if key.stored == "f32" else 2
            words = load_words(data + Int64(dim * size), size)
        else:
            # Where a step has both parts a lane loads both, of its own dim and of the nearest: loads need no branch then.
            if cutlass.const_expr(codes):
                code_dim = cutlass.min(dim, nope - FOUR)
                if cutlass.const_expr(key.record == "fp8"):
                    words += load_words(data + Int64(code_dim), 1)
                    scale = Uint32(at(scales + Int64(code_dim // NOPE_GROUP), Uint8, 1)[0])
                else:
                    words += [Uint32(at(data + Int64(code_dim // 2), Uint16, 1)[0])]
                    scale = Uint32(at(scales + Int64(code_dim // NVFP4.group), Uint8, 1)[0])
                    power = Uint32(at(scales + nope // NVFP4.group, Uint8, 1)[0])
            if cutlass.const_expr(rotary):
                first = key.layout.data_bytes - 2 * ROPE_DIM
                words += load_words(data + first + Int64(cutlass.max(dim - nope, 0) * 2), 2)
        return words, scale, power

    @cute.jit
    def _values(self, loaded: Any, dim: Any, step: cutlass.Constexpr) -> Any:
        """Four values."""
        words, scale, power = loaded
        codes, rotary = self._parts(step)
        if cutlass.const_expr(not self.packed):
            return enc.floats(words, self.key.stored)
        decoded, turned = [], []
        if cutlass.const_expr(codes):
            if cutlass.const_expr(self.key.record == "fp8"):
                factor = _e8m0(scale)
                raw = [*enc.from_e4m3(words[0] & Uint32(0xFFFF)), *enc.from_e4m3(words[0] >> 16)]
                decoded = [enc.mul(value, factor) for value in raw]
            else:
                block_scale, _ = enc.from_e4m3(scale)
                factor = _e8m0(power)
                decoded = [enc.mul(enc.mul(_e2m1(words[0] >> (4 * i)), block_scale), factor) for i in range(FOUR)]
        if cutlass.const_expr(rotary):
            turned = enc.floats(words[-2:], "bf16")
        if cutlass.const_expr(codes and rotary):
            decoded = [decoded[i] if dim < self.nope else turned[i] for i in range(FOUR)]
        return decoded if cutlass.const_expr(codes) else turned


@cute.jit
def _e8m0(byte: Any) -> Any:
    """2^(byte - 127), exact; 255 is NaN."""
    bits = byte << 23 if byte > Uint32(0) else Uint32(_SMALLEST)
    return Uint32(enc.NAN_BITS).bitcast(Float32) if byte == Uint32(255) else bits.bitcast(Float32)


def _e2m1(code: Any) -> Any:
    """The value of a code in the low four bits of a word: its low three, as the top of a float32, are 2^-126 of it."""
    bits = ((code & Uint32(7)) << 22) | ((code & Uint32(8)) << 28)
    return enc.mul(bits.bitcast(Float32), Float32(2.0**126))
