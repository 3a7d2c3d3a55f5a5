"""`pre`, `post_pre` and `head` as CuTeDSL compiles them: the projection and, beside it, what follows from it (PDL).

The order of launches makes waiting safe: CTAs of `finish` start once every CTA of `project` runs, and nothing there waits for
them. Of a few tokens, and of D that clusters do not divide; of many tokens see `together`.

Up to 8 tokens both are CTAs of one kernel, a launch fewer, and a cluster shares the columns of a token, which takes less time
to read, to collapse and to store. Those that project come first, wait for none, and have places: see `MixConfig.for_shape`.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.memory import SmemAllocator

from dsv4lab.kernels.mhc.config import WARP, MixConfig
from dsv4lab.kernels.mhc.finish import Finish
from dsv4lab.kernels.mhc.project import Project

_CARVEOUT = 100  # percent of the L1 for shared memory, of both kernels: with two opinions they could not share a multiprocessor


class Mix:
    """One configuration."""

    def __init__(self, plan: MixConfig, arch: str) -> None:
        plan.check()
        self.plan = plan
        self.project, self.finish = Project(plan), Finish(plan, arch)

    @cute.jit
    def __call__(
        self,
        streams: Any,
        y: Any,
        post: Any,
        comb: Any,
        fn: Any,
        partial: Any,
        base: Any,
        scale: Any,
        weight: Any,
        new: Any,
        out: Any,
        new_post: Any,
        new_comb: Any,
        eps: Float32,
        hc_eps: Float32,
        iters: Int32,
        scales: Any,
        given: Any,
        groups: Int32,
        ctas: Int32,
        stream: Any,
    ) -> None:
        """streams, new (M, 4, D / 2), y, out (M, D / 2) words of two BF16; post, new_post (M, 4), comb, new_comb (M, 16) f32.

        fn: `prepared`; partial (M, slices, row) words, `UNSET` before and after; base (N,), scale (3,) or (1,) f32;
        weight (D,).
        y, post, comb and new are read and written with `post` only, new_post and new_comb not by the head. M > 0. With `quant`
        out has words of codes, scales bytes (M, blocks) or tiles, given (1,) is NVFP4's global scale.
        """
        plan = self.plan
        made = new, out, new_post, new_comb, eps, hc_eps, iters, scales, given
        how = dict(min_blocks_per_mp=1, preferred_smem_carveout=_CARVEOUT, stream=stream, use_pdl=True)
        finish = dict(block=[plan.finish_threads, 1, 1], max_number_threads=[plan.finish_bound, 1, 1], **how)
        if cutlass.const_expr(plan.split > 1):
            self.kernel(streams, y, post, comb, fn, partial, base, scale, weight, *made).launch(
                grid=[plan.leading + ctas * plan.split, 1, 1], cluster=[plan.split, 1, 1], **finish
            )
        else:
            self.project.kernel(streams, y, post, comb, fn, partial).launch(
                grid=[plan.slices, groups, 1],
                block=[plan.warps * WARP, 1, 1],
                max_number_threads=[plan.project_bound, 1, 1],
                **how,
            )
            self.finish.kernel(streams, y, post, comb, partial, base, scale, weight, *made).launch(grid=[ctas, 1, 1], **finish)

    @cute.kernel
    def kernel(
        self,
        streams: Any,
        y: Any,
        post: Any,
        comb: Any,
        fn: Any,
        partial: Any,
        base: Any,
        scale: Any,
        weight: Any,
        new: Any,
        out: Any,
        new_post: Any,
        new_comb: Any,
        eps: Float32,
        hc_eps: Float32,
        iters: Int32,
        scales: Any,
        given: Any,
    ) -> None:
        """CTAs that project, idle ones that fill up their last cluster, clusters that finish. Sums, too, are written, and asked
        for, only when the kernel ahead, which clears them, has ended.
        """
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        memory = SmemAllocator()
        cute.arch.griddepcontrol_launch_dependents()
        if block >= self.plan.leading:
            made = new, out, new_post, new_comb, eps, hc_eps, iters, scales, given
            self.finish.run(memory, (streams, y, post, comb), partial, (base, scale, weight), made)
        elif block < self.plan.slices and thread < self.plan.warps * WARP:
            self.project.run(memory, streams, y, post, comb, fn, partial)
