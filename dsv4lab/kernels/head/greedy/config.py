"""Compile-time choices of the kernel that ends a greedy head. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
MAX_ELEMENTS = 2**31  # indices are 32 bits wide


@dataclass(frozen=True)
class PickConfig:
    """warps: that share a row."""

    warps: int

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if not 1 <= self.warps <= 32:
            raise ValueError(f"warps must be 1 to 32, got {self.warps}")

    @classmethod
    def for_shape(cls, parts: int) -> PickConfig:
        """Four numbers a thread, all in flight at once, up to a CTA of eight warps: a thousand parts are one trip to memory."""
        return cls(next(w for w in (1, 2, 4, 8) if parts <= w * WARP * 4 or w == 8))
