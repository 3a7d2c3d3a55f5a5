"""Page pools as kernels take them: which plan fits a tensor, and its bytes."""

from __future__ import annotations

import torch

from dsv4lab.arguments import check_dense
from dsv4lab.kernels._common.elements import ELEMENT
from dsv4lab.kernels.cache.plan import MAX_SLOTS, KeyPlan

PAGE_ALIGN = 16  # bytes: of the first page, for vectors


def plan_of(
    pages: torch.Tensor, *, kind: str, record: str, page_size: int, dim: int, element: str = "bf16", weight: str = "bf16"
) -> KeyPlan:
    """What keys of this record in this pool are. Raises ValueError, TypeError where the pool is none of theirs."""
    stored = "u8"
    if record == "plain":
        if pages.dtype not in ELEMENT:
            raise TypeError(f"plain pages must be bfloat16 or float32, got {pages.dtype}")
        stored = ELEMENT[pages.dtype]
    elif pages.dtype != torch.uint8:
        raise TypeError(f"{record} pages must be uint8, got {pages.dtype}")
    key = KeyPlan(kind, record, dim, page_size, element, weight, stored)
    key.check()
    shape = (page_size, dim) if record == "plain" else (key.page_bytes,)
    check_dense(f"{record} pages", pages, ("P", *shape))
    if pages.data_ptr() % PAGE_ALIGN:
        raise ValueError(f"pages must begin at a multiple of {PAGE_ALIGN} bytes, got address {pages.data_ptr():#x}")
    if pages.shape[0] * page_size > MAX_SLOTS:
        raise ValueError(f"pages must have at most 2^31 slots, got {pages.shape[0]} of {page_size}")
    return key


def bytes_of(pages: torch.Tensor) -> torch.Tensor:
    """A pool as (P, page_bytes) u8."""
    return pages.flatten(1).view(torch.uint8)
