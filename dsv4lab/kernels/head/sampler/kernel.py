"""Token ids and distributions of a batch of rows; see `draw` and `filter` for the mathematics.

Which way a row goes is decided here, from its parameters in memory:

    T <= 0                   the largest logit: one pass
    no filter                the largest of logits / T + noise: one pass
    top-k or top-p           read once into shared memory, 2 or 3 passes there a filter, then the draw from what is kept

With peaks, each part's largest logit from the head, a row at T <= 0 is not read by `sample`, and the pass that reads one to be
filtered is the first that counts.

A row always has one cluster. Each of its CTAs leaves its packed maximum (image, lowest id) with the first one, through
distributed shared memory, a barrier, and the id is written: no counters in memory that a launch would have to find cleared.

`probabilities` has the same first passes, then a sum, and a pass that writes.

Bytes: the logits once, 517 kB a row of 129,280; `probabilities` writes as much. Instructions an element in sm_90a's code:
greedy 5, noise 25, a filtered draw about 110; probabilities 45, filtered 110. Predicted on an H200 for 256 rows (132 MB, 31 us
at a copy's 4.2 TB/s): greedy 35 us, noise 45 us, filtered 130 us; probabilities 75 and 140 us. One row: 4 us, 6 us (2 us are
instructions: 16,160 elements a multiprocessor), 10 to 13 us; probabilities 8 and 13 us. 64 registers a thread at most, nothing
spilled on Hopper. sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Int64, Uint32, Uint64
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.order import LOWEST, choose, largest_of, pack, token_in
from dsv4lab.kernels._common.ptx import exp2
from dsv4lab.kernels.head.sampler import noise
from dsv4lab.kernels.head.sampler.config import GROUP, WARP, SamplerConfig
from dsv4lab.kernels.head.sampler.device import arrive, fma, leave, low_high, part, remote, wait, widened
from dsv4lab.kernels.head.sampler.draw import LOG2E, MAX_TOKEN, MIN_TEMPERATURE, Draw, submit_peaks
from dsv4lab.kernels.head.sampler.filter import Filter

_LOG2E_HIGH, _LOG2E_LOW = 1.44269502162933349609375, 1.9259629911266174681e-08  # their sum is log2(e) to 48 bits
_LN2 = 0.693147180559945309


class Sampler:
    """The kernel for one `SamplerConfig`; B and V are the call's."""

    def __init__(self, config: SamplerConfig) -> None:
        config.check()
        self.plan = config
        self.filter = Filter(config)
        self.plain = Draw(config)
        self.rest = Draw(config, self.filter)

    @cute.jit
    def __call__(
        self,
        logits: Any,
        temperature: Any,
        top_k: Any,
        top_p: Any,
        seed: Any,
        position: Any,
        peaks: Any,
        out: Any,
        stream: Any,
    ) -> None:
        """logits (B, V), parameters (B,), peaks (B, P) -> out (B,) i64, or (B, V) f32. seed, position: read for draws only."""
        plan = self.plan
        kernel = self.sample if plan.what == "sample" else self.probabilities
        kernel(logits, temperature, top_k, top_p, seed, position, peaks, out).launch(
            grid=[plan.cluster, logits.shape[0], 1],
            block=[plan.threads, 1, 1],
            cluster=[plan.cluster, 1, 1] if plan.cluster > 1 else None,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def sample(
        self, logits: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any, position: Any, peaks: Any, out: Any
    ) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        rank, batch, _ = cute.arch.block_idx()
        vocab = logits.shape[1]
        self._begin(thread)
        best = self.best.iterator.toint()
        t, k, p, divisor, filtered = self._parameters(temperature, top_k, top_p, batch, vocab)
        row = logits[batch, None]
        where, key = low_high(position[batch]), low_high(seed[batch])
        first, last = part(cute.ceil_div(vocab, GROUP), rank, plan.cluster)
        wait(plan.cluster)
        if filtered:
            self.filter.begin(rank, row, divisor, first, last, vocab, thread)
            top, _ = self.filter.largest(peaks[batch, None], k, filtered)
            rule = self.filter.rule(top, k, p)
            draw = (best, Float32(LOG2E), Float32(1.0), where, key)
            self.rest.noisy(row, rule, draw, first, last, vocab, thread)
        elif t <= Float32(0.0):
            if cutlass.const_expr(plan.peaks):
                submit_peaks(best, peaks[batch, None], thread, plan.threads)
            else:
                self.plain.greedy(row, best, first, last, vocab, thread)
        else:
            draw = (best, noise.div(Float32(LOG2E), divisor), divisor, where, key)
            self.plain.noisy(row, (), draw, first, last, vocab, thread)
        cute.arch.barrier()
        if thread == 0:
            leave(self.slots.iterator.toint() + 8 * rank, 0, self.best[0])
        self.filter.sync()
        if (thread == 0) & (rank == 0):
            out[batch] = Int64(token_in(largest_of([self.slots[r] for r in range(plan.cluster)])))

    @cute.kernel
    def probabilities(
        self, logits: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any, position: Any, peaks: Any, out: Any
    ) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        rank, batch, _ = cute.arch.block_idx()
        vocab = logits.shape[1]
        self._begin(thread)
        t, k, p, divisor, filtered = self._parameters(temperature, top_k, top_p, batch, vocab)
        row = logits[batch, None]
        first, last = part(cute.ceil_div(vocab, GROUP), rank, plan.cluster)
        wait(plan.cluster)
        self.filter.begin(rank, row, divisor, first, last, vocab, thread)
        top, top_id = self.filter.largest(peaks[batch, None], k, filtered)
        bar, last_id = Float32(-float("inf")), Int32(MAX_TOKEN)
        if filtered:
            bar, last_id = self.filter.rule(top, k, p)
        if t <= Float32(0.0):
            bar, last_id = top, top_id  # one element is left
        rule = (bar, last_id)
        mine = Float32(0.0)
        for group in cutlass.range(first + thread, last, plan.threads, unroll=1):
            values = self._powers(rule, top, group, t <= Float32(0.0))
            mine = mine + ((values[0] + values[1]) + (values[2] + values[3]))
            self.filter.keep(values, group)
        scale = self._one_over(mine, thread)
        for group in cutlass.range(first + thread, last, plan.threads, unroll=1):
            if cutlass.const_expr(plan.room > 0):
                values = self.filter._group(group)  # the thread's own
            else:
                values = self._powers(rule, top, group, t <= Float32(0.0))
            if cutlass.const_expr(plan.vector):
                held = cute.make_rmem_tensor((GROUP,), Float32)
                for j in cutlass.range_constexpr(GROUP):
                    held[j] = values[j] * scale
                cute.autovec_copy(held, cute.local_tile(out[batch, None], (GROUP,), (group,)))
            else:
                for j in cutlass.range_constexpr(GROUP):
                    if GROUP * group + j < vocab:
                        out[batch, GROUP * group + j] = values[j] * scale
        self.filter.sync()

    def _begin(self, thread: Any) -> None:
        """Shared memory, and the wait for what came before. `wait` must follow: then all of the cluster have begun."""
        memory = SmemAllocator()
        self.filter.allocate(memory)
        self.best = memory.allocate_tensor(Uint64, cute.make_layout(1), byte_alignment=16)
        self.slots = memory.allocate_tensor(Uint64, cute.make_layout(self.plan.cluster), byte_alignment=16)
        cute.arch.griddepcontrol_launch_dependents()
        self._clear(thread)
        arrive(self.plan.cluster)
        cute.arch.griddepcontrol_wait()

    @cute.jit
    def _clear(self, thread: Any) -> None:
        best, peak, found = self.best, self.filter.peak, self.filter.found
        if thread == 0:
            best[0] = pack(Uint32(LOWEST), Int32(0))
            peak[0] = pack(Uint32(LOWEST), Int32(0))
            found[3] = Int32(0)  # read by all, written where equals are found

    def _parameters(self, temperature: Any, top_k: Any, top_p: Any, batch: Any, vocab: Any) -> tuple[Any, ...]:
        """A row's (T, elements that top-k keeps, top-p, what logits are divided by, whether it is filtered)."""
        t, p, k = Float32(temperature[batch]), Float32(top_p[batch]), Int64(top_k[batch])
        off = (k <= Int64(0)) | (k >= Int64(vocab))
        kept = choose(off, Int32(vocab), Int32(k))
        greedy = t <= Float32(0.0)
        divisor = choose(greedy, Float32(1.0), cutlass.max(t, Float32(MIN_TEMPERATURE)))
        filtered = (t > Float32(0.0)) & ((kept < Int32(vocab)) | (p < Float32(1.0)))
        return t, kept, p, divisor, filtered

    def _powers(self, rule: Any, top: Any, group: Any, greedy: Any) -> list[Any]:
        """e^(x - largest) of a group's elements, 0 of those that are not kept. Greedy keeps one, which may be infinite: 1."""
        return [
            choose(
                self.filter._kept(rule, x, GROUP * group + j),
                choose(greedy, Float32(1.0), _exp(noise.sub(x, top))),
                Float32(0.0),
            )
            for j, x in enumerate(self.filter._group(group))
        ]

    @cute.jit
    def _one_over(self, mine: Any, thread: Any) -> Any:
        """One over the sum of all threads' numbers, over the cluster, always in the same order."""
        plan = self.plan
        sums = self.filter.doubles
        warp, lane = thread // WARP, thread % WARP
        total = widened(mine)
        total = self.filter._running(total)
        if lane == WARP - 1:
            sums[4 + warp] = total
        cute.arch.barrier()
        if thread == 0:
            total = Float64(0.0)
            for w in cutlass.range(plan.warps, unroll=1):
                total = total + sums[4 + w]
            sums[3] = total
        self.filter.sync()
        total = Float64(0.0)
        for r in cutlass.range_constexpr(plan.cluster):
            total = total + remote(sums.iterator.toint() + 24, r, "f64")
        return Float32(Float64(1.0) / total)


def _exp(x: Any) -> Any:
    """e^x for x <= 0."""
    high = noise.mul(x, Float32(_LOG2E_HIGH))
    low = fma(x, Float32(_LOG2E_HIGH), -high) + x * Float32(_LOG2E_LOW)
    power = exp2(high)
    # Where the power is 0 so is the answer: -inf would make the correction NaN.
    return choose(power > Float32(0.0), fma(power, low * Float32(_LN2), power), power)
