"""Compile-time choices of the key writer, and which to take for a size. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4lab.kernels.cache.plan import KeyPlan

_FEW_ROWS = 132 * 16  # CTAs of one warp, 16 a multiprocessor: no SM has two rows before all have one


@dataclass(frozen=True)
class WriteConfig:
    """key: what is written. warps: of a CTA, a row each. settled: the kernel before wrote neither norm weight nor
    frequencies, so they are read while it still runs.
    """

    key: KeyPlan
    warps: int = 8
    settled: bool = True

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        self.key.check()
        if not 1 <= self.warps <= 32:
            raise ValueError(f"warps must be 1 to 32, got {self.warps}")

    @classmethod
    def for_shape(cls, rows: int, key: KeyPlan) -> WriteConfig:
        """Few rows are spread over all multiprocessors; many take large CTAs, of which fewer have to be started."""
        return cls(key, 1 if rows <= _FEW_ROWS else 8)
