"""Compile-time choices of the kernels between a decode step and the next. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

THREADS = 128
MAX_RATIOS = 4
MAX_DRAFTS = 15
MAX_TOKENS = 2**26  # B * tokens, and rows of the result with them: indices are 32 bits wide


@dataclass(frozen=True)
class PlanConfig:
    """tokens: of a sequence's step. ratios: tokens an entry stands for, of each kind of entry."""

    tokens: int
    ratios: tuple[int, ...]

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.tokens < 1:
            raise ValueError(f"tokens must be >= 1, got {self.tokens}")
        if len(self.ratios) > MAX_RATIOS or any(r < 1 for r in self.ratios):
            raise ValueError(f"ratios must be {MAX_RATIOS} at most, each >= 1, got {self.ratios}")


@dataclass(frozen=True)
class MatchConfig:
    """drafts: that a step verifies."""

    drafts: int

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if not 0 <= self.drafts <= MAX_DRAFTS:
            raise ValueError(f"drafts must be 0 to {MAX_DRAFTS}, got {self.drafts}")


@dataclass(frozen=True)
class AdvanceConfig(MatchConfig):
    """drafts: that a step has verified."""
