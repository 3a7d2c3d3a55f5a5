"""The entry of the prediction (MTP) block (spec 7), and heads that draw: of greedy decoding, and of unfiltered sampling.

Logits: `reference.gemm.lm_head`; sampling: `reference.sampling`.
"""

from __future__ import annotations

import torch

from dsv4lab.arguments import PEAK_IDS, check_shape
from dsv4lab.formats import PackedWeight
from dsv4lab.reference.gemm import linear, lm_head
from dsv4lab.reference.norm import rmsnorm
from dsv4lab.reference.sampling import sample


def mtp_input(
    embedding: torch.Tensor,
    streams: torch.Tensor,
    enorm_weight: torch.Tensor,
    hnorm_weight: torch.Tensor,
    e_proj: PackedWeight,
    h_proj: PackedWeight,
    *,
    eps: float,
    act: str,
) -> torch.Tensor:
    """Y[j] = e_proj(norm(embedding of the next token)) + h_proj(norm(X[j])): what the prediction block starts from.

    embedding (M, D); streams (M, S, D) before the head collapse; enorm_weight, hnorm_weight (D,); e_proj, h_proj (D, D);
    act as in `linear` -> (M, S, D) of streams.dtype.  Raises as `rmsnorm` and `linear`.  Source: spec 7.
    """
    check_shape("embedding", embedding, streams.shape[::2])
    e = linear(rmsnorm(embedding, enorm_weight, eps=eps), e_proj, act=act)
    f = linear(rmsnorm(streams, hnorm_weight, eps=eps).flatten(0, 1), h_proj, act=act)
    return (e.float()[:, None, :] + f.float().view_as(streams)).to(streams.dtype)


def lm_head_greedy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The id of each row's largest logit, the lowest of equals: `sampling.sample` at temperature 0 of `gemm.lm_head`'s logits.

    x (M, D) float, weight (V, D) float, V >= 1 -> ids (M,) int64. Zeros of both signs are equal. A NaN counts as larger than
    every number, as in torch's argmax, so that a row with NaN logits gets the first one's id.  Source: spec 6, 15.
    """
    return lm_head(x, weight).argmax(-1)


def lm_head_sample(
    x: torch.Tensor, weight: torch.Tensor, *, temperature: torch.Tensor, seed: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """`sampling.sample` of `gemm.lm_head`'s logits, without filters: the draw needs the largest of logits / T + noise alone.

    x (M, D) float, weight (V, D) float; temperature (M,) f32, 0 = greedy; seed, position (M,) int64 -> ids (M,) int64.
    Raises ValueError on shapes, TypeError on dtypes. Logits must not be NaN.  Source: spec 6, 15.
    """
    return sample(lm_head(x, weight), temperature=temperature, seed=seed, position=position)


def lm_head_peaks(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`gemm.lm_head`'s logits, and of every `PEAK_IDS` of them the largest, which `sampling` then need not look for.

    x (M, D) float, weight (V, D) float, V >= 1 -> logits (M, V) f32, no NaN, peaks (M, ceil(V / PEAK_IDS)) int64: in the upper
    word the logit, +0 for -0, as an unsigned integer in the order of floats, in the lower one ~id. Of such unsigned numbers the
    largest is the largest logit's, of equals the lowest id's.  Source: spec 6, 15.
    """
    logits = lm_head(x, weight)
    return logits, peaks_of(logits)


def peaks_of(logits: torch.Tensor) -> torch.Tensor:
    """The peaks of logits (M, V) f32."""
    padding = (0, -logits.shape[1] % PEAK_IDS)
    parts = torch.nn.functional.pad(logits + 0.0, padding, value=-torch.inf).unflatten(1, (-1, PEAK_IDS))
    bits = parts.amax(-1).view(torch.int32).long()
    ids = parts.argmax(-1) + PEAK_IDS * torch.arange(parts.shape[1], device=logits.device)
    return (torch.where(bits < 0, ~bits, bits + (1 << 31)) << 32) | (0xFFFFFFFF - ids)
