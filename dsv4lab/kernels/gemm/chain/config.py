"""Compile-time choices of the two products of one token's experts in one launch. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4lab.kernels.gemm.mixed.config import SHARED_BYTES, MixedConfig, chunks_for, with_stages

_WARPS = 16
_TOKENS = 8  # columns of a product, of which one is the token's
_ALIKE = ("format", "tokens", "slabs", "chunks", "stages", "splits", "per_warp", "cluster", "beside")  # of both products


@dataclass(frozen=True)
class ChainConfig:
    """first: the paired product of one token's rows; second: of its results. Both use the same ring, so their tiles and stages
    are of one size.
    """

    first: MixedConfig
    second: MixedConfig

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        for config in (self.first, self.second):
            config.check()
            if not config.single or config.cluster > 1 or config.requant or config.scaled != "no":
                raise ValueError(f"both products must be single, without cluster, requant and factors, got {config}")
        if not (self.first.paired and self.first.slotted and self.first.gather):
            raise ValueError(f"first must be paired, slotted and gather, got {self.first}")
        if self.second.paired or self.second.slotted or self.second.gather:
            raise ValueError(f"second must not be paired, slotted or gather, got {self.second}")
        for name in _ALIKE:
            a, b = getattr(self.first, name), getattr(self.second, name)
            if a != b:
                raise ValueError(f"{name} must be the same for both products, got {a!r} and {b!r}")

    def ctas(self, rows: int, slabs: int, multiprocessors: int) -> int:
        """Of a launch: those that run at once, as far as the first product has tiles. slabs: of a pair."""
        return min(rows * -(-slabs // self.first.slabs), multiprocessors * self.first.resident)

    @classmethod
    def for_shape(cls, fmt: str, out: str, k_first: int, k_second: int, *, beside: bool) -> ChainConfig:
        """For matrices of one format whose K are padded; out: the element of both results. 16 warps a CTA, in as few teams as
        K is long enough for, since sums are then added up over fewer of them.
        """
        chunks = min(chunks_for(k_first, 8), chunks_for(k_second, 8))
        slabs = 8 if fmt == "nvfp4" and chunks >= 2 else 4
        splits = min(_WARPS // slabs, chunks)
        first = MixedConfig(fmt, out, _TOKENS, slabs, chunks, 2, splits=splits, grouped=True, single=True, beside=beside)
        first = with_stages(replace(first, slotted=True, gather=True, paired=True, early=False), SHARED_BYTES)
        return cls(first, replace(first, slotted=False, gather=False, paired=False, early=True))
