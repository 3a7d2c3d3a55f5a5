"""Compile-time choices of the key reader, and which to take for a size. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4lab.kernels.cache.plan import KeyPlan

_FEW_ROWS = 132 * 16  # as for the writer


@dataclass(frozen=True)
class ReadConfig:
    """key: what is read; its element and weight do not matter. warps: of a CTA, a row each."""

    key: KeyPlan
    warps: int = 8

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        self.key.check()
        if self.key.kind != "kv":
            raise ValueError(f"keys to read must be kv keys, got {self.key.kind!r}")
        if not 1 <= self.warps <= 32:
            raise ValueError(f"warps must be 1 to 32, got {self.warps}")

    @classmethod
    def for_shape(cls, rows: int, key: KeyPlan) -> ReadConfig:
        """Few rows are spread over all multiprocessors; many take large CTAs, of which fewer have to be started."""
        return cls(key, 1 if rows <= _FEW_ROWS else 8)
