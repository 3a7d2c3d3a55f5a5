"""Prepared weights, kept beside the weights they were made from: made at first use, made again when those change.

A prepared weight lives as long as the codes it was made from. It takes as many bytes again.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from dsv4lab.formats import PackedWeight
from dsv4lab.kernels.gemm.mixed.layout import PreparedWeight, prepare


@dataclass(frozen=True)
class _Entry:
    """A prepared weight and what it was made from: the tensors themselves, since an id may come again, as they then were."""

    tensors: list[weakref.ref[torch.Tensor]]
    states: list[tuple[int, int]]
    made: PreparedWeight

    def is_of(self, tensors: list[torch.Tensor]) -> bool:
        same = len(self.tensors) == len(tensors) and all(ref() is t for ref, t in zip(self.tensors, tensors, strict=True))
        return same and self.states == [_state(t) for t in tensors]


_known: dict[tuple[int, ...], _Entry] = {}


def prepared(weight: PackedWeight, up: PackedWeight | None = None) -> PreparedWeight:
    """`layout.prepare` of a weight, or of a gate-up pair, from memory where nothing has changed since.

    Making one waits for the device: kernels read weights before the kernel ahead of them has ended. Raises as `prepare`.
    """
    parts = [w.tensors() for w in (weight, up) if w is not None]
    tensors = [t for part in parts for name, t in part.items() if name != "input_scale"]  # what `prepare` reads
    key = tuple(id(w.codes) for w in (weight, up) if w is not None)
    found = _known.get(key)
    if found is None or not found.is_of(tensors):
        made = prepare(weight, up)
        if weight.codes.device.type == "cuda":
            torch.cuda.current_stream(weight.codes.device).synchronize()
        if found is None:
            weakref.finalize(weight.codes, _known.pop, key, None)
        found = _known[key] = _Entry([weakref.ref(t) for t in tensors], [_state(t) for t in tensors], made)
    return found.made


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the memory is, and how often it was changed in place: -1 in inference mode, which does not count."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
