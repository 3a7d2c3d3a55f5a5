"""Rows -> NVFP4: E2M1 codes, E4M3 block scales in atom128x4 tiles, one global scale a row; bit for bit the reference's.

    row_scale = amax of the row / 2688 (1 where that is 0), or the static scale given
    block_scale = E4M3(amax of the block / (6 row_scale)), at least 2^-9, 1 for a block of zeros
    code = E2M1(x / (block_scale row_scale))

One warp a row. A lane takes 16 consecutive values, one block, at a time, and the warp 512; rows are read twice where their own
amax is needed, the second time from cache. Rows and blocks that only fill the last tile get scales of zero.
Bytes: x once from memory, codes and scales once to it. Source: the model specification, section 11.2.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Uint32

from dsv4lab.kernels.quant.nvfp4_rows.config import GROUP, ROWS_PER_CTA, QuantizeRowsConfig

WARP = 32
ATOM_ROWS, ATOM_COLUMNS, ATOM_BYTES = 128, 4, 512
E2M1_MAX, RANGE = 6.0, 2688.0  # largest code; largest code times largest block scale
E4M3_MIN = 2.0**-9
F32_TINY, F32_MAX = 2.0**-126, 3.4028234663852886e38


class QuantizeRowsSm100:
    """The kernel for one `QuantizeRowsConfig`; M and K are the call's."""

    def __init__(self, config: QuantizeRowsConfig) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        static_scale: cute.Tensor,
        codes: cute.Tensor,
        scale: Any,
        row_scale: cute.Tensor,
        stream: Any,
    ) -> None:
        """x (M, K); static_scale (1,) f32, read if the config says so; codes (M, K/8) u32; scale (ceil(M/128), ceil(K/64), 512)
        u8; row_scale (M,) f32.
        """
        ctas = scale.shape[0] * (ATOM_ROWS // ROWS_PER_CTA)
        self.kernel(x, static_scale, codes, scale, row_scale).launch(
            grid=[ctas, 1, 1], block=[WARP * ROWS_PER_CTA, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, x: Any, static_scale: Any, codes: Any, scale: Any, row_scale: Any) -> None:
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = thread % WARP
        row = block * ROWS_PER_CTA + thread // WARP
        column_tiles = scale.shape[1]
        groups = x.shape[1] // GROUP
        tile_row, inner = row // ATOM_ROWS, row % ATOM_ROWS
        offset = (inner % 32) * 16 + inner // 32 * ATOM_COLUMNS
        if row < x.shape[0]:
            factor = Float32(0.0)
            if cutlass.const_expr(self.config.static):
                factor = static_scale[0]
            else:
                factor = self._row_scale(x, row, lane, groups)
            if lane == 0:
                row_scale[row] = factor
            for group in cutlass.range(lane, column_tiles * ATOM_COLUMNS, WARP, unroll=1):
                byte = Uint32(0)
                if group < groups:
                    byte = self._block(x, codes, row, group, factor)
                scale[tile_row, group // ATOM_COLUMNS, offset + group % ATOM_COLUMNS] = cutlass.Uint8(byte)
        else:
            for group in cutlass.range(lane, column_tiles * ATOM_COLUMNS, WARP, unroll=1):
                scale[tile_row, group // ATOM_COLUMNS, offset + group % ATOM_COLUMNS] = cutlass.Uint8(0)

    @cute.jit
    def _row_scale(self, x: Any, row: Any, lane: Any, groups: Any) -> Any:
        """amax / 2688 of a whole row, in every lane."""
        largest = Float32(0.0)
        for group in cutlass.range(lane, groups, WARP, unroll=1):
            largest = cute.arch.fmax(largest, _amax(_values(x, row, group)))
        for distance in (16, 8, 4, 2, 1):
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, distance))
        largest = cute.arch.fmin(largest, Float32(F32_MAX))
        factor = cute.arch.fmax(largest / Float32(RANGE), Float32(F32_TINY))
        return factor if largest > 0.0 else Float32(1.0)

    @cute.jit
    def _block(self, x: Any, codes: Any, row: Any, group: Any, factor: Any) -> Any:
        """Quantise 16 values: their codes to memory, the byte of their scale back."""
        values = _values(x, row, group)
        largest = cute.arch.fmin(_amax(values), Float32(F32_MAX))
        ratio = largest / (Float32(E2M1_MAX) * factor)
        ratio = cute.arch.fmax(ratio, Float32(E4M3_MIN)) if ratio != 0.0 else Float32(1.0)
        byte = _to_e4m3(ratio)
        step = _from_e4m3(byte) * factor
        for word in cutlass.range_constexpr(GROUP // 8):
            codes[row, group * 2 + word] = _to_e2m1([values[word * 8 + i] / step for i in range(8)])
        return byte


def _values(x: Any, row: Any, group: Any) -> Any:
    """One block of 16 values in registers, float32."""
    source = cute.local_tile(x, (1, GROUP), (row, group))
    held = cute.make_rmem_tensor((GROUP,), x.element_type)
    cute.autovec_copy(cute.make_tensor(source.iterator, GROUP), held)
    wide = cute.make_rmem_tensor((GROUP,), Float32)
    wide.store(held.load().to(Float32))
    return wide


def _amax(values: Any) -> Any:
    largest = Float32(0.0)
    for i in range(GROUP):
        largest = cute.arch.fmax(largest, _absolute(values[i]))
    return largest


def _absolute(value: Any) -> Any:
    return cute.arch.inline_ptx("abs.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[value])


def _to_e4m3(value: Any) -> Any:
    """The byte of one value, rounded to the nearest, ties to even, saturating."""
    code = "{ .reg .b16 pair; .reg .f32 zero; mov.f32 zero, 0f00000000; cvt.rn.satfinite.e4m3x2.f32 pair, zero, {$r0};"
    return cute.arch.inline_ptx(code + " cvt.u32.u16 {$w0}, pair; }", write_only_types=[Uint32], read_only_args=[value])


def _from_e4m3(byte: Any) -> Any:
    """The value of a byte, exact."""
    code = "{ .reg .b16 pair, low, high; .reg .b32 halves; cvt.u16.u32 pair, {$r0}; cvt.rn.f16x2.e4m3x2 halves, pair;"
    code += " mov.b32 {low, high}, halves; cvt.f32.f16 {$w0}, low; }"
    return cute.arch.inline_ptx(code, write_only_types=[Float32], read_only_args=[byte])


def _to_e2m1(values: list[Any]) -> Any:
    """Eight codes in a word, the first in the lowest nibble; nearest, ties to even, saturating."""
    pairs = " ".join(f"cvt.rn.satfinite.e2m1x2.f32 byte{i}, {{$r{2 * i + 1}}}, {{$r{2 * i}}};" for i in range(len(values) // 2))
    code = "{ .reg .b8 byte0, byte1, byte2, byte3; " + pairs + " mov.b32 {$w0}, {byte0, byte1, byte2, byte3}; }"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=values)
