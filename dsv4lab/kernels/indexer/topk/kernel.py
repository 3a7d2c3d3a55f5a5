"""The k largest of a row of float32 scores, in the order of their places: a radix selection in registers.

A row is a CTA's, or that of the CTAs of a cluster. It is read once; a lane holds up to 64 scores as integers that compare the
other way round, small for a large score. Warp w of CTA c owns neighbouring entries, a lane one of each 32, so that order by
(CTA, warp, register, lane) is the order of entries. A graph is captured for the longest rows that it may ever see: a cluster
has several rows then, its CTAs select from short ones each by itself, and afterwards from long ones together.

1. Three digits of 11, 11 and 10 bits: count the scores of each digit that share the digits already known, by atomics in shared
   memory; sum up the counts of the cluster; find the digit that the k-th score has. Done early where all of a digit fits.
2. Where scores equal the k-th but not all of them fit: sums over the warps ahead tell each warp how many of its own do, those
   with the lowest entries; the others are forgotten.
3. A bit for each score that is taken, 32 registers a word. Sums over the warps ahead give a warp its place in the result. Its
   words are transposed, so that a lane has the bits of one register, 32 neighbouring entries, and writes those. The result is
   in ascending order, whatever the timing.

Counts are kept in two copies, by lane: scores lie so close together that many of a warp's share a digit.
Of the visible entries alone: what lies beyond is not read. -0 equals 0; a NaN is behind every number, -inf included.

Bytes: the visible scores once, 4 k a row. 4096 rows of 16384, all visible: 268 MB, 64 us at 4.2 TB/s. About 37 instructions a
score, so 85 us of issue slots on 132 multiprocessors, with two rows on each that overlap one's loads with the other's digits.
Predicted on an H200: 100 us; 4 us for few short rows. sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from dataclasses import dataclass, replace
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.lanes import lowest, through
from dsv4lab.kernels.indexer.topk.config import BINS, DIGIT_BITS, SHIFTS, WARP, IndexTopkConfig
from dsv4lab.kernels.indexer.visible import visible

_CARVEOUT = 100  # percent of the L1 for shared memory; named, or compiling with a minimum of CTAs would ask for a device
_COPY = BINS + 4  # words between copies of a histogram: equal digits are on different banks
_NOTHING = 0xFFFFFFFF  # behind every score
_BELOW_INFINITY = 0x007FFFFF  # taken from all, it puts NaNs behind the numbers
_WORD = 32  # bits of a word


class IndexTopk:
    """One configuration of the kernel, as CuTeDSL compiles it."""

    def __init__(self, config: IndexTopkConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(self, scores: Any, num_visible: Any, out: Any, clusters: Int32, stream: Any) -> None:
        """scores (M, T) f32, num_visible (M,) -> out (M, k) i32. M, T, k > 0. clusters: that there are; M where none is for
        several rows.
        """
        plan = self.plan
        self.kernel(scores, num_visible, out).launch(
            grid=[clusters * plan.cluster, 1, 1],
            block=[plan.threads, 1, 1],
            cluster=[plan.cluster, 1, 1] if plan.cluster > 1 else None,
            min_blocks_per_mp=plan.resident,
            preferred_smem_carveout=_CARVEOUT,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, scores: Any, num_visible: Any, out: Any) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        row, rank = block // plan.cluster, block % plan.cluster
        memory = SmemAllocator()
        counts = memory.allocate_tensor(Uint32, cute.make_layout(plan.copies * _COPY), byte_alignment=16)
        local = counts
        if cutlass.const_expr(plan.cluster > 1):
            local = memory.allocate_tensor(Uint32, cute.make_layout((BINS, len(SHIFTS))), byte_alignment=16)
        selection = Selection(
            plan,
            counts,
            local,
            memory.allocate_tensor(Int32, cute.make_layout((plan.cluster * plan.warps, 2))),
            memory.allocate_tensor(Int32, cute.make_layout(plan.warps)),
            memory.allocate_tensor(Int32, cute.make_layout(4), byte_alignment=16),
        )
        cute.arch.griddepcontrol_launch_dependents()
        quads = cute.make_rmem_tensor((4,), Uint32)
        quads.fill(0)
        for i in cutlass.range(thread, plan.copies * _COPY // 4, plan.threads, unroll=1):
            cute.autovec_copy(quads, cute.local_tile(counts, (4,), (i,)))
        cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(plan.alone == 0):
            selection.choose(scores, visible(num_visible, row, scores.shape[1]), out, row, rank)
        else:
            first, clusters = row, grid // plan.cluster
            count = cute.ceil_div(scores.shape[0] - first, clusters)  # of the cluster's rows
            most = cutlass.max(plan.alone, out.shape[1])  # a row of no choice is one CTA's
            few, many = (replace(selection, plan=plan.single(values)) for values in (plan.few, plan.values))
            for i in cutlass.range(rank, count, plan.cluster, unroll=1):
                row = first + i * clusters
                seen = visible(num_visible, row, scores.shape[1])
                if seen <= most:
                    if cutlass.const_expr(plan.alone <= few.plan.capacity) or seen <= few.plan.capacity:
                        few.choose(scores, seen, out, row, Int32(0))
                    else:
                        many.choose(scores, seen, out, row, Int32(0))
            for i in cutlass.range(count, unroll=1):
                row = first + i * clusters
                seen = visible(num_visible, row, scores.shape[1])
                if seen > most:
                    selection.select(scores, out, row, rank, seen, out.shape[1])


@dataclass(frozen=True)
class Selection:
    """Of a row. counts: copies of a histogram, zero; local: of a cluster, this CTA's counts of each digit, for the others.
    warps, sums, found: what warps tell each other.
    """

    plan: cutlass.Constexpr
    counts: Any
    local: Any
    warps: Any
    sums: Any
    found: Any

    @cute.jit
    def choose(self, scores: Any, visible: Any, out: Any, row: Any, rank: Any) -> None:
        """A row's result, whatever is visible."""
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        k = out.shape[1]
        if visible <= k:
            for i in cutlass.range(rank * plan.threads + thread, k, plan.cluster * plan.threads, unroll=1):
                out[row, i] = i if i < visible else Int32(-1)
        else:
            self.select(scores, out, row, rank, visible, k)

    @cute.jit
    def select(self, scores: Any, out: Any, row: Any, rank: Any, visible: Any, k: Any) -> None:
        """The row's k best of `visible`, which are more, by CTA `rank` of those that the plan has for it."""
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        lane = thread % WARP
        warp = cute.arch.make_warp_uniform(thread // WARP)
        place = rank * plan.warps + warp
        used = cute.ceil_div(visible, plan.cluster * plan.threads)  # registers of a lane
        first = place * used * WARP + lane
        image = self._read(scores, row, first, used, visible)
        cute.arch.barrier()  # counts are zero

        # Of the k-th score: its digits so far, bits that are not known, how many of those scores are to be taken, whether all.
        known, open_bits, left, whole = Uint32(0), Uint32(32), Int32(k), cutlass.Boolean(False)
        for d in cutlass.range_constexpr(len(SHIFTS)):
            if not whole:
                digit, before, count = self._digit(image, used, known, left, d)
                known = (known << _bits(d)) | Uint32(digit)
                open_bits, left = Uint32(SHIFTS[d]), left - before
                whole = count == left
        begin = known << open_bits
        last = begin | ((Uint32(1) << open_bits) - Uint32(1))

        if not whole:  # some of the equal scores are too many
            self._drop(image, used, begin, last, left - self._ahead(self._masks(image, used, begin, last), place, 0))
        masks = self._masks(image, used, Uint32(0), last)
        at = self._ahead(masks, place, 1)
        line = (out.iterator + Int64(row) * k).toint()
        lane = cute.arch.lane_idx()
        for w in cutlass.range_constexpr(len(masks)):
            word = _transposed(masks[w], lane)  # of the lane-th register, a bit a lane
            count = Int32(cute.arch.popc(word))
            upto = through(count, lane)
            spot = at + upto - count
            # The first of a register's entries; made of a number that the compiler does not know, or it would keep it.
            entry = cute.arch.shuffle_sync(first, 0) + (w * _WORD + lane) * WARP
            for _ in cutlass.range(count, unroll=1):
                _store_number(line + Int64(spot) * 4, entry + lowest(word))
                word = word & (word - Uint32(1))
                spot += 1
            at += cute.arch.shuffle_sync(upto, WARP - 1)
        if cutlass.const_expr(plan.cluster > 1):
            cute.arch.cluster_arrive()  # nobody leaves while its shared memory is read
            cute.arch.cluster_wait()

    @cute.jit
    def _read(self, scores: Any, row: Any, first: Any, used: Any, visible: Any) -> Any:
        """The lane's scores as integers that are small for large scores."""
        plan = self.plan
        start = first - cute.arch.lane_idx()
        end = cutlass.min(visible, start + used * WARP)  # of what the warp owns
        base = (scores.iterator + (Int64(row) * scores.shape[1] + first)).toint()
        raw = cute.make_rmem_tensor((plan.values,), Uint32)
        raw.fill(0)
        for g in cutlass.range_constexpr(plan.values // plan.step):
            if g * plan.step < used:
                if start + (g + 1) * plan.step * WARP <= end:
                    for v in cutlass.range_constexpr(g * plan.step, (g + 1) * plan.step):
                        raw[v] = _load(base, v * WARP * 4)
                else:
                    for v in cutlass.range_constexpr(g * plan.step, (g + 1) * plan.step):
                        raw[v] = _load_if(base, v * WARP * 4, first + v * WARP, end)
        image = cute.make_rmem_tensor((plan.values,), Uint32)
        for v in range(plan.values):
            image[v] = _image(raw[v])
        if start + plan.values * WARP > end:  # the last registers are beyond what the lane owns
            self._hide(image, first, end)
        return image

    def _hide(self, image: Any, first: Any, end: Any) -> None:
        for v in range(self.plan.values):
            image[v] = cutlass.select_(first + v * WARP < end, image[v], Uint32(_NOTHING))

    @cute.jit
    def _digit(self, image: Any, used: Any, known: Any, left: Any, d: cutlass.Constexpr) -> tuple[Any, Any, Any]:
        """The digit of the score that `left` scores do not exceed, among those with the digits known: (it, scores with a
        smaller digit, scores with it).
        """
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        lane = thread % WARP
        warp = cute.arch.make_warp_uniform(thread // WARP)
        shift, bits = SHIFTS[d], _bits(d)
        sums, found = self.sums, self.found  # stores inside a branch, into what is not an attribute
        base = self.counts.iterator.toint() + lane % plan.copies * (4 * _COPY)
        for g in cutlass.range_constexpr(plan.values // plan.step):
            if g * plan.step < used:
                for v in cutlass.range_constexpr(g * plan.step, (g + 1) * plan.step):
                    _increment(base, image[v], shift, bits, None if d == 0 else known)
        cute.arch.barrier()

        number = self._sum_up(thread, d)
        total = number[0]
        for b in cutlass.range_constexpr(1, plan.bins):
            total = total + number[b]
        upto = through(total, lane)
        if lane == WARP - 1:
            sums[warp] = upto
        cute.arch.barrier()
        part = sums[lane % plan.warps]
        before = upto - total + cute.arch.warp_redux_sync(part if lane < warp else Int32(0), "add")
        if before < left and left <= before + total:
            found[3] = Int32(0)  # read with the others
            for b in cutlass.range_constexpr(plan.bins):
                if before < left and left <= before + number[b]:
                    found[0] = thread * plan.bins + b
                    found[1] = before
                    found[2] = number[b]
                before = before + number[b]
        cute.arch.barrier()
        return found[0], found[1], found[2]

    @cute.jit
    def _sum_up(self, thread: Any, d: cutlass.Constexpr) -> Any:
        """Counts of the thread's digits, all copies, all CTAs; the copies are zero again."""
        plan = self.plan
        number = cute.make_rmem_tensor((plan.bins,), Int32)
        number.fill(0)
        quad = cute.make_rmem_tensor((4,), Uint32)
        zeros = cute.make_rmem_tensor((4,), Uint32)
        zeros.fill(0)
        for c in cutlass.range_constexpr(plan.copies):
            for b in cutlass.range_constexpr(plan.bins // 4):
                spot = cute.local_tile(self.counts, (4,), (c * (_COPY // 4) + thread * (plan.bins // 4) + b,))
                cute.autovec_copy(spot, quad)
                cute.autovec_copy(zeros, spot)
                for i in cutlass.range_constexpr(4):
                    number[4 * b + i] = number[4 * b + i] + Int32(quad[i])
        if cutlass.const_expr(plan.cluster > 1):
            for b in cutlass.range_constexpr(plan.bins):
                self.local[thread * plan.bins + b, d] = Uint32(number[b])
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
            number.fill(0)
            place = self.local[None, d].iterator.toint() + thread * (4 * plan.bins)
            for c in cutlass.range_constexpr(plan.cluster):
                for b in cutlass.range_constexpr(plan.bins // 4):
                    words = _remote_words(place + 16 * b, c)
                    for i in cutlass.range_constexpr(4):
                        number[4 * b + i] = number[4 * b + i] + words[i]
        return number

    @cute.jit
    def _masks(self, image: Any, used: Any, low: Any, high: Any) -> list[Any]:
        """Which of the lane's scores are from low to high, a bit a register."""
        plan = self.plan
        masks = [Uint32(0) for _ in range(-(-plan.values // _WORD))]
        for g in cutlass.range_constexpr(plan.values // plan.step):
            if g * plan.step < used:
                for v in cutlass.range_constexpr(g * plan.step, (g + 1) * plan.step):
                    masks[v // _WORD] = _mark_if(image[v] - low, high - low, masks[v // _WORD], 1 << (v % _WORD))
        return masks

    @cute.jit
    def _ahead(self, masks: Any, place: Any, which: cutlass.Constexpr) -> Any:
        """How many scores are marked in the warps ahead of this one. which: of the exchanges."""
        plan = self.plan
        lane = cute.arch.lane_idx()
        warps = self.warps
        mine = Int32(0)
        for w in cutlass.range_constexpr(len(masks)):
            mine = mine + Int32(cute.arch.popc(masks[w]))
        mine = cute.arch.warp_redux_sync(mine, "add")
        if cutlass.const_expr(plan.cluster > 1):
            if lane < plan.cluster:
                _remote_store(warps[None, which].iterator.toint() + 4 * place, lane, mine)
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            if lane == 0:
                warps[place, which] = mine
            cute.arch.barrier()
        ahead = Int32(0)
        for i in cutlass.range_constexpr(-(-plan.cluster * plan.warps // WARP)):
            other = i * WARP + lane
            if other < place:
                ahead = ahead + warps[other, which]
        return cute.arch.warp_redux_sync(ahead, "add")

    @cute.jit
    def _drop(self, image: Any, used: Any, begin: Any, last: Any, kept: Any) -> None:
        """Forget the warp's scores from begin to last but for the first `kept`."""
        plan = self.plan
        below = Uint32(cute.arch.lanemask_lt())
        for g in cutlass.range_constexpr(plan.values // plan.step):
            if g * plan.step < used:
                for v in cutlass.range_constexpr(g * plan.step, (g + 1) * plan.step):
                    same = image[v] >= begin and image[v] <= last
                    mask = Uint32(cute.arch.vote_ballot_sync(same))
                    late = same and Int32(cute.arch.popc(mask & below)) >= kept
                    image[v] = cutlass.select_(late, Uint32(_NOTHING), image[v])
                    kept -= Int32(cute.arch.popc(mask))


def _bits(d: int) -> int:
    """Of a digit."""
    return SHIFTS[d - 1] - SHIFTS[d] if d else DIGIT_BITS


@cute.jit
def _transposed(word: Any, lane: Any) -> Any:
    """Bit b of lane a to bit a of lane b."""
    for step, mask in ((16, 0x0000FFFF), (8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        other = Uint32(cute.arch.shuffle_sync_bfly(word, step))
        lower = (word & Uint32(mask)) | ((other & Uint32(mask)) << step)
        upper = (word & Uint32(mask << step)) | ((other >> step) & Uint32(mask))
        word = Uint32(cutlass.select_(lane & step == 0, lower, upper))
    return word


def _load(base: Any, offset: int) -> Any:
    """A word `offset` bytes behind an address."""
    code = f"ld.global.b32 {{$w0}}, [{{$r0}} + {offset}];"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[base])


def _load_if(base: Any, offset: int, index: Any, end: Any) -> Any:
    """The same if index < end, else 0. Without branches: all loads of a lane are in flight."""
    code = "{ .reg .pred inside; setp.lt.s32 inside, {$r1}, {$r2}; mov.b32 {$w0}, 0; "
    code += f"@inside ld.global.b32 {{$w0}}, [{{$r0}} + {offset}]; }}"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[base, index, end])


def _image(bits: Any) -> Any:
    """A float's bits as an integer that is small where the float is large: -0 is 0, NaN behind -inf, ahead of _NOTHING."""
    code = "{ .reg .b32 sign, flip, image; shr.s32 sign, {$r0}, 31; not.b32 flip, sign; and.b32 flip, flip, 0x7FFFFFFF; "
    code += "xor.b32 image, {$r0}, flip; add.s32 image, image, sign; "  # images of the two zeros are neighbours
    code += f"sub.u32 image, image, {_BELOW_INFINITY}; min.u32 {{$w0}}, image, {_NOTHING - 1}; }}"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[bits])


def _increment(base: Any, image: Any, shift: int, bits: int, known: Any) -> None:
    """Count a digit of a score; with digits known, only if it has them. One piece of assembly: the compiler would keep what
    the digits have in common, a register a score.
    """
    code = "{ .reg .b32 spot; .reg .pred same; "
    move = f"shr.u32 spot, {{$r1}}, {shift - 2}" if shift >= 2 else f"shl.b32 spot, {{$r1}}, {2 - shift}"
    code += f"{move}; and.b32 spot, spot, {((1 << bits) - 1) << 2}; add.u32 spot, spot, {{$r0}}; "
    if known is None:
        cute.arch.inline_ptx(code + "red.shared.add.u32 [spot], 1; }", read_only_args=[base, image])
        return
    code += f".reg .b32 above; shr.u32 above, {{$r1}}, {shift + bits}; setp.eq.u32 same, above, {{$r2}}; "
    cute.arch.inline_ptx(code + "@same red.shared.add.u32 [spot], 1; }", read_only_args=[base, image, known])


def _mark_if(a: Any, b: Any, word: Any, bit: int) -> Any:
    """word with a bit more if a <= b."""
    code = "{ .reg .pred inside; setp.le.u32 inside, {$r0}, {$r1}; mov.b32 {$w0}, {$r2}; "
    code += f"@inside or.b32 {{$w0}}, {{$r2}}, {bit}; }}"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a, b, word])


def _store_number(address: Any, number: Any) -> None:
    cute.arch.inline_ptx("st.global.s32 [{$r0}], {$r1};", read_only_args=[address, number])


def _remote_words(place: Any, cta: int) -> Any:
    """Four words at the same place of another CTA's shared memory."""
    code = "{ .reg .b32 there; mapa.shared::cluster.u32 there, {$r0}, {$r1}; "
    code += "ld.shared::cluster.v4.s32 {{$w0}, {$w1}, {$w2}, {$w3}}, [there]; }"
    return cute.arch.inline_ptx(code, write_only_types=[Int32] * 4, read_only_args=[place, Int32(cta)])


def _remote_store(place: Any, cta: Any, word: Any) -> None:
    code = "{ .reg .b32 there; mapa.shared::cluster.u32 there, {$r0}, {$r1}; st.shared::cluster.s32 [there], {$r2}; }"
    cute.arch.inline_ptx(code, read_only_args=[place, cta, word])
