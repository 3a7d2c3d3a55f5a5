"""Perplexity on text that the nano model never saw, and differences between two models token by token.

The text is a handful of held-out files of the Python standard library, stored with the package under Python's licence
(`training/heldout.py` made it). Comparing two number formats by their losses on the same tokens removes the spread that the
tokens themselves have, which is a hundred times the effect.
"""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dsv4lab.model.model import Model
    from dsv4lab.model.tokenizer import Tokenizer

HELD_OUT = Path(__file__).resolve().parents[1] / "data" / "heldout.json.xz"


def held_out_files() -> dict[str, str]:
    """The held-out files: path in the standard library -> text."""
    return dict(json.loads(lzma.decompress(HELD_OUT.read_bytes()))["files"])


def held_out_ids(tokenizer: Tokenizer) -> list[int]:
    """The held-out files as one stream of ids, each framed by the begin and end tokens, as in training."""
    ids: list[int] = []
    for text in held_out_files().values():
        ids += [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    return ids


def held_out_windows(tokenizer: Tokenizer, *, count: int, length: int) -> torch.Tensor:
    """`count` windows of `length` + 1 ids, spread evenly over the held-out text, without overlap: (count, length + 1) int64.

    Raises ValueError where the text is too short for them.
    """
    ids = torch.tensor(held_out_ids(tokenizer))
    if count < 1 or length < 1 or count * length + 1 > len(ids):
        raise ValueError(f"count * length + 1 must be in [2, {len(ids)}] held-out ids, got {count} * {length} + 1")
    starts = torch.linspace(0, len(ids) - length - 1, count).long() if count > 1 else torch.zeros(1, dtype=torch.int64)
    return torch.stack([ids[s : s + length + 1] for s in starts.tolist()])


def log_probabilities(model: Model, windows: torch.Tensor, *, batch: int = 4) -> torch.Tensor:
    """Of every next token: windows (n, L + 1) int64 -> (n, L, V) f32 on the host. batch: windows run together."""
    return torch.cat([torch.log_softmax(model.logits(w[:, :-1]).cpu(), dim=-1) for w in windows.split(batch)])


def token_losses(log_p: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every next token: log_p (n, L, V) from `log_probabilities`, windows (n, L + 1) -> (n, L) f64, nats."""
    return -log_p.gather(-1, windows[:, 1:, None])[..., 0].double()


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) at every position: two (n, L, V) -> (n, L) f64, nats. Were p the truth, q would lose this much to it."""
    p = log_p.double()
    return (p.exp() * (p - log_q.double())).sum(-1)


def perplexity(losses: torch.Tensor) -> float:
    """exp of the mean loss per token."""
    return math.exp(float(losses.double().mean()))


def paired_difference(losses: torch.Tensor, base: torch.Tensor, *, block: int = 64) -> tuple[float, float]:
    """Mean of `losses - base` (n, L) over the same tokens, and its standard error, both in nats per token.

    Neighbouring tokens share context, so their differences are not independent: the error is that of the means of runs of
    `block` tokens. Raises ValueError on unequal shapes or fewer than two runs.
    """
    if losses.shape != base.shape or losses.dim() != 2:
        raise ValueError(f"losses and base must have one shape (n, L), got {tuple(losses.shape)} and {tuple(base.shape)}")
    difference = (losses - base).double()
    runs = difference[:, : losses.shape[1] // block * block].unflatten(1, (-1, block)).mean(-1).flatten()
    if runs.numel() < 2:
        raise ValueError(f"there must be at least two runs of {block} tokens, got shape {tuple(losses.shape)}")
    return float(difference.mean()), float(runs.std() / runs.numel() ** 0.5)
