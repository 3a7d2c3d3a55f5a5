"""Rows -> codes and block scales, in one pass: x itself, its RMS norm, or SwiGLU of two inputs; bit for bit the reference's.

    NVFP4  block_scale = E4M3(amax of 16 / (6 global)), at least 2^-9, 1 for zeros;  code = E2M1(x / (block_scale global))
    MXFP4  scale = 2^ceil(log2(amax of 32 / 6));          code = E2M1(x / scale)
    FP8    scale = 2^ceil(log2(amax of 64 or 128 / 448)); code = E4M3(x / scale), amax at least 1e-4

`threads` threads take a row, chunks of 16 consecutive values each, which stay in registers; neighbouring threads have
neighbouring chunks. Sums and maxima of a row go by shuffles, and through shared memory where a row has several warps.
A global scale of the whole tensor takes a launch of its own, "amax": CTAs add the largest magnitude that they met to a word in
global memory, and the last to come leaves the scale, which for the launch of the codes is a given one.

Bytes, the floor of the time: x once (2 or 4 a value; SwiGLU reads two inputs), codes and scales once: 0.5625 a value for
NVFP4, 0.53 for MXFP4, 1.01 for FP8; 2 for decoded values. A second reading of x comes on top for a global scale of the tensor.

On Hopper a CTA of norms or SwiGLU to NVFP4 of one global scale goes on from rows to rows: it prepares `table` and, for a norm,
float32 weights in shared memory once, and a chunk's registers take the next row's as soon as its words are made, so that loads
are under way while the rest is encoded. That needs registers to spare: where they are spilled, the warp waits for its loads.

Instructions a value at K = 4096, those of the usual way counted in sm_90a's code: NVFP4 of a given scale 7.7, of a row's 10.2;
MXFP4 9.8; FP8 8.9; norms of FP8 13.4, of NVFP4 15, SwiGLU's 19; 80 registers at most, 128 for Pro's norms to NVFP4. At 1.75
GHz, 528 schedulers take 1.13 us for an instruction a value of 8192 x 4096 where every slot is used, 9 us for a conversion to
float64 of each.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Float64, Int32, Int64, Uint8, Uint16, Uint32
from cutlass.memory import SmemAllocator

from dsv4lab.formats import ATOM_ROWS, E2M1_MAX, E4M3_MAX
from dsv4lab.kernels._common.ptx import prefetch_bulk, store_global
from dsv4lab.kernels.quant.rows import blocks as blk
from dsv4lab.kernels.quant.rows import encode as enc
from dsv4lab.kernels.quant.rows import ring, table
from dsv4lab.kernels.quant.rows.config import CHUNK, WARP, RowsConfig
from dsv4lab.kernels.quant.rows.sources import RowSources, halves

RANGE = E2M1_MAX * E4M3_MAX  # largest code times largest block scale
_AHEAD = 528  # CTAs, four for each multiprocessor of an H200: rows with a scale each come to L2 before their own CTA
_CARVEOUT = 8  # percent of the L1 for shared memory; named, or compiling with a minimum of CTAs would ask for a device
_SHARED, _SHARED_CTA = 228 * 1024, 2048  # bytes of a multiprocessor; a CTA's beside what it keeps, 1 KiB reserved
F32_TINY = 2.0**-126
_VAST_BITS = 0x7E000000  # 2^125: half of a block's 1 / scale is a normal BF16 below


class QuantizeRows(RowSources):
    """The kernel of one `RowsConfig` for an architecture, "sm_90a" or "sm_100a"; M and K are the call's."""

    def __init__(self, config: RowsConfig, arch: str) -> None:
        config.check()
        self.config = config
        self.arch = arch
        # Lanes of a warp that ask each other for a factor must have the same global scale.
        alike = config.scale in ("", "one") or config.threads % WARP == 0
        fp4 = config.out in ("nvfp4", "mxfp4") and not config.decoded
        self.quick = fp4 and config.element == "bf16" and arch == "sm_90a" and alike
        self.streams = config.streams and alike and arch == "sm_90a"
        self.leaves = config.apart and not config.tiles
        self.rings = self.streams and config.source == "swiglu"
        self.kept = 4 * CHUNK * config.threads * config.chunks if self.streams and config.keeps else 0
        self.kept += ring.STAGES * ring.stage_bytes(config) if self.rings else 0

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        other: cute.Tensor,
        row_weight: cute.Tensor,
        given: cute.Tensor,
        codes: cute.Tensor,
        scale: cute.Tensor,
        used: cute.Tensor,
        rows_per_scale: Int32,
        per_column: Float64,
        eps: Float64,
        limit: Float32,
        ctas: Int32,
        stream: Any,
    ) -> None:
        """x (M, K) as u32 words, or where `ragged` as bits, u16 or u32; other: SwiGLU's second input, like x, or the norm's
        weight, (1, K) like a row of x; row_weight (M,) f32. given (G,) f32: global scales, one for every `rows_per_scale` rows.
        codes: u32 words, or where `ragged` bytes or bits of values; of "amax" two counters (1, 2), zeros before and after.
        scale u8: (M, blocks), or tiles (ceil(M/128), ceil(blocks/4), 512). used f32: the global scale of each row (M,), or of
        the tensor (1,). per_column is 1 / K; eps and limit are the norm's and SwiGLU's. What a configuration does not need it
        never touches.
        """
        config = self.config
        threads = config.threads * config.rows
        how = dict(block=[threads, 1, 1], stream=stream, use_pdl=True)
        if cutlass.const_expr(self.quick or self.streams):
            ctas_each = max(config.resident // threads, 1)
            wanted = -(-100 * ctas_each * (self.kept + _SHARED_CTA) // _SHARED)
            carveout = max(_CARVEOUT, wanted) if self.kept else _CARVEOUT
            how |= dict(min_blocks_per_mp=ctas_each, preferred_smem_carveout=carveout)
        self.kernel(x, other, row_weight, given, codes, scale, used, rows_per_scale, per_column, eps, limit).launch(
            grid=[ctas, 1, 1], **how
        )

    @cute.kernel
    def kernel(
        self,
        x: Any,
        other: Any,
        row_weight: Any,
        given: Any,
        codes: Any,
        scale: Any,
        used: Any,
        rows_per_scale: Int32,
        per_column: Float64,
        eps: Float64,
        limit: Float32,
    ) -> None:
        config = self.config
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        parts = config.threads * config.rows // config.lanes  # of sums; twice, since there are two in turn
        allocator = SmemAllocator()
        self.shared = allocator.allocate_tensor(Uint32, cute.make_layout(4 * parts), byte_alignment=16)
        if cutlass.const_expr(self.streams and config.keeps):
            quads = cute.make_layout((4, config.threads * config.chunks * CHUNK // 4))
            self.factors = allocator.allocate_tensor(Float32, quads, byte_alignment=16)
        if cutlass.const_expr(self.rings):
            self.ahead = allocator.allocate_tensor(Uint32, cute.make_layout(self.kept // 4), byte_alignment=128)
        rows, width = x.shape
        self.columns = width * (CHUNK // config.words) if cutlass.const_expr(not config.ragged) else width
        padded = rows
        if cutlass.const_expr(config.tiles):
            padded = scale.shape[0] * ATOM_ROWS
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

        if cutlass.const_expr(self.streams):
            self._stream(x, other, row_weight, given, codes, scale, per_column, eps, limit, thread, block, grid, padded)
        else:
            self._plainly(x, other, row_weight, given, codes, scale, used, rows_per_scale, per_column, eps, limit, padded)

    @cute.jit
    def _plainly(
        self,
        x: Any,
        other: Any,
        row_weight: Any,
        given: Any,
        codes: Any,
        scale: Any,
        used: Any,
        rows_per_scale: Any,
        per_column: Any,
        eps: Any,
        limit: Any,
        padded: Any,
    ) -> None:
        """Rows are loaded, made and quantised, one after the other."""
        config, rows = self.config, x.shape[0]
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        largest, entry = Uint32(0), Uint32(0)
        for step in cutlass.range(block, (padded + config.rows - 1) // config.rows, grid, unroll=1):
            row = step * config.rows + thread // config.threads
            mine = cutlass.min(row, rows - 1)  # threads past the last row repeat it, and store nothing
            if cutlass.const_expr(config.scale == "row" and config.source == "x"):
                ahead, size = row + _AHEAD * config.rows, self.columns * (4 * config.words // CHUNK)
                if thread % config.threads == 0 and ahead < rows:
                    prefetch_bulk(x.iterator.toint() + Int64(ahead) * size, size)
            held = self._values(x, other, row_weight, mine, thread, per_column, eps, limit)
            if cutlass.const_expr(config.out == "amax"):
                for c in cutlass.range_constexpr(config.chunks):
                    largest = enc.max_u32(largest, self._number_amax(self._words(held, c)))
            elif cutlass.const_expr(config.out == "same"):
                self._store_values(held, codes, row, rows, thread)
            elif cutlass.const_expr(config.out == "nvfp4"):
                if cutlass.const_expr(config.scale == "one"):
                    factor = given[0]
                elif cutlass.const_expr(config.scale == "many"):
                    factor = given[mine // rows_per_scale]
                else:
                    factor = self._of_row(held, thread)
                    if row < rows and thread % config.threads == 0:
                        used[row] = factor
                if cutlass.const_expr(self.quick):
                    entry = table.prepare(factor, thread)
                self._nvfp4(held, codes, scale, row, rows, thread, factor, entry)
            else:
                self._power_of_two(held, codes, scale, row, rows, thread)
        if cutlass.const_expr(config.out == "amax"):
            self._of_tensor(largest, codes, used, grid, thread)

    @cute.jit
    def _stream(
        self,
        x: Any,
        other: Any,
        row_weight: Any,
        given: Any,
        codes: Any,
        scale: Any,
        per_column: Any,
        eps: Any,
        limit: Any,
        thread: Any,
        block: Any,
        grid: Any,
        padded: Any,
    ) -> None:
        """The same, of one global scale. Norms: the registers of a chunk that is done take the next row's, which is under way
        while the others are done. SwiGLU: rows come by `ring`.
        """
        config, rows = self.config, x.shape[0]
        if cutlass.const_expr(self.quick):
            factor = given[0]  # on its way before the rows
        own, blocks = thread // config.threads, self.columns // CHUNK
        if cutlass.const_expr(self.leaves):
            own = cute.arch.make_warp_uniform(own)
        held = cute.make_rmem_tensor((config.chunks * config.words,), Uint32)
        second = cute.make_rmem_tensor((config.chunks * config.words if self.rings else 1,), Uint32)
        row = block * config.rows + own
        mine = cutlass.min(row, rows - 1)  # threads past the last row repeat it, and store nothing
        # Whole warps end with their last row; other threads repeat it, and store nothing.
        steps = ((rows - own if self.leaves else padded) + config.rows - 1) // config.rows
        stride = grid * config.rows
        at = Uint32(mine * blocks + thread % config.threads)  # of a thread's first block; others lie at constant distances
        further = Uint32(stride * blocks)
        place, stage = Int32(0), Int32(0)  # of the ring: a warp's, where its chunks are
        if cutlass.const_expr(self.rings):
            place = self.ahead.iterator.toint() + thread // WARP * ring.warp_stage(config)
            ring.ask(config, (x, other), mine, blocks, place + stage)
        else:
            for c in cutlass.range_constexpr(config.chunks):
                self._take(held, c, x, at)
        if cutlass.const_expr(config.keeps):
            if own == 0:
                for c in cutlass.range_constexpr(config.chunks):
                    self._keep(enc.floats(self._factors(other, c, thread), config.weight), c, thread)
            cute.arch.barrier()
        share, parity = Float32(1.0), Int32(0)
        if cutlass.const_expr(config.weighted):
            share = row_weight[mine]
        entry, terms = Uint32(0), ()
        if cutlass.const_expr(self.quick):
            entry, terms = table.prepare(factor, thread), enc.global_terms(factor)
        for step in cutlass.range(block, steps, grid, unroll=1):
            following, beyond = at + further, row + stride
            more, here = beyond < rows, Boolean(True) if cutlass.const_expr(self.leaves) else row < rows
            if cutlass.const_expr(self.rings):
                cute.arch.cp_async_wait_group(0)
                cute.arch.sync_warp()  # what the others asked for has come, and they have read what was there before
                next_stage = ring.stage_bytes(config) - stage
                if step + grid < steps:
                    ring.ask(config, (x, other), cutlass.min(beyond, rows - 1), blocks, place + next_stage)
                ring.take(config, (held, second), place + stage)
                stage = next_stage
            next_share = share
            if cutlass.const_expr(config.weighted):
                next_share = row_weight[cutlass.min(beyond, rows - 1)]
            near, high, low, square = Boolean(True), Float32(0.0), Float32(0.0), Float64(0.0)
            if cutlass.const_expr(config.source == "norm"):
                square = self._mean_square(held, thread, per_column, eps, parity)
                parity, near = 1 - parity, self._near(square)
                high, low = self._split_root(square)
            for c in cutlass.range_constexpr(config.chunks):
                part = cute.make_rmem_tensor((config.words,), Uint32)
                words = self._words(held, c)
                if cutlass.const_expr(self.rings):
                    words = self._gated(words, self._words(second, c), share, limit)
                elif cutlass.const_expr(config.source == "norm"):
                    if cutlass.const_expr(config.keeps):
                        factors = self._kept(c, thread)
                    else:
                        factors = enc.floats(self._factors(other, c, thread), config.weight)
                    words = self._scaled_words(words, factors, high, low)
                for i in cutlass.range_constexpr(config.words):
                    part[i] = words[i]
                if cutlass.const_expr(not self.rings) and more:
                    self._take(held, c, x, following)
                distance = c * config.threads
                cute.arch.sync_warp()
                if cutlass.const_expr(config.out == "fp8"):
                    lanes = config.group // CHUNK
                    words = self._words(part, 0)
                    bits = self._over_group(enc.amax_bits_of_bf16(words))
                    byte, inverse = enc.e8m0_of_number(bits, enc.E4M3_MAX_BITS, enc.FP8_FLOOR_BITS)
                    found = blk.e4m3_of_numbers(words, inverse, config.element)
                    near = near and bits < Uint32(enc.INFINITY_BITS)
                    if here:
                        if at % lanes == 0:
                            enc.store_byte(scale.iterator.toint() + Int64(at // lanes), distance // lanes, byte)
                        store_global(codes.iterator.toint() + Int64(at) * CHUNK, found, distance * CHUNK)
                else:
                    out = cute.make_rmem_tensor((2,), Uint32)
                    words = self._words(part, 0)
                    if cutlass.const_expr(config.source == "norm"):
                        ratio = enc.block_ratio(enc.amax_bits_of_bf16(words), terms)
                        byte, by, usual = blk.looked_up(ratio, terms, entry)
                        near = near & usual
                        out[0], out[1] = table.nibbles(words[:4], by), table.nibbles(words[4:], by)
                    else:
                        byte = self._block(out, words, terms, entry)
                    if cutlass.const_expr(config.tiles):
                        self._store_scale(scale, byte, row, rows, self._chunk(c, thread), 1)
                    if here:
                        if cutlass.const_expr(not config.tiles):
                            enc.store_byte(scale.iterator.toint() + Int64(at), distance, byte)
                        target = codes.iterator.toint() + Int64(at) * (CHUNK // 2)
                        store_global(target, [out[0], out[1]], distance * (CHUNK // 2))
            if cutlass.const_expr(config.source == "norm"):
                self._again(near, x, other, codes, scale, row, thread, square, terms)
            share, at, row = next_share, following, beyond

    @cute.jit
    def _again(
        self, near: Any, x: Any, weight: Any, codes: Any, scale: Any, row: Any, thread: Any, square: Any, terms: Any
    ) -> None:
        """Chunks of a norm by ways that are good for any values, over what the usual ones left, where one of the warp is not
        near, or has no finite values as FP8, or no factor as NVFP4. One code for all chunks, away from the others': within it,
        it would be the larger part.
        """
        config, rows = self.config, x.shape[0]
        if cute.arch.vote_any_sync(not near):
            mine, inverse = cutlass.min(row, rows - 1), self._root(square)
            for c in cutlass.range(config.chunks, unroll=1):
                chunk, out = self._chunk(c, thread), cute.make_rmem_tensor((CHUNK // 4,), Uint32)
                words = self._far_words(x, weight, mine, c, thread, inverse)
                bits = enc.amax_bits_of_bf16(words)
                if cutlass.const_expr(config.out == "nvfp4"):
                    byte = blk.nvfp4(out, words, bits, terms, None, config.element, self.arch)
                    self._store_scale(scale, byte, row, rows, chunk, 1)
                    self._store_two([out[0], out[1]], codes, row, rows, chunk)
                else:
                    bits, byte, factor = self._group_scale(bits)
                    blk.e4m3(out, words, bits, factor, config.element)
                    self._store_scale(scale, byte, row, rows, chunk, config.group // CHUNK)
                    self._store_e4m3([out[i] for i in range(CHUNK // 4)], byte, codes, row, rows, chunk, thread)

    @cute.jit
    def _take(self, held: Any, c: cutlass.Constexpr, x: Any, at: Any) -> None:
        """Load a thread's c-th chunk."""
        words, distance = self.config.words, c * self.config.threads * 2 * CHUNK
        found = enc.load_chunk(x.iterator.toint() + Int64(at) * (2 * CHUNK), distance)
        for i in cutlass.range_constexpr(words):
            held[c * words + i] = found[i]

    # ---- global scales ---------------------------------------------------------------------------------------------------
    @cute.jit
    def _of_row(self, held: Any, thread: Any) -> Any:
        """The global scale of a row from its largest magnitude."""
        largest = Uint32(0)
        for c in cutlass.range_constexpr(self.config.chunks):
            largest = enc.max_u32(largest, self._number_amax(self._words(held, c)))
        return _global_scale(self._over_row(largest, thread))

    @cute.jit
    def _of_tensor(self, largest: Any, counters: Any, used: Any, ctas: Any, thread: Any) -> None:
        """Leave the global scale of the tensor, from what each thread met: the last CTA to come does. counters: words for the
        largest magnitude and for the CTAs that came.
        """
        whole = self._over_cta(largest, thread)
        if thread == 0:
            most, came = counters.iterator, counters.iterator + 1
            cute.arch.atomic_max(most, whole, sem="relaxed", scope="gpu")
            if cute.arch.atomic_add(came, Uint32(1), sem="acq_rel", scope="gpu") == ctas - 1:
                used[0] = _global_scale(Uint32(cute.arch.atomic_exch(most, Uint32(0), sem="relaxed", scope="gpu")))
                counters[0, 1] = Uint32(0)

    @cute.jit
    def _number_amax(self, words: Any) -> Any:
        """The largest magnitude among values that are numbers, as float32 bits."""
        element = self.config.element
        bits = enc.number_amax_bits(enc.absolute(words, element), element)
        return enc.finite(bits if bits <= Uint32(enc.INFINITY_BITS) else Uint32(0)).bitcast(Uint32)

    # ---- block formats ---------------------------------------------------------------------------------------------------
    @cute.jit
    def _nvfp4(self, held: Any, codes: Any, scale: Any, row: Any, rows: Any, thread: Any, factor: Any, entry: Any) -> None:
        """Blocks of 16; entry: this lane's of `table`, where `quick`."""
        config = self.config
        terms = enc.global_terms(factor)
        for c in cutlass.range_constexpr(config.chunks):
            out = cute.make_rmem_tensor((CHUNK // 2 if config.decoded else 2,), Uint32)
            chunk = self._chunk(c, thread)
            byte = self._block(out, self._words(held, c), terms, entry)
            if cutlass.const_expr(config.decoded):
                self._store_words([out[i] for i in range(CHUNK // 2)], codes, row, rows, chunk, thread)
            else:
                self._store_scale(scale, byte, row, rows, chunk, 1)
                self._store_two([out[0], out[1]], codes, row, rows, chunk)

    @cute.jit
    def _block(self, out: Any, words: Any, terms: Any, entry: Any) -> Any:
        """One block: its codes, or decoded values, to `out`; returns the byte of its scale. terms: `enc.global_terms`."""
        element = self.config.element
        if cutlass.const_expr(self.quick):
            bits = enc.amax_bits_of_bf16(words)
        else:
            bits, entry = enc.amax_bits(enc.absolute(words, element), element), None
        return blk.nvfp4(out, words, bits, terms, entry, element, self.arch, self.config.decoded)

    @cute.jit
    def _power_of_two(self, held: Any, codes: Any, scale: Any, row: Any, rows: Any, thread: Any) -> None:
        """MXFP4 and FP8: one E8M0 scale for the chunks of neighbouring threads."""
        config = self.config
        lanes, fp8 = config.group // CHUNK, cutlass.const_expr(config.out == "fp8")
        for c in cutlass.range_constexpr(config.chunks):
            words = self._words(held, c)
            magnitudes = enc.absolute(words, config.element)  # which FP8 of BF16 does not take
            if cutlass.const_expr(fp8 and config.element == "bf16"):
                largest = enc.amax_bits_of_bf16(words)
            else:
                largest = enc.amax_bits(magnitudes, config.element)
            bits, byte, inverse = self._group_scale(largest)
            signs = cute.make_rmem_tensor((config.words,), Uint32)
            if cutlass.const_expr(not fp8):
                for i in cutlass.range_constexpr(config.words):
                    signs[i] = words[i]
                if bits > Uint32(enc.INFINITY_BITS):
                    for i in cutlass.range_constexpr(config.words):
                        signs[i] = enc.signs_of_nan(words[i], config.element)
            chunk = self._chunk(c, thread)
            if cutlass.const_expr(not config.decoded):
                self._store_scale(scale, byte, row, rows, chunk, lanes)
            if cutlass.const_expr(fp8):
                out = cute.make_rmem_tensor((CHUNK // 4,), Uint32)
                blk.e4m3(out, words, bits, inverse, config.element)
                self._store_e4m3([out[i] for i in range(CHUNK // 4)], byte, codes, row, rows, chunk, thread)
            elif cutlass.const_expr(self.quick):
                if bits >= Uint32(_VAST_BITS):
                    self._scaled_nibbles(magnitudes, signs, bits, inverse, codes, row, rows, chunk)
                else:
                    counts = enc.e2m1_count_pairs(magnitudes, inverse)
                    self._store_two(
                        [enc.nibbles_of_pairs(counts[i : i + 4], words[i : i + 4]) for i in (0, 4)], codes, row, rows, chunk
                    )
            else:
                self._scaled_nibbles(magnitudes, signs, bits, inverse, codes, row, rows, chunk)

    def _group_scale(self, bits: Any) -> tuple[Any, Any, Any]:
        """Of MXFP4 or FP8: (bits of the largest magnitude of neighbouring threads, byte of the scale, 1 / scale)."""
        fp8, bits = self.config.out == "fp8", self._over_group(bits)
        limit, floor = (enc.E4M3_MAX_BITS, enc.FP8_FLOOR_BITS) if fp8 else (enc.E2M1_MAX_BITS, enc.MXFP4_FLOOR_BITS)
        return bits, *enc.e8m0_ceil(bits, limit, floor)

    def _over_group(self, bits: Any) -> Any:
        """The largest among threads that share a block scale."""
        for distance in halves(self.config.group // CHUNK):
            bits = enc.max_u32(bits, cute.arch.shuffle_sync_bfly(bits, distance))
        return bits

    @cute.jit
    def _scaled_nibbles(
        self, magnitudes: Any, signs: Any, bits: Any, inverse: Any, codes: Any, row: Any, rows: Any, chunk: Any
    ) -> None:
        """A chunk of MXFP4 of any kind. bits: the block's largest magnitude."""
        scaled = cute.make_rmem_tensor((CHUNK,), Float32)
        wide = enc.floats(magnitudes, self.config.element)
        for i in cutlass.range_constexpr(CHUNK):
            scaled[i] = enc.mul(wide[i], inverse)
        if bits >= Uint32(enc.INFINITY_BITS):
            for i in cutlass.range_constexpr(CHUNK):
                scaled[i] = cute.arch.fmin(scaled[i], Float32(enc.LARGEST))  # of a NaN, too
        nibbles = blk.nibbles([scaled[i] for i in range(CHUNK)], signs, self.config.element, self.arch)
        self._store_two(nibbles, codes, row, rows, chunk)

    # ---- stores ----------------------------------------------------------------------------------------------------------
    @cute.jit
    def _store_scale(self, scale: Any, byte: Any, row: Any, rows: Any, chunk: Any, lanes: cutlass.Constexpr) -> None:
        """A block's scale, by the first of its threads."""
        column = chunk // lanes
        if cutlass.const_expr(self.config.tiles):
            blocks = self.columns // (CHUNK * lanes)
            tile_row, tile_column, offset = blk.atom(row, column)
            if chunk % lanes == 0 and tile_row < scale.shape[0] and tile_column < scale.shape[1]:
                here = row < rows and column < blocks
                scale[tile_row, tile_column, offset] = Uint8(byte if here else Uint32(0))
        else:
            if chunk % lanes == 0 and row < rows and column < scale.shape[1]:
                scale[row, column] = Uint8(byte)

    @cute.jit
    def _store_two(self, words: Any, codes: Any, row: Any, rows: Any, chunk: Any) -> None:
        """The 16 codes of a chunk."""
        out = cute.make_rmem_tensor((2,), Uint32)
        for i in cutlass.range_constexpr(2):
            out[i] = words[i]
        if row < rows and self._inside(chunk):
            cute.autovec_copy(out, cute.local_tile(codes[row, None], (2,), (chunk,)))

    @cute.jit
    def _store_e4m3(self, words: Any, byte: Any, codes: Any, row: Any, rows: Any, chunk: Any, thread: Any) -> None:
        config = self.config
        if cutlass.const_expr(config.decoded):
            value = _e8m0(byte)
            pairs = [pair for word in words for pair in enc.e4m3_values(word, value)]
            self._store_words(pairs, codes, row, rows, chunk, thread)
        elif cutlass.const_expr(config.ragged):
            for i in cutlass.range_constexpr(CHUNK):
                if row < rows and chunk * CHUNK + i < codes.shape[1]:
                    codes[row, chunk * CHUNK + i] = Uint8((words[i // 4] >> (8 * (i % 4))) & Uint32(0xFF))
        else:
            out = cute.make_rmem_tensor((CHUNK // 4,), Uint32)
            for i in cutlass.range_constexpr(CHUNK // 4):
                out[i] = words[i]
            if row < rows and self._inside(chunk):
                cute.autovec_copy(out, cute.local_tile(codes[row, None], (CHUNK // 4,), (chunk,)))

    @cute.jit
    def _store_values(self, held: Any, out: Any, row: Any, rows: Any, thread: Any) -> None:
        """The values themselves."""
        config = self.config
        for c in cutlass.range_constexpr(config.chunks):
            chunk = self._chunk(c, thread)
            words = self._words(held, c)
            if cutlass.const_expr(config.ragged):
                self._store_ragged(words, out, row, rows, chunk)
            elif cutlass.const_expr(config.element == "bf16"):
                self._store_words(words, out, row, rows, chunk, thread)
            else:
                mine = cute.make_rmem_tensor((CHUNK,), Uint32)
                for i in cutlass.range_constexpr(CHUNK):
                    mine[i] = words[i]
                if row < rows and self._inside(chunk):
                    cute.autovec_copy(mine, cute.local_tile(out[row, None], (CHUNK,), (chunk,)))

    @cute.jit
    def _store_ragged(self, words: Any, out: Any, row: Any, rows: Any, chunk: Any) -> None:
        """One by one."""
        for i in cutlass.range_constexpr(CHUNK):
            if row < rows and chunk * CHUNK + i < out.shape[1]:
                if cutlass.const_expr(self.config.element == "bf16"):
                    out[row, chunk * CHUNK + i] = Uint16((words[i // 2] >> (16 * (i % 2))) & Uint32(0xFFFF))
                else:
                    out[row, chunk * CHUNK + i] = words[i]

    @cute.jit
    def _store_words(self, words: Any, out: Any, row: Any, rows: Any, chunk: Any, thread: Any) -> None:
        """A chunk of BF16. Threads swap halves in pairs, so that a store fills sectors of 32 bytes."""
        odd = chunk % 2 == 1
        first = cute.make_rmem_tensor((4,), Uint32)
        second = cute.make_rmem_tensor((4,), Uint32)
        for i in cutlass.range_constexpr(4):
            got = cute.arch.shuffle_sync_bfly(words[i] if odd else words[4 + i], 1)
            first[i] = got if odd else words[i]
            second[i] = words[4 + i] if odd else got
        if row < rows:
            even = chunk // 2 * 2
            if self._inside(even):
                cute.autovec_copy(first, cute.local_tile(out[row, None], (4,), (2 * even + chunk % 2,)))
            if self._inside(even + 1):
                cute.autovec_copy(second, cute.local_tile(out[row, None], (4,), (2 * even + 2 + chunk % 2,)))


@cute.jit
def _global_scale(bits: Any) -> Any:
    """amax / 2688, at least the smallest normal number; 1 where amax is 0."""
    scale = cute.arch.fmax(bits.bitcast(Float32) / Float32(RANGE), Float32(F32_TINY))
    return scale if bits > Uint32(0) else Float32(1.0)


@cute.jit
def _e8m0(byte: Any) -> Any:
    """The value of a scale byte from 1 up; NaN for 255."""
    return (byte << 23).bitcast(Float32) if byte < Uint32(255) else Uint32(enc.NAN_BITS).bitcast(Float32)
