"""Compile-time choices of the index queries' kernel, and which to take for a shape. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIM = 128  # values of an index head
ROPE_DIM = 64  # of them, the last ones, are rotated: a pair for each lane of a warp
WARP = 32
WARP_HEADS = 8  # that a warp holds at a time, four lanes each
RECORDS = ("plain", "fp8", "fp4")
ELEMENTS = ("bf16", "f32")
_MANY_TOKENS = 4 * 132  # from which on a CTA a token keeps an H100 or H200 busy


@dataclass(frozen=True)
class QueryConfig:
    """record: "plain", rotation alone; "fp8" or "fp4": Hadamard and that format besides. element: of q, "bf16" or "f32".
    warps: of a CTA, which has one token. passes: times that a warp takes 8 heads.
    """

    record: str
    element: str
    warps: int = 2
    passes: int = 1

    @property
    def heads(self) -> int:
        """Heads of a CTA."""
        return self.warps * self.passes * WARP_HEADS

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.record not in RECORDS:
            raise ValueError(f"record must be one of {', '.join(RECORDS)}, got {self.record!r}")
        if self.element not in ELEMENTS:
            raise ValueError(f"element must be bf16 or f32, got {self.element!r}")
        if not 1 <= self.warps <= 8 or self.passes not in (1, 2):
            raise ValueError(f"warps must be 1 to 8 and passes 1 or 2, got {self.warps} and {self.passes}")

    @classmethod
    def for_shape(cls, tokens: int, num_heads: int, record: str, element: str) -> QueryConfig:
        """Many tokens: a CTA for all 64 heads of one, two passes of four warps, so that sines are found for 16 heads. Few, or
        few heads: as many CTAs as there are 16 heads, 8 where there are no more.
        """
        if tokens >= _MANY_TOKENS and num_heads >= 64 and element == "bf16":
            return cls(record, element, 4, 2)
        return cls(record, element, 2 if num_heads > WARP_HEADS else 1, 1)
