"""Compile-time choices of the index scores, and which to take for a shape. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

WARP, WARPGROUP = 32, 128
DIM = 128  # of an index key
TILE = 64  # keys of a product: the fixed side of `wgmma`
MAX_COLUMNS = 256  # heads of all queries of a tile: its free side
SHARED_BYTES = 227 * 1024  # that a CTA may have
HALF_SHARED_BYTES = 113 * 1024  # two CTAs fit on a multiprocessor
RECORDS = {"plain": (2 * DIM, 0), "fp8": (DIM, 4), "fp4": (DIM // 2, 4)}  # bytes of a record's data and of its scales
_INTEGERS = ("i32", "i64")
_MIN_PAGE = 4  # records whose scales are 16 bytes, the smallest bulk copy
_MARGIN = 2048  # barriers, runs, and alignment of the buffers to 1024 bytes
_MANY_ROWS = 256  # queries from which several share a tile
_MAX_STAGES = 12
_SPAN = {1: 8192, 2: 16384, 4: 32768}  # most keys of a CTA, by queries of a tile; longer ones would end unevenly
_DIVIDED = 1024  # most queries whose entries are divided: a CTA has the numbers of all in shared memory
_START = 256  # keys that could be scored while a CTA starts


@dataclass(frozen=True)
class IndexScoresConfig:
    """record: of the keys. heads: of a query. page_size: records of a page. queries: of a tile. groups: warpgroups that
    multiply, each its own tiles of keys. stages: tiles of keys in shared memory, as many of each group. visible, sequence:
    integer types of num_visible and seq_idx. divided: what single queries see is divided among CTAs that run at once; otherwise
    a CTA has a span of what they may see.
    """

    record: str
    heads: int
    page_size: int
    queries: int
    groups: int
    stages: int
    visible: str = "i64"
    sequence: str = "i64"
    divided: bool = False

    @property
    def padded(self) -> int:
        """Columns of a query."""
        return -(-self.heads // 8) * 8

    @property
    def columns(self) -> int:
        """Of a product: the heads of all queries of a tile."""
        return self.queries * self.padded

    @property
    def threads(self) -> int:
        """Of a CTA: those that multiply, and the warp that loads (with three idle ones where it hands registers over)."""
        return self.groups * WARPGROUP + (WARPGROUP if self.hands_over else WARP)

    @property
    def hands_over(self) -> bool:
        """Whether threads that multiply need registers of those that load: their sums alone are half of a fair share."""
        return self.columns >= 192

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that loads and of one that multiplies, where they are handed over. Who divides needs more to load."""
        return (40, 232) if self.divided else (24, 240)

    @property
    def data_bytes(self) -> int:
        return RECORDS[self.record][0]

    @property
    def scale_bytes(self) -> int:
        return RECORDS[self.record][1]

    @property
    def stage_bytes(self) -> int:
        return TILE * (self.data_bytes + self.scale_bytes)

    @property
    def unit(self) -> int:
        """Neighbouring records of a page that one copy takes."""
        return gcd(self.page_size, TILE)

    @property
    def shared_bytes(self) -> int:
        return self.columns * (2 * DIM + 4) + self.stages * self.stage_bytes + 8 * self.known + _MARGIN

    @property
    def known(self) -> int:
        """Queries of which a CTA knows what they see, and of which sequence they are."""
        return _DIVIDED if self.divided else self.queries

    @property
    def resident(self) -> int:
        """CTAs of a multiprocessor at a time."""
        return 2 if self.shared_bytes <= HALF_SHARED_BYTES and not self.hands_over else 1

    def ctas(self, queries: int, entries: int, multiprocessors: int) -> int:
        """That divide what is seen: those that run at once, but no more than have a tile for each warpgroup."""
        return min(self.resident * multiprocessors, queries * -(-entries // (self.groups * TILE)))

    def span(self, queries: int, entries: int, multiprocessors: int) -> int:
        """Keys of a CTA, where nothing is divided: of those that finish soonest, all CTAs together, the fewest CTAs."""
        tiles, step = -(-queries // self.queries), self.groups * TILE
        places = self.resident * multiprocessors
        most = min(-(-entries // step), max(-(-places // tiles), 1) * 8)
        least = -(-entries // _SPAN[self.queries])
        spans = [-(-entries // (parts * step)) * step for parts in range(min(least, most), most + 1)]
        return min(spans, key=lambda span: -(-tiles * -(-entries // span) // places) * (span + _START))

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.record not in RECORDS:
            raise ValueError(f"record must be one of {', '.join(RECORDS)}, got {self.record!r}")
        if self.visible not in _INTEGERS or self.sequence not in _INTEGERS:
            raise ValueError(f"visible and sequence must be i32 or i64, got {self.visible!r} and {self.sequence!r}")
        if self.heads < 1 or self.queries not in (1, 2, 4) or self.columns > MAX_COLUMNS:
            raise ValueError(
                f"heads and queries must be positive, 1, 2 or 4 queries, with {MAX_COLUMNS} columns at most, got "
                f"{self.heads} and {self.queries}"
            )
        if self.divided and self.queries > 1:
            raise ValueError(f"divided must go with one query a tile, got {self.queries}")
        if self.page_size < _MIN_PAGE or self.page_size % _MIN_PAGE:
            raise ValueError(f"page_size must be a positive multiple of {_MIN_PAGE}, got {self.page_size}")
        if not 1 <= self.groups <= 3:
            raise ValueError(f"groups must be 1 to 3, got {self.groups}")
        if self.stages < 1 or self.stages % self.groups or self.shared_bytes > SHARED_BYTES:
            raise ValueError(
                f"stages must be a multiple of groups and fit {SHARED_BYTES} bytes, got {self.stages}: "
                f"{self.shared_bytes} bytes"
            )

    @classmethod
    def for_shape(
        cls,
        queries: int,
        entries: int,
        sequences: int,
        multiprocessors: int,
        heads: int,
        record: str,
        page_size: int,
        *,
        visible: str = "i64",
        sequence: str = "i64",
    ) -> IndexScoresConfig:
        """Few queries, in all or for each of the sequences that there may be: one a tile, since its neighbours may see other
        keys, and two CTAs a multiprocessor, one of which multiplies while the other starts. They divide what is seen where not
        each can have the least that there is. Many: as many as a product takes, so that keys are read and decoded less often.
        """
        padded = -(-heads // 8) * 8
        many = queries > max(_MANY_ROWS, 2 * sequences)
        together = next((n for n in (4, 2) if n * padded <= MAX_COLUMNS), 1) if many else 1
        config = cls(record, heads, page_size, together, 2, 2, visible, sequence)
        least = queries * -(-entries // (config.groups * TILE))  # CTAs
        if together == 1 and queries <= _DIVIDED and least > config.resident * multiprocessors:
            config = replace(config, divided=True)
        limit = SHARED_BYTES if together * padded >= 192 else HALF_SHARED_BYTES
        more = (limit - config.shared_bytes) // config.stage_bytes
        return replace(config, stages=min(2 + max(more, 0) // config.groups * config.groups, _MAX_STAGES))
