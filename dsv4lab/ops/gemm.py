"""Matrix products."""

# No `from __future__ import annotations`: torch.library reads the schema from the annotations themselves.
from typing import Optional

import torch
from torch import Tensor

from dsv4lab.dispatch import operator
from dsv4lab.formats import PackedWeight, weights_of
from dsv4lab.ops.weights import flat, pack_all, packed
from dsv4lab.reference import gemm as _gemm


@operator(
    fake=lambda x, fmt, codes, *rest: x.new_empty(
        (x.shape[0], codes.shape[0]), dtype=rest[-1] or x.dtype
    )  # rest: .., out_dtype
)
def _linear(
    x: Tensor,
    fmt: str,
    codes: Tensor,
    scale: Optional[Tensor],
    global_scale: Optional[Tensor],
    input_scale: Optional[Tensor],
    act: str,
    out_dtype: Optional[torch.dtype],
) -> Tensor:
    return _gemm.linear(x, packed(fmt, codes, scale, global_scale, input_scale), act=act, out_dtype=out_dtype)


def linear(x: Tensor, weight: PackedWeight, *, act: str, out_dtype: Optional[torch.dtype] = None) -> Tensor:
    """See `reference.gemm.linear`."""
    return _linear(x, *flat(weight), act, out_dtype)


@operator(
    fake=lambda x, fmts, codes, *_, out_dtype, **__: tuple(
        x.new_empty((x.shape[0], c.shape[0]), dtype=out_dtype or x.dtype) for c in codes
    )
)
def _two_linears(
    x: Tensor,
    fmts: str,
    codes: list[Tensor],
    scale: list[Tensor],
    global_scale: list[Tensor],
    input_scale: list[Tensor],
    *,
    act: str,
    out_dtype: Optional[torch.dtype],
) -> tuple[Tensor, Tensor]:
    return _gemm.two_linears(x, *weights_of(fmts, codes, scale, global_scale, input_scale), act=act, out_dtype=out_dtype)


def two_linears(
    x: Tensor, first: PackedWeight, second: PackedWeight, *, act: str, out_dtype: Optional[torch.dtype] = None
) -> tuple[Tensor, Tensor]:
    """See `reference.gemm.two_linears`."""
    return _two_linears(x, *pack_all(first, second), act=act, out_dtype=out_dtype)


@operator(fake=lambda x, fmt, codes, *_: x.new_empty((x.shape[0], x.shape[1], codes.shape[0] // x.shape[1])))
def _grouped_linear(
    x: Tensor,
    fmt: str,
    codes: Tensor,
    scale: Optional[Tensor],
    global_scale: Optional[Tensor],
    input_scale: Optional[Tensor],
    act: str,
) -> Tensor:
    return _gemm.grouped_linear(x, packed(fmt, codes, scale, global_scale, input_scale), act=act)


def grouped_linear(x: Tensor, weight: PackedWeight, *, act: str) -> Tensor:
    """See `reference.gemm.grouped_linear`."""
    return _grouped_linear(x, *flat(weight), act)


@operator()
def lm_head(x: Tensor, weight: Tensor) -> Tensor:
    """See `reference.gemm.lm_head`."""
    return _gemm.lm_head(x, weight)
