"""What a kernel is to an operation: the form of the registry's entries, in a module that every room of kernels may import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A kernel of an operation. refuses: says why it does not take these arguments, None where it does."""

    operation: str
    arch: str
    function: Callable[..., Any]
    refuses: Callable[..., str | Exception | None]
