"""What is made of weights before kernels read them: made at first use, kept beside them, made again when they change.

It lives as long as the first tensor it was made from. A change in place is seen by address and version count; one through
`.data`, or in inference mode, which counts none, is not: `forget` is for those.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


@dataclass(frozen=True)
class _Entry:
    """What was made, and of what: the tensors themselves, since an id may come again, as they then were."""

    tensors: list[weakref.ref[torch.Tensor]]
    states: list[tuple[int, int]]
    made: Any

    def is_of(self, tensors: list[torch.Tensor]) -> bool:
        same = len(self.tensors) == len(tensors) and all(ref() is t for ref, t in zip(self.tensors, tensors, strict=True))
        return same and self.states == [_state(t) for t in tensors]


_known: dict[Hashable, _Entry] = {}


def kept(key: Hashable, tensors: list[torch.Tensor], make: Callable[[], Made]) -> Made:
    """`make()` of these tensors, from memory where none of them has changed since. key: ids of owners, the first tensor's
    among them, and what distinguishes things made of the same.

    Making waits for the device: kernels read weights before the kernel ahead of them has ended.
    """
    found = _known.get(key)
    if found is None or not found.is_of(tensors):
        made = make()
        if tensors[0].device.type == "cuda":
            torch.cuda.current_stream(tensors[0].device).synchronize()
        if found is None:
            weakref.finalize(tensors[0], _known.pop, key, None)
        found = _known[key] = _Entry([weakref.ref(t) for t in tensors], [_state(t) for t in tensors], made)
    return found.made


def forget() -> None:
    """Have everything made again at its next use. What CUDA graphs read that were captured before is then gone: capture them
    again.
    """
    for entry in list(_known.values()):
        entry.states.clear()


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the memory is, and how often it was changed in place: -1 in inference mode, which does not count."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
