"""How many entries a query sees, as its kernels take what they are told.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
from cutlass import Int32


def visible(num_visible: Any, row: Any, entries: Any) -> Any:
    """Of query `row`, int32: at least none, at most all of `entries`. num_visible (M,) of any integers."""
    integer = num_visible.element_type
    return Int32(cutlass.max(cutlass.min(num_visible[row], integer(entries)), integer(0)))
