"""Hyper-connections."""

# No `from __future__ import annotations`: torch.library reads the schema from the annotations themselves.
from typing import Optional

from torch import Tensor

from dsv4lab.dispatch import operator
from dsv4lab.reference import mhc as _mhc


@operator()
def embed_streams(token_ids: Tensor, weight: Tensor, *, num_streams: int) -> Tensor:
    """See `reference.mhc.embed_streams`."""
    return _mhc.embed_streams(token_ids, weight, num_streams=num_streams)


@operator()
def mhc_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.mhc.mhc_pre`."""
    return _mhc.mhc_pre(streams, fn, base, scale, norm_weight, eps=eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters)


@operator()
def mhc_pre_quantized(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    global_scale: Optional[Tensor] = None,
    *,
    act: str,
    eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.mhc.mhc_pre_quantized`."""
    how = dict(global_scale=global_scale, act=act, eps=eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters)
    return _mhc.mhc_pre_quantized(streams, fn, base, scale, norm_weight, **how)  # type: ignore[arg-type, return-value]


@operator()
def mhc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See `reference.mhc.mhc_post`."""
    return _mhc.mhc_post(y, streams, post, comb)


@operator()
def mhc_post_pre(
    y: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.mhc.mhc_post_pre`."""
    return _mhc.mhc_post_pre(
        y, streams, post, comb, fn, base, scale, norm_weight, eps=eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters
    )


@operator()
def mhc_post_pre_quantized(
    y: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    global_scale: Optional[Tensor] = None,
    *,
    act: str,
    eps: float,
    hc_eps: float,
    sinkhorn_iters: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.mhc.mhc_post_pre_quantized`."""
    how = dict(global_scale=global_scale, act=act, eps=eps, hc_eps=hc_eps, sinkhorn_iters=sinkhorn_iters)
    return _mhc.mhc_post_pre_quantized(y, streams, post, comb, fn, base, scale, norm_weight, **how)  # type: ignore[return-value]


@operator()
def mhc_head(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_weight: Tensor, *, eps: float, hc_eps: float
) -> Tensor:
    """See `reference.mhc.mhc_head`."""
    return _mhc.mhc_head(streams, fn, base, scale, norm_weight, eps=eps, hc_eps=hc_eps)
