"""Compile-time choices of the expert combination, and which to take for a size. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
MAX_TOP_K = 16  # rows of a token that a lane holds together
MAX_ELEMENTS = 2**31  # indices are 32 bits wide
DEPTH_MULTIPLE = 8  # elements of the longest access
_ELEMENTS = ("bf16", "f32")
_MANY_WARPS = 132 * 16  # as for the gather


@dataclass(frozen=True)
class CombineConfig:
    """y: "bf16" or "f32". top_k: rows of a token. shared: "bf16" or "f32", or None for a plain f32 sum.
    units: accesses of a lane along a row. indexed: rows are found by position; otherwise row m of y is token m's, top_k is 1.
    warps: of a CTA. experts: 0, or of how many; rows are then those of the slots, in order, and have expert ids for positions.
    """

    y: str
    top_k: int
    shared: str | None
    units: int = 1
    indexed: bool = True
    warps: int = 4
    experts: int = 0

    @property
    def out(self) -> str:
        return self.shared or "f32"

    @property
    def vector(self) -> int:
        """Elements of a lane's access: 16 bytes of the widest type, so that no store leaves half a 32-byte sector."""
        return 4 if "f32" in (self.y, self.out) else 8

    @property
    def piece(self) -> int:
        """Elements of a row that a warp sums."""
        return self.units * WARP * self.vector

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.y not in _ELEMENTS or self.shared not in (None, *_ELEMENTS):
            raise ValueError(f"y must be bf16 or f32, and shared that or None, got {self.y!r} and {self.shared!r}")
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"top_k must be 1 to {MAX_TOP_K}, got {self.top_k}")
        if not 0 <= self.experts * self.top_k < MAX_ELEMENTS or (self.experts and not self.indexed):
            raise ValueError(f"experts must be 0, or below 2^31 / top_k of indexed rows, got {self.experts}")
        if not self.indexed and self.top_k != 1:
            raise ValueError(f"top_k must be 1 where rows are not indexed, got {self.top_k}")
        if self.units not in (1, 2, 4) or self.units * self.top_k > 2 * MAX_TOP_K:
            raise ValueError(f"units must be 1, 2 or 4, with {2 * MAX_TOP_K} accesses in all, got {self.units}")
        if not 1 <= self.warps <= 32:
            raise ValueError(f"warps must be 1 to 32, got {self.warps}")

    @classmethod
    def for_shape(
        cls, tokens: int, depth: int, y: str, top_k: int, shared: str | None, *, indexed: bool = True, experts: int = 0
    ) -> CombineConfig:
        """About eight loads of a lane in flight, where that leaves warps enough and a row is long enough."""
        wanted = 4 if top_k <= 2 else 2 if top_k <= 8 else 1
        for units in (4, 2):
            config = cls(y, top_k, shared, units, indexed, experts=experts)
            if units <= wanted and depth >= config.piece and tokens * -(-depth // config.piece) >= _MANY_WARPS:
                return config
        return cls(y, top_k, shared, 1, indexed, experts=experts)
