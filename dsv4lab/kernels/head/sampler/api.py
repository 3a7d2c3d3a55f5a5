"""The sampler on any architecture: checks and launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dsv4lab.arguments import check_dense, check_peaks
from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import Runtime, runtime_of
from dsv4lab.kernels.head.sampler.config import AcceptConfig, SamplerConfig
from dsv4lab.paging import check_range

ARCHITECTURES = ("sm_90a", "sm_100a")
_INTEGER = {torch.int32: "i32", torch.int64: "i64"}
MAX_BATCH = 65_535  # of a grid's second dimension


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    peaks: torch.Tensor | None = None,
    *,
    config: SamplerConfig | None = None,
) -> torch.Tensor:
    """Draw one token a row, with the noise and comparisons of the reference bit for bit.

    logits (B, V) f32, no NaN; temperature (B,) f32, 0 = greedy; top_k (B,) i32 or i64, 0 = off; top_p (B,) f32, 1 = off; seed,
    position (B,) i64; peaks (B, ceil(V / 128)) i64, of `gemm.mixed.api.linear_peaks`, which save work and change nothing; all
    contiguous -> ids (B,) i64. With top-p the kept set may differ from the reference's by an element whose mass before it is
    within 1e-7 of top_p.
    Raises ValueError on shapes, TypeError on dtypes. Source: `reference.sampling.sample`.
    """
    _check_logits(logits, temperature, top_k, top_p, peaks)
    _check_vectors(logits.shape[0], seed=seed, position=position)
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    _launch("sample", (logits, temperature, top_k, top_p, seed, position), peaks, out, config)
    return out


def probabilities(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    peaks: torch.Tensor | None = None,
    *,
    config: SamplerConfig | None = None,
) -> torch.Tensor:
    """The distribution that `sample` draws from, (B, V) f32; arguments as there.

    A number is within 2^-21 + 2^-23 d of itself, d its distance from the largest in nats; those below 2^-126 are 0.

    Raises ValueError on shapes, TypeError on dtypes.  Source: `reference.sampling.probabilities`.
    """
    _check_logits(logits, temperature, top_k, top_p, peaks)
    out = torch.empty_like(logits)
    none = torch.empty(1, dtype=torch.int64, device=logits.device)
    _launch("probabilities", (logits, temperature, top_k, top_p, none, none), peaks, out, config)
    return out


def accept_drafts(
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    *,
    config: AcceptConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Verify drafts by rejection: `reference.sampling.accept_drafts` in every bit.

    target_probs (B, n + 1, V) f32; draft_probs (B, n, V) f32; draft_ids (B, n) i64, kept inside the vocabulary; seed, position
    (B,) i64; all contiguous -> num_accepted, next_ids (B,) i64.  Raises ValueError on shapes, TypeError on dtypes.
    """
    if target_probs.ndim != 3 or target_probs.shape[1] < 1 or target_probs.shape[2] < 1:
        raise ValueError(f"target_probs must be (B, n + 1, V) with V >= 1, got {tuple(target_probs.shape)}")
    batch, length, vocab = target_probs.shape
    drafts = length - 1
    check_dense("target_probs", target_probs, (batch, length, vocab), torch.float32)
    check_dense("draft_probs", draft_probs, (batch, drafts, vocab), torch.float32)
    check_dense("draft_ids", draft_ids, (batch, drafts), torch.int64)
    _check_vectors(batch, seed=seed, position=position)
    _check_size(batch, target_probs.numel())
    check_range("draft_ids", draft_ids, vocab, start=0)
    count, token = (torch.empty(batch, dtype=torch.int64, device=target_probs.device) for _ in range(2))
    if not batch:
        return count, token
    config = config or AcceptConfig.for_shape(batch, vocab)
    config.check(vocab)
    if not drafts:  # a tensor of no elements has no address
        draft_probs, draft_ids = target_probs, seed[:, None]
    runtime = runtime_of(target_probs)
    runtime.call(_compiled(config, runtime), target_probs, draft_probs, draft_ids, seed, position, count, token)
    return count, token


