"""Integers between a decode step and the next: addresses of its tokens, drafts that stand, and on; see `reference.decoding`.

One thread a token, or a sequence. A few kB at most, so each is a launch's latency, about 2 us. sm_90a and sm_100a.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from dsv4lab.kernels.head.decoding.config import THREADS, AdvanceConfig, MatchConfig, PlanConfig


def _row() -> Any:
    """This thread's token or sequence, once what came before has ended."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    row = block * THREADS + thread
    cute.arch.griddepcontrol_launch_dependents()
    cute.arch.griddepcontrol_wait()
    return row


class Plan:
    """The kernel for one `PlanConfig`; B is the call's."""

    def __init__(self, config: PlanConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(self, known: Any, seqs: Any, out: Any, offset: Int64, ring_len: Int64, stream: Any) -> None:
        """known, seqs (B,) -> out (4 + ratios, B tokens), all i64."""
        self.kernel(known, seqs, out, offset, ring_len).launch(
            grid=[cute.ceil_div(out.shape[1], THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, known: Any, seqs: Any, out: Any, offset: Int64, ring_len: Int64) -> None:
        plan = self.plan
        row = _row()
        if row < out.shape[1]:
            batch = row // plan.tokens
            first, seq = Int64(known[batch]) + offset, Int64(seqs[batch])
            position = first + Int64(row % plan.tokens)
            out[0, row] = position
            out[1, row] = seq
            out[2, row] = seq * ring_len + position % ring_len
            out[3, row] = first + Int64(plan.tokens - 1)
            for i, ratio in enumerate(plan.ratios):
                out[4 + i, row] = (position + 1) // ratio


class Match:
    """The kernel for one `MatchConfig`; B is the call's."""

    def __init__(self, config: MatchConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(self, choices: Any, step_ids: Any, accepted: Any, next_ids: Any, stream: Any) -> None:
        """choices, step_ids (B, n + 1) -> accepted, next_ids (B,), all i64."""
        self.kernel(choices, step_ids, accepted, next_ids).launch(
            grid=[cute.ceil_div(accepted.shape[0], THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, choices: Any, step_ids: Any, accepted: Any, next_ids: Any) -> None:
        row = _row()
        if row < accepted.shape[0]:
            count, going = Int32(0), Int32(1)
            for i in cutlass.range_constexpr(self.plan.drafts):
                going = cutlass.select_(choices[row, i] == step_ids[row, i + 1], going, Int32(0))
                count = count + going
            accepted[row] = Int64(count)
            next_ids[row] = choices[row, count]


class Advance:
    """The kernel for one `AdvanceConfig`; B is the call's."""

    def __init__(self, config: AdvanceConfig) -> None:
        config.check()
        self.plan = config

    @cute.jit
    def __call__(
        self,
        step_ids: Any,
        known: Any,
        limit: Any,
        accepted: Any,
        next_ids: Any,
        new_ids: Any,
        rows: Any,
        stream: Any,
    ) -> None:
        """step_ids (B, n + 1), the others (B,) -> new_ids (B, n + 1), rows (B,); known and step_ids[:, 0] in place; all i64."""
        self.kernel(step_ids, known, limit, accepted, next_ids, new_ids, rows).launch(
            grid=[cute.ceil_div(known.shape[0], THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, step_ids: Any, known: Any, limit: Any, accepted: Any, next_ids: Any, new_ids: Any, rows: Any) -> None:
        length = self.plan.drafts + 1
        row = _row()
        if row < known.shape[0]:
            count, token = Int64(accepted[row]), Int64(next_ids[row])
            for i in cutlass.range_constexpr(length):
                drafted = Int64(step_ids[row, (i + 1) % length])
                new_ids[row, i] = cutlass.select_(count > i, drafted, token)
            rows[row] = Int64(row) * length + count
            known[row] = cutlass.min(Int64(known[row]) + count + 1, Int64(limit[row]))
            step_ids[row, 0] = token
