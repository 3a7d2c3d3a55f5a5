"""A normalised row as codes: bit for bit what `quant.rows` makes of the same BF16.

A lane has 8 columns, so that a block of NVFP4 lies in 2 lanes, a group of FP8 in 16: their maximum goes by shuffles.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Uint8, Uint32

from dsv4lab.kernels.mhc import values as val
from dsv4lab.kernels.mhc.config import CHUNK, GROUPS, MixConfig
from dsv4lab.kernels.quant.rows import blocks as blk
from dsv4lab.kernels.quant.rows import encode as enc
from dsv4lab.kernels.quant.rows import table


@dataclass(frozen=True)
class Codes:
    """Where codes and scales go; of NVFP4 also `enc.global_terms`, and a lane's entry of `table`."""

    plan: MixConfig
    arch: str
    codes: Any
    scales: Any
    terms: Any
    entry: Any

    @classmethod
    def of(cls, plan: MixConfig, arch: str, codes: Any, scales: Any, given: Any, thread: Any) -> "Codes":
        """given: NVFP4's global scale."""
        terms = entry = None
        if plan.quant != "fp8":
            terms = enc.global_terms(given[0])
            entry = table.prepare(given[0], thread) if arch == "sm_90a" else None
        return cls(plan, arch, codes, scales, terms, entry)

    @cute.jit
    def put(self, words: Any, token: Any, chunk: Any, here: Any) -> None:
        """A lane's chunk, if it is `here`. All lanes of a warp come, those past the last chunk with the last."""
        plan, lanes = self.plan, GROUPS[self.plan.quant] // CHUNK
        distances = tuple(1 << n for n in range(lanes.bit_length() - 1))
        bits = val.over_lanes(enc.amax_bits_of_bf16(words), distances, enc.max_u32)
        out = cute.make_rmem_tensor((plan.chunk_words,), Uint32)
        if cutlass.const_expr(plan.quant == "fp8"):
            byte, inverse = enc.e8m0_ceil(bits, enc.E4M3_MAX_BITS, enc.FP8_FLOOR_BITS)
            blk.e4m3(out, words, bits, inverse, "bf16")
        else:
            byte = blk.nvfp4(out, words, bits, self.terms, self.entry, "bf16", self.arch)
        codes, scales, tiles = self.codes, self.scales, plan.quant == "nvfp4_tiles"
        place = blk.atom(token, chunk // lanes) if cutlass.const_expr(tiles) else (token, chunk // lanes)
        if here:
            cute.autovec_copy(out, cute.local_tile(codes[token, None], (plan.chunk_words,), (chunk,)))
            if chunk % lanes == 0:
                scales[place] = Uint8(byte)
