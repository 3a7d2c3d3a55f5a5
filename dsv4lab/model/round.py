"""A decode step of several sequences, drafting and verification included, as one sequence of launches (spec 13, 15).

Every sequence has the same number of tokens in a step: its last one and the drafts. What the step finds changes numbers on the
device, never what is launched, so a CUDA graph holds it: which drafts stand, where the next step begins, and going back over
those that do not, which is a smaller count of known tokens. The host reads ids, and sees to cache blocks.

    the step's tokens through the backbone -> drafts that stand, and the token after them -> the prediction block over all the
    step's positions, of which those past the accepted ones are overwritten when they come again -> the next drafts
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsIndex

import torch

from dsv4lab import ops
from dsv4lab.model.cache import Batch, Cache

if TYPE_CHECKING:
    from dsv4lab.model.model import Model


def as_integer(name: str, value: SupportsIndex, low: int, end: int) -> int:
    """The value. Raises TypeError on what is no integer, ValueError on one out of [low, end)."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not low <= number < end:
        raise ValueError(f"{name} must be in [{low}, {end}), got {number}")
    return number


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy; top_k 0 and top_p 1 are off; seed of the request."""

    temperature: float
    top_k: int
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= torch.finfo(torch.float32).max:
            raise ValueError(f"temperature must be >= 0 and finite in float32, got {self.temperature}")
        for name, low in (("top_k", 0), ("seed", -(1 << 63))):
            object.__setattr__(self, name, as_integer(name, getattr(self, name), low, 1 << 63))
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    @property
    def filtered(self) -> bool:
        """Whether some tokens are left out before a draw."""
        return self.top_k > 0 or self.top_p < 1

    def tensors(self, rows: int, device: torch.device) -> dict[str, torch.Tensor] | None:
        """Arguments of the sampling operations for a batch of requests, which greedy ones do without: None."""
        if self.temperature == 0:
            return None
        return {
            "temperature": torch.full((rows,), self.temperature, dtype=torch.float32, device=device),
            "top_k": torch.full((rows,), self.top_k, dtype=torch.int64, device=device),
            "top_p": torch.full((rows,), self.top_p, dtype=torch.float32, device=device),
        }


def draw(
    model: Model,
    hidden: torch.Tensor,
    arguments: dict[str, torch.Tensor] | None,
    seed: torch.Tensor,
    position: torch.Tensor,
    *,
    filtered: bool,
) -> torch.Tensor:
    """One token a row: hidden (B, D); arguments: `Sampling.tensors`; seed, position (B,) int64 -> ids (B,) int64.

    Without arguments the likeliest ones. Those, and draws that are not filtered, need no logits in memory.
    """
    if arguments is None:
        return ops.lm_head_greedy(hidden, model.head.weight)
    if not filtered:
        return ops.lm_head_sample(hidden, model.head.weight, arguments["temperature"], seed, position)
    return ops.sample(ops.lm_head(hidden, model.head.weight), **arguments, seed=seed, position=position)


class Round:
    """The step's state on the device, B sequences with n drafts: all int64 but `draft_probs`.

    known (B,): tokens known; limit (B,): what `known` stops at, so that a finished sequence stands still; seqs (B,): places in
    the cache; seed (B,); step_ids (B, n + 1): the last known token and the drafts; draft_probs (B, n, V) f32: what the drafts
    were drawn from, None where greedy.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        sampling: Sampling,
        num_drafts: int,
        *,
        known: list[int],
        limit: list[int],
        seqs: list[int],
        seed: list[int],
        last: list[int],
    ) -> None:
        """One value a sequence each."""
        self.model, self.cache, self.sampling, self.num_drafts = model, cache, sampling, num_drafts
        self.longest = max(limit) + num_drafts
        self.known, self.limit, self.seqs, self.seed = (self._integers(v) for v in (known, limit, seqs, seed))
        self.step_ids = self._integers(last)[:, None].repeat(1, num_drafts + 1)
        self.draft_probs = None
        if num_drafts and sampling.temperature:
            self.draft_probs = torch.zeros(len(seqs), num_drafts, model.config.vocab_size, device=cache.device)
        self._prepare()

    def _integers(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.cache.device)

    def _prepare(self) -> None:
        """What is constant for these sequences; the step is captured anew."""
        rows, length = self.step_ids.shape
        self.rows = {n: self._rows_of(rows, n) for n in {1, length}}
        self.none = torch.zeros_like(self.known)
        self.arguments = self.sampling.tensors(rows, self.cache.device)
        self.verified = self.sampling.tensors(rows * length, self.cache.device)
        self.result = torch.zeros(rows, length + 1, dtype=torch.int64, device=self.cache.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _rows_of(self, sequences: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For `Batch`: each token's first row of its sequence, each sequence's last."""
        first = [r * tokens for r in range(sequences) for _ in range(tokens)]
        return self._integers(first), self._integers([(r + 1) * tokens - 1 for r in range(sequences)])

    def keep(self, rows: list[int]) -> None:
        """Go on with these of the sequences alone."""
        chosen = self._integers(rows)
        for name in ("known", "limit", "seqs", "seed", "step_ids"):
            setattr(self, name, getattr(self, name)[chosen])
        self.draft_probs = None if self.draft_probs is None else self.draft_probs[chosen]
        self._prepare()

    def freeze(self, row: int, known: int) -> None:
        """A sequence has ended: its next steps repeat the last one, in the same places."""
        self.limit[row] = known

    # ---- a step --------------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def step(self, longest: int) -> list[list[int]]:
        """Run it: for each sequence how many drafts stand, and n + 1 ids, that many drafts and then the next token.

        longest: the most tokens known of any sequence. Where all is done by kernels, the second step on is a graph's replay.
        """
        if self.graph is not None:
            self.graph.replay()
            return self.result.tolist()
        on_gpu = self.cache.device.type == "cuda"
        with ops.references() as plain:
            self._step(self.longest if on_gpu else longest + self.num_drafts)
        result = self.result.tolist()
        if on_gpu and not plain:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step(self.longest)
        return result

    def _step(self, longest: int) -> None:
        model, n = self.model, self.num_drafts
        batch = self._batch(self.step_ids.flatten(), -1, longest)
        streams = model(batch)
        hidden = model.collapse(streams)
        if self.arguments is None:
            choices = ops.lm_head_greedy(hidden, model.head.weight).view_as(self.step_ids)
            count, token = ops.match_drafts(choices, self.step_ids)
        elif not n:
            token = draw(model, hidden, self.arguments, self.seed, self.known, filtered=self.sampling.filtered)
            count = self.none
        else:
            assert self.draft_probs is not None and self.verified is not None
            target = ops.probabilities(ops.lm_head(hidden, model.head.weight), **self.verified)
            target = target.unflatten(0, self.step_ids.shape)
            count, token = ops.accept_drafts(target, self.draft_probs, self.step_ids[:, 1:], self.seed, self.known)
        new_ids, rows = ops.advance_decode(self.step_ids, self.known, self.limit, count, token)
        self.result[:, 0].copy_(count)
        self.result[:, 1:].copy_(new_ids)
        if n:
            # the batch's places, and no entries: the block has a window only
            own, hidden = model.predict(streams, new_ids.flatten(), batch)
            self._draft(_rows(own, rows), _rows(hidden, rows))

    @torch.inference_mode()
    def start(self, streams: torch.Tensor, hidden: torch.Tensor) -> None:
        """The first drafts, from the prediction block's output (B, S, D), (B, D) for each sequence's last known pair."""
        self._draft(streams, hidden)

    def _draft(self, streams: torch.Tensor, hidden: torch.Tensor) -> None:
        """Draft on. The block's own streams stand in for the backbone's at drafted positions."""
        for depth in range(self.num_drafts):
            if self.arguments is None or self.draft_probs is None:
                token = ops.lm_head_greedy(hidden, self.model.head.weight)
            else:
                logits = ops.lm_head(hidden, self.model.head.weight)
                position = self._plan(1, depth)[0]
                token = ops.sample(logits, **self.arguments, seed=self.seed, position=position)
                self.draft_probs[:, depth].copy_(ops.probabilities(logits, **self.arguments))
            self.step_ids[:, depth + 1].copy_(token)
            if depth + 1 < self.num_drafts:
                batch = self._batch(token, depth - 1, 0)
                streams, hidden = self.model.predict(streams, token, batch)

    # ---- places --------------------------------------------------------------------------------------------------------
    def _plan(self, tokens: int, offset: int) -> torch.Tensor:
        ratios = [self.cache.config.ratio(kind) for kind in self.cache.entry_kinds]
        return ops.decode_plan(self.known, self.seqs, tokens=tokens, offset=offset, ring_len=self.cache.ring_len, ratios=ratios)

    def _batch(self, token_ids: torch.Tensor, offset: int, longest: int) -> Batch:
        """The same number of tokens for each sequence, from position known + offset on."""
        tokens = len(token_ids) // len(self.seqs)
        return Batch.laid_out(self.cache, token_ids, self._plan(tokens, offset), *self.rows[tokens], longest)


def _rows(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """values (M, ..), rows (B,) -> (B, ..)."""
    return ops.embed_streams(rows, values.flatten(1), num_streams=1).view(len(rows), *values.shape[1:])
