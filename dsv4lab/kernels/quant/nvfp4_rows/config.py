"""Compile-time choices of the NVFP4 row quantiser. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 16  # values along K that share a scale
ROWS_PER_CTA = 4  # one warp each


@dataclass(frozen=True)
class QuantizeRowsConfig:
    """element: "bf16" or "f32". static: whether all rows take a global scale that is given, not one from their own amax."""

    element: str
    static: bool
