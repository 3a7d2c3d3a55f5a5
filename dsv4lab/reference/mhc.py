"""Manifold-constrained hyper-connections (mHC): four residual streams, mixed by a doubly stochastic matrix (spec 3).

`pre` collapses the streams into one sub-layer input, `post` writes the sub-layer's output back, `comb[old, new]` mixes the
streams and is summed over its FIRST index. Stream-major flattening; coefficients and streams never below float32.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv4lab.arguments import check_codes, check_eps, check_shape, check_sinkhorn
from dsv4lab.paging import check_range
from dsv4lab.reference.gemm import matmul_rows
from dsv4lab.reference.norm import rmsnorm
from dsv4lab.reference.quant import quantize_fp8_rows, quantize_nvfp4


def embed_streams(token_ids: torch.Tensor, weight: torch.Tensor, *, num_streams: int) -> torch.Tensor:
    """Look up embeddings and copy each into every stream. token_ids (M,) int; weight (V, D) -> (M, S, D) of weight.dtype.

    Negative ids count from the end.  Raises ValueError on ids outside the table.
    """
    check_range("token_ids", token_ids, weight.shape[0], start=-weight.shape[0])
    return weight[token_ids][:, None, :].repeat(1, num_streams, 1)


def sinkhorn(logits: torch.Tensor, *, iters: int, eps: float) -> torch.Tensor:
    """Turn a (..., S, S) matrix of logits into a nearly doubly stochastic one, in float64.

    Softmax over the last index and a first column step count as iteration one; each further one is a row then a column step.
    Raises ValueError on iters and eps.
    """
    check_sinkhorn(iters, eps)
    a = torch.softmax(logits.double(), dim=-1) + eps
    a = a / (a.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        a = a / (a.sum(-1, keepdim=True) + eps)
        a = a / (a.sum(-2, keepdim=True) + eps)
    return a


def mhc_mix(streams: torch.Tensor, fn: torch.Tensor, *, eps: float) -> torch.Tensor:
    """(fn @ v) / rms(v) for v the flattened streams: streams (M, S, D), fn (N, S*D) f32 -> (M, N) f64."""
    check_eps(eps)
    v = streams.float().flatten(1)
    inv_rms = torch.rsqrt(v.double().square().mean(-1, keepdim=True) + eps)
    return matmul_rows(v, fn.float()).double() * inv_rms


def mhc_coefficients(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    *,
    eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three coefficient sets of one sub-layer: pre (M, S), post (M, S), comb (M, S, S), all f32.

    streams (M, S, D); fn ((2+S)*S, S*D), base ((2+S)*S,), scale (3,) f32. eps in x^2 units; hc_eps is added to pre and inside
    Sinkhorn. Raises ValueError on shapes, and as `sinkhorn`. Source: spec 3.
    """
    _, s, d = streams.shape
    _check(fn=(fn, ((2 + s) * s, s * d)), base=(base, ((2 + s) * s,)), scale=(scale, (3,)))
    mix = mhc_mix(streams, fn, eps=eps)
    # pre = sigmoid(.) + eps; post = 2 sigmoid(.); comb = sinkhorn(.)
    pre = torch.sigmoid(mix[:, :s] * scale[0] + base[:s]) + hc_eps
    post = 2.0 * torch.sigmoid(mix[:, s : 2 * s] * scale[1] + base[s : 2 * s])
    logits = (mix[:, 2 * s :] * scale[2] + base[2 * s :]).view(-1, s, s)
    return pre.float(), post.float(), sinkhorn(logits, iters=sinkhorn_iters, eps=hc_eps).float()


def mhc_collapse(streams: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """u = sum_j pre[j] X[j]: streams (M, S, D), pre (M, S) f32 -> (M, D) of streams.dtype."""
    return (pre.double()[:, :, None] * streams.double()).sum(1).to(streams.dtype)


def mhc_pre(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coefficients, collapse and the following RMSNorm: what a sub-layer reads, and what `mhc_post` needs.

    -> normalised input (M, D) of streams.dtype, post (M, S) f32, comb (M, S, S) f32.  Raises as `sinkhorn`.
    """
    pre, post, comb = mhc_coefficients(streams, fn, base, scale, eps=eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters)
    return rmsnorm(mhc_collapse(streams, pre), norm_weight, eps=eps), post, comb


def mhc_pre_quantized(
    streams: torch.Tensor, *mix: torch.Tensor, global_scale: torch.Tensor | None = None, act: str, **how: Any
) -> tuple[torch.Tensor, ...]:
    """`mhc_pre`, its normalised input quantised (spec 3, 8.2): act "fp8", in groups of 128, or "nvfp4" with a global_scale ().

    -> codes (M, D) e4m3, scale (M, ceil(D/128)) e8m0, or codes (M, D/2) u8, block_scale (M, D/16) e4m3; post, comb.
    Raises ValueError on act, and as `mhc_pre`.
    """
    check_codes(act, global_scale)
    x, *rest = mhc_pre(streams, *mix, **how)
    codes = quantize_fp8_rows(x, group=128) if act == "fp8" else quantize_nvfp4(x, global_scale=global_scale)[:2]
    return *codes, *rest


def mhc_post(y: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """X'[i] = post[i] y + sum_j comb[j, i] X[j]: y (M, D), streams (M, S, D) -> (M, S, D) of streams.dtype.

    Raises ValueError on shapes.
    """
    m, s, d = streams.shape
    _check(y=(y, (m, d)), post=(post, (m, s)), comb=(comb, (m, s, s)))
    mixed = (comb.double()[:, :, :, None] * streams.double()[:, :, None, :]).sum(1)
    return (post.double()[:, :, None] * y.double()[:, None, :] + mixed).to(streams.dtype)


def mhc_post_pre(
    y: torch.Tensor,
    streams: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mhc_post` of one sub-layer, then `mhc_pre` of the next: one pass over the streams in a kernel.

    -> new streams (M, S, D), normalised input (M, D), post (M, S), comb (M, S, S).  Raises as `sinkhorn`.
    """
    new = mhc_post(y, streams, post, comb)
    x, next_post, next_comb = mhc_pre(new, fn, base, scale, norm_weight, eps=eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters)
    return new, x, next_post, next_comb


def mhc_post_pre_quantized(
    y: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, *mix: torch.Tensor, **how: Any
) -> tuple[torch.Tensor, ...]:
    """`mhc_post` of one sub-layer, then `mhc_pre_quantized` of the next -> new streams, codes, scales, post, comb."""
    new = mhc_post(y, streams, post, comb)
    return new, *mhc_pre_quantized(new, *mix, **how)


def mhc_head(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    eps: float,
    hc_eps: float,
) -> torch.Tensor:
    """Collapse the streams before the head, then the final RMSNorm: no post, no comb.

    streams (M, S, D); fn (S, S*D), base (S,), scale (1,) f32; norm_weight (D,) -> (M, D) of streams.dtype.  Source: spec 3, 6.
    """
    _, s, d = streams.shape
    _check(fn=(fn, (s, s * d)), base=(base, (s,)), scale=(scale, (1,)))
    check_sinkhorn(1, hc_eps)
    pre = torch.sigmoid(mhc_mix(streams, fn, eps=eps) * scale + base) + hc_eps
    return rmsnorm(mhc_collapse(streams, pre.float()), norm_weight, eps=eps)


def _check(**tensors: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    for name, (value, want) in tensors.items():
        check_shape(name, value, want)
