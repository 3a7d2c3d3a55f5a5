"""Writing and reading of keys in the operators' form: contiguous inputs, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4lab.kernels._common.elements import FLOATS
from dsv4lab.kernels.cache.plan import ROPE_DIM, refuse_dim
from dsv4lab.kernels.cache.pool import PAGE_ALIGN
from dsv4lab.kernels.cache.read.api import read_keys
from dsv4lab.kernels.cache.write.api import write_keys
from dsv4lab.kernels.entry import Entry
from dsv4lab.records import KV_RECORDS

ARCHITECTURES = ("sm_90a", "sm_100a")


def cache_write(
    x: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    pages: Tensor,
    slots: Tensor,
    **how: Any,
) -> None:
    settled = norm_weight.is_contiguous() and inv_freq.is_contiguous()  # a copy is a kernel's result
    x, norm_weight, positions, inv_freq, slots = (t.contiguous() for t in (x, norm_weight, positions, inv_freq, slots))
    keys = (x, norm_weight, positions, inv_freq, pages, slots)
    write_keys(*keys, kind="kv", settled=settled, **how)


def cache_read(pages: Tensor, slots: Tensor, *, record: str, page_size: int, dim: int, rope_dim: int) -> Tensor:
    return read_keys(pages, slots.contiguous(), record=record, page_size=page_size, dim=dim, rope_dim=rope_dim)


# ---- refusals ----------------------------------------------------------------------------------------------------------
def _refuse_pages(pages: Tensor, record: str) -> str | None:
    if record == "plain" and pages.dtype not in FLOATS:
        return f"plain pages must be bfloat16 or float32, got {pages.dtype}"
    if not pages.is_contiguous() or pages.data_ptr() % PAGE_ALIGN:
        return f"pages must be contiguous and begin at a multiple of {PAGE_ALIGN} bytes, got strides {pages.stride()}"
    return None


def _refuse_slots(slots: Tensor) -> str | None:
    return None if slots.dtype == torch.int64 else f"slots must be int64, got {slots.dtype}"


def _refuse_rows(x: Tensor, norm_weight: Tensor, positions: Tensor, inv_freq: Tensor) -> str | None:
    for name, value in (("x", x), ("norm_weight", norm_weight)):
        if value.dtype not in FLOATS:
            return f"{name} must be bfloat16 or float32, got {value.dtype}"
    if positions.dtype != torch.int64:
        return f"positions must be int64, got {positions.dtype}"
    if inv_freq.dtype != torch.float32 or 2 * inv_freq.shape[0] != ROPE_DIM:
        return f"inv_freq must be float32 ({ROPE_DIM // 2},), got {inv_freq.dtype} {tuple(inv_freq.shape)}"
    return refuse_dim("kv", x.shape[1])


def _cache_write_refuses(
    x: Tensor,
    norm_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    pages: Tensor,
    slots: Tensor,
    *,
    record: str,
    **_: Any,
) -> str | None:
    if record not in KV_RECORDS:
        return f"record must be one of {KV_RECORDS}, got {record!r}"
    rows = _refuse_rows(x, norm_weight, positions, inv_freq)
    return rows or _refuse_slots(slots) or _refuse_pages(pages, record)


def _cache_read_refuses(pages: Tensor, slots: Tensor, *, record: str, page_size: int, dim: int, rope_dim: int) -> str | None:
    if record not in KV_RECORDS:
        return f"record must be one of {KV_RECORDS}, got {record!r}"
    if rope_dim != ROPE_DIM:
        return f"rope_dim must be {ROPE_DIM}, got {rope_dim}"
    return refuse_dim("kv", dim) or _refuse_slots(slots) or _refuse_pages(pages, record)


_FUNCTIONS: tuple[tuple[Callable[..., Any], Callable[..., str | None]], ...] = (
    (cache_write, _cache_write_refuses),
    (cache_read, _cache_read_refuses),
)
ENTRIES = tuple(Entry(function.__name__, arch, function, refuses) for function, refuses in _FUNCTIONS for arch in ARCHITECTURES)
