"""The prediction block's entry and sampling in the operators' form: `ENTRIES` for the registry. Imports no CuTeDSL."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4lab.formats import BF16, PackedWeight, weights_of
from dsv4lab.kernels._common.elements import FLOATS, contiguous, dense
from dsv4lab.kernels.entry import Entry
from dsv4lab.kernels.gemm.mixed.api import Draws, linear_peaks, partial_argmax, partial_sample
from dsv4lab.kernels.gemm.mixed.config import FEW
from dsv4lab.kernels.gemm.mixed.prepared import prepared
from dsv4lab.kernels.gemm.operators import linear_sm90, lm_head_sm90, why_not_head, why_not_mixed
from dsv4lab.kernels.head.decoding import api as decoding
from dsv4lab.kernels.head.decoding.config import MAX_DRAFTS, MAX_RATIOS, MAX_TOKENS
from dsv4lab.kernels.head.greedy.api import pick_largest
from dsv4lab.kernels.head.mtp.api import add_streams
from dsv4lab.kernels.head.mtp.config import MAX_STREAMS
from dsv4lab.kernels.head.sampler import api
from dsv4lab.kernels.head.sampler.config import MAX_SLICE, SamplerConfig
from dsv4lab.kernels.quant.operators import rmsnorm

Parts = list[Tensor]  # of e_proj and h_proj; a part that a format lacks is empty


def lm_head_greedy(x: Tensor, weight: Tensor) -> Tensor:
    """`ops.lm_head_greedy`: no logits in memory, but for float32 x, whose logits are sums of three products."""
    if x.dtype == torch.float32:
        return lm_head_sm90(x, weight).argmax(-1)
    return pick_largest(partial_argmax(dense(x), prepared(PackedWeight(BF16, weight))))


def lm_head_peaks(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.lm_head_peaks`."""
    return linear_peaks(dense(x), prepared(PackedWeight(BF16, weight)))


