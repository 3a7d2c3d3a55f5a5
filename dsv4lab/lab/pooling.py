"""Compressors taken apart: the weights of an entry's tokens, and one sequence's observed step cut into other steps.

`Inputs` are those of an observed `compress` call of a single sequence that starts at position 0.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv4lab.records import allocate_index_pages, allocate_kv_pages
from dsv4lab.reference.cache import cache_read
from dsv4lab.reference.indexer import index_key_read

Inputs = dict[str, Any]


def dims(inputs: Inputs) -> int:
    """Channels of an entry."""
    return int(inputs["norm_weight"].shape[0])


def span(inputs: Inputs) -> int:
    """Tokens that an entry pools."""
    return int(inputs["ratio"]) * (2 if inputs["overlap"] else 1)


def gates(inputs: Inputs, entry: int) -> torch.Tensor:
    """The weights by which an entry pools its tokens, in order: (span, d) f64; the block before the first weighs nothing.

    Raises ValueError for an entry that the step does not complete.
    """
    ratio, d, tokens = inputs["ratio"], dims(inputs), inputs["scores"].shape[0]
    if not 0 <= entry < tokens // ratio:
        raise ValueError(f"entry must be in [0, {tokens // ratio}), got {entry}")
    places = torch.arange((entry + 1) * ratio - span(inputs), (entry + 1) * ratio)
    z = inputs["scores"][places.clamp(min=0)].double() + inputs["ape"][places % ratio].double()
    if inputs["overlap"]:
        z = torch.cat([z[:ratio, :d], z[ratio:, d:]])
    return torch.softmax(torch.where(places[:, None].to(z.device) >= 0, z, -torch.inf), dim=0)


def effective_tokens(weights: torch.Tensor) -> torch.Tensor:
    """How many equal tokens are as uncertain as these weights: (span, d) -> (d,), from 1 to span."""
    return torch.exp(torch.special.entr(weights).sum(0))


def on(inputs: Inputs, device: torch.device, **other: Any) -> Inputs:
    """The same on a device, with other values of some."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in (inputs | other).items()}


def longer(inputs: Inputs, tokens: int) -> Inputs:
    """The same sequence over again up to so many tokens, with a page of its own for each block."""
    rows = torch.arange(tokens, device=inputs["values"].device)
    source = rows % inputs["values"].shape[0]
    blocks = -(-tokens // (inputs["ratio"] * inputs["page_size"]))
    table = torch.randperm(blocks, device=rows.device).int()[None]
    return inputs | {"values": inputs["values"][source], "scores": inputs["scores"][source], "block_table": table}


def fresh(inputs: Inputs, *, ring: int, record: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Inputs with an empty ring of so many places, and an empty pool; record, dtype: of that pool, its own record if None."""
    values, record = inputs["values"], record or inputs["record"]
    state = torch.zeros(1, ring, 2, values.shape[1], device=values.device)
    state[:, :, 1] = -torch.inf
    pool: dict[str, Any] = dict(num_pages=int(inputs["block_table"].max()) + 1, page_size=inputs["page_size"])
    pool |= dict(dim=dims(inputs), dtype=dtype, device=values.device)
    if inputs["key"] == "kv":
        pages = allocate_kv_pages(record, rope_dim=2 * inputs["inv_freq"].shape[0], **pool)
    else:
        pages = allocate_index_pages(record, **pool)
    return inputs | {"state": state, "pages": pages, "record": record}


def piece(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The step of tokens start .. stop - 1, as arguments of `ops.compress`; state and pages are the same tensors."""
    positions = torch.arange(start, stop, device=inputs["values"].device)
    zero = torch.zeros_like(positions)
    plan = {"positions": positions, "seq_idx": zero, "first_row": zero, "last_position": torch.full_like(positions, stop - 1)}
    return inputs | plan | {name: inputs[name][start:stop] for name in ("values", "scores")}


def entries(inputs: Inputs, count: int) -> torch.Tensor:
    """The first entries as they are stored, (count, d) f32."""
    size, j = inputs["page_size"], torch.arange(count, device=inputs["values"].device)
    slots = inputs["block_table"][0, j // size].long() * size + j % size
    how: dict[str, Any] = dict(record=inputs["record"], page_size=size, dim=dims(inputs))
    if inputs["key"] == "index":
        return index_key_read(inputs["pages"], slots, **how)
    return cache_read(inputs["pages"], slots, rope_dim=2 * inputs["inv_freq"].shape[0], **how)