# ---- checks ------------------------------------------------------------------------------------------------------------
def _check_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, peaks: torch.Tensor | None
) -> None:
    if logits.dtype != torch.float32:
        raise TypeError(f"logits must be float32, got {logits.dtype}")
    if logits.ndim != 2 or logits.shape[1] < 1 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous (B, V) with V >= 1, got {tuple(logits.shape)}, strides {logits.stride()}")
    _check_vectors(logits.shape[0], temperature=temperature, top_k=top_k, top_p=top_p)
    _check_size(logits.shape[0], logits.numel())
    check_peaks(peaks, logits)


def _check_vectors(batch: int, **vectors: torch.Tensor) -> None:
    for name, value in vectors.items():
        if name in ("temperature", "top_p"):
            dtypes: tuple[torch.dtype, ...] = (torch.float32,)
        else:
            dtypes = (torch.int32, torch.int64) if name == "top_k" else (torch.int64,)
        if value.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(_name, dtypes))}, got {value.dtype}")
        if tuple(value.shape) != (batch,) or not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous ({batch},), one value a row, got {tuple(value.shape)}")


def _check_size(batch: int, elements: int) -> None:
    if batch > MAX_BATCH or elements >= 2**31:
        raise ValueError(f"the batch must have at most {MAX_BATCH} rows and less than 2^31 numbers, got {batch} and {elements}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- launches ----------------------------------------------------------------------------------------------------------
def _launch(
    what: str, args: tuple[torch.Tensor, ...], peaks: torch.Tensor | None, out: torch.Tensor, config: SamplerConfig | None
) -> None:
    batch, vocab = args[0].shape
    if not batch:
        return
    integer = _INTEGER[args[2].dtype]  # of top_k
    given = peaks is not None
    config = config or replace(SamplerConfig.for_shape(what, batch, vocab, integer), peaks=given)
    config.check(vocab)
    if (config.what, config.integer, config.peaks) != (what, integer, given):
        raise ValueError(f"config must be for {what} with top_k {integer} and peaks={given}, got {config}")
    runtime = runtime_of(out)
    runtime.call(_compiled(config, runtime), *args, args[-1][None] if peaks is None else peaks, out)


def _compiled(config: SamplerConfig | AcceptConfig, runtime: Runtime) -> Callable[..., Any]:
    """The host function, with B, n and V left open."""

    def build() -> tuple[Any, tuple[Any, ...]]:
        import cutlass
        import cutlass.cute as cute

        from dsv4lab.kernels._common.fakes import fake, fake_stream
        from dsv4lab.kernels.head.sampler.accept import Accept
        from dsv4lab.kernels.head.sampler.kernel import Sampler

        f32, i64 = cutlass.Float32, cutlass.Int64
        rows, vocab = cute.sym_int(), cute.sym_int(divisibility=4 if config.vector else 1)
        wide = 16 if config.vector else 4
        where = (fake(i64, cute.sym_int(), align=8), fake(i64, cute.sym_int(), align=8))
        if isinstance(config, AcceptConfig):
            probs = (fake(f32, rows, cute.sym_int(), vocab, align=wide), fake(f32, rows, cute.sym_int(), vocab, align=wide))
            ids = fake(i64, rows, cute.sym_int(), align=8)
            outs = (fake(i64, rows, align=8), fake(i64, rows, align=8))
            return Accept(config), (*probs, ids, *where, *outs, fake_stream())
        whole = cutlass.Int32 if config.integer == "i32" else i64
        vectors = (fake(f32, rows, align=4), fake(whole, rows, align=whole.width // 8), fake(f32, rows, align=4))
        out = fake(i64, rows, align=8) if config.what == "sample" else fake(f32, rows, vocab, align=wide)
        peaks = fake(i64, cute.sym_int(), cute.sym_int(), align=8)
        return Sampler(config), (fake(f32, rows, vocab, align=wide), *vectors, *where, peaks, out, fake_stream())

    module = "accept" if isinstance(config, AcceptConfig) else "kernel"
    return cache.kernel(f"dsv4lab.kernels.head.sampler.{module}", config, build, runtime)
