"""Compile-time choices of the attention kernel, and how a call is divided among multiprocessors. Imports no CuTeDSL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsv4lab.kernels.cache.unpack.config import GROUP, MAX_SEQS, rows_in_line
from dsv4lab.records import KV_RECORDS, kv_record

STEP = 16  # tokens that `resident` takes in at once: keys of a `wgmma` along them
DIM, ROPE_DIM = 512, 64  # of a head, and of its rotated part: what the tiles are made for
ROWS = 64  # query heads of a tile: rows of one `wgmma`
KEYS = 64  # of a block
TILE = 64  # dims of a column tile: a row of the 128-byte swizzle in BF16
TILES = DIM // TILE
HALVES = 2  # of the dims: one a multiplying warpgroup, and the unit in which a stage is filled and freed
STAGES = 2  # blocks of keys in shared memory, one a multiplying warpgroup
ZERO_ROWS = -GROUP  # of keys in line: a group that begins there lies before all rows, and TMA writes zeros for it
WARPGROUP = 128
CLUSTER = 12  # CTAs at most: more than 8, which an H200 allows, and as many as there is room for what they send
GATHER_WARPS = 8  # two on each scheduler: one would not issue fast enough
THREADS = 4 * WARPGROUP  # two warpgroups multiply, two gather
KINDS = ("window", "visible", "chosen")
SHARES = ("", "tiles", "queries")
# What `divide` weighs, in microseconds: a block of packed keys; an item's start and end, the launch included; each other part
# that meets in a cluster; leaving a part in float32 and its share of the kernel that combines; that kernel's launch. For an
# H200: a sequence with 64 heads and 640 keys takes 35.1 us in one part, 21.3, 18.4, 15.7, 13.8 and 12.3 in clusters of 2, 3, 4,
# 5 and 10; what a second kernel costs is counted, and agrees for 8 to 64 sequences.
_BLOCK_US, _ITEM_US, _MERGE_US, _PART_US, _COMBINE_US = 2.75, 7.7, 0.15, 1.1, 2.5
_PART_READ_US = ROWS * DIM * 4 / 4.0e6  # of 64 heads at 4 TB/s
# What `unpacks` weighs, for an H200: a block of packed keys takes 3.2 (FP8) or 2.9 us (NVFP4), in pairs 2.4 (FP8), one of plain
# keys 2.0: measured. A kernel that unpacks takes its launch, a look at all positions, latencies, and bytes at 80 % of a copy's
# rate: estimates.
_DECODE_US, _PAIR_DECODE_US, _UNPACK_US, _UNPACK_BYTES = 1.0, 0.4, 6.0, 3.4e6  # the last one a microsecond
_RESIDENT_PLAIN = 8  # units of a multiprocessor from which on plain keys are worth being put in line: 64 us, gathered 65 (H200)
_LINE_ROWS = 1 << 20  # of keys in line at most, if all of every ring is seen: a GiB
_SHARED_BYTES = 227 * 1024 - 2048  # of a CTA, without barriers and what comes before a multiple of 1024
_SEEN = 0.5  # of a pool's entries: it is made for other sequences, too, and for longer ones


@dataclass(frozen=True)
class AttentionConfig:
    """record: of the keys, "plain" (BF16), "fp8" or "nvfp4". kind: entries attended besides the window, none ("window"), every
    "visible" one, or those "chosen" by index. window: tokens. window_page, entry_page: records of a page. pair: CTAs are
    clusters of two, which have two tiles of a query's heads and decode half of its keys each. merge: a query's parts are a
    cluster, which puts them together. share: CTAs are clusters of two, which have two "tiles" of a query's heads or two
    neighbouring "queries", and copy half of the keys of either each, from where they are in line; "": they are not.
    """

    record: str
    kind: str
    window: int = 128
    window_page: int = 64
    entry_page: int = 1
    pair: bool = False
    merge: bool = False
    share: str = ""

    @property
    def ctas(self) -> int:
        """That have the same keys, each for its tile of heads or its query."""
        return 2 if self.pair or self.share else 1

    @property
    def mask_bytes(self) -> int:
        """Of a stage: which keys there are, a bit a key; in pairs a word of every warp that decodes, with a byte a key."""
        return 4 * GATHER_WARPS * self.ctas if self.pair else KEYS // 8

    @property
    def data_bytes(self) -> int:
        """Of a record's first part in a page."""
        return 2 * DIM if self.record == "plain" else kv_record(DIM, ROPE_DIM, self.record).data_bytes

    @property
    def scale_bytes(self) -> int:
        """Of a record's second part."""
        return 0 if self.record == "plain" else kv_record(DIM, ROPE_DIM, self.record).scale_bytes

    def page_bytes(self, page_size: int) -> int:
        """Of a page in its pool."""
        return 2 * DIM * page_size if self.record == "plain" else kv_record(DIM, ROPE_DIM, self.record).page_bytes(page_size)

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.record not in KV_RECORDS:
            raise ValueError(f"record must be one of {', '.join(KV_RECORDS)}, got {self.record!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name, value in (("window", self.window), ("window_page", self.window_page), ("entry_page", self.entry_page)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.share not in SHARES:
            raise ValueError(f"share must be one of {', '.join(map(repr, SHARES))}, got {self.share!r}")
        if self.share and (self.record != "plain" or self.kind == "chosen" or self.pair or self.merge):
            raise ValueError(f"share must be '' but for plain records in line, attended by one CTA, got {self}")
        if self.pair and self.record == "plain":
            raise ValueError("pair must be false for plain records, which are not decoded, got True")


@dataclass(frozen=True)
class ResidentConfig:
    """The kernel that keeps all keys of neighbouring queries in shared memory. window: tokens; entries: places for them, a
    multiple of `STEP`, 0 where none are attended.
    """

    window: int = 128
    entries: int = 0

    @property
    def reach(self) -> int:
        """Blocks of tokens that a query sees besides its own, at most."""
        return -(-(self.window - 1) // STEP)

    @property
    def ring(self) -> int:
        """Blocks of tokens that are held."""
        return self.reach + 1

    @property
    def rows(self) -> int:
        """Keys that are held, and multiplied."""
        return self.ring * STEP + self.entries

    @property
    def query_stages(self) -> int:
        """Slices of queries, 64 heads x 64 dims, that have a place: a power of two, 0 where there is none for two."""
        free = (_SHARED_BYTES - self.rows * DIM * 2) // (ROWS * TILE * 2)
        return next((n for n in (8, 4, 2) if n <= free), 0)

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.entries < 0 or self.entries % STEP:
            raise ValueError(f"entries must be a multiple of {STEP}, got {self.entries}")
        if not self.query_stages:
            raise ValueError(f"keys must have a place in shared memory, got {self.rows} rows for {self}")


@dataclass(frozen=True)
class CombineConfig:
    """The kernel that combines parts has no choices."""


@dataclass(frozen=True)
class Division:
    """How a call's work is cut: queries x head_tiles x parts items, each for one CTA at a time; ctas of them at once.

    merge: a query's parts meet in a cluster.
    """

    queries: int
    head_tiles: int
    parts: int
    ctas: int
    merge: bool

    @property
    def items(self) -> int:
        return self.queries * self.head_tiles * self.parts


def block_range(total: int, parts: int, part: int) -> tuple[int, int]:
    """The key blocks [first, end) that a part has of `total`, as the kernel divides them: see `work` for of how many."""
    return part * total // parts, (part + 1) * total // parts


def capacity(kind: str, window: int, entries: int) -> int:
    """Most keys a query may attend to, whatever its position: entries are the k chosen or what the block table holds."""
    return window + (0 if kind == "window" else entries)


def divide(
    queries: int,
    heads: int,
    keys: int,
    multiprocessors: int,
    *,
    paired: bool = False,
    clusters: Callable[[int], int] | None = None,
) -> Division:
    """The number of parts that ends first, of those that fit: known from sizes alone, never from positions.

    keys: `capacity`. paired: two tiles of heads are a pair of CTAs'. clusters: how many of so many CTAs run at once, by default
    as many as there are multiprocessors for; asked as little as possible. A CTA works through one item after another; all take
    as long as ceil(blocks / parts) and a start. More parts than one pay where multiprocessors would be idle. They meet in a
    cluster, if all clusters run at once, or in a second kernel, which costs more.
    """
    head_tiles, ctas = -(-heads // ROWS), 2 if paired else 1
    blocks = -(-keys // KEYS)
    items = queries * head_tiles

    def ideal(size: int) -> int:
        return multiprocessors // size

    def cost(parts: int, merge: bool, clusters: Callable[[int], int]) -> float:
        each = -(-blocks // parts) * _BLOCK_US + _ITEM_US
        if merge:
            at_once = clusters(parts * ctas)
            return -(-items // (ctas * at_once)) * (each + _MERGE_US * (parts - 1)) if at_once else float("inf")
        waves = -(-items * parts // multiprocessors)
        if parts == 1:
            return waves * each
        return waves * (each + _PART_US) + _COMBINE_US + items * parts * _PART_READ_US

    most = max(min(blocks, 2 * multiprocessors // max(items, 1)), 1)
    ways = [(n, False) for n in range(1, most + 1)] + [(n, True) for n in range(2, most + 1) if merges(n, ctas)]
    hoped = sorted((cost(*way, ideal), way) for way in ways)
    best, chosen = float("inf"), (1, False)
    for hope, way in hoped:
        if hope >= best:
            break
        found = cost(*way, clusters or ideal)
        if found < best:
            best, chosen = found, way
    parts, merge = chosen
    return Division(queries, head_tiles, parts, min(items * parts, multiprocessors), merge)


def pairs(heads: int, record: str, multiprocessors: int) -> bool:
    """Whether CTAs work in pairs: where keys are decoded, and every tile of heads has another that needs the same ones."""
    return record != "plain" and -(-heads // ROWS) % 2 == 0 and multiprocessors > 1


def merges(parts: int, ctas: int) -> bool:
    """Whether the CTAs of a query's parts may put them together themselves: several, that a cluster holds. ctas: of a part."""
    return 1 < parts <= CLUSTER // ctas


def unpacks(division: Division, record: str, keys: int, *, rings: int, window: int, tokens: int, entries: int) -> bool:
    """Whether keys are decoded to BF16 once, by a kernel before attention's, instead of for every query that picks them.

    keys: `capacity`. rings: sequences that the window pool has places for; tokens: its slots; entries: most that the call can
    reach, 0 where none are read. All are sizes, known to the host: what queries do see is not, and does not count.

    Decoding in attention costs every block of every item about a microsecond that nothing overlaps, in `pairs` less; unpacking
    costs a launch, and a record's packed and BF16 bytes once. 4,096 queries of a sequence, 640 keys each, see 6,272 records:
    9 us against 320. 128 sequences of 16,384 tokens that decode have 540,000 records, 130 us at half of them, against 10 us:
    there a record is for one query. Half of the entries are taken as seen, since pools are made for other sequences, too: to be
    wrong costs a few records, where many queries that decode for themselves cost 60 % of a call. What a query attends to is
    taken from the same entries, divided among all sequences, since a block table's width may be a whole pool's.
    """
    if record == "plain" or not 0 < rings <= MAX_SEQS:
        return False
    seqs, seen = min(rings, division.queries), _SEEN * entries
    blocks = -(-min(keys, window + entries // seqs) // KEYS)
    each = _DECODE_US if division.head_tiles % 2 else _PAIR_DECODE_US
    saved = -(-division.items // division.ctas) * -(-blocks // division.parts) * each
    records = min(tokens, division.queries + (window - 1) * seqs) + seen
    layout = kv_record(DIM, ROPE_DIM, record)
    return saved > _UNPACK_US + records * (layout.data_bytes + layout.scale_bytes + 2 * DIM) / _UNPACK_BYTES


def resident_config(kind: str, window: int, entries: int) -> ResidentConfig | None:
    """Of the kernel that keeps all keys in shared memory, if they have a place there. entries: most of a sequence."""
    config = ResidentConfig(window, 0 if kind == "window" else -(-entries // STEP) * STEP)
    return config if kind != "chosen" and config.query_stages else None


def resides(division: Division, record: str, *, multiprocessors: int, rings: int, ring_len: int, entries: int) -> bool:
    """Whether a call whose keys have a place in shared memory has them there: many queries in few sequences. entries: most of
    a sequence.

    A CTA reads up to 208 KB before its first query of a sequence, which 16 of them and more are worth; keys go in line first,
    which plain ones need for nothing else.
    """
    seqs, units = min(rings, division.queries), division.queries * division.head_tiles
    fewest = (_RESIDENT_PLAIN if record == "plain" else 1) * multiprocessors
    if not 0 < rings <= MAX_SEQS or division.queries < STEP * seqs or units < fewest:
        return False
    return rows_in_line(division.queries, rings, ring_len=ring_len, entries=entries) <= _LINE_ROWS


def shares(division: Division, kind: str, *, rings: int, ring_len: int, entries: int) -> bool:
    """Whether keys that are `unpacks`' go in line, for two CTAs that have theirs together: of two tiles of heads, or of two
    queries. entries: most of a sequence.

    Not where entries are chosen, since other queries choose others, nor where a query's keys have several parts. Plain records
    would have to be copied first, which takes longer than it saves.
    """
    if kind == "chosen" or division.parts > 1 or division.items < 2:
        return False
    return rows_in_line(division.queries, rings, ring_len=ring_len, entries=entries) <= _LINE_ROWS
