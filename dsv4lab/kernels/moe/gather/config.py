"""Compile-time choices of the row gather, and which to take for a size. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
UNIT_BYTES = 16  # the longest access of a lane
MAX_WORDS = 2**31  # of 4 bytes; indices are 32 bits wide
_MANY_WARPS = 132 * 16  # enough to keep a Hopper GPU's memory busy with one access each; past it, longer pieces cost less
_MANY_ROWS = 73_728  # 25 MB of pieces of 2 KB, where a token has 6 rows


@dataclass(frozen=True)
class GatherConfig:
    """units: 16-byte accesses of a lane, all in flight together. warps: of a CTA."""

    units: int
    warps: int = 8

    @property
    def piece(self) -> int:
        """Units of a row that a warp copies."""
        return self.units * WARP

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.units not in (1, 2, 4, 8):
            raise ValueError(f"units must be 1, 2, 4 or 8, got {self.units}")
        if not 1 <= self.warps <= 32:
            raise ValueError(f"warps must be 1 to 32, got {self.warps}")

    @classmethod
    def for_shape(cls, rows: int, row_bytes: int) -> GatherConfig:
        """The longest pieces that leave enough warps, are no longer than a row, and, of all tokens, stay in L2.

        At 6 rows a token, pieces of 4 accesses, 2 KB, are 17 MB for 49,152 rows: an H100 has 50 MB, half of it near a
        multiprocessor. 2 accesses take over where those would be more than half as much again.
        """
        row_units = -(-row_bytes // UNIT_BYTES)
        for units in (4, 2) if rows <= _MANY_ROWS else (2,):
            pieces = -(-row_units // (units * WARP))
            if row_units >= units * WARP and rows * pieces >= _MANY_WARPS:
                return cls(units)
        return cls(1)
