"""Example arguments for compiling: tensors without memory, whose sizes may be left open."""

from __future__ import annotations

from typing import Any

from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream


def fake(element: Any, *shape: Any, align: int = 16) -> Any:
    """A contiguous row-major tensor; sizes are numbers or `cute.sym_int`. align: of its first byte."""
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(element, shape, stride_order=order, assumed_align=align)


def fake_stream() -> Any:
    """The stream that torch uses when the kernel is called; callers pass nothing for it."""
    return make_fake_stream(use_tvm_ffi_env_stream=True)
