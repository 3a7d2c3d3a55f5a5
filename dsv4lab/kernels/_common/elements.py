"""Tensors as kernels take and give them: element types, by the names configurations have for them, and layout."""

from __future__ import annotations

from typing import Any

import torch

ELEMENT = {torch.bfloat16: "bf16", torch.float32: "f32"}
FLOATS = tuple(ELEMENT)


def contiguous(tensors: tuple[torch.Tensor | None, ...]) -> tuple[Any, ...]:
    """Copies where a tensor is not contiguous; None stays."""
    return tuple(t if t is None else dense(t) for t in tensors)


def dense(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, with the strides of its shape, from an address that is a multiple of 16: x itself, where it is so."""
    plain = x.contiguous().flatten().view(x.shape)
    if plain.data_ptr() % 16:
        return plain.clone()
    return x if plain.data_ptr() == x.data_ptr() and plain.stride() == x.stride() else plain
