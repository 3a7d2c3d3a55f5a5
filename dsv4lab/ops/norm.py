"""RMSNorm and rotary embedding, alone and with quantised output."""

# No `from __future__ import annotations`: torch.library reads the schema from the annotations themselves.
from typing import Optional

from torch import Tensor

from dsv4lab.dispatch import operator
from dsv4lab.reference import norm as _norm
from dsv4lab.reference import rope as _rope


@operator()
def rmsnorm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """See `reference.norm.rmsnorm`."""
    return _norm.rmsnorm(x, weight, eps=eps)


@operator()
def rmsnorm_fp8(x: Tensor, weight: Tensor, *, eps: float, group: int) -> tuple[Tensor, Tensor]:
    """See `reference.norm.rmsnorm_fp8`."""
    return _norm.rmsnorm_fp8(x, weight, eps=eps, group=group)


@operator()
def rmsnorm_nvfp4(
    x: Tensor, weight: Tensor, eps: float, global_scale: Optional[Tensor] = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.norm.rmsnorm_nvfp4`."""
    codes, block_scale, used = _norm.rmsnorm_nvfp4(x, weight, eps=eps, global_scale=global_scale)
    return codes, block_scale, used.clone() if used is global_scale else used


@operator()
def q_norm_rope(q: Tensor, positions: Tensor, inv_freq: Tensor, *, eps: float) -> Tensor:
    """See `reference.norm.q_norm_rope`."""
    return _norm.q_norm_rope(q, positions, inv_freq, eps=eps)


@operator()
def inverse_rope(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """See `reference.rope.inverse_rope`."""
    return _rope.inverse_rope(x, positions, inv_freq)


@operator()
def inverse_rope_fp8(x: Tensor, positions: Tensor, inv_freq: Tensor, *, group: int) -> tuple[Tensor, Tensor]:
    """See `reference.rope.inverse_rope_fp8`."""
    return _rope.inverse_rope_fp8(x, positions, inv_freq, group=group)


@operator()
def inverse_rope_nvfp4(
    x: Tensor, positions: Tensor, inv_freq: Tensor, global_scale: Optional[Tensor] = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.rope.inverse_rope_nvfp4`."""
    codes, block_scale, used = _rope.inverse_rope_nvfp4(x, positions, inv_freq, global_scale=global_scale)
    return codes, block_scale, used.clone() if used is global_scale else used
