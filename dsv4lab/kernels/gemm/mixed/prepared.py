"""Prepared weights, kept beside the weights they were made from: made at first use, made again when those change.

A prepared weight lives as long as the codes it was made from. It takes as many bytes again.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from dsv4lab.formats import PackedWeight
from dsv4lab.kernels.gemm.mixed.layout import PreparedWeight, prepare

_known: dict[tuple[int, ...], tuple[tuple[Any, ...], PreparedWeight]] = {}


def prepared(weight: PackedWeight, up: PackedWeight | None = None) -> PreparedWeight:
    """`layout.prepare` of a weight, or of a gate-up pair, from memory where nothing has changed since.

    Making one waits for the device: kernels read weights before the kernel ahead of them has ended.
    """
    tensors = [t for w in (weight, up) if w is not None for t in w.tensors().values()]
    key = tuple(id(w.codes) for w in (weight, up) if w is not None)
    state = tuple((id(t), t.data_ptr(), _version(t)) for t in tensors)
    found = _known.get(key)
    if found is None or found[0] != state:
        made = prepare(weight, up)
        if weight.codes.device.type == "cuda":
            torch.cuda.current_stream(weight.codes.device).synchronize()
        if found is None:
            weakref.finalize(weight.codes, _known.pop, key, None)
        found = _known[key] = (state, made)
    return found[1]


def _version(tensor: torch.Tensor) -> int:
    """Counts changes in place; tensors made in inference mode have no count and cannot be changed outside of it."""
    return -1 if tensor.is_inference() else tensor._version
