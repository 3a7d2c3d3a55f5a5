"""Heads turned by their token's rotary angles: after a norm, or backwards and on to FP8 or NVFP4; one pass over x.

    q_norm_rope       y = rotate(x / sqrt(mean(x^2) + eps), position)
    inverse_rope      y = rotate(x, -position), rounded to x's element; then FP8 or NVFP4 codes of it, or its largest magnitude

A CTA of 8 warps takes 8 heads of a token at a time, a thread 16 consecutive values, a chunk. The last 4 of a head's 32 chunks
are rotated. Norms need whole heads: a warp has one. Otherwise warps 0 to 5 have the first 24 chunks of 8 heads, 6 and 7 the
last 8, an FP8 group of 128: only these two rotate. Where CTAs go on to other heads (NVFP4 and "amax"), the pair that rotates
moves on by two warps each time, or it would end last and alone, and a head's registers take the next run's head as soon as it
is encoded, so that loads are under way meanwhile. Lane l of a warp that rotates finds sine and cosine of pair l, once for all
heads of its token, and shuffles hand each lane those of its 8 pairs (`angles`). Encoding is the row quantisers' own.

The reference works in float64. Here a rotated value has two roundings to float32 before its last, one more after a norm, and
sines are good to 1.25 units: results lie within 2^-22 of the pair's length. Of BF16, 3e-5 differ from the reference's by the
last bit; by more where the pair's products cancel. What is not rotated is the reference's, but for 2^-47 in norms.

Bytes, the floor of the time: x once, codes and scales once: 4 a value for BF16 to itself, 3.01 to FP8, 2.56 to NVFP4, whose
global scale of the tensor takes a launch that reads x before. 8192 tokens of 64 heads at an H200's copy of 4.2 TB/s:
256 us, 193 and 164. Instructions a value, about, from sm_90a's code of four passes without its rare branches: 5 to itself, 17
with the norm, 11 to FP8, 12 to NVFP4; one takes 12 us where three quarters of the slots are used. 80 registers at most, up to
8 bytes spilled for NVFP4 of BF16.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Float64, Int32, Uint32
from cutlass.memory import SmemAllocator

from dsv4lab.kernels.quant.rows import encode as enc
from dsv4lab.kernels.quant.rows import sources, table
from dsv4lab.kernels.quant.rows.config import CHUNK, WARP
from dsv4lab.kernels.quant.rows.kernel import QuantizeRows
from dsv4lab.kernels.rope import angles
from dsv4lab.kernels.rope.heads.config import HEAD_DIM, PASS_HEADS, ROPE_DIM, THREADS, HeadsConfig

_CHUNKS = HEAD_DIM // CHUNK
_TURNED = ROPE_DIM // CHUNK  # chunks that are rotated
_TAIL = 8  # chunks of a head that the last warps have
_AHEAD = PASS_HEADS * (_CHUNKS - _TAIL)  # threads that have the others
_PAIRS = CHUNK // 2
_CARVEOUT = 8  # percent of the L1 for shared memory; named, or compiling with a minimum of CTAs would ask for a device
_CTAS = 3  # of Hopper's multiprocessor, at least: 80 registers a thread; Blackwell's code would spill up to 100 bytes
_NEAR = 2.0**100  # mean squares between its reciprocal and this have a float32 as seed of their root


class TurnHeads(QuantizeRows):
    """The kernel of one `HeadsConfig` for an architecture, "sm_90a" or "sm_100a"; M and H are the call's."""

    def __init__(self, plan: HeadsConfig, arch: str) -> None:
        plan.check()
        super().__init__(plan.rows, arch)
        self.plan = plan
        self.early = plan.out in ("nvfp4", "amax")  # CTAs go on to other runs of heads: these are under way meanwhile

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        positions: cute.Tensor,
        inv_freq: cute.Tensor,
        given: cute.Tensor,
        codes: cute.Tensor,
        scale: cute.Tensor,
        used: cute.Tensor,
        stride: Int32,
        heads: Int32,
        eps: Float64,
        ctas: Int32,
        stream: Any,
    ) -> None:
        """x (M H, 512) as u32 words; positions: token m's is the i32 word m stride; inv_freq (32,) f32. given f32: (1,)
        or (M,). codes: u32 words of a row's result, or the counters (1, 2) of "amax"; scale (M H, 512 / group) u8. used (1,)
        f32: the tensor's global scale. heads is H. What a configuration does not need it never touches.
        """
        how = dict(block=[THREADS, 1, 1], stream=stream, use_pdl=True)
        if cutlass.const_expr(self.arch == "sm_90a"):
            how |= dict(min_blocks_per_mp=_CTAS, preferred_smem_carveout=_CARVEOUT)
        self.kernel(x, positions, inv_freq, given, codes, scale, used, stride, heads, eps).launch(grid=[ctas, 1, 1], **how)

    @cute.kernel
    def kernel(
        self,
        x: Any,
        positions: Any,
        inv_freq: Any,
        given: Any,
        codes: Any,
        scale: Any,
        used: Any,
        stride: Int32,
        heads: Int32,
        eps: Float64,
    ) -> None:
        plan, config = self.plan, self.config
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        self.shared = SmemAllocator().allocate_tensor(Uint32, cute.make_layout(2 * PASS_HEADS), byte_alignment=8)
        self.columns = HEAD_DIM
        blocks = (heads + plan.heads - 1) // plan.heads
        tasks = x.shape[0] // heads * blocks
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

        factor, entry, largest = Float32(1.0), Uint32(0), Uint32(0)
        if cutlass.const_expr(plan.scale == "one"):
            factor = given[0]
        if cutlass.const_expr(self.quick and plan.scale == "one"):
            entry = table.prepare(factor, thread)
        held = cute.make_rmem_tensor((plan.passes * config.words,), Uint32)
        at, token, position = thread, block // blocks, Int32(0)
        first, end = self._rows(at, block, token, blocks, heads)
        column = self._column(at)
        if cutlass.const_expr(self.early):
            position = positions[token * stride]
            for i in cutlass.range_constexpr(plan.passes):
                self._fetch(held, i, x, first, end, column, Boolean(True))
        for task in cutlass.range(block, tasks, grid, unroll=1):
            if cutlass.const_expr(not self.early):
                token = task // blocks
                first, end = self._rows(at, task, token, blocks, heads)
                position = positions[token * stride]
                for i in cutlass.range_constexpr(plan.passes):
                    self._fetch(held, i, x, first, end, column, Boolean(True))
            if cutlass.const_expr(plan.norm):
                self._norm_and_turn(held, position, inv_freq, thread, column, eps)
            else:
                if self._turns(at):
                    self._turn_back(held, position, inv_freq, thread, column)
            if cutlass.const_expr(plan.scale == "many"):
                factor = given[token]
                if cutlass.const_expr(self.quick):
                    entry = table.prepare(factor, thread)
            next_column, next_first, next_end = column, first, end
            if cutlass.const_expr(self.early):
                at, following = (at + (THREADS - _AHEAD)) % THREADS, cutlass.min(task + grid, tasks - 1)
                token = following // blocks
                next_first, next_end = self._rows(at, following, token, blocks, heads)
                next_column, position = self._column(at), positions[token * stride]
            for i in cutlass.range_constexpr(plan.passes):
                mine, row = self._pass(held, i), first + i * PASS_HEADS
                if cutlass.const_expr(plan.out == "amax"):
                    largest = enc.max_u32(largest, self._number_amax(self._words(mine, 0)))
                elif cutlass.const_expr(plan.out == "same"):
                    self._store_values(mine, codes, row, end, column)
                elif cutlass.const_expr(plan.out == "nvfp4"):
                    self._nvfp4(mine, codes, scale, row, end, column, factor, entry)
                else:
                    self._power_of_two(mine, codes, scale, row, end, column)
                if cutlass.const_expr(self.early):
                    self._fetch(held, i, x, next_first, next_end, next_column, task + grid < tasks)
            column, first, end = next_column, next_first, next_end
        if cutlass.const_expr(plan.out == "amax"):
            self._of_tensor(largest, codes, used, grid, thread)

    def _chunk(self, c: int, thread: Any) -> Any:
        """The number of a chunk in its head: what encoding is given in a thread's place."""
        return thread

    def _turns(self, at: Any) -> Any:
        """Whether the warp at a place rotates."""
        return cute.arch.make_warp_uniform(at // WARP) >= _AHEAD // WARP

    def _column(self, at: Any) -> Any:
        """Which chunk of its heads a thread has."""
        if self.plan.norm:
            return at % WARP
        tail = _CHUNKS - _TAIL + at % _TAIL
        return cutlass.select_(self._turns(at), tail, at % (_CHUNKS - _TAIL))

    def _rows(self, at: Any, task: Any, token: Any, blocks: Any, heads: Any) -> tuple[Any, Any]:
        """(a thread's first row of a task, the end of the token's rows)."""
        own = at // WARP
        if not self.plan.norm:
            own = cutlass.select_(self._turns(at), (at - _AHEAD) // _TAIL, at // (_CHUNKS - _TAIL))
        return token * heads + task % blocks * self.plan.heads + own, (token + 1) * heads

    @cute.jit
    def _fetch(self, held: Any, i: cutlass.Constexpr, x: Any, first: Any, end: Any, column: Any, wanted: Any) -> None:
        """Load a thread's i-th head of a task; threads past the last head repeat it, and store nothing."""
        if wanted:
            row = cutlass.min(first + i * PASS_HEADS, end - 1)
            self._load_chunk(self._pass(held, i), x, row, column, self.config.element)

    def _pass(self, held: Any, i: int) -> Any:
        """The words of a thread's i-th head."""
        return cute.local_tile(held, (self.config.words,), (i,))

    def _pairs(self, position: Any, inv_freq: Any, thread: Any, column: Any) -> list[tuple[Any, Any]]:
        """(cos, sin) of the pairs of a thread's chunk, if it is one that is rotated."""
        lane = thread % WARP
        cos, sin = angles.cos_sin(position, inv_freq[lane])
        return angles.shared_over_lanes(cos, sin, column % _TURNED * _PAIRS, _PAIRS)

    @cute.jit
    def _turn_back(self, held: Any, position: Any, inv_freq: Any, thread: Any, column: Any) -> None:
        """Rotate backwards and round to the element, for the warps that have what is rotated."""
        config = self.config
        pairs = self._pairs(position, inv_freq, thread, column)
        if column >= _CHUNKS - _TURNED:
            for i in cutlass.range_constexpr(self.plan.passes):
                mine = self._pass(held, i)
                values = enc.floats(self._words(mine, 0), config.element)
                turned: list[Any] = []
                for j in cutlass.range_constexpr(_PAIRS):
                    turned += angles.turned_back(values[2 * j], values[2 * j + 1], *pairs[j])
                words = enc.words_of(turned, config.element)
                for j in cutlass.range_constexpr(config.words):
                    mine[j] = words[j]

    @cute.jit
    def _norm_and_turn(self, held: Any, position: Any, inv_freq: Any, thread: Any, column: Any, eps: Any) -> None:
        """Divide by the root of the mean square, rotate, and round to the element. A warp has a head at a time."""
        config = self.config
        pairs = self._pairs(position, inv_freq, thread, column)
        sums = []
        for i in cutlass.range_constexpr(self.plan.passes):
            wide = sources._wide(self._words(self._pass(held, i), 0), config.element, apart=True)
            strands = sources._squares(wide, [])
            sums.append((strands[0] + strands[1]) + (strands[2] + strands[3]))
        for i in cutlass.range_constexpr(self.plan.passes):
            mine = self._pass(held, i)
            square = self._over_row_f64(sums[i], thread) * Float64(1.0 / HEAD_DIM) + eps
            inverse = sources._rsqrt64(square)
            if square < Float64(1.0 / _NEAR) or square > Float64(_NEAR):
                inverse = Float64(1.0) / sources._sqrt64(square)
            high, low = sources._split(inverse)
            values = cute.make_rmem_tensor((CHUNK,), Float32)
            plain = enc.floats(self._words(mine, 0), config.element)
            for j in cutlass.range_constexpr(CHUNK):
                values[j] = enc.fma(plain[j], high, enc.mul(plain[j], low))
            if column >= _CHUNKS - _TURNED:
                for j in cutlass.range_constexpr(_PAIRS):
                    values[2 * j], values[2 * j + 1] = angles.rotated(values[2 * j], values[2 * j + 1], *pairs[j])
            words = enc.words_of([values[j] for j in range(CHUNK)], config.element)
            for j in cutlass.range_constexpr(config.words):
                mine[j] = words[j]
