"""The rotation of heads in the operators' form: contiguous arguments, results that share no memory with them, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4lab.arguments import check_eps
from dsv4lab.kernels.entry import Entry
from dsv4lab.kernels.rope.heads import api


def q_norm_rope(q: Tensor, positions: Tensor, inv_freq: Tensor, *, eps: float) -> Tensor:
    return api.q_norm_rope(q.contiguous(), positions.contiguous(), inv_freq.contiguous(), eps=eps)


def inverse_rope(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    return api.inverse_rope(x.contiguous(), positions.contiguous(), inv_freq.contiguous())


def inverse_rope_fp8(x: Tensor, positions: Tensor, inv_freq: Tensor, *, group: int) -> tuple[Tensor, Tensor]:
    return api.inverse_rope_fp8(x.contiguous(), positions.contiguous(), inv_freq.contiguous(), group=group)


def inverse_rope_nvfp4(
    x: Tensor, positions: Tensor, inv_freq: Tensor, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    given = None if global_scale is None else global_scale.contiguous()
    codes, scale, used = api.inverse_rope_nvfp4(x.contiguous(), positions.contiguous(), inv_freq.contiguous(), given)
    return codes, scale, used if global_scale is None else global_scale.clone()


# ---- refusals ----------------------------------------------------------------------------------------------------------
def _norm_refuses(q: Tensor, positions: Tensor, inv_freq: Tensor, *, eps: float) -> str | Exception | None:
    try:
        check_eps(eps)
    except ValueError as why:
        return str(why)
    return api.refuses(q, positions, inv_freq)


def _fp8_refuses(x: Tensor, positions: Tensor, inv_freq: Tensor, *, group: int) -> str | Exception | None:
    if group not in api.GROUPS:
        return f"group must be 64 or 128, got {group}"
    return api.refuses(x, positions, inv_freq)


def _nvfp4_refuses(
    x: Tensor, positions: Tensor, inv_freq: Tensor, global_scale: Tensor | None = None
) -> str | Exception | None:
    if global_scale is not None and global_scale.dtype != torch.float32:
        return f"global_scale must be float32, got {global_scale.dtype}"
    if global_scale is not None and global_scale.shape not in ((), x.shape[:1]):
        return f"global_scale must be a scalar or {tuple(x.shape[:1])}, got {tuple(global_scale.shape)}"
    return api.refuses(x, positions, inv_freq)


_FUNCTIONS: tuple[tuple[Callable[..., Any], Callable[..., str | Exception | None]], ...] = (
    (q_norm_rope, _norm_refuses),
    (inverse_rope, api.refuses),
    (inverse_rope_fp8, _fp8_refuses),
    (inverse_rope_nvfp4, _nvfp4_refuses),
)
ENTRIES = tuple(
    Entry(function.__name__, arch, function, refuses) for function, refuses in _FUNCTIONS for arch in api.ARCHITECTURES
)
