"""The largest of logits, and of logits / T + noise, over a part of a row.

    key[v] = logits[v] / T + g[v],   g = -log E,   E ~ Exp(1) from the uniform number w of element v

Most elements cannot win, and their exact key is never computed: E >= w, so a key reaches the best so far only where
w <= 2^((logit / T - best) log2 e), which a product, an `ex2` and a comparison decide, with a margin above all rounding. The
best so far stands in shared memory; before the first look at it, a few warps put a bound there that some element surely
reaches. What is skipped depends on timing, what is found does not. Warps whose logits are all 23 nats below skip their words,
too. Instructions in sm_90a's code: 95 a group of four, 40 of them the generator's, and about 150 an exact key.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, Uint64

from dsv4lab.kernels._common.order import (
    choose,
    floor_of,
    image,
    image_in,
    largest_of,
    largest_of_lanes,
    pack,
    value_of,
)
from dsv4lab.kernels._common.ptx import exp2, log2
from dsv4lab.kernels.head.sampler import noise
from dsv4lab.kernels.head.sampler.config import GROUP, WARP, SamplerConfig
from dsv4lab.kernels.head.sampler.device import fma, load_group, low_high, magnitude, shared_max, shared_now
from dsv4lab.kernels.head.sampler.noise import larger, smaller

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
_INFINITY = float("inf")
_MARGIN = 2.0**-20  # of 2 |b| + 64 bits: products, sums and approximations above err by less than a tenth of it
_HALF_EXPONENT = 0.4713  # E <= 2^0.4713 w for w <= 1/2
_CLAMP = 1e38  # infinite keys are tested as this one
_FLOOR_WARPS = 8  # whose first group gives the bound
MAX_TOKEN = 2**31 - 1
MIN_TEMPERATURE = 1e-5


class Draw:
    """Maxima of rows, for one `SamplerConfig`. filtered: logits / T come from a `Filter` and not from memory, elements that it
    removed as -inf."""

    def __init__(self, config: SamplerConfig, filtered: Any = None) -> None:
        self.plan = config
        self.filtered = filtered

    @cute.jit
    def greedy(self, row: Any, best: Any, first: Any, last: Any, vocab: Any, thread: Any) -> None:
        """Put the largest of groups first .. last - 1, and of equals the lowest, into `best`, a shared address."""
        plan = self.plan
        held, at = Float32(-_INFINITY), Int32(0)
        for base in cutlass.range(first, last, plan.threads * plan.batch, unroll=1):
            groups = [cutlass.min(base + b * plan.threads + thread, last - 1) for b in range(plan.batch)]
            found = [load_group(row, group, vocab, plan.vector) for group in groups]
            for b in cutlass.range_constexpr(plan.batch):  # what is read twice at an end changes nothing
                for j in cutlass.range_constexpr(GROUP):
                    better = found[b][j] > held
                    held = choose(better, found[b][j], held)
                    at = choose(better, GROUP * groups[b] + j, at)
        submit(best, image(held), at)

    @cute.jit
    def noisy(self, row: Any, rule: Any, draw: Any, first: Any, last: Any, vocab: Any, thread: Any) -> None:
        """Put the largest key of groups first .. last - 1 into the shared address draw[0].

        draw: (best, log2(e) / T, what a value is divided by, words of the position, words of the seed).
        """
        plan = self.plan
        held = cute.make_rmem_tensor((GROUP, plan.batch), Float32)
        if first < last:  # the last CTAs may have no groups
            self._fetch(held, row, rule, first + thread, last, vocab)
            if thread < _FLOOR_WARPS * WARP:
                self._bound([held[j, 0] for j in range(GROUP)], first + thread, draw)
        cute.arch.barrier()
        for base in cutlass.range(first, last, plan.threads * plan.batch, unroll=1):
            if base > first:
                self._fetch(held, row, rule, base + thread, last, vocab)
            for b in cutlass.range_constexpr(plan.batch):
                self._consider([held[j, b] for j in range(GROUP)], base + b * plan.threads + thread, draw)

    @cute.jit
    def _fetch(self, held: Any, row: Any, rule: Any, group: Any, last: Any, vocab: Any) -> None:
        """A thread's next groups."""
        found = [self._values(row, rule, group + b * self.plan.threads, last, vocab) for b in range(self.plan.batch)]
        for b in cutlass.range_constexpr(self.plan.batch):
            for j in cutlass.range_constexpr(GROUP):
                held[j, b] = found[b][j]

    def _values(self, row: Any, rule: Any, group: Any, last: Any, vocab: Any) -> list[Any]:
        """A group's logits, or from a filter logits / T; -inf for those of no group and past the row's end."""
        if self.filtered is not None:
            return self.filtered.kept_values(row, rule, group, last, vocab)
        found = load_group(row, cutlass.min(group, last - 1), vocab, self.plan.vector)
        end = vocab if not self.plan.vector else None
        return [
            choose((group < last) if end is None else ((group < last) & (GROUP * group + j < end)), x, Float32(-_INFINITY))
            for j, x in enumerate(found)
        ]

    @cute.jit
    def _bound(self, values: Any, group: Any, draw: Any) -> None:
        """Raise `best` to what a lane's best key is at least: E < 1.3863 w where w <= 1/2. By whole warps."""
        best, slope, _, position, seed = draw
        word = noise.words(group, position, seed, noise.SAMPLE)
        low = Float32(-_INFINITY)
        for j in cutlass.range_constexpr(GROUP):
            w = Float32(word[j]) + Float32(0.5)
            bound = fma(values[j], slope, Float32(32.0 - _HALF_EXPONENT) - log2(w))
            low = larger(low, choose(w <= Float32(2.0**31), bound, Float32(-_INFINITY)))
        low = smaller(low, Float32(_CLAMP))
        low = (low - Float32(_MARGIN) * (magnitude(low) * Float32(2.0) + Float32(64.0))) * Float32(LN2)
        code = cute.arch.warp_redux_sync(image(low), "umax")
        if cute.arch.lane_idx() == 0:
            shared_max(best, floor_of(code))

    @cute.jit
    def _consider(self, values: Any, group: Any, draw: Any) -> None:
        """Exact keys of those of a group that may win. By whole warps."""
        best, slope, divisor, position, seed = draw
        bar = value_of(image_in(shared_now(best)))
        bar = smaller(larger(bar, Float32(-_CLAMP)), Float32(_CLAMP)) * Float32(LOG2E)
        offset = Float32(32.0) + Float32(_MARGIN) * (magnitude(bar) * Float32(2.0) + Float32(64.0)) - bar
        top = larger(larger(values[0], values[1]), larger(values[2], values[3]))
        if cute.arch.vote_any_sync(fma(top, slope, offset) >= Float32(-1.0)):  # w >= 2^-33
            word = noise.words(group, position, seed, noise.SAMPLE)
            left = Int32(0)
            for j in cutlass.range_constexpr(GROUP):
                may = Float32(word[j]) <= exp2(fma(values[j], slope, offset))
                left = left | choose(may, Int32(1 << j), Int32(0))
            while left != 0:
                lowest = left & -left
                x, w, token = values[0], word[0], GROUP * group
                for j in cutlass.range_constexpr(1, GROUP):
                    here = lowest == (1 << j)
                    x, w = choose(here, values[j], x), choose(here, word[j], w)
                    token = choose(here, GROUP * group + j, token)
                key = noise.add(noise.div(x, divisor), noise.gumbel(w))
                shared_max(best, pack(image(key), token))
                left = left & (left - 1)


