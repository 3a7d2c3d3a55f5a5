"""Compile-time choices of the top-k selection, and which to take for a shape. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass, replace

WARP = 32
DIGIT_BITS = 11
BINS = 1 << DIGIT_BITS
SHIFTS = (21, 10, 0)  # of the digits of a 32-bit key, 11, 11 and 10 bits
MAX_K = 2048
MAX_ENTRIES = 1 << 18
SHARED_BYTES = 227 * 1024  # that a CTA may have
_INTEGERS = ("i32", "i64")
_MARGIN = 4096
_VALUES = (4, 8, 16, 32, 64)
_SHORT = 4096  # entries that one CTA selects from about as fast as several


@dataclass(frozen=True)
class IndexTopkConfig:
    """warps: of a CTA. values: scores of a lane. cluster: CTAs that share a row. copies: of a histogram, so that equal digits
    of neighbouring lanes are counted apart. visible: integer type of num_visible. alone: the most visible entries of which
    a CTA of a cluster selects by itself; a cluster has several rows then, where not all clusters run at once.
    """

    warps: int
    values: int
    cluster: int
    copies: int
    visible: str = "i64"
    alone: int = 0

    @property
    def threads(self) -> int:
        return self.warps * WARP

    @property
    def capacity(self) -> int:
        """Scores of a row."""
        return self.cluster * self.threads * self.values

    @property
    def few(self) -> int:
        """Scores of a lane that a CTA holds of the shortest rows: with all places for long ones it would be slower."""
        return next(v for v in _VALUES if v == self.values or v * self.threads >= min(self.alone, _SHORT))

    def single(self, values: int) -> IndexTopkConfig:
        """The choices of a CTA that has a row for itself."""
        return replace(self, values=values, cluster=1, alone=0)

    @property
    def step(self) -> int:
        """Scores of a lane that are skipped together, where rows are short."""
        return min(self.values, 8)

    @property
    def bins(self) -> int:
        """Of a digit, that a thread sums up."""
        return BINS // self.threads

    @property
    def resident(self) -> int:
        """CTAs that a multiprocessor shall hold at least: while one waits for its scores, another selects."""
        return 2 if self.warps == 16 and self.values <= 32 else 1

    @property
    def shared_bytes(self) -> int:
        return 4 * BINS * (self.copies + (len(SHIFTS) if self.cluster > 1 else 0)) + 8 * self.cluster * self.warps + _MARGIN

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.visible not in _INTEGERS:
            raise ValueError(f"visible must be i32 or i64, got {self.visible!r}")
        if self.warps not in (4, 8, 16):
            raise ValueError(f"warps must be 4, 8 or 16, got {self.warps}")
        if self.values not in _VALUES:
            raise ValueError(f"values must be 4, 8, 16, 32 or 64, got {self.values}")
        if self.cluster not in (1, 2, 4, 8):
            raise ValueError(f"cluster must be 1, 2, 4 or 8, got {self.cluster}")
        if self.copies not in (1, 2, 4, 8) or self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"copies must be 1, 2, 4 or 8, got {self.copies}")
        most = self.threads * self.values if self.cluster > 1 else 0
        if not 0 <= self.alone <= most:
            raise ValueError(f"alone must be 0 to {most} for {self.cluster} CTAs a row, got {self.alone}")

    @classmethod
    def for_shape(cls, rows: int, entries: int, multiprocessors: int, *, visible: str = "i64") -> IndexTopkConfig:
        """Rows enough for all multiprocessors have a CTA each, as long as registers hold a row; fewer or longer rows have
        several, up to eight. Where not all of them run at once, a CTA takes alone what it can hold.
        """
        spread = max(multiprocessors // rows, 1)  # CTAs that a row could have at once
        cluster = next(c for c in (1, 2, 4, 8) if c * 16384 >= entries or c == 8)
        while cluster < 8 and 2 * cluster <= spread and entries > cluster * 4096:
            cluster *= 2
        share = -(-entries // cluster)
        warps = 16 if share > 2048 else 8
        values = next(v for v in _VALUES if v * warps * WARP >= share)
        alone = warps * WARP * values
        if cluster == 1:
            alone = 0
        elif rows * cluster <= multiprocessors:
            alone = min(alone, _SHORT)
        return cls(warps, values, cluster, 2, visible, alone)