def lm_head_sample(x: Tensor, weight: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """`ops.lm_head_sample`: no logits in memory for few rows of bf16. Of more, keys would keep the product waiting."""
    temperature, seed, position = temperature.contiguous(), seed.contiguous(), position.contiguous()
    if x.dtype == torch.bfloat16 and x.shape[0] <= FEW:
        draws = Draws(temperature, seed, position)
        return pick_largest(partial_sample(dense(x), prepared(PackedWeight(BF16, weight)), draws))
    off = torch.zeros_like(seed), torch.ones_like(temperature)
    return api.sample(lm_head_sm90(x, weight), temperature, *off, seed, position)


def sample(logits: Tensor, *args: Tensor | None) -> Tensor:
    """`ops.sample`."""
    return api.sample(*contiguous((logits, *args)))


def probabilities(logits: Tensor, *args: Tensor | None) -> Tensor:
    """`ops.probabilities`."""
    return api.probabilities(*contiguous((logits, *args)))


def accept_drafts(
    target_probs: Tensor, draft_probs: Tensor, draft_ids: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """`ops.accept_drafts`."""
    return api.accept_drafts(*contiguous((target_probs, draft_probs, draft_ids, seed, position)))


def decode_plan(known: Tensor, seqs: Tensor, *, tokens: int, offset: int, ring_len: int, ratios: list[int]) -> Tensor:
    """`ops.decode_plan`."""
    where = (known.contiguous(), seqs.contiguous())
    return decoding.decode_plan(*where, tokens=tokens, offset=offset, ring_len=ring_len, ratios=ratios)


def match_drafts(choices: Tensor, step_ids: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.match_drafts`."""
    return decoding.match_drafts(choices.contiguous(), step_ids.contiguous())


def advance_decode(
    step_ids: Tensor, known: Tensor, limit: Tensor, num_accepted: Tensor, next_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """`ops.advance_decode`."""
    return decoding.advance_decode(step_ids, known, *(t.contiguous() for t in (limit, num_accepted, next_ids)))


def mtp_input(
    embedding: Tensor,
    streams: Tensor,
    enorm_weight: Tensor,
    hnorm_weight: Tensor,
    fmts: str,
    codes: Parts,
    scale: Parts,
    global_scale: Parts,
    input_scale: Parts,
    *,
    eps: float,
    act: str,
) -> Tensor:
    """`ops.mtp_input`: two norms, two linears, each rounded to its input's dtype as in the reference, and one addition."""
    rows = (rmsnorm(embedding, enorm_weight, eps=eps), rmsnorm(streams, hnorm_weight, eps=eps).flatten(0, 1))
    weights = weights_of(fmts, codes, scale, global_scale, input_scale)
    e, f = (
        linear_sm90(x, w.format.name, w.codes, w.scale, w.global_scale, w.input_scale, act, None)
        for x, w in zip(rows, weights, strict=True)
    )
    return add_streams(e, f.view(streams.shape))


# ---- refusals ----------------------------------------------------------------------------------------------------------
def _refuse_peaks(x: Tensor, weight: Tensor) -> str | None:
    return why_not_head(x, weight) if x.dtype == torch.bfloat16 else f"x must be bfloat16, got {x.dtype}"


def _refuse_logits(logits: Tensor, *vectors: Tensor | None) -> str | None:
    if logits.dtype != torch.float32:
        return f"logits must be float32, got {logits.dtype}"
    if logits.ndim != 2 or not 1 <= logits.shape[1] <= MAX_SLICE * SamplerConfig.cluster:
        return f"logits must be (B, V) with V from 1 to {MAX_SLICE * SamplerConfig.cluster}, got {tuple(logits.shape)}"
    if logits.shape[0] > api.MAX_BATCH or logits.numel() >= 2**31:
        return f"logits must have {api.MAX_BATCH} rows at most and less than 2^31 numbers, got {tuple(logits.shape)}"
    return None


def _refuse_head_sample(x: Tensor, weight: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> str | None:
    rows, vocab = x.shape[0], weight.shape[0]
    if vocab > MAX_SLICE * SamplerConfig.cluster or rows > api.MAX_BATCH or rows * vocab >= 2**31:
        return f"logits must be those of the sampler, got {rows} rows of {vocab}"
    return why_not_head(x, weight)


def _refuse_probs(target_probs: Tensor, draft_probs: Tensor, draft_ids: Tensor, seed: Tensor, position: Tensor) -> str | None:
    if target_probs.dtype != torch.float32 or draft_probs.dtype != torch.float32:
        return f"target_probs and draft_probs must be float32, got {target_probs.dtype} and {draft_probs.dtype}"
    if target_probs.shape[0] > api.MAX_BATCH or target_probs.numel() >= 2**31:
        return (
            f"target_probs must have {api.MAX_BATCH} rows at most and less than 2^31 numbers, got {tuple(target_probs.shape)}"
        )
    return None


def _refuse_plan(known: Tensor, seqs: Tensor, *, tokens: int, offset: int, ring_len: int, ratios: list[int]) -> str | None:
    if len(ratios) > MAX_RATIOS or known.shape[0] * tokens >= MAX_TOKENS:
        return f"there must be {MAX_RATIOS} ratios at most and {MAX_TOKENS} tokens, got {len(ratios)} and {tokens} each"
    return None


def _refuse_match(choices: Tensor, step_ids: Tensor) -> str | None:
    if step_ids.ndim == 2 and step_ids.shape[1] > MAX_DRAFTS + 1:
        return f"there must be {MAX_DRAFTS} drafts at most, got {step_ids.shape[1] - 1}"
    return None


def _refuse_advance(step_ids: Tensor, known: Tensor, limit: Tensor, num_accepted: Tensor, next_ids: Tensor) -> str | None:
    if not (step_ids.is_contiguous() and known.is_contiguous()):
        return "step_ids and known must be contiguous, since they change in place"
    return _refuse_match(step_ids, step_ids)


def _refuse_mtp(
    embedding: Tensor,
    streams: Tensor,
    enorm_weight: Tensor,
    hnorm_weight: Tensor,
    fmts: str,
    codes: Parts,
    scale: Parts,
    global_scale: Parts,
    input_scale: Parts,
    *,
    eps: float,
    act: str,
) -> str | None:
    if streams.ndim != 3 or not 1 <= streams.shape[1] <= MAX_STREAMS:
        return f"streams must be (M, S, D) with S from 1 to {MAX_STREAMS}, got {tuple(streams.shape)}"
    if enorm_weight.dtype not in FLOATS or hnorm_weight.dtype not in FLOATS:
        return f"norm weights must be bfloat16 or float32, got {enorm_weight.dtype} and {hnorm_weight.dtype}"
    why = (
        why_not_mixed(x, fmt, codes[i], scale[i] if scale[i].numel() else None, act)
        for i, (x, fmt) in enumerate(zip((embedding, streams), fmts.split(","), strict=True))
    )
    return next((reason for reason in why if reason), None)


ENTRIES = (
    Entry("mtp_input", "sm_90a", mtp_input, _refuse_mtp),
    Entry("lm_head_greedy", "sm_90a", lm_head_greedy, why_not_head),
    Entry("lm_head_peaks", "sm_90a", lm_head_peaks, _refuse_peaks),
    Entry("lm_head_sample", "sm_90a", lm_head_sample, _refuse_head_sample),
    *(
        Entry(operation, arch, function, refuses)
        for arch in api.ARCHITECTURES
        for operation, function, refuses in (
            ("sample", sample, _refuse_logits),
            ("probabilities", probabilities, _refuse_logits),
            ("accept_drafts", accept_drafts, _refuse_probs),
            ("decode_plan", decode_plan, _refuse_plan),
            ("match_drafts", match_drafts, _refuse_match),
            ("advance_decode", advance_decode, _refuse_advance),
        )
    ),
)
