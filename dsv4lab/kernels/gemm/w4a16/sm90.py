"""y = x W^T on Hopper with four-bit weights: decoded in registers, multiplied by `wgmma`, weights as the A operand.

The product is computed as y^T = W x^T, so that 64 weight rows fill the fixed side of `wgmma` and the tokens, 8 to 256 of them,
its free side. One warp streams prepared weights (see `weights`) into a ring of stages, another the tokens; weights do not
wait for the kernel before, tokens do. Every consumer warpgroup owns 64 weight rows, decodes a tile of them while the tile
before multiplies, and keeps the sums in registers.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from dsv4lab.kernels.gemm.w4a16.config import CODE_BYTES, PITCH_PAD, SCALE_BYTES, TILE, W4A16Config
from dsv4lab.kernels.gemm.w4a16.weights import BLOCKS, SCALE_EXPONENT

WARPGROUP = 128
CODE_WORDS, SCALE_WORDS = CODE_BYTES // 4, SCALE_BYTES // 4  # of a tile
_FIELD_MASK = 0x81C081C0  # sign, two exponent bits, one mantissa bit of two BF16


def _mul_bf16x2(a: Uint32, b: Uint32) -> Uint32:
    return cute.arch.inline_ptx("mul.rn.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


class W4A16LinearSm90:
    """One configuration of the kernel, as CuTeDSL compiles it."""

    def __init__(self, config: W4A16Config) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        alpha: cute.Tensor,
        y: cute.Tensor,
        partial: cute.Tensor,
        arrived: cute.Tensor,
        ctas: Int32,
        stream: Any,
    ) -> None:
        """y = alpha x W^T.

        x (M, K) bf16; codes (R, C, 512) and scales (R, C, 64) i32; alpha (1,) f32; y (M, 64 R).
        partial (ctas, 2, tokens * rows) f32 and arrived (tiles,) i32, zero, are for streamed configurations.
        """
        plan = self.plan
        mma = hopper.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            tiler_mn=(TILE, plan.tokens),
            a_source=warpgroup.OperandSource.RMEM,
        )
        layout = hopper.make_smem_layout_b(
            utils.LayoutEnum.ROW_MAJOR, (TILE, plan.tokens, TILE), BFloat16, plan.stages * plan.chunks
        )
        one = cute.slice_(layout, (None, None, 0))
        load_x, tma_x = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), x, one, (plan.tokens, TILE))
        self.kernel(mma, load_x, tma_x, codes, scales, alpha, y, partial, arrived, layout).launch(
            grid=[ctas, 1, 1],
            block=[(plan.warpgroups + 1) * WARPGROUP, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        load_x: cute.CopyAtom,
        x: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        alpha: cute.Tensor,
        y: cute.Tensor,
        partial: cute.Tensor,
        arrived: cute.Tensor,
        layout: cute.ComposedLayout,
    ) -> None:
        plan = self.plan
        stages, chunks, groups = plan.stages, plan.chunks, plan.warpgroups
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        memory = utils.SmemAllocator()
        full = memory.allocate_array(Int64, stages)
        empty = memory.allocate_array(Int64, stages)
        flag = memory.allocate_array(Int32, 1)
        shared_x = memory.allocate_tensor(BFloat16, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        shared_codes = memory.allocate_tensor(
            Uint32, cute.make_layout((CODE_WORDS, chunks, groups, stages)), byte_alignment=128
        )
        shared_scales = memory.allocate_tensor(
            Uint32, cute.make_layout((SCALE_WORDS, chunks, groups, stages)), byte_alignment=128
        )
        sums = memory.allocate_tensor(
            Float32, cute.make_layout((plan.rows, plan.slice), stride=(1, plan.rows + PITCH_PAD)), byte_alignment=128
        )

        if thread == 0:
            for i in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(full + i, 2)
                cute.arch.mbarrier_init(empty + i, 4 * groups)
        cute.arch.mbarrier_init_fence()
        cute.arch.barrier()
        cute.arch.griddepcontrol_launch_dependents()

        work = self._work(codes, y)
        if warp >= 4 * groups:
            if cutlass.const_expr(plan.tokens >= 128):
                cute.arch.setmaxregister_decrease(40)
            if warp == 4 * groups:
                self._load_weights(codes, scales, shared_codes, shared_scales, full, empty, work)
            elif warp == 4 * groups + 1:
                self._load_tokens(load_x, x, shared_x, full, empty, work)
        else:
            if cutlass.const_expr(plan.tokens >= 128):
                cute.arch.setmaxregister_increase(232)
            self._consume(mma, shared_x, shared_codes, shared_scales, sums, flag, full, empty, alpha, y, partial, arrived, work)

    def _work(self, codes: Any, y: Any) -> tuple[Any, ...]:
        """(tiles this CTA works on, their first, their stride, its first and last step, token tiles, steps of a tile, CTAs)."""
        plan = self.plan
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        token_tiles = cute.ceil_div(y.shape[0], plan.tokens)
        tiles = cute.ceil_div(y.shape[1], plan.rows) * token_tiles
        steps = codes.shape[1] // plan.chunks
        if cutlass.const_expr(plan.streamed):
            first, last = block * tiles * steps // grid, (block + 1) * tiles * steps // grid
            count = (last + steps - 1) // steps - first // steps
            return cutlass.max(count, 0), first // steps, Int32(1), first, last, token_tiles, steps, grid
        return (tiles - block + grid - 1) // grid, block, grid, Int32(0), tiles * steps, token_tiles, steps, grid

    @staticmethod
    def _tile(work: Any, i: Any) -> tuple[Any, ...]:
        """Of the CTA's i-th tile: (number, row tile, token tile, first and last step along K)."""
        _, start, stride, first, last, token_tiles, steps, _ = work
        tile = start + i * stride
        low, high = cutlass.max(first - tile * steps, 0), cutlass.min(last - tile * steps, steps)
        return tile, tile // token_tiles, tile % token_tiles, low, high

    @cute.jit
    def _next(self, stage: Any, phase: Any) -> tuple[Any, Any]:
        """The ring's next stage, and the phase in which it is then."""
        stage += 1
        if stage == self.plan.stages:
            stage, phase = Int32(0), phase ^ 1
        return stage, phase

    @cute.jit
    def _load_weights(
        self, codes: Any, scales: Any, shared_codes: Any, shared_scales: Any, full: Any, empty: Any, work: Any
    ) -> None:
        plan = self.plan
        groups, chunks = plan.warpgroups, plan.chunks
        stage, phase = Int32(0), Int32(1)  # of the ring's empty barriers; the phase before the first counts as over
        for i in cutlass.range(work[0], unroll=1):
            _, row_tile, _, low, high = self._tile(work, i)
            for k in cutlass.range(low, high, 1, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                barrier = full + stage
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(barrier, plan.weight_bytes)
                    for g in cutlass.range_constexpr(groups):
                        row = cutlass.min(row_tile * groups + g, codes.shape[0] - 1)  # past the last: never stored
                        _bulk(shared_codes[None, None, g, stage], codes[row, k * chunks, None], chunks * CODE_WORDS, barrier)
                        _bulk(shared_scales[None, None, g, stage], scales[row, k * chunks, None], chunks * SCALE_WORDS, barrier)
                stage, phase = self._next(stage, phase)

    @cute.jit
    def _load_tokens(self, load_x: Any, x: Any, shared_x: Any, full: Any, empty: Any, work: Any) -> None:
        plan = self.plan
        chunks = plan.chunks
        blocks = cute.local_tile(x, (plan.tokens, TILE), (None, None))
        to_x, from_x = cpasync.tma_partition(
            load_x, 0, cute.make_layout(1), cute.group_modes(shared_x, 0, 2), cute.group_modes(blocks, 0, 2)
        )
        cute.arch.griddepcontrol_wait()
        stage, phase = Int32(0), Int32(1)
        for i in cutlass.range(work[0], unroll=1):
            _, _, token_tile, low, high = self._tile(work, i)
            for k in cutlass.range(low, high, 1, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                barrier = full + stage
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(barrier, plan.token_bytes)
                for c in cutlass.range_constexpr(chunks):
                    cute.copy(
                        load_x, from_x[None, token_tile, k * chunks + c], to_x[None, stage * chunks + c], tma_bar_ptr=barrier
                    )
                stage, phase = self._next(stage, phase)

    @cute.jit
    def _consume(
        self,
        mma: Any,
        shared_x: Any,
        shared_codes: Any,
        shared_scales: Any,
        sums: Any,
        flag: Any,
        full: Any,
        empty: Any,
        alpha: Any,
        y: Any,
        partial: Any,
        arrived: Any,
        work: Any,
    ) -> None:
        plan = self.plan
        part = mma.get_slice(cute.arch.thread_idx()[0] % WARPGROUP)
        total = cute.make_rmem_tensor(part.partition_shape_C((TILE, plan.tokens)), Float32)
        gain = alpha[0]
        stage, phase = Int32(0), Int32(0)
        for i in cutlass.range(work[0], unroll=1):
            tile, row_tile, token_tile, low, high = self._tile(work, i)
            total.fill(0.0)
            if cutlass.const_expr(plan.by_warp):
                stage, phase = self._multiply_by_warp(
                    shared_x, shared_codes, shared_scales, full, empty, total, high - low, stage, phase
                )
            else:
                stage, phase = self._multiply_by_warpgroup(
                    mma, part, shared_x, shared_codes, shared_scales, full, empty, total, high - low, stage, phase
                )
            cute.arch.griddepcontrol_wait()
            if cutlass.const_expr(plan.streamed):
                mine_to_store = self._combine(total, flag, partial, arrived, tile, low, high, work)
                if mine_to_store:
                    self._store(total, sums, y, gain, row_tile, token_tile)
            else:
                self._store(total, sums, y, gain, row_tile, token_tile)

    @cute.jit
    def _multiply_by_warpgroup(
        self,
        mma: Any,
        part: Any,
        shared_x: Any,
        shared_codes: Any,
        shared_scales: Any,
        full: Any,
        empty: Any,
        total: Any,
        count: Any,
        stage: Any,
        phase: Any,
    ) -> tuple[Any, Any]:
        """`count` steps of a tile by `wgmma`, from the ring's given stage on; returns the stage and phase that follow."""
        plan = self.plan
        chunks = plan.chunks
        thread, _, _ = cute.arch.thread_idx()
        lane = thread % 32
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        mine = thread % WARPGROUP
        fragment_x = mma.make_fragment_B(part.partition_B(shared_x))
        a = [mma.make_fragment_A(part.partition_shape_A((TILE, TILE))) for _ in range(2)]
        words = [cute.recast_tensor(f, Uint32) for f in a]
        mma.set(warpgroup.Field.ACCUMULATE, True)
        rounds = 1 + chunks % 2  # two buffers of decoded weights take turns
        before = stage
        for k in cutlass.range(0, count, rounds, unroll=1):
            for r in cutlass.range_constexpr(rounds):
                cute.arch.mbarrier_wait(full + stage, phase)
                for c in cutlass.range_constexpr(chunks):
                    turn = (r * chunks + c) % 2
                    self._decode_blocks(
                        shared_codes[None, c, group, stage], shared_scales[None, c, group, stage], mine, words[turn]
                    )
                    warpgroup.fence()
                    for j in cutlass.range_constexpr(BLOCKS):
                        cute.gemm(mma, total, a[turn][None, None, j], fragment_x[None, None, j, stage * chunks + c], total)
                    warpgroup.commit_group()
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(c == 0):  # the stage before is read to its end
                        used = (k > 0 or r > 0) and lane == 0
                        if used:
                            cute.arch.mbarrier_arrive(empty + before)
                before = stage
                stage, phase = self._next(stage, phase)
        warpgroup.wait_group(0)
        if lane == 0 and count > 0:
            cute.arch.mbarrier_arrive(empty + before)
        return stage, phase

    @cute.jit
    def _multiply_by_warp(
        self,
        shared_x: Any,
        shared_codes: Any,
        shared_scales: Any,
        full: Any,
        empty: Any,
        total: Any,
        count: Any,
        stage: Any,
        phase: Any,
    ) -> tuple[Any, Any]:
        """The same by `mma.sync`, each warp for its 16 rows: for few tokens, where `wgmma` costs more than it multiplies."""
        plan = self.plan
        chunks = plan.chunks
        thread, _, _ = cute.arch.thread_idx()
        lane = thread % 32
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        mine = thread % WARPGROUP
        words = cute.make_rmem_tensor((4 * BLOCKS,), Uint32)
        tile_bytes = plan.tokens * TILE * 2
        # Lane (g, q) reads token g's 16 columns of block q: two 16-byte parts of a 128-byte row, which the swizzle XORs with g.
        g, q = lane // 4, lane % 4
        places = [g * 128 + ((2 * q + h) ^ g) * 16 for h in range(2)]
        base = shared_x.iterator.toint()
        for _ in cutlass.range(count, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            for c in cutlass.range_constexpr(chunks):
                self._decode_one_block(shared_codes[None, c, group, stage], shared_scales[None, c, group, stage], mine, words)
                for n in cutlass.range_constexpr(plan.tokens // 8):
                    rows = base + (stage * chunks + c) * tile_bytes + n * 8 * 128
                    low_columns, high_columns = _load_shared(rows + places[0]), _load_shared(rows + places[1])
                    for j in cutlass.range_constexpr(BLOCKS):
                        _mma(total, 4 * n, words, 4 * j, low_columns[j], high_columns[j])
            cute.arch.sync_warp()
            if lane == 0:
                cute.arch.mbarrier_arrive(empty + stage)
            stage, phase = self._next(stage, phase)
        return stage, phase

    @cute.jit
    def _combine(self, total: Any, flag: Any, partial: Any, arrived: Any, tile: Any, low: Any, high: Any, work: Any) -> Any:
        """Add up a tile's sums where several CTAs have a share of it. True for the CTA that came last and holds them all."""
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        threads = plan.warpgroups * WARPGROUP
        steps, grid = work[6], work[7]
        store = low == 0 and high == steps
        if not store:
            tiles = arrived.shape[0]
            work_steps = tiles * steps
            first_cta = ((tile * steps + 1) * grid - 1) // work_steps
            last_cta = ((tile * steps + steps) * grid - 1) // work_steps
            slot = cutlass.Int32(0) if low != 0 else cutlass.Int32(1)
            flat = cute.make_tensor(total.iterator, cute.make_layout(plan.sums))
            for v in cutlass.range_constexpr(plan.sums // 4):
                quad = cute.make_tensor(total.iterator + 4 * v, cute.make_layout(4))
                cute.autovec_copy(quad, cute.local_tile(partial[block, slot, None], (4,), (v * threads + thread,)))
            cute.arch.fence_acq_rel_gpu()
            cute.arch.barrier(barrier_id=1, number_of_threads=threads)
            if thread == 0:
                before = cute.arch.atomic_add(arrived.iterator + tile, Int32(1), sem="acq_rel", scope="gpu")
                flag[0] = before
                if before == last_cta - first_cta:
                    arrived[tile] = Int32(0)
            cute.arch.barrier(barrier_id=1, number_of_threads=threads)
            store = flag[0] == last_cta - first_cta
            if store:
                cute.arch.fence_acq_rel_gpu()
                total.fill(0.0)
                for cta in cutlass.range(first_cta, last_cta + 1, 1, unroll=4):
                    other = cutlass.Int32(1) if cta == first_cta else cutlass.Int32(0)
                    for v in cutlass.range_constexpr(plan.sums // 4):
                        spot = cute.local_tile(partial[cta, other, None], (4,), (v * threads + thread,))
                        parts = _load_fresh(spot.iterator)
                        for e in cutlass.range_constexpr(4):
                            flat[4 * v + e] = flat[4 * v + e] + parts[e]
        return store

    @cute.jit
    def _decode_blocks(self, codes: Any, scales: Any, mine: Any, out: Any) -> None:
        """A warpgroup lane's codes of a tile, block after block -> 16 pairs of BF16."""
        warp, g, q = mine // 32, (mine % 32) // 4, mine % 4
        pair = cute.make_rmem_tensor((2,), Uint32)
        cute.autovec_copy(cute.local_tile(scales, (2,), (warp * 8 + g,)), pair)
        for j in cutlass.range_constexpr(BLOCKS):
            word = codes[((warp * BLOCKS + j) * 8 + (g ^ (2 * j))) * BLOCKS + q]
            _decode(word, _scale(pair[j // 2], 2 * (j % 2)), _scale(pair[j // 2], 2 * (j % 2) + 1), out, 4 * j)

    @cute.jit
    def _decode_one_block(self, codes: Any, scales: Any, mine: Any, out: Any) -> None:
        """A lane's own block of 16 columns of a tile -> 16 pairs of BF16."""
        warp, g, q = mine // 32, (mine % 32) // 4, mine % 4
        words = cute.make_rmem_tensor((BLOCKS,), Uint32)
        cute.autovec_copy(cute.local_tile(codes, (BLOCKS,), ((warp * BLOCKS + q) * 8 + (g ^ (2 * q)),)), words)
        halves = cute.recast_tensor(scales, cutlass.Uint16)
        pair = Uint32(halves[(warp * 8 + g) * BLOCKS + q])
        low, high = _scale(pair, 0), _scale(pair, 1)
        for j in cutlass.range_constexpr(BLOCKS):
            _decode(words[j], low, high, out, 4 * j)

    @cute.jit
    def _store(self, total: Any, sums: Any, y: Any, gain: Any, row_tile: Any, token_tile: Any) -> None:
        """Sums of a tile to y through shared memory, a slice of tokens at a time."""
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        threads = plan.warpgroups * WARPGROUP
        lane = thread % 32
        row = (thread // 32) * 16 + lane // 4
        quads = plan.rows // 4
        for s in cutlass.range_constexpr(plan.tokens // plan.slice):
            for i in cutlass.range_constexpr(plan.slice // 8):
                for e in cutlass.range_constexpr(4):
                    sums[row + 8 * (e // 2), 8 * i + 2 * (lane % 4) + e % 2] = total[(s * plan.slice // 8 + i) * 4 + e]
            cute.arch.barrier(barrier_id=1, number_of_threads=threads)
            for u in cutlass.range_constexpr((plan.slice * quads + threads - 1) // threads):
                unit = u * threads + thread
                token, quad = unit // quads, unit % quads
                t = token_tile * plan.tokens + s * plan.slice + token
                n = row_tile * plan.rows + 4 * quad
                if token < plan.slice and t < y.shape[0] and n < y.shape[1]:
                    value = cute.make_rmem_tensor((4,), Float32)
                    cute.autovec_copy(cute.local_tile(sums[None, token], (4,), (quad,)), value)
                    result = cute.make_rmem_tensor((4,), y.element_type)
                    result.store((value.load() * (gain * Float32(2.0 ** (126 - SCALE_EXPONENT)))).to(y.element_type))
                    cute.autovec_copy(result, cute.local_tile(y[t, None], (4,), (n // 4,)))
            cute.arch.barrier(barrier_id=1, number_of_threads=threads)


def _load_fresh(address: Any) -> Any:
    """Four floats from L2, past this SM's cache."""
    return cute.arch.inline_ptx(
        "ld.global.cg.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", write_only_types=[Float32] * 4, read_only_args=[address]
    )


def _bulk(target: Any, source: Any, words: Any, barrier: Any) -> None:
    """Copy `words` neighbouring words, asynchronously."""
    cute.arch.inline_ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
        read_only_args=[target.iterator, source.iterator, Int32(words * 4), barrier],
    )


def _load_shared(address: Any) -> Any:
    """Four words of shared memory."""
    return cute.arch.inline_ptx(
        "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", write_only_types=[Uint32] * 4, read_only_args=[address]
    )


def _scale(bytes_: Any, at: Any) -> Any:
    """Byte `at` of a word as a pair of equal BF16, 2^107 times the scale."""
    byte = cute.arch.prmt(bytes_, Uint32(0), Uint32(0x4440 | at))
    return byte * Uint32(0x00100010) + Uint32(0x70007000)


def _decode(word: Any, low: Any, high: Any, out: Any, at: Any) -> None:
    """Eight codes -> out[at .. at + 3], pairs of BF16 for rows g, g + 8, g, g + 8; 2^-19 of their value."""
    mask = Uint32(_FIELD_MASK)
    out[at] = _mul_bf16x2((word << 6) & mask, low)
    out[at + 1] = _mul_bf16x2((word << 2) & mask, high)
    out[at + 2] = _mul_bf16x2(((word >> 4) | (word << 28)) & mask, low)
    out[at + 3] = _mul_bf16x2((word & Uint32(0x81808180)) | ((word >> 8) & Uint32(0x00400040)), high)


def _mma(total: Any, first: Any, a: Any, at: Any, b0: Any, b1: Any) -> None:
    """total[first .. first + 3] += a[at .. at + 3] b, a 16 x 8 x 16 product of BF16."""
    out = cute.arch.inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[*(a[at + i] for i in range(4)), b0, b1, *(total[first + i] for i in range(4))],
    )
    for i in range(4):
        total[first + i] = out[i]
