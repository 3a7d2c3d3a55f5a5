"""What a decode step does besides the model: addresses of its tokens, drafts that stand, and on to the next (spec 12, 15).

Integers only. They are operations so that a step, drafts and rewinding included, is one sequence of launches whose shapes do
not depend on what it finds: B sequences, each with the same number of tokens a step. A sequence goes back by counting fewer
known tokens; what was written past them is written anew.
"""

from __future__ import annotations

import torch

from dsv4lab.reference.sampling import check_vectors


def decode_plan(
    known: torch.Tensor, seqs: torch.Tensor, *, tokens: int, offset: int, ring_len: int, ratios: list[int]
) -> torch.Tensor:
    """Addresses of a step of `tokens` tokens of each sequence, from position known + offset on.

    known (B,) int64, tokens of each sequence known so far; seqs (B,) int64, its place in the cache; ring_len: positions of a
    window ring -> (4 + len(ratios), B * tokens) int64, rows: positions, places, window slots, each sequence's last position,
    and for each ratio the compressed entries that the token may see. Raises ValueError on shapes, TypeError on dtypes.
    """
    check_vectors(known.numel(), known=known, seqs=seqs)
    if tokens < 1 or ring_len < 1 or any(r < 1 for r in ratios):
        raise ValueError(f"tokens, ring_len and ratios must be >= 1, got {tokens}, {ring_len} and {ratios}")
    positions = known[:, None] + offset + torch.arange(tokens, device=known.device)
    places = seqs[:, None].expand_as(positions)
    rows = [positions, places, places * ring_len + positions % ring_len, positions[:, -1:].expand_as(positions)]
    return torch.stack([*rows, *((positions + 1) // r for r in ratios)]).flatten(1)


def match_drafts(choices: torch.Tensor, step_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`accept_drafts` where every distribution is one-hot: drafts stand up to the first that the target did not choose.

    choices (B, n + 1) int64: the target's token after each of the step's; step_ids (B, n + 1) int64: the step's tokens, a known
    one and n drafts -> num_accepted (B,) int64, next_ids (B,) int64. Raises ValueError on shapes, TypeError on dtypes.
    """
    _check_steps(choices=choices, step_ids=step_ids)
    accepted = (choices[:, :-1] == step_ids[:, 1:]).long().cumprod(1).sum(1)
    return accepted, choices.gather(1, accepted[:, None])[:, 0]


def advance_decode(
    step_ids: torch.Tensor, known: torch.Tensor, limit: torch.Tensor, num_accepted: torch.Tensor, next_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count what a step has brought, and set out for the next: known grows by num_accepted + 1, to `limit` at most, and
    step_ids[:, 0] becomes next_ids; both in place.

    step_ids (B, n + 1), the others (B,), all int64 -> new ids (B, n + 1), the accepted drafts and then next_ids; rows (B,),
    where among the step's B (n + 1) rows each sequence's last accepted token was.
    Raises ValueError on shapes, TypeError on dtypes.
    """
    _check_steps(step_ids=step_ids)
    batch, length = step_ids.shape
    check_vectors(batch, known=known, limit=limit, num_accepted=num_accepted, next_ids=next_ids)
    place = torch.arange(length, device=known.device)
    drafted = step_ids.roll(-1, 1)
    new_ids = torch.where(place < num_accepted[:, None], drafted, next_ids[:, None])
    rows = torch.arange(batch, device=known.device) * length + num_accepted
    known.copy_(torch.minimum(known + num_accepted + 1, limit))
    step_ids[:, 0] = next_ids
    return new_ids, rows


def _check_steps(**steps: torch.Tensor) -> None:
    first = next(iter(steps.values()))
    for name, value in steps.items():
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {value.dtype}")
        if value.ndim != 2 or not value.shape[1] or value.shape != first.shape:
            raise ValueError(f"{name} must be (B, n + 1) = {tuple(first.shape)}, got {tuple(value.shape)}")
