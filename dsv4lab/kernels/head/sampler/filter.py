"""Top-k and top-p of a row, exact, by a cluster: no sort, and nothing of the row but its logits / T in shared memory.

What is kept is a prefix of the row's order (falling logit, then rising id); a filter finds where it ends, in passes that each
narrow it down by 2048 bins, in order:

    first   bins of 1/64 nat below the largest logit; the last one takes all that is further down
    then    bins of images (a float's bits, made to compare as integers) of the bin that the end lies in, until that bin has one
            element, ends with the prefix, or holds one image only; of equal logits the lower ids are kept

What is kept so far is a rule of two numbers, (bar, id): x > bar, or x == bar up to that id. A bin's lower end is a bar, too:
the float below all x whose rounded distance from the largest is less than the bin's far end; float64 finds it exactly (`_bar`).

With peaks of the row from the head, its largest logit is known, and the first pass fills the cache.

A pass: every CTA counts its elements by bin, in its shared memory; each sums 2048 / cluster bins over all CTAs; every CTA finds
the end in those sums. Two barriers of the cluster a pass, two or three passes.

Masses for top-p: an element d below the largest has e^-d. A bin keeps its count n and the sum s of 1 - e^-f, f < 1/64 how
far an element is below the bin's upper end; s is an integer sum in units of 2^-22, so it does not depend on the order. The
bin's mass is (n - s) e^-upper, float64; sums over bins are float64 in a fixed order. d = largest - logit is rounded to float32,
as in the reference; an element's mass is within 2^-23 of itself. Beyond 32 nats masses count as 0.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Uint32

from dsv4lab.kernels._common.lanes import lowest, through
from dsv4lab.kernels._common.order import choose, image, image_in, largest_of, token_in, value_of
from dsv4lab.kernels.head.sampler import noise
from dsv4lab.kernels.head.sampler.config import BINS, BINS_A_NAT, GROUP, SHARE_BITS, WARP, SamplerConfig
from dsv4lab.kernels.head.sampler.device import (
    arrive,
    double,
    exp_minus,
    load_group,
    nearest_uint,
    remote,
    shared_add,
    shuffle_up_double,
    significant_bits,
    wait,
    widened,
)
from dsv4lab.kernels.head.sampler.draw import MAX_TOKEN, submit, submit_peaks

_INFINITY = float("inf")
_ALL = 0xFFFFFFFF
_DIGIT = 11  # bits of a bin's number
_LARGEST = 3.4028234663852886e38
_SMALLEST = 1e-300  # a target that the first element reaches


class Filter:
    """The filters of one `SamplerConfig`.

    A rule says what is kept: (bar, last id that is kept of the values that equal it).
    """

    def __init__(self, config: SamplerConfig) -> None:
        self.plan = config

    def allocate(self, memory: Any) -> None:
        """Shared memory of a CTA."""
        plan = self.plan
        self.cache = memory.allocate_tensor(Float32, cute.make_layout(plan.room), byte_alignment=16) if plan.room else None
        self.hist = memory.allocate_tensor(Uint32, cute.make_layout(2 * BINS), byte_alignment=16)
        self.weights = memory.allocate_tensor(Float64, cute.make_layout(plan.own), byte_alignment=16)
        self.doubles = memory.allocate_tensor(Float64, cute.make_layout(4 + WARP), byte_alignment=16)
        self.peak = memory.allocate_tensor(cutlass.Uint64, cute.make_layout(2), byte_alignment=16)
        self.counts = memory.allocate_tensor(Uint32, cute.make_layout(plan.own), byte_alignment=16)
        self.found = memory.allocate_tensor(Int32, cute.make_layout(4), byte_alignment=16)
        self.tied = memory.allocate_tensor(Int32, cute.make_layout(WARP), byte_alignment=16)

    def begin(self, rank: Any, row: Any, divisor: Any, first: Any, last: Any, vocab: Any, thread: Any) -> None:
        """What all passes work on: groups first .. last - 1 of a row, this CTA's."""
        self.rank, self.row, self.divisor, self.vocab = rank, row, divisor, vocab
        self.first, self.last, self.thread = first, last, thread

    def sync(self) -> None:
        """A barrier of all that share the row."""
        arrive(self.plan.cluster)
        wait(self.plan.cluster)

    # ---- values --------------------------------------------------------------------------------------------------------
    def _group(self, group: Any) -> list[Any]:
        """logits / T of a group inside the CTA's; past the row's end -inf."""
        if self.cache is not None:
            held = cute.make_rmem_tensor((GROUP,), Float32)
            cute.autovec_copy(cute.local_tile(self.cache, (GROUP,), (group - self.first,)), held)
            return [held[j] for j in range(GROUP)]
        return self._scaled(load_group(self.row, group, self.vocab, self.plan.vector), group)

    def _scaled(self, found: list[Any], group: Any) -> list[Any]:
        """Divided by T, with one zero only."""
        values = [noise.add(noise.div(x, self.divisor), Float32(0.0)) for x in found]
        if self.plan.vector:
            return values
        return [choose(GROUP * group + j < self.vocab, x, Float32(-_INFINITY)) for j, x in enumerate(values)]

    def kept_values(self, row: Any, rule: Any, group: Any, last: Any, vocab: Any) -> list[Any]:
        """logits / T of a group, -inf where nothing is or was kept."""
        values = self._group(cutlass.min(group, last - 1))
        return [
            choose((group < last) & self._kept(rule, x, GROUP * group + j), x, Float32(-_INFINITY))
            for j, x in enumerate(values)
        ]

    def _kept(self, rule: Any, x: Any, token: Any) -> Any:
        bar, last_id = rule
        kept = (x > bar) | ((x == bar) & (token <= last_id))
        return kept if self.plan.vector else kept & (token < self.vocab)

    @cute.jit
    def keep(self, values: Any, group: Any) -> None:
        """Put a group's numbers into the cache, if there is one."""
        if cutlass.const_expr(self.plan.room > 0):
            held = cute.make_rmem_tensor((GROUP,), Float32)
            for j in cutlass.range_constexpr(GROUP):
                held[j] = values[j]
            cute.autovec_copy(held, cute.local_tile(self.cache, (GROUP,), (group - self.first,)))

    @cute.jit
    def largest(self, peaks: Any, top_k: Any, filtered: Any) -> tuple[Any, Any]:
        """(The largest logit / T, its lowest id), and the cache filled.

        With peaks a row to be filtered is counted, too, for `rule`; the id is the lowest at T = 0: division may make equals.
        """
        address = self.peak.iterator.toint()
        if cutlass.const_expr(self.plan.peaks):
            submit_peaks(address, peaks, self.thread, self.plan.threads)
            cute.arch.barrier()
            best = self.peak[0]
            top = noise.add(noise.div(value_of(image_in(best)), self.divisor), Float32(0.0))
            if filtered:
                self._read(top_k >= self.vocab, noise.smaller(top, Float32(_LARGEST)), True)
            else:
                self._read(False, top, False)
        else:
            held, at = self._read(False, Float32(0.0), False)
            submit(address, image(held), at)
            self.sync()
            best = largest_of([remote(address, r, "u64") for r in range(self.plan.cluster)])
            top = value_of(image_in(best))
        return top, token_in(best)

    @cute.jit
    def _read(self, by_mass: Any, top: Any, counted: cutlass.Constexpr) -> tuple[Any, Any]:
        """Fill the cache, and count lines where asked to: a thread's largest logit / T, and its lowest id."""
        plan = self.plan
        held, at = Float32(-_INFINITY), Int32(0)
        if cutlass.const_expr(counted):
            self._clear()
        for base in cutlass.range(self.first, self.last, plan.threads * plan.batch, unroll=1):
            groups = [base + b * plan.threads + self.thread for b in range(plan.batch)]
            read = [load_group(self.row, cutlass.min(g, self.last - 1), self.vocab, plan.vector) for g in groups]
            for b in cutlass.range_constexpr(plan.batch):
                if groups[b] < self.last:
                    values = self._scaled(read[b], groups[b])
                    for j in cutlass.range_constexpr(GROUP):
                        better = values[j] > held
                        held = choose(better, values[j], held)
                        at = choose(better, GROUP * groups[b] + j, at)
                    self.keep(values, groups[b])
                    if cutlass.const_expr(counted):
                        self._count((Float32(-_INFINITY), Int32(MAX_TOKEN)), values, groups[b], by_mass, top)
        if cutlass.const_expr(counted):
            cute.arch.barrier()  # none may follow before other threads' groups are read
        return held, at

    # ---- the end of the prefix -----------------------------------------------------------------------------------------
    @cute.jit
    def rule(self, top: Any, top_k: Any, top_p: Any) -> tuple[Any, Any]:
        """What top-k keeps, and of that top-p. top_k: elements, the vocabulary or more where it is off."""
        bar, last_id = Float32(-_INFINITY), Int32(MAX_TOKEN)
        some = top > Float32(-_INFINITY)  # else there is nothing to choose between
        top = noise.smaller(top, Float32(_LARGEST))  # infinite ones share the first bin
        for stage in cutlass.range(2, unroll=1):
            by_mass = stage == 1
            wanted = some & choose(by_mass, top_p < Float32(1.0), top_k < self.vocab)
            at, place, shift = Int32(-1), Uint32(0), Uint32(0)
            low, high = Uint32(0), Uint32(_ALL)
            above, target = Float64(0.0), widened(Float32(top_k))
            while wanted:
                if at < 0:  # with peaks the first filter's are counted
                    if cutlass.const_expr(not self.plan.peaks) or by_mass & (top_k < self.vocab):
                        self._count_lines((bar, last_id), by_mass, top)
                else:
                    self._count_images((bar, last_id), by_mass, top, at, low, high, shift)
                self.sync()
                self._sum(by_mass, at)
                self.sync()  # from here on, counts may be cleared
                self._cross(by_mass, at, above, target, top_p)
                cute.arch.barrier()
                place, count = Uint32(self.found[0]), self.found[1]
                above, target, weight = self.doubles[1], self.doubles[2], self.doubles[3]
                one = (at >= 0) & (shift == Uint32(0))
                enough = choose(by_mass, count == 1, above + weight <= target)
                if at < 0:
                    at = Int32(place)
                    if at < BINS - 1:
                        edge = _bar(top, at)
                        low = image(edge) + Uint32(1)
                        if edge >= bar:
                            bar, last_id = edge, Int32(-1)
                    if at > 0:
                        high = image(_bar(top, at - 1))
                else:
                    high = high - (place << shift)
                    span = (Uint32(1) << shift) - Uint32(1)
                    low = choose(high - low > span, high - span, low)
                    edge = value_of(low)
                    if (enough | one) & (edge > bar):
                        bar, last_id = edge, Int32(MAX_TOKEN)
                    if (~enough) & one:
                        need = (target - above) / (weight / Float64(count))
                        need = cutlass.min(cutlass.max(_ceiling(need), 1), count)
                        if need < count:
                            last_id = self._last_of_equals((bar, last_id), need, last_id)
                wanted = ~(enough | one)
                shift = Uint32(cutlass.max(significant_bits(high - low) - _DIGIT, 0))
                cute.arch.barrier()
        return bar, last_id

    @cute.jit
    def _clear(self) -> None:
        hist = self.hist
        for i in cutlass.range(self.thread, 2 * BINS, self.plan.threads, unroll=1):
            hist[i] = Uint32(0)
        cute.arch.barrier()

    @cute.jit
    def _count_lines(self, rule: Any, by_mass: Any, top: Any) -> None:
        """Counts and shares, by bins below the largest, of the CTA's elements that are kept so far."""
        self._clear()
        for group in cutlass.range(self.first + self.thread, self.last, self.plan.threads, unroll=1):
            self._count(rule, self._group(group), group, by_mass, top)

    @cute.jit
    def _count(self, rule: Any, values: Any, group: Any, by_mass: Any, top: Any) -> None:
        counts = self.hist.iterator.toint()
        for j in cutlass.range_constexpr(GROUP):
            if self._kept(rule, values[j], GROUP * group + j):
                line, down = _line(top, values[j])
                shared_add(counts + 4 * line, Uint32(1))
                if by_mass:
                    shared_add(counts + 4 * (BINS + line), _share(line, down))

    @cute.jit
    def _count_images(self, rule: Any, by_mass: Any, top: Any, at: Any, low: Any, high: Any, shift: Any) -> None:
        """The same by images from `high` down to `low`, all in bin `at` of the first kind."""
        self._clear()
        counts = self.hist.iterator.toint()
        for group in cutlass.range(self.first + self.thread, self.last, self.plan.threads, unroll=1):
            values = self._group(group)
            for j in cutlass.range_constexpr(GROUP):
                below = high - image(values[j])  # wraps round for what lies above
                if self._kept(rule, values[j], GROUP * group + j) & (below <= high - low):
                    place = Int32(below >> shift)
                    shared_add(counts + 4 * place, Uint32(1))
                    if by_mass:
                        shared_add(counts + 4 * (BINS + place), _share(at, _line(top, values[j])[1]))

    @cute.jit
    def _sum(self, by_mass: Any, at: Any) -> None:
        """Weights (masses, or counts) of the CTA's share of the bins, over the cluster, and their sum."""
        plan = self.plan
        counts = self.hist.iterator.toint()
        weights, totals, doubles = self.weights, self.counts, self.doubles
        for i in cutlass.range(self.thread, plan.own, plan.threads, unroll=1):
            place = self.rank * plan.own + i
            count, short = Uint32(0), Float64(0.0)
            for r in cutlass.range_constexpr(plan.cluster):
                count = count + remote(counts + 4 * place, r, "u32")
                short = short + double(remote(counts + 4 * (BINS + place), r, "u32"))
            weight = double(count)
            if by_mass:
                line = choose(at < 0, place, at)
                weight = (weight - short * Float64(2.0**-SHARE_BITS)) * exp_minus(line, BINS_A_NAT)
                weight = choose(line < BINS - 1, weight, Float64(0.0))
            weights[i] = weight
            totals[i] = count
        cute.arch.barrier()
        if self.thread < WARP:
            each = plan.own // WARP
            mine = Float64(0.0)
            for i in cutlass.range(each, unroll=1):
                mine = mine + weights[self.thread * each + i]
            mine = self._running(mine)
            if self.thread == WARP - 1:
                doubles[0] = mine

    def _running(self, mine: Any) -> Any:
        """Sum over the lanes up to this one."""
        for step in (1, 2, 4, 8, 16):
            other = shuffle_up_double(mine, step)
            mine = choose(self.thread % WARP >= step, mine + other, mine)
        return mine

    @cute.jit
    def _cross(self, by_mass: Any, at: Any, above: Any, target: Any, top_p: Any) -> None:
        """Find the bin in which sums from the top reach the target; every CTA by itself, in its first warp.

        -> found: bin, count; doubles: sum above it, target, its weight. Where rounding leaves none, the last bin with weight.
        """
        plan = self.plan
        found, doubles = self.found, self.doubles
        if self.thread < WARP:
            lane, each = self.thread, plan.own // WARP
            parts = [remote(self.doubles.iterator.toint(), r, "f64") for r in range(plan.cluster)]
            if by_mass & (at < 0):
                total = Float64(0.0)
                for r in cutlass.range_constexpr(plan.cluster):
                    total = total + parts[r]
                target = total * widened(top_p)
                target = choose(target > Float64(_SMALLEST), target, Float64(_SMALLEST))
            owner, start, reached, running = Int32(0), above, False, above
            for r in cutlass.range_constexpr(plan.cluster):
                takes = (parts[r] > Float64(0.0)) & (~cutlass.Boolean(reached))
                owner, start = choose(takes, Int32(r), owner), choose(takes, running, start)
                running = running + parts[r]
                reached = cutlass.Boolean(reached) | (takes & (running >= target))
            mine, weight_of = Float64(0.0), self.weights.iterator.toint()
            for i in cutlass.range(each, unroll=1):
                mine = mine + remote(weight_of + 8 * (lane * each + i), owner, "f64")
            upto = self._running(mine)
            before = shuffle_up_double(upto, 1)
            before = choose(lane > 0, before, Float64(0.0))
            some = cute.arch.vote_ballot_sync(mine > Float64(0.0))
            done = cute.arch.vote_ballot_sync((mine > Float64(0.0)) & (start + upto >= target))
            chosen = choose(Uint32(done) != Uint32(0), lowest(Uint32(done)), _highest(Uint32(some)))
            if lane == chosen:
                place, weight, higher, left = Int32(0), Float64(0.0), start + before, Int32(1)
                upto = higher
                for i in cutlass.range(each, unroll=1):
                    here = remote(weight_of + 8 * (lane * each + i), owner, "f64")
                    if (left != 0) & (here > Float64(0.0)):
                        place, weight, higher = lane * each + i, here, upto
                        upto = upto + here
                        left = choose(upto >= target, Int32(0), left)
                found[0] = owner * plan.own + place
                found[1] = Int32(remote(self.counts.iterator.toint() + 4 * place, owner, "u32"))
                doubles[1] = higher
                doubles[2] = target
                doubles[3] = weight

    @cute.jit
    def _last_of_equals(self, rule: Any, need: Any, last_id: Any) -> Any:
        """The id of the `need`-th of the row's elements that equal the bar, as far as this CTA can tell: -1 where
        none of its own is among them, `last_id` where all are."""
        plan = self.plan
        found, tied = self.found, self.tied
        warp, lane = cute.arch.make_warp_uniform(self.thread // WARP), self.thread % WARP
        each = cute.ceil_div(self.last - self.first, plan.warps)
        begin = self.first + warp * each
        end = cutlass.min(begin + each, self.last)
        mine = Int32(0)
        for group in cutlass.range(begin + lane, end, WARP, unroll=1):
            mine = mine + self._equals(rule, group)[GROUP]
        mine = Int32(cute.arch.warp_redux_sync(mine, "add"))
        if lane == 0:
            tied[warp] = mine
        cute.arch.barrier()
        before, total = Int32(0), Int32(0)
        for w in cutlass.range(plan.warps, unroll=1):
            before = choose(w == warp, total, before)
            total = total + tied[w]
        if self.thread == 0:
            found[2] = total
        self.sync()
        quota = need
        for r in cutlass.range_constexpr(plan.cluster):
            other = Int32(remote(self.found.iterator.toint() + 8, r, "u32"))
            quota = choose(self.rank > r, quota - other, quota)
        if (quota > before) & (quota <= before + mine):  # it is in this warp's part
            for base in cutlass.range(begin, end, WARP, unroll=1):
                group = base + lane
                equal = self._equals(rule, cutlass.min(group, end - 1))
                count = choose(group < end, equal[GROUP], Int32(0))
                upto = through(count, lane)
                seen = before + upto - count
                for j in cutlass.range_constexpr(GROUP):
                    seen = seen + equal[j]
                    if (group < end) & (equal[j] != 0) & (seen == quota):
                        found[3] = GROUP * group + j
                before = before + cute.arch.shuffle_sync(upto, WARP - 1)
        cute.arch.barrier()
        last_id = choose(quota < total, found[3], last_id)
        return choose(quota <= 0, Int32(-1), last_id)

    def _equals(self, rule: Any, group: Any) -> list[Any]:
        """1 for each of a group's elements that is kept and equals the bar, and their number."""
        values = self._group(group)
        each = [
            choose(
                (GROUP * group + j < self.vocab) & self._kept(rule, x, GROUP * group + j) & (x == rule[0]),
                Int32(1),
                Int32(0),
            )
            for j, x in enumerate(values)
        ]
        return [*each, each[0] + each[1] + each[2] + each[3]]


def _line(top: Any, x: Any) -> tuple[Any, Any]:
    """(the bin of the first kind, int32, how far below the largest in such bins, at most the last bin)."""
    down = noise.sub(top, x) * Float32(BINS_A_NAT)
    down = noise.larger(noise.smaller(down, Float32(BINS - 1)), Float32(0.0))
    code = "add.rz.f32 {$w0}, {$r0}, {$r1};"  # whole numbers are the lowest bits beside 2^23
    sum_ = cute.arch.inline_ptx(code, write_only_types=[Float32], read_only_args=[down, Float32(2.0**23)])
    return Int32(noise.bits(sum_) & Uint32(BINS - 1)), down


def _share(line: Any, down: Any) -> Any:
    """1 - e^-f in units of 2^-22, f nats from the upper end of the bin; off by f^4 / 24 < 2^-28."""
    f = (down - Float32(line)) * Float32(1 / BINS_A_NAT)
    return nearest_uint((f - f * f * (Float32(0.5) - f * Float32(1 / 6))) * Float32(2.0**SHARE_BITS))


def _bar(top: Any, line: Any) -> Any:
    """The largest float whose distance below `top`, rounded to float32, is beyond a bin of the first kind.

    Rounded distances are less than the bin's far end E where the exact ones are less than the middle M between E and the float
    before: E has few bits, so M itself is rounded to E. top - M, rounded down twice, is below no float that it should not be.
    """
    code = "{ .reg .b32 raw; .reg .f32 end, before; .reg .f64 a, b; mov.f32 end, {$r1}; mov.b32 raw, end; sub.u32 raw, raw, 1; "
    code += "mov.b32 before, raw; cvt.f64.f32 a, end; cvt.f64.f32 b, before; add.rn.f64 a, a, b; "
    code += f"mul.rn.f64 a, a, 0d{0x3FE0000000000000:016X}; cvt.f64.f32 b, {{$r0}}; sub.rm.f64 b, b, a; "
    code += "cvt.rm.f32.f64 {$w0}, b; }"
    end = Float32(line + 1) * Float32(1 / BINS_A_NAT)
    return cute.arch.inline_ptx(code, write_only_types=[Float32], read_only_args=[top, end])


def _ceiling(value: Any) -> Any:
    """A float64 as the next int32."""
    return cute.arch.inline_ptx("cvt.rpi.s32.f64 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[value])


def _highest(mask: Any) -> Any:
    """The highest lane in a mask; of an empty one the first."""
    code = "{ .reg .b32 zeros, top; clz.b32 zeros, {$r0}; sub.s32 top, 31, zeros; max.s32 {$w0}, top, 0; }"
    return cute.arch.inline_ptx(code, write_only_types=[Int32], read_only_args=[mask])
