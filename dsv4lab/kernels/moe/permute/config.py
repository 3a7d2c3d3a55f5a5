"""Compile-time choices of the token permutation, and which to take for a size. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
MAX_WARPS = 32  # 1024 threads, the most a CTA may have
CLUSTER = 8  # CTAs, the most that every GPU can start together
MAX_ROUNDS = 32  # entries a lane keeps in registers
MAX_ENTRIES = CLUSTER * MAX_WARPS * WARP * MAX_ROUNDS
ROW_STEP = 8  # token tiles are multiples of this, the smallest free side of `mma.sync` and `wgmma`


@dataclass(frozen=True)
class PermuteConfig:
    """experts: how many there are, one thread each. warps: of a CTA. rounds: entries of a lane. ctas: of the one cluster."""

    experts: int
    warps: int
    rounds: int
    ctas: int = 1

    @property
    def entries(self) -> int:
        """How many it can take."""
        return self.ctas * self.warps * WARP * self.rounds

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if not 1 <= self.experts <= MAX_WARPS * WARP:
            raise ValueError(f"experts must be 1 to {MAX_WARPS * WARP}, got {self.experts}")
        if not self.experts <= self.warps * WARP <= MAX_WARPS * WARP:
            raise ValueError(f"warps must be {MAX_WARPS} at most, with a thread for every expert, got {self.warps}")
        if not 1 <= self.rounds <= MAX_ROUNDS:
            raise ValueError(f"rounds must be 1 to {MAX_ROUNDS}, got {self.rounds}")
        if self.ctas not in (1, 2, 4, CLUSTER):
            raise ValueError(f"ctas must be 1, 2, 4 or {CLUSTER}, got {self.ctas}")

    @classmethod
    def for_shape(cls, entries: int, experts: int) -> PermuteConfig:
        """The smallest that takes so many entries: a few warps, then a full CTA, then a cluster. Raises ValueError.

        A cluster costs two barriers, about a microsecond, so one CTA takes two rounds before eight share the work.
        """
        if entries > MAX_ENTRIES:
            raise ValueError(f"expert_idx must have at most {MAX_ENTRIES} entries, got {entries}")
        few = max(-(-experts // WARP), 4)
        if entries <= few * WARP:
            return cls(experts, few, 1)
        if entries <= 2 * MAX_WARPS * WARP:
            return cls(experts, MAX_WARPS, -(-entries // (MAX_WARPS * WARP)))
        rounds = -(-entries // (CLUSTER * MAX_WARPS * WARP))
        return cls(experts, MAX_WARPS, 1 << (rounds - 1).bit_length(), CLUSTER)


def max_tiles(entries: int, experts: int, tile_tokens: int) -> int:
    """The most token tiles that so many entries can make, and some assignment makes.

    n rows of an expert are 1 + (n - 1) // T tiles: one for each expert that is hit, and one for every T of the other rows.
    """
    hit = min(experts, entries)
    return hit + (entries - hit) // tile_tokens
