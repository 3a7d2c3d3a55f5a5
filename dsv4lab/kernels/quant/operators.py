"""The row quantisers in the operators' form: leading dims flattened, results in the reference's shapes, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4lab.kernels._common.elements import FLOATS
from dsv4lab.kernels.entry import Entry
from dsv4lab.kernels.quant.rows import api


def quantize_nvfp4(x: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.quantize_nvfp4`; a global scale of x.shape[:-2] goes with the rows of its matrix."""
    return _nvfp4(api.quantize_nvfp4(_rows(x), global_scale), x, global_scale)


def quantize_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    return _shaped(api.quantize_mxfp4(_rows(x)), x)


def quantize_fp8_rows(x: Tensor, *, group: int) -> tuple[Tensor, Tensor]:
    return _shaped(api.quantize_fp8_rows(_rows(x), group), x)


def rmsnorm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return api.rmsnorm(_rows(x), weight.contiguous(), eps=eps).view(x.shape)


def rmsnorm_fp8(x: Tensor, weight: Tensor, *, eps: float, group: int) -> tuple[Tensor, Tensor]:
    return _shaped(api.rmsnorm_fp8(_rows(x), weight.contiguous(), eps=eps, group=group), x)


def rmsnorm_nvfp4(x: Tensor, weight: Tensor, eps: float, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return _nvfp4(api.rmsnorm_nvfp4(_rows(x), weight.contiguous(), eps, global_scale), x, global_scale)


def swiglu(gate: Tensor, up: Tensor, row_weight: Tensor | None = None, *, limit: float) -> Tensor:
    return api.swiglu(_rows(gate), _rows(up), _flat(row_weight), limit=limit).view(gate.shape)


def swiglu_fp8(
    gate: Tensor, up: Tensor, row_weight: Tensor | None = None, *, limit: float, group: int
) -> tuple[Tensor, Tensor]:
    return _shaped(api.swiglu_fp8(_rows(gate), _rows(up), _flat(row_weight), limit=limit, group=group), gate)


def swiglu_nvfp4(
    gate: Tensor, up: Tensor, row_weight: Tensor | None = None, global_scale: Tensor | None = None, *, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    found = api.swiglu_nvfp4(_rows(gate), _rows(up), _flat(row_weight), global_scale, limit=limit)
    return _nvfp4(found, gate, global_scale)


# ---- shapes ------------------------------------------------------------------------------------------------------------
def _rows(x: Tensor) -> Tensor:
    """(..., K) -> contiguous (rows, K)."""
    return x.reshape(-1, x.shape[-1]).contiguous() if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)


def _flat(row_weight: Tensor | None) -> Tensor | None:
    return None if row_weight is None else row_weight.reshape(-1).contiguous()


def _shaped(parts: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows with x's leading dims."""
    codes, scale = (part.view(*x.shape[:-1], part.shape[-1]) for part in parts)
    return codes, scale


def _nvfp4(parts: tuple[Tensor, Tensor, Tensor], x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the global scale; a given one is copied, since operators share no memory with their arguments."""
    codes, scale = _shaped(parts[:2], x)
    return codes, scale, parts[2] if given is None else given.clone()


# ---- refusals ----------------------------------------------------------------------------------------------------------
def _refuse_x(x: Tensor, multiple: int) -> str | None:
    if x.dtype not in FLOATS:
        return f"x must be bfloat16 or float32, got {x.dtype}"
    if x.ndim < 1 or x.shape[-1] % multiple:
        return f"x must have K % {multiple} == 0, got shape {tuple(x.shape)}"
    return None


def _refuse_global(x: Tensor, global_scale: Tensor | None) -> str | None:
    if global_scale is None:
        return None
    if global_scale.dtype != torch.float32:
        return f"global_scale must be float32, got {global_scale.dtype}"
    if global_scale.ndim and global_scale.shape != x.shape[:-2]:
        return f"global_scale must be a scalar or {tuple(x.shape[:-2])}, got {tuple(global_scale.shape)}"
    return None


def _refuse_group(group: int) -> str | None:
    return None if group in (64, 128) else f"group must be 64 or 128, got {group}"


def _refuse_weight(weight: Tensor) -> str | None:
    return None if weight.dtype in FLOATS else f"weight must be bfloat16 or float32, got {weight.dtype}"


def _refuse_halves(gate: Tensor, up: Tensor, row_weight: Tensor | None, limit: float) -> str | None:
    if up.dtype != gate.dtype or up.shape != gate.shape:
        return f"up must be like gate, got {up.dtype} {tuple(up.shape)} and {gate.dtype} {tuple(gate.shape)}"
    if row_weight is not None and (row_weight.dtype != torch.float32 or row_weight.shape != gate.shape[:-1]):
        return f"row_weight must be float32 {tuple(gate.shape[:-1])}, got {row_weight.dtype} {tuple(row_weight.shape)}"
    return None if 0.0 < limit < float("inf") else f"limit must be positive and finite, got {limit}"


def _nvfp4_refuses(x: Tensor, global_scale: Tensor | None = None) -> str | None:
    return _refuse_x(x, 16) or _refuse_global(x, global_scale)


def _mxfp4_refuses(x: Tensor) -> str | None:
    return _refuse_x(x, 32)


def _fp8_refuses(x: Tensor, *, group: int) -> str | None:
    return _refuse_x(x, 1) or _refuse_group(group)


def _rmsnorm_refuses(x: Tensor, weight: Tensor, *, eps: float) -> str | None:
    return _refuse_x(x, 1) or _refuse_weight(weight)


def _rmsnorm_fp8_refuses(x: Tensor, weight: Tensor, *, eps: float, group: int) -> str | None:
    return _refuse_x(x, 1) or _refuse_weight(weight) or _refuse_group(group)


def _rmsnorm_nvfp4_refuses(x: Tensor, weight: Tensor, eps: float, global_scale: Tensor | None = None) -> str | None:
    return _refuse_x(x, 16) or _refuse_weight(weight) or _refuse_global(x, global_scale)


def _swiglu_refuses(gate: Tensor, up: Tensor, row_weight: Tensor | None = None, *, limit: float) -> str | None:
    return _refuse_x(gate, 1) or _refuse_halves(gate, up, row_weight, limit)


def _swiglu_fp8_refuses(gate: Tensor, up: Tensor, row_weight: Tensor | None = None, *, limit: float, group: int) -> str | None:
    return _refuse_x(gate, 1) or _refuse_halves(gate, up, row_weight, limit) or _refuse_group(group)


def _swiglu_nvfp4_refuses(
    gate: Tensor, up: Tensor, row_weight: Tensor | None = None, global_scale: Tensor | None = None, *, limit: float
) -> str | None:
    return _refuse_x(gate, 16) or _refuse_halves(gate, up, row_weight, limit) or _refuse_global(gate, global_scale)


_FUNCTIONS: tuple[tuple[Callable[..., Any], Callable[..., str | None]], ...] = (
    (quantize_nvfp4, _nvfp4_refuses),
    (quantize_mxfp4, _mxfp4_refuses),
    (quantize_fp8_rows, _fp8_refuses),
    (rmsnorm, _rmsnorm_refuses),
    (rmsnorm_fp8, _rmsnorm_fp8_refuses),
    (rmsnorm_nvfp4, _rmsnorm_nvfp4_refuses),
    (swiglu, _swiglu_refuses),
    (swiglu_fp8, _swiglu_fp8_refuses),
    (swiglu_nvfp4, _swiglu_nvfp4_refuses),
)
ENTRIES = tuple(
    Entry(function.__name__, arch, function, refuses) for function, refuses in _FUNCTIONS for arch in api.ARCHITECTURES
)
