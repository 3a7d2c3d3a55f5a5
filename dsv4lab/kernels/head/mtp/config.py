"""Compile-time choices of the prediction block's addition. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
DEPTH_MULTIPLE = 8  # elements of the longest access
MAX_STREAMS = 8  # of a token, loaded together
MAX_ELEMENTS = 2**31  # indices are 32 bits wide
_ELEMENTS = ("bf16", "f32")


@dataclass(frozen=True)
class AddConfig:
    """e, f: "bf16" or "f32"; the result is like f. streams: of a token. warps: of a CTA."""

    e: str
    f: str
    streams: int
    warps: int = 4

    @property
    def vector(self) -> int:
        """Elements of a lane's access: 16 bytes of the wider type."""
        return 4 if "f32" in (self.e, self.f) else 8

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.e not in _ELEMENTS or self.f not in _ELEMENTS:
            raise ValueError(f"e and f must be bf16 or f32, got {self.e!r} and {self.f!r}")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"streams must be 1 to {MAX_STREAMS}, got {self.streams}")
        if not 1 <= self.warps <= 32:
            raise ValueError(f"warps must be 1 to 32, got {self.warps}")

    @classmethod
    def for_shape(cls, tokens: int, depth: int, e: str, f: str, streams: int) -> AddConfig:
        """Small CTAs where there are few of them, so that one token of 4096 is on four multiprocessors and not on one."""
        draft = cls(e, f, streams)
        return cls(e, f, streams, 4 if tokens * depth < 132 * 8 * WARP * draft.vector * 4 else 8)
