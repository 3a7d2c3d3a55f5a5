"""Compile-time choices of the sampler's kernels, and which to take for a size. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
GROUP = 4  # elements that share a call of the generator
BINS = 2048  # of a histogram
BINS_A_NAT = 64  # of the first one: 32 nats below the largest logit, where a probability is under 2^-46 of the largest
SHARE_BITS = 22  # of what an element falls short of its bin's upper end, at most 1/64
MAX_SLICE = 1 << 16  # elements of a CTA: so many shares of 1/64 in 22 bits fit 32
_SHARED_BYTES = 227 * 1024  # that a CTA may have
_SMALL_BYTES = 1024  # of shared memory for single numbers, more than enough
_MULTIPROCESSORS = 132  # of an H100 or H200
_CLUSTERS = (1, 2, 4, 8)
_WHATS = ("sample", "probabilities")


@dataclass(frozen=True)
class SamplerConfig:
    """what: "sample" or "probabilities". vector: rows start at 16 bytes, V % 4 == 0.
    room: logits that a CTA keeps in shared memory, 0 to read them again from L2 for every pass. cluster: CTAs that share a row.
    warps: of a CTA. batch: loads of a thread in flight. integer: the type of top_k. peaks: whether the head has left each
    part's largest logit.
    """

    what: str
    vector: bool
    room: int
    cluster: int = 8
    warps: int = 32
    batch: int = 2
    integer: str = "i64"
    peaks: bool = False

    @property
    def threads(self) -> int:
        return self.warps * WARP

    @property
    def own(self) -> int:
        """Bins that a CTA sums for all of its cluster."""
        return BINS // self.cluster

    @property
    def shared_bytes(self) -> int:
        """At most: the logits, two histograms, sums of this CTA's bins."""
        return 4 * self.room + 8 * BINS + 12 * self.own + _SMALL_BYTES

    def slice(self, vocab: int) -> int:
        """Elements of a row that each CTA of a cluster has, a multiple of 4; the last may have fewer."""
        groups = -(-vocab // GROUP)
        return -(-groups // self.cluster) * GROUP

    def check(self, vocab: int | None = None) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.what not in _WHATS:
            raise ValueError(f"what must be one of {', '.join(_WHATS)}, got {self.what!r}")
        if self.cluster not in _CLUSTERS:
            raise ValueError(f"cluster must be 1, 2, 4 or 8, got {self.cluster}")
        if not 1 <= self.warps <= 32:
            raise ValueError(f"warps must be 1 to 32, got {self.warps}")
        if self.batch not in (1, 2, 4):
            raise ValueError(f"batch must be 1, 2 or 4, got {self.batch}")
        if self.integer not in ("i32", "i64"):
            raise ValueError(f"integer must be i32 or i64, got {self.integer!r}")
        if self.room < 0 or self.room % GROUP or self.shared_bytes > _SHARED_BYTES:
            raise ValueError(f"room must be a multiple of {GROUP} that fits {_SHARED_BYTES} bytes, got {self.room}")
        if vocab is None:
            return
        if self.vector and vocab % GROUP:
            raise ValueError(f"vector must be false where V % {GROUP} != 0, got V={vocab}")
        if self.slice(vocab) > MAX_SLICE:
            raise ValueError(f"V must be <= {MAX_SLICE} for each CTA of a cluster of {self.cluster}, got {vocab}")
        if self.room and self.slice(vocab) > self.room:
            raise ValueError(f"room must be >= {self.slice(vocab)} for V={vocab}, got {self.room}")

    @classmethod
    def for_shape(cls, what: str, batch: int, vocab: int, integer: str = "i64") -> SamplerConfig:
        """8 CTAs a row, the most that any GPU runs as a cluster, with 1024 threads while each has a multiprocessor to itself;
        else two of 512 share one: 129,280 logits are 65 kB a CTA, beside 20 kB of histograms."""
        slice_ = cls(what, vocab % GROUP == 0, 0).slice(vocab)
        fits = cls(what, vocab % GROUP == 0, slice_).shared_bytes <= _SHARED_BYTES
        warps = 32 if 8 * batch <= _MULTIPROCESSORS else 16
        each = -(-slice_ // (GROUP * warps * WARP))
        loads = 1 if each <= 1 else 2 if each <= 2 else 4
        return cls(what, vocab % GROUP == 0, slice_ if fits else 0, warps=warps, batch=loads, integer=integer)


@dataclass(frozen=True)
class AcceptConfig:
    """vector: as above. cluster: CTAs that share a row. warps: of a CTA."""

    vector: bool
    cluster: int = 8
    warps: int = 32

    @property
    def threads(self) -> int:
        return self.warps * WARP

    def check(self, vocab: int | None = None) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.cluster not in _CLUSTERS:
            raise ValueError(f"cluster must be 1, 2, 4 or 8, got {self.cluster}")
        if not 1 <= self.warps <= 32:
            raise ValueError(f"warps must be 1 to 32, got {self.warps}")
        if vocab is not None and self.vector and vocab % GROUP:
            raise ValueError(f"vector must be false where V % {GROUP} != 0, got V={vocab}")

    @classmethod
    def for_shape(cls, batch: int, vocab: int) -> AcceptConfig:
        """As for the sampler."""
        return cls(vocab % GROUP == 0, warps=32 if 8 * batch <= _MULTIPROCESSORS else 16)
