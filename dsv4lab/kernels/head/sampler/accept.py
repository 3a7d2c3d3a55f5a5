"""Verification of drafted tokens by rejection: how many stand, and the token that follows them.

Draft i stands where u q < p; one lane of every warp looks at one draft. The token after the last that stands is the largest of

    max(p - q, 0) / E   over the vocabulary, or p / E after the last draft, E ~ Exp(1)

by a cluster a row. As in `draw`, most exact keys are never computed: E >= w, the
uniform number, so an element whose weight is below best * w cannot win. Where p <= q everywhere
the draw is from p, in a second round: that takes two distributions that differ by rounding only.

Bytes: two rows of probabilities once, 1 MB of 129,280: a quarter of a microsecond at an H200's bandwidth, so latencies count.
Predicted there: 4 to 5 us up to 16 rows, 70 us for 256 (265 MB). sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, Uint64
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.lanes import lowest
from dsv4lab.kernels._common.order import choose, floor_of, image, image_in, largest_of, pack, token_in, value_of
from dsv4lab.kernels.head.sampler import noise
from dsv4lab.kernels.head.sampler.config import GROUP, WARP, AcceptConfig
from dsv4lab.kernels.head.sampler.device import (
    arrive,
    leave,
    load_group,
    low_high,
    part,
    shared_max,
    shared_now,
    wait,
)
from dsv4lab.kernels.head.sampler.noise import larger

_MARGIN = 2.0**-18  # of the quantities compared: above all rounding in them
_HALF_EXPONENT = 1.3864  # E <= this times w for w <= 1/2
_SMALL = 1e-20  # bars below this are none: a product with w would not be exact enough
_FLOOR_WARPS = 8
_BATCH = 4  # groups that a thread loads together, of two rows


class Accept:
    """The kernel for one `AcceptConfig`; B, n and V are the call's."""

    def __init__(self, config: AcceptConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(
        self,
        target: Any,
        draft: Any,
        draft_ids: Any,
        seed: Any,
        position: Any,
        count: Any,
        token: Any,
        stream: Any,
    ) -> None:
        """target (B, n + 1, V), draft (B, n, V), not read where n is 0, draft_ids (B, n) -> count, token (B,)."""
        plan = self.plan
        self.kernel(target, draft, draft_ids, seed, position, count, token).launch(
            grid=[plan.cluster, target.shape[0], 1],
            block=[plan.threads, 1, 1],
            cluster=[plan.cluster, 1, 1] if plan.cluster > 1 else None,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, target: Any, draft: Any, draft_ids: Any, seed: Any, position: Any, count: Any, token: Any) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        rank, batch, _ = cute.arch.block_idx()
        vocab, drafts = target.shape[2], target.shape[1] - 1
        # For p - q and for p: the CTA's best, and those of all of the cluster.
        best = SmemAllocator().allocate_tensor(Uint64, cute.make_layout((1 + plan.cluster, 2)), byte_alignment=16)
        cute.arch.griddepcontrol_launch_dependents()
        if thread == 0:
            for i in cutlass.range_constexpr(2):
                best[0, i] = Uint64(0)
        arrive(plan.cluster)
        cute.arch.griddepcontrol_wait()
        key, start = low_high(seed[batch]), Int64(position[batch])
        stands = self._stands(target[batch, None, None], draft[batch, None, None], draft_ids[batch, None], key, start, drafts)
        where = low_high(start + Int64(stands))
        p = target[batch, stands, None]
        q = draft[batch, cutlass.max(cutlass.min(stands, drafts - 1), 0), None]
        first, last = part(cute.ceil_div(vocab, GROUP), rank, plan.cluster)
        wait(plan.cluster)  # all of the cluster have begun
        found = self._round(p, q, stands < drafts, best[None, 0], rank, key, where, first, last, vocab, thread)
        if found == Uint64(0):  # nothing is left of p - q anywhere, as all of the cluster see
            found = self._round(p, q, False, best[None, 1], rank, key, where, first, last, vocab, thread)
        if (thread == 0) & (rank == 0):
            count[batch] = Int64(stands)
            token[batch] = Int64(choose(found == Uint64(0), Int32(0), token_in(found)))

    @cute.jit
    def _round(
        self,
        p: Any,
        q: Any,
        subtract: Any,
        best: Any,
        rank: Any,
        key: Any,
        where: Any,
        first: Any,
        last: Any,
        vocab: Any,
        thread: Any,
    ) -> Any:
        """The row's largest weight / E, packed; 0 where no weight is above 0."""
        plan = self.plan
        self._largest(p, q, subtract, best.iterator.toint(), key, where, first, last, vocab, thread)
        cute.arch.barrier()
        if thread < plan.cluster:  # everyone tells everyone
            leave(best.iterator.toint() + 8 + 8 * rank, thread, best[0])
        arrive(plan.cluster)
        wait(plan.cluster)
        return largest_of([best[1 + r] for r in range(plan.cluster)])

    @cute.jit
    def _stands(self, target: Any, draft: Any, draft_ids: Any, key: Any, start: Any, drafts: Any) -> Any:
        """How many drafts are accepted before the first that is not; every warp finds it."""
        lane = cute.arch.lane_idx()
        stands, going = Int32(0), Int32(1)
        for base in cutlass.range(0, drafts, WARP, unroll=1):
            i = cutlass.min(base + lane, drafts - 1)
            drafted = cutlass.min(cutlass.max(Int64(draft_ids[i]), Int64(0)), Int64(target.shape[1] - 1))
            p, q = target[i, Int32(drafted)], draft[i, Int32(drafted)]
            word = noise.words(Uint32(0), low_high(start + Int64(i)), key, noise.ACCEPT)
            good = (base + lane < drafts) & (noise.mul(noise.uniform(word[0]), q) < p)
            run = lowest(~Uint32(cute.arch.vote_ballot_sync(good)))
            stands = stands + choose(going != 0, run, Int32(0))
            going = choose(run == WARP, going, Int32(0))
        return stands

    @cute.jit
    def _largest(
        self,
        p: Any,
        q: Any,
        subtract: Any,
        best: Any,
        key: Any,
        where: Any,
        first: Any,
        last: Any,
        vocab: Any,
        thread: Any,
    ) -> None:
        """Raise the shared address `best` to the largest weight / E of groups first .. last - 1."""
        plan = self.plan
        held = cute.make_rmem_tensor((GROUP, _BATCH), Float32)
        if first < last:  # the last CTAs may have no groups
            self._fetch(held, p, q, subtract, first + thread, last, vocab)
            if thread < _FLOOR_WARPS * WARP:
                self._bound([held[j, 0] for j in range(GROUP)], first + thread, best, key, where)
        cute.arch.barrier()
        for base in cutlass.range(first, last, plan.threads * _BATCH, unroll=1):
            if base > first:
                self._fetch(held, p, q, subtract, base + thread, last, vocab)
            for b in cutlass.range_constexpr(_BATCH):
                self._consider([held[j, b] for j in range(GROUP)], base + b * plan.threads + thread, best, key, where)

    @cute.jit
    def _fetch(self, held: Any, p: Any, q: Any, subtract: Any, group: Any, last: Any, vocab: Any) -> None:
        """Weights of a thread's next groups."""
        found = [self._weights(p, q, subtract, group + b * self.plan.threads, last, vocab) for b in range(_BATCH)]
        for b in cutlass.range_constexpr(_BATCH):
            for j in cutlass.range_constexpr(GROUP):
                held[j, b] = found[b][j]

    def _weights(self, p: Any, q: Any, subtract: Any, group: Any, last: Any, vocab: Any) -> list[Any]:
        """max(p - q, 0), or p; 0 for elements of no group."""
        at = cutlass.min(group, last - 1)
        wanted, drawn = load_group(p, at, vocab, self.plan.vector), load_group(q, at, vocab, self.plan.vector)
        less = [noise.sub(a, choose(subtract, b, Float32(0.0))) for a, b in zip(wanted, drawn, strict=True)]
        return [
            choose((group < last) & (GROUP * group + j < vocab) & (x > Float32(0.0)), x, Float32(0.0))
            for j, x in enumerate(less)
        ]

    @cute.jit
    def _bound(self, weights: Any, group: Any, best: Any, key: Any, where: Any) -> None:
        """Raise `best` to what a lane's best key is at least. By whole warps."""
        word = noise.words(Uint32(group), where, key, noise.RESIDUAL)
        low = Float32(0.0)
        for j in cutlass.range_constexpr(GROUP):
            w = noise.uniform(word[j])
            bound = noise.div(weights[j], w * Float32(_HALF_EXPONENT)) * Float32(1.0 - _MARGIN)
            low = larger(low, choose(w <= Float32(0.5), bound, Float32(0.0)))
        code = Uint32(cute.arch.warp_redux_sync(image(low), "umax"))
        if (cute.arch.lane_idx() == 0) & (value_of(code) > Float32(_SMALL)):
            shared_max(best, floor_of(code))

    @cute.jit
    def _consider(self, weights: Any, group: Any, best: Any, key: Any, where: Any) -> None:
        """Exact keys of those of a group that may win. By whole warps."""
        seen = shared_now(best)
        bar = choose(seen == Uint64(0), Float32(0.0), value_of(image_in(seen)))
        bar = choose(bar >= Float32(_SMALL), bar, Float32(-1.0)) * Float32(1.0 - _MARGIN)
        top = larger(larger(weights[0], weights[1]), larger(weights[2], weights[3]))
        # w >= 2^-33
        if cute.arch.vote_any_sync((top > Float32(0.0)) & (top >= bar * Float32(2.0**-33))):
            word = noise.words(Uint32(group), where, key, noise.RESIDUAL)
            left = Int32(0)
            for j in cutlass.range_constexpr(GROUP):
                may = (weights[j] > Float32(0.0)) & (weights[j] >= bar * noise.uniform(word[j]))
                left = left | choose(may, Int32(1 << j), Int32(0))
            while left != 0:
                lowest = left & -left
                x, w, token = weights[0], word[0], GROUP * group
                for j in cutlass.range_constexpr(1, GROUP):
                    here = lowest == (1 << j)
                    x, w = choose(here, weights[j], x), choose(here, word[j], w)
                    token = choose(here, GROUP * group + j, token)
                exact = noise.div(x, noise.exponential(noise.uniform(w)))
                token = choose(exact > Float32(0.0), token, Int32(0))  # of zeros the first of all wins
                shared_max(best, pack(image(exact), token))
                left = left & (left - 1)
