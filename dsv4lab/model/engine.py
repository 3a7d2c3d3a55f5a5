"""Generation: prefill, decode, and speculative decoding with the prediction block (spec 13, 15).

A round is one step of the backbone over all unfinished sequences, see `round`. With drafts, a sequence's step holds its last
token and the drafted ones; the longest prefix that the backbone agrees with is kept, the rest is rewound. The prediction block
is fed every pair (streams of position i, token i + 1) that has become certain, then drafts on from the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import c_int64  # wraps
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from dsv4lab.model.cache import DEFAULT_STEP, Batch, Cache
from dsv4lab.model.round import Round, Sampling, as_integer, draw

if TYPE_CHECKING:
    from dsv4lab.model.model import Model

STOP, LENGTH = "stop", "length"


@dataclass
class Completion:
    """What one prompt got: new ids (the stop id included), why it ended, and how its drafts fared.

    drafted[k], accepted[k]: how often a draft at place k was verified, and how often it was kept.
    """

    ids: list[int] = field(default_factory=list)
    finish: str = LENGTH
    steps: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, num_drafts: int) -> Completion:
        """An empty one that counts drafts at `num_drafts` places."""
        return cls(drafted=[0] * num_drafts, accepted=[0] * num_drafts)

    @property
    def acceptance(self) -> list[float]:
        """Share of verified drafts that were kept, by place; NaN where none was verified."""
        return [a / d if d else float("nan") for a, d in zip(self.accepted, self.drafted, strict=True)]


@dataclass(eq=False)
class _Request:
    """A sequence under way. `pending`: streams (k, S, D) whose next tokens are known, but not fed to the prediction block."""

    prompt: list[int]
    row: int
    seed: int
    seq: int
    out: Completion
    pending: torch.Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.out.ids


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: frozenset[int],
    num_drafts: int,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """Continue every prompt by up to `max_new_tokens` ids.

    prompts: lists of ids, lengths may differ; request r draws with seed sampling.seed + r; num_drafts: tokens drafted ahead a
    step, 0 = plain decoding; on_token(row, id) is called for each new id in order. Raises ValueError on bad counts and when
    a prompt with its continuation exceeds max_position_embeddings.
    """
    max_new_tokens = as_integer("max_new_tokens", max_new_tokens, 0, 1 << 63)
    num_drafts = as_integer("num_drafts", num_drafts, 0, DEFAULT_STEP)  # a step has one token more
    if num_drafts and not len(model.mtp):
        raise ValueError(f"num_drafts must be 0 where the checkpoint has no prediction (MTP) block, got {num_drafts}")
    limit = model.config.max_position_embeddings
    longest = max(len(p) for p in prompts) + max_new_tokens
    if longest > limit:
        raise ValueError(f"prompt plus max_new_tokens must be <= max_position_embeddings {limit}, got {longest}")
    if max_new_tokens == 0:
        return [Completion.of(num_drafts) for _ in prompts]
    return _Engine(model, prompts, max_new_tokens, sampling, stop_ids, num_drafts, on_token).run()


class _Engine:
    """One call of `generate`: the cache and the requests that share it."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
        num_drafts: int,
        on_token: Callable[[int, int], None] | None,
    ) -> None:
        self.model, self.sampling, self.stop_ids, self.on_token = model, sampling, stop_ids, on_token
        self.max_new_tokens, self.num_drafts = max_new_tokens, num_drafts
        tokens = sum(len(p) + max_new_tokens + num_drafts for p in prompts)
        self.cache: Cache = model.new_cache(max_seqs=len(prompts), max_tokens=tokens, max_rewind=num_drafts)
        self.requests = [
            _Request(list(p), row, c_int64(sampling.seed + row).value, self.cache.open(), Completion.of(num_drafts))
            for row, p in enumerate(prompts)
        ]

    def run(self) -> list[Completion]:
        active = self._prefill()
        if active:
            self._decode(active)
        return [r.out for r in self.requests]

    # ---- prompt --------------------------------------------------------------------------------------------------------
    def _prefill(self) -> list[_Request]:
        """Feed the prompts in steps and draw each request's first token."""
        left = list(self.requests)
        while left:
            size = self.cache.max_step
            starts = {r.row: self.cache.lengths[r.seq] for r in left}
            step = [(r.seq, r.prompt[starts[r.row] : starts[r.row] + size]) for r in left]
            batch, streams = self.model.run_step(self.cache, step)
            parts = streams.split([len(ids) for _, ids in step])
            for r, part in zip(left, parts, strict=True) if self.num_drafts else ():
                r.pending = part if r.pending is None else torch.cat((r.pending, part))
            done = [r for r in left if self.cache.lengths[r.seq] == len(r.prompt)]
            if done:
                rows = torch.tensor([i for i, r in enumerate(left) if r in done], device=streams.device)
                for r, token in zip(done, self._draw(done, streams[batch.last_rows[rows]]), strict=True):
                    self._emit(r, [token])
            left = [r for r in left if r not in done]
            if self.num_drafts and left:
                # all but the last position's next token are known; the last one waits for the next step
                self._feed([r for r in left if r.pending is not None and len(r.pending) > 1], keep_last=True)
        return [r for r in self.requests if not self._finished(r)]

    def _feed(self, requests: list[_Request], *, keep_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the prediction block over pending pairs -> its streams and hidden states (B, ..) for each request's last one.

        With keep_last the newest position stays pending, and the rest is dropped: nothing is drafted yet.
        """
        steps, starts, streams, next_ids = [], [], [], []
        for r in requests:
            assert r.pending is not None
            count = len(r.pending) - keep_last
            start = self.cache.lengths[r.seq] - len(r.pending)
            ids = r.tokens[start + 1 : start + 1 + count]
            steps.append((r.seq, ids))
            starts.append(start)
            streams.append(r.pending[:count])
            r.pending = r.pending[count:]
            next_ids += ids
        batch = Batch.plan(self.cache, steps, starts=starts)
        own, hidden = self.model.predict(torch.cat(streams), torch.tensor(next_ids, device=self.cache.device), batch)
        return own[batch.last_rows], hidden[batch.last_rows]

    # ---- decoding ------------------------------------------------------------------------------------------------------
    def _decode(self, rows: list[_Request]) -> None:
        """Rounds over `rows` until all have finished. Those that have are left out at once, or where a graph would have to be
        captured anew stand still until that is half of them."""
        n = self.num_drafts
        step = Round(
            self.model,
            self.cache,
            self.sampling,
            n,
            known=[len(r.tokens) for r in rows],
            limit=[len(r.prompt) + self.max_new_tokens for r in rows],
            seqs=[r.seq for r in rows],
            seed=[r.seed for r in rows],
            last=[r.tokens[-1] for r in rows],
        )
        if n:
            step.start(*self._feed(rows, keep_last=False))
        while True:
            for r in rows:
                self.cache.reserve(r.seq, n + 1)
            for place, (r, (count, *ids)) in enumerate(zip(rows, step.step(max(len(r.tokens) for r in rows)), strict=True)):
                if not self._finished(r):
                    self._take(r, count, ids)
                    if self._finished(r):
                        step.freeze(place, self.cache.lengths[r.seq] + 1)
            live = [i for i, r in enumerate(rows) if not self._finished(r)]
            if not live:
                return
            if len(live) <= (len(rows) // 2 if step.graph is not None else len(rows) - 1):
                rows = [rows[i] for i in live]
                step.keep(live)

    def _take(self, r: _Request, count: int, ids: list[int]) -> None:
        """What a round has brought a request: the accepted drafts and the token after them."""
        # drafts past the last token wanted, or past the position limit, do not count
        room = min(self.max_new_tokens - len(r.out.ids), self.model.config.max_position_embeddings - len(r.tokens) + 1)
        for place in range(min(self.num_drafts, room - 1)):
            r.out.drafted[place] += place <= count  # drafts after the first rejected one were not judged
            r.out.accepted[place] += place < count
        r.out.steps += 1
        known = min(len(r.tokens) + count + 1, len(r.prompt) + self.max_new_tokens)
        self.cache.advance(r.seq, self.num_drafts + 1)
        self.cache.rewind(r.seq, known - 1)
        self._emit(r, ids[: count + 1])

    # ---- tokens --------------------------------------------------------------------------------------------------------
    def _draw(self, requests: list[_Request], streams: torch.Tensor) -> list[int]:
        """Each request's next token, from its last position's streams (B, S, D)."""
        seed, position = (
            torch.tensor(values, dtype=torch.int64, device=streams.device)
            for values in ([r.seed for r in requests], [len(r.tokens) for r in requests])
        )
        arguments = self.sampling.tensors(len(requests), streams.device)
        hidden, filtered = self.model.collapse(streams), self.sampling.filtered
        return draw(self.model, hidden, arguments, seed, position, filtered=filtered).tolist()

    def _emit(self, r: _Request, ids: list[int]) -> None:
        """Append new ids up to a stop id or the limit."""
        for token in ids:
            if self._finished(r):
                return
            r.out.ids.append(token)
            if token in self.stop_ids:
                r.out.finish = STOP
            if self.on_token is not None:
                self.on_token(r.row, token)

    def _finished(self, r: _Request) -> bool:
        return r.out.finish == STOP or len(r.out.ids) >= self.max_new_tokens
