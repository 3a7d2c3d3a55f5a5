"""The compressor in the operator's form: contiguous inputs, refusals; `ENTRIES` for the registry. Imports no CuTeDSL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4lab.kernels._common.elements import FLOATS, dense
from dsv4lab.kernels.cache.plan import INDEX_DIM, ROPE_DIM
from dsv4lab.kernels.compressor import api
from dsv4lab.kernels.compressor.config import LANE
from dsv4lab.kernels.entry import Entry

_ALIGN = 16  # bytes of a vector
_DIMS = {"kv": 512, "index": INDEX_DIM}
_RATIOS = {True: 4, False: 128}  # by overlap; HCA has no index keys


def compress(
    values: Tensor,
    scores: Tensor,
    ape: Tensor,
    state: Tensor,
    norm_weight: Tensor,
    inv_freq: Tensor,
    pages: Tensor,
    positions: Tensor,
    seq_idx: Tensor,
    first_row: Tensor,
    last_position: Tensor,
    block_table: Tensor,
    **how: Any,
) -> None:
    """`ops.compress`; what it only reads may lie anyhow."""
    given = (ape, norm_weight, inv_freq)
    ape, norm_weight, inv_freq = constants = tuple(dense(x) for x in given)
    api.compress(
        _rows(values),
        _rows(scores),
        ape,
        state,
        norm_weight,
        inv_freq,
        pages,
        *(plan.contiguous() for plan in (positions, seq_idx, first_row, last_position, block_table)),
        **how,
        settled=all(mine is x for mine, x in zip(constants, given, strict=True)),  # a copy is a kernel's result
    )


def _rows(x: Tensor) -> Tensor:
    """Rows that vectors can be read from: the halves of one matrix already are."""
    plain = x.stride(1) == 1 and x.stride(0) % LANE == 0 and x.data_ptr() % _ALIGN == 0
    return x if plain else x.clone(memory_format=torch.contiguous_format)


def _refuses(
    values: Tensor,
    scores: Tensor,
    ape: Tensor,
    state: Tensor,
    norm_weight: Tensor,
    inv_freq: Tensor,
    pages: Tensor,
    positions: Tensor,
    seq_idx: Tensor,
    first_row: Tensor,
    last_position: Tensor,
    block_table: Tensor,
    *,
    ratio: int,
    overlap: bool,
    record: str,
    key: str,
    **_: Any,
) -> str | None:
    for name, value in (("values", values), ("scores", scores), ("ape", ape), ("state", state), ("inv_freq", inv_freq)):
        if value.dtype != torch.float32:
            return f"{name} must be float32, got {value.dtype}"
    if norm_weight.dtype not in FLOATS or (record == "plain" and pages.dtype not in FLOATS):
        return f"norm_weight and plain pages must be bfloat16 or float32, got {norm_weight.dtype} and {pages.dtype}"
    if ratio != _RATIOS[overlap] or (key, overlap) == ("index", False):
        return f"ratio must be 4 with overlap, or 128 without and for kv keys, got {ratio}, overlap {overlap}, {key} keys"
    if key in _DIMS and norm_weight.shape != (_DIMS[key],):
        return f"{key} keys must have {_DIMS[key]} dims, got a norm_weight of {tuple(norm_weight.shape)}"
    if 2 * inv_freq.shape[0] != ROPE_DIM:
        return f"inv_freq must be ({ROPE_DIM // 2},), got {tuple(inv_freq.shape)}"
    for name, plan in (("positions", positions), ("seq_idx", seq_idx), ("first_row", first_row)):
        if plan.dtype != torch.int64 or last_position.dtype != torch.int64:
            return f"{name} and last_position must be int64, got {plan.dtype} and {last_position.dtype}"
    return None if block_table.dtype == torch.int32 else f"block_table must be int32, got {block_table.dtype}"


ENTRIES = tuple(Entry("compress", arch, compress, _refuses) for arch in api.ARCHITECTURES)
