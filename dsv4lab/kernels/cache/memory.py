"""Loads and stores at byte addresses of global memory: records are no tensors of one element. Device functions."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Uint8, Uint32


def at(address: Any, element: Any, count: int) -> Any:
    """`count` elements at an address that is a multiple of their bytes."""
    pointer = cute.make_ptr(element, address, cute.AddressSpace.gmem, assumed_align=element.width // 8 * count)
    return cute.make_tensor(pointer, cute.make_layout((count,)))


def load_words(address: Any, count: int) -> list[Any]:
    """One, two or four words in one load."""
    held = cute.make_rmem_tensor((count,), Uint32)
    cute.autovec_copy(at(address, Uint32, count), held)
    return [held[i] for i in range(count)]


@cute.jit
def put_words(words: Any, address: Any, condition: Any) -> None:
    """One, two or four words in one store."""
    held = cute.make_rmem_tensor((len(words),), Uint32)
    for i in cutlass.range_constexpr(len(words)):
        held[i] = words[i]
    if condition:
        cute.autovec_copy(held, at(address, Uint32, len(words)))


@cute.jit
def put_byte(byte: Any, address: Any, condition: Any) -> None:
    if condition:
        at(address, Uint8, 1)[0] = Uint8(byte)
