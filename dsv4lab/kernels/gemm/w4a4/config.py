"""Compile-time choices of the NVFP4 x NVFP4 linear kernel, and the arithmetic that follows from them. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

TILE_M, TILE_K = 128, 256
SCALE_GROUP = 16  # values along K that share a scale
SHARED_BYTES = 227 * 1024  # that a CTA may have
TMEM_COLUMNS = 512
_STORE_BYTES = 4 * 2 * 4096  # two buffers of 32 rows by 128 bytes for each of four warps
_SCALE_COLUMNS = TILE_K // SCALE_GROUP // 4 * 4  # TMEM columns of the scales of 128 rows
_MARGIN = 2048  # barriers, and alignment of the buffers to 1024 bytes


@dataclass(frozen=True)
class W4A4Config:
    """out: "bf16" or "f32". tile_n: columns of an output tile, 128 or 256. stages: slices of K in flight.
    accumulators: output tiles in TMEM, 2 where the next tile's products shall overlap the last one's store.
    """

    out: str = "bf16"
    tile_n: int = 128
    stages: int = 5
    accumulators: int = 2

    @property
    def stage_bytes(self) -> int:
        """Codes and scales of one K slice of both operands."""
        rows = TILE_M + self.tile_n
        return rows * TILE_K // 2 + rows * TILE_K // SCALE_GROUP

    @property
    def scale_columns(self) -> tuple[int, int]:
        """TMEM columns at which the scales of x and of W begin: after the accumulators."""
        first = self.accumulators * self.tile_n
        return first, first + _SCALE_COLUMNS

    @property
    def tmem_columns(self) -> int:
        """TMEM columns in use."""
        return self.scale_columns[1] + _SCALE_COLUMNS * self.tile_n // TILE_M

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes + _STORE_BYTES + _MARGIN

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.out not in ("bf16", "f32"):
            raise ValueError(f"out must be bf16 or f32, got {self.out!r}")
        if self.tile_n not in (128, 256):
            raise ValueError(f"tile_n must be 128 or 256, got {self.tile_n}")
        if self.stages < 1 or self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"stages must be >= 1 and fit {SHARED_BYTES} bytes, got {self.stages} of {self.stage_bytes} bytes")
        if self.accumulators < 1 or self.tmem_columns > TMEM_COLUMNS:
            raise ValueError(
                f"accumulators and scales must fit {TMEM_COLUMNS} TMEM columns, got {self.tmem_columns} with "
                f"accumulators={self.accumulators}, tile_n={self.tile_n}"
            )
