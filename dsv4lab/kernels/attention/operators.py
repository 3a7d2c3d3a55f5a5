"""Core attention as operators call it: `ENTRIES` for the registry. Imports no CuTeDSL."""

from __future__ import annotations

from typing import Any

import torch

from dsv4lab.kernels.attention.core import api
from dsv4lab.kernels.attention.core.config import DIM, ROPE_DIM
from dsv4lab.kernels.entry import Entry
from dsv4lab.records import KV_RECORDS


def attention(
    q: torch.Tensor,
    sinks: torch.Tensor,
    window_pages: torch.Tensor,
    entry_pages: torch.Tensor | None,
    block_table: torch.Tensor,
    positions: torch.Tensor,
    seq_idx: torch.Tensor,
    topk_indices: torch.Tensor | None,
    *,
    rope_dim: int,
    **how: Any,
) -> torch.Tensor:
    """The operator `attention`; how: as `api.attention`."""
    return api.attention(
        q.contiguous(),
        sinks.contiguous(),
        window_pages,
        entry_pages,
        _narrow(block_table),
        positions.long().contiguous(),
        seq_idx.long().contiguous(),
        None if topk_indices is None else _narrow(topk_indices),
        **how,
    )


def _narrow(numbers: torch.Tensor) -> torch.Tensor:
    """As int32; what does not fit stays out of every range."""
    fitting = numbers if numbers.dtype == torch.int32 else numbers.long().clamp(-(2**31), 2**31 - 1).int()
    return fitting.contiguous()


def _refuses(
    q: torch.Tensor,
    sinks: torch.Tensor,
    window_pages: torch.Tensor,
    entry_pages: torch.Tensor | None,
    *_: Any,
    scale: float,
    record: str,
    rope_dim: int,
    **__: Any,
) -> str | None:
    if q.dtype != torch.bfloat16 or sinks.dtype != torch.float32:
        return f"q must be bfloat16 and sinks float32, got {q.dtype} and {sinks.dtype}"
    if q.ndim != 3 or q.shape[-1] != DIM or rope_dim != ROPE_DIM:
        return f"q must be (M, H, {DIM}) with rope_dim {ROPE_DIM}, got {tuple(q.shape)} and {rope_dim}"
    if record not in KV_RECORDS:
        return f"record must be one of {', '.join(KV_RECORDS)}, got {record!r}"
    for name, pages in (("window_pages", window_pages), ("entry_pages", entry_pages)):
        if pages is None:
            continue
        if record == "plain" and pages.dtype != torch.bfloat16:
            return f"{name} must be bfloat16 for plain records, got {pages.dtype}"
        if not pages.is_contiguous():
            return f"{name} must be contiguous, got strides {pages.stride()}"
    return None if scale > 0 else f"scale must be positive, got {scale}"


ENTRIES = tuple(Entry("attention", arch, attention, _refuses) for arch in api.ARCHITECTURES)
