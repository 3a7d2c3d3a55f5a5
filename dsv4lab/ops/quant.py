"""Quantisers, and the way back."""

# No `from __future__ import annotations`: torch.library reads the schema from the annotations themselves.
from typing import Optional

from torch import Tensor

from dsv4lab.dispatch import operator
from dsv4lab.formats import PackedWeight
from dsv4lab.ops.weights import flat, packed
from dsv4lab.reference import quant as _quant


@operator()
def quantize_nvfp4(x: Tensor, global_scale: Optional[Tensor] = None) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.quant.quantize_nvfp4`."""
    codes, block_scale, used = _quant.quantize_nvfp4(x, global_scale=global_scale)
    return codes, block_scale, used.clone() if used is global_scale else used


@operator()
def quantize_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quant.quantize_mxfp4`."""
    return _quant.quantize_mxfp4(x)


@operator()
def quantize_fp8_rows(x: Tensor, *, group: int) -> tuple[Tensor, Tensor]:
    """See `reference.quant.quantize_fp8_rows`."""
    return _quant.quantize_fp8_rows(x, group=group)


@operator(preparation=True)
def quantize_fp8_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quant.quantize_fp8_blocks`."""
    return _quant.quantize_fp8_blocks(w)


@operator(preparation=True)
def _dequantize(
    fmt: str, codes: Tensor, scale: Optional[Tensor], global_scale: Optional[Tensor], input_scale: Optional[Tensor]
) -> Tensor:
    return _quant.dequantize(packed(fmt, codes, scale, global_scale, input_scale)).clone()


def dequantize(weight: PackedWeight) -> Tensor:
    """See `reference.quant.dequantize`."""
    return _dequantize(*flat(weight))
