"""Hyper-connections as operators call them: `ENTRIES` for the registry. Imports no CuTeDSL."""

from __future__ import annotations

from typing import Any

import torch

from dsv4lab.kernels._common.elements import FLOATS, contiguous
from dsv4lab.kernels.entry import Entry
from dsv4lab.kernels.mhc import api
from dsv4lab.kernels.mhc.config import BLOCK, STREAMS

INTEGERS = (torch.int32, torch.int64)


def pre(*args: torch.Tensor, **how: Any) -> Any:
    """The operator `mhc_pre`."""
    return api.mhc_pre(*contiguous(args), **how)


def pre_quantized(*args: torch.Tensor, **how: Any) -> Any:
    """The operator `mhc_pre_quantized`."""
    return api.mhc_pre_quantized(*contiguous(args), **how)


def post(*args: torch.Tensor, **how: Any) -> Any:
    """The operator `mhc_post`."""
    return api.mhc_post(*contiguous(args), **how)


def post_pre(*args: torch.Tensor, **how: Any) -> Any:
    """The operator `mhc_post_pre`."""
    return api.mhc_post_pre(*contiguous(args), **how)


def post_pre_quantized(*args: torch.Tensor, **how: Any) -> Any:
    """The operator `mhc_post_pre_quantized`."""
    return api.mhc_post_pre_quantized(*contiguous(args), **how)


def head(*args: torch.Tensor, **how: Any) -> Any:
    """The operator `mhc_head`."""
    return api.mhc_head(*contiguous(args), **how)


def embed(*args: torch.Tensor, **how: Any) -> Any:
    """The operator `embed_streams`."""
    return api.embed_streams(*contiguous(args), **how)


def _streams_refuse(streams: torch.Tensor) -> str | None:
    if streams.dtype != torch.bfloat16:
        return f"streams must be bfloat16, got {streams.dtype}"
    if streams.ndim != 3 or streams.shape[1] != STREAMS or not streams.shape[2] or streams.shape[2] % BLOCK:
        return f"streams must be (M, {STREAMS}, D) with D % {BLOCK} == 0, got {tuple(streams.shape)}"
    return None


def _mix_refuses(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor,
    global_scale: torch.Tensor | None = None,
    **how: Any,
) -> str | None:
    if global_scale is not None and (global_scale.dtype != torch.float32 or global_scale.ndim):
        return f"global_scale must be one float32, (), got {global_scale.dtype} {tuple(global_scale.shape)}"
    for name, value in (("fn", fn), ("base", base), ("scale", scale)):
        if value.dtype != torch.float32:
            return f"{name} must be float32, got {value.dtype}"
    if norm_weight.dtype not in FLOATS:
        return f"norm_weight must be bfloat16 or float32, got {norm_weight.dtype}"
    return _streams_refuse(streams)


def _post_refuses(y: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> str | None:
    if y.dtype != torch.bfloat16:
        return f"y must be bfloat16, got {y.dtype}"
    if post.dtype != torch.float32 or comb.dtype != torch.float32:
        return f"post and comb must be float32, got {post.dtype} and {comb.dtype}"
    return _streams_refuse(streams)


def _post_pre_refuses(
    y: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, *mix: torch.Tensor, **how: Any
) -> str | None:
    return _post_refuses(y, streams, post, comb) or _mix_refuses(streams, *mix, **how)


def _embed_refuses(token_ids: torch.Tensor, weight: torch.Tensor, *, num_streams: int) -> str | None:
    if token_ids.dtype not in INTEGERS or weight.dtype not in FLOATS:
        return f"token_ids must be int32 or int64, weight bfloat16 or float32, got {token_ids.dtype} and {weight.dtype}"
    if weight.ndim != 2 or not weight.numel() or weight.shape[1] * weight.element_size() % 16:
        return f"weight must be (V, D) with rows of a multiple of 16 bytes, got {tuple(weight.shape)} {weight.dtype}"
    if token_ids.ndim != 1:
        return f"token_ids must be (M,), got {tuple(token_ids.shape)}"
    return None


ENTRIES = tuple(
    Entry(operation, arch, function, refuses)
    for arch in api.ARCHITECTURES
    for operation, function, refuses in (
        ("mhc_pre", pre, _mix_refuses),
        ("mhc_pre_quantized", pre_quantized, _mix_refuses),
        ("mhc_post", post, _post_refuses),
        ("mhc_post_pre", post_pre, _post_pre_refuses),
        ("mhc_post_pre_quantized", post_pre_quantized, _post_pre_refuses),
        ("mhc_head", head, _mix_refuses),
        ("embed_streams", embed, _embed_refuses),
    )
)
