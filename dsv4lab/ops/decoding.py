"""What a decode step does besides the model."""

# No `from __future__ import annotations`: torch.library reads the schema from the annotations themselves.
import torch
from torch import Tensor

from dsv4lab.dispatch import operator
from dsv4lab.reference import decoding as _decoding


@operator(
    fake=lambda known, seqs, *, tokens, ratios, **_: known.new_empty((4 + len(ratios), known.shape[0] * tokens)),
)
def decode_plan(known: Tensor, seqs: Tensor, *, tokens: int, offset: int, ring_len: int, ratios: list[int]) -> Tensor:
    """See `reference.decoding.decode_plan`."""
    return _decoding.decode_plan(known, seqs, tokens=tokens, offset=offset, ring_len=ring_len, ratios=ratios)


@operator(fake=lambda choices, step_ids: (choices.new_empty(choices.shape[0]), choices.new_empty(choices.shape[0])))
def match_drafts(choices: Tensor, step_ids: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.decoding.match_drafts`."""
    return _decoding.match_drafts(choices, step_ids)


@operator(
    mutates=("step_ids", "known"),
    fake=lambda step_ids, known, *_: (step_ids.new_empty(step_ids.shape), torch.empty_like(known)),
)
def advance_decode(
    step_ids: Tensor, known: Tensor, limit: Tensor, num_accepted: Tensor, next_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.decoding.advance_decode`."""
    return _decoding.advance_decode(step_ids, known, limit, num_accepted, next_ids)