def keys_of(values: list[Any], group: Any, temperature: Any, seed: Any, position: Any) -> list[Any]:
    """The exact keys of a group's logits, their own where the temperature is 0: seed, position int64."""
    greedy = temperature <= Float32(0.0)
    divisor = choose(greedy, Float32(1.0), cutlass.max(temperature, Float32(MIN_TEMPERATURE)))
    word = noise.words(group, low_high(position), low_high(seed), noise.SAMPLE)
    return [choose(greedy, x, noise.add(noise.div(x, divisor), noise.gumbel(w))) for x, w in zip(values, word, strict=True)]


@cute.jit
def submit(best: Any, code: Any, token: Any) -> None:
    """Raise the shared address `best` to the largest of a warp's images and the lowest id that has it."""
    largest = cute.arch.warp_redux_sync(code, "umax")
    lowest = cute.arch.warp_redux_sync(choose(code == largest, token, Int32(MAX_TOKEN)), "min")
    if cute.arch.lane_idx() == 0:
        shared_max(best, pack(Uint32(largest), Int32(lowest)))


@cute.jit
def submit_peaks(best: Any, peaks: Any, thread: Any, threads: cutlass.Constexpr) -> None:
    """Raise the shared address `best` to the largest of a row's numbers that are packed already. By all threads."""
    found = Uint64(0)
    for i in cutlass.range(thread, peaks.shape[0], threads, unroll=1):
        found = largest_of([found, Uint64(peaks[i])])
    found = largest_of_lanes(found, WARP)
    if cute.arch.lane_idx() == 0:
        shared_max(best, found)
