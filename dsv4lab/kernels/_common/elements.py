"""Tensors as kernels take and give them: element types, by the names configurations have for them, and layout."""

from __future__ import annotations

from typing import Any

import torch

ELEMENT = {torch.bfloat16: "bf16", torch.float32: "f32"}
FLOATS = tuple(ELEMENT)


def contiguous(tensors: tuple[torch.Tensor | None, ...]) -> tuple[Any, ...]:
    """Copies where a tensor is not contiguous; None stays."""
    return tuple(t if t is None else t.contiguous() for t in tensors)
