"""Compile-time choices of the linear with stored weights, and which to take for a shape. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4lab.arguments import PEAK_IDS
from dsv4lab.kernels.gemm.mixed.layout import PLANES, SLAB, TILE, record_words

SHARED_BYTES = 227 * 1024  # that a CTA may have
HALF_SHARED_BYTES = 113 * 1024  # two CTAs fit on a multiprocessor
PITCH_PAD = 4  # floats between the epilogue's rows, so that stores hit every bank once
ROW_PAD = 16  # bytes between tokens in shared memory where warps read them, for the same reason
FEW = 16  # tokens up to which warps multiply on their own
_TWO_CTAS = 64  # tokens of a tile up to which the registers of a multiprocessor are enough for two CTAs
PART = PEAK_IDS  # rows whose largest result is one number: the lanes of a warp have four each
_MARGIN = 2048  # barriers, and alignment of the buffers to 1024 bytes
_MULTIPROCESSORS = 132  # of an H100 SXM or H200
_ENOUGH = 100  # CTAs that keep the memory busy, with a ring full of weights in flight each
_FOR_TWO = 180  # CTAs of half the memory that do
_CLUSTERS = {1: _MULTIPROCESSORS, 2: 66, 4: 30}  # of so many CTAs that an H100 SXM or H200 runs at once, one a multiprocessor
# Microseconds of a tile, by (tokens, slabs), for 64 columns of K; what a narrow product saves of it; for its end, and more for
# each result of a token and 128 rows. The same two of a cluster's sums. Fitted to 2,650 times of 24 to 2,048 tokens on an H200.
_STEP_US = {
    (32, 4): 0.113,
    (32, 8): 0.204,
    (64, 4): 0.146,
    (64, 8): 0.226,
    (128, 4): 0.209,
    (128, 8): 0.321,
    (192, 8): 0.464,
    (256, 8): 0.596,
}
_NARROWER, _END_US = 0.57, (0.1, 0.009)
_CLUSTER_US = {1: (0.0, 0.0), 2: (1.14, 0.014), 4: (0.91, 0.0165)}
_NARROW = {128: (64,), 192: (64, 128), 256: (128, 192)}  # narrower products of a linear, for its last tile of tokens
BLOCK = 16  # columns of a quantised result that share a scale
_SMALL_BYTES = 6 << 20  # a weight that arrives in less time than a launch takes


@dataclass(frozen=True)
class MixedConfig:
    """format: of the weight. out: "bf16", "f32", "argmax" (of each token and part of the rows, the largest result and its row,
    as `_common.order.pack` has them), "sample" (the same of results / T + noise), or "peaks" (f32, and argmax's beside them).
    tokens: of an output tile; narrow: of the products that do for a tile with fewer (with four widths, ptxas waits for every
    `wgmma`). slabs: of a tile, 16 rows each.
    chunks: tiles of 64 along K in a stage. stages: of the ring. splits: warps that share a slab's K, and per_warp: slabs
    of a warp, where warps multiply on their own. cluster: CTAs that share a tile's K.
    grouped: tiles come from a list, each with a matrix and rows of its own. single: the list is one of matrices, a row each.
    beside: of one token's rows, one more matrix, first to be multiplied, has one more row of the result, the last.
    slotted: rows of a grouped product are slots (token * top_k + choice), looked up; the result takes the slot's weight.
    gather: x has a row for each token, not for each slot. paired: clamped SwiGLU of gate and up rows. scaled: whether products
    have a factor, one a "row", a "matrix" or, of slots, a "token". early: weights do not wait for the kernel before.
    requant: where warps multiply, whether the results of a pair leave as the NVFP4 values that they are quantised to.
    two: two matrices lie one behind the other, each with a result of its own.
    """

    format: str
    out: str
    tokens: int
    slabs: int
    chunks: int
    stages: int
    narrow: tuple[int, ...] = ()
    splits: int = 1
    per_warp: int = 1
    cluster: int = 1
    grouped: bool = False
    single: bool = False
    beside: bool = False
    slotted: bool = False
    gather: bool = False
    paired: bool = False
    scaled: str = "no"
    early: bool = True
    requant: bool = False
    two: bool = False

    @property
    def rows(self) -> int:
        """Weight rows of an output tile."""
        return self.slabs * SLAB

    @property
    def rows_out(self) -> int:
        """Columns of the result in an output tile."""
        return self.rows // 2 if self.paired else self.rows

    @property
    def by_warp(self) -> bool:
        """Whether warps multiply on their own, by `mma.sync`: for few tokens it does more per cycle than `wgmma`."""
        return self.tokens <= FEW

    @property
    def resident(self) -> int:
        """CTAs of a multiprocessor at a time."""
        return 2 if self.tokens <= _TWO_CTAS and self.shared_bytes <= HALF_SHARED_BYTES else 1

    @property
    def warps(self) -> int:
        """That multiply."""
        return self.slabs // self.per_warp * self.splits

    @property
    def threads(self) -> int:
        """Of a CTA: those that multiply, and two warps that load, in a warpgroup where registers are handed over."""
        return self.warps * 32 + (64 if self.by_warp else 128)

    @property
    def slice(self) -> int:
        """Tokens that go through the epilogue's buffer at a time."""
        return min(self.tokens, 64)

    @property
    def box(self) -> int:
        """Tokens of one TMA load."""
        return min(self.tokens, 64)

    @property
    def paced(self) -> bool:
        """Whether a CTA's first stages are asked for one after the other: large ones of few tokens. Where stages are small,
        what it takes to know the time costs more.
        """
        return self.by_warp and self.chunks >= 4

    @property
    def apart(self) -> bool:
        """Whether tiles of weight rows begin in different places of K: where CTAs have the same few tokens, so that not all
        read the same lines of these at a time. Float32 results keep one order of sums: equal rows of a head have equal logits,
        wherever they are.
        """
        return self.out == "bf16" and self.tokens <= 64

    @property
    def alternates(self) -> bool:
        """Whether stages of one tile take turns with the buffers of decoded weights, so that a CTA must have an even number."""
        return not self.by_warp and self.chunks % 2 == 1

    @property
    def record_bytes(self) -> int:
        return record_words(self.format) * 4

    @property
    def weight_bytes(self) -> int:
        """Of a stage."""
        return self.chunks * self.slabs * self.record_bytes

    @property
    def token_pitch(self) -> int:
        """Bytes between two tokens of a stage where warps read them."""
        return self.chunks * TILE * 2 + ROW_PAD

    @property
    def room(self) -> int:
        """Tokens that a stage has memory for: those of a tile."""
        return 1 if self.single else self.tokens

    @property
    def token_bytes(self) -> int:
        """Of a stage."""
        return self.room * (self.token_pitch if self.by_warp else self.chunks * TILE * 2)

    @property
    def sums(self) -> int:
        """Partial sums that a thread holds of a tile."""
        return self.tokens // 2 * self.per_warp

    @property
    def direct(self) -> bool:
        """Whether results leave from registers, without float32 sums in shared memory."""
        return self.out == "bf16" and not self.by_warp and self.cluster == 1

    @property
    def direct_pitch(self) -> int:
        """Bytes between tokens of a direct epilogue's buffer: a warpgroup's columns, and room that spreads banks."""
        return 4 * self.rows_out // self.slabs * 2 + ROW_PAD

    @property
    def picks(self) -> bool:
        """Whether the largest results leave, for peaks beside all."""
        return self.out in ("argmax", "sample", "peaks")

    @property
    def part_rows(self) -> int:
        """Rows whose largest result leaves as one number: a tile's, or as many as the lanes of a warp have, four each."""
        return min(self.rows, PART)

    @property
    def sends(self) -> bool:
        """Whether a cluster's CTAs send each other sums, which are few."""
        return self.cluster > 1 and self.by_warp

    @property
    def kept(self) -> int:
        """Tokens of a slice whose sums are in a CTA's memory."""
        return self.slice // (self.cluster if self.sends else 1)

    @property
    def sum_floats(self) -> int:
        """Of the epilogue's buffer."""
        if self.direct:
            return self.slabs // 4 * 2 * self.slice * self.direct_pitch // 4
        return self.splits * self.slice * (self.rows + PITCH_PAD)

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.weight_bytes + self.token_bytes) + 4 * self.sum_floats + _MARGIN

    @property
    def widths(self) -> tuple[int, ...]:
        """Tokens of a product, ascending: a tile takes the narrowest that holds its tokens."""
        return *self.narrow, self.tokens

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.format not in PLANES:
            raise ValueError(f"format must be one of {', '.join(PLANES)}, got {self.format!r}")
        if self.out not in ("bf16", "f32", "argmax", "sample", "peaks"):
            raise ValueError(f"out must be bf16, f32, argmax, sample or peaks, got {self.out!r}")
        if self.out == "peaks" and self.rows % PART:
            raise ValueError(f"slabs must be a multiple of {PART // SLAB} for peaks, got {self.slabs}")
        if self.picks and (self.paired or self.grouped or self.scaled != "no"):
            got = f"paired={self.paired}, grouped={self.grouped}, scaled={self.scaled!r}"
            raise ValueError(f"{self.out} needs one matrix's products as they are, got {got}")
        if self.out == "sample" and not self.by_warp:
            raise ValueError(f"tokens must be at most {FEW} for sample, whose keys need registers, got {self.tokens}")
        if self.tokens not in (8, 16, 32, 64, 128, 192, 256):
            raise ValueError(f"tokens must be 8, 16, 32, 64, 128, 192 or 256, got {self.tokens}")
        if list(self.widths) != sorted(set(self.widths)) or len(self.narrow) > 2 or any(w % 32 or not w for w in self.narrow):
            raise ValueError(f"narrow must be two multiples of 32 at most, ascending and below tokens, got {self.narrow}")
        if self.slabs not in (1, 2, 4, 8, 16) or (not self.by_warp and self.slabs not in (4, 8)):
            raise ValueError(f"slabs must be 1, 2, 4, 8 or 16, and 4 or 8 for more than {FEW} tokens, got {self.slabs}")
        if self.chunks not in (1, 2, 4, 8) or self.chunks % self.splits:
            raise ValueError(f"chunks must be 1, 2, 4 or 8 and a multiple of splits, got {self.chunks}")
        if self.splits > 1 and not self.by_warp:
            raise ValueError(f"splits must be 1 for more than {FEW} tokens, got {self.splits}")
        if self.per_warp not in (1, 2) or self.slabs % self.per_warp or (self.per_warp > 1 and not self.by_warp):
            raise ValueError(f"per_warp must be 1, or 2 for even slabs and at most {FEW} tokens, got {self.per_warp}")
        if not 1 <= self.warps <= 16:
            raise ValueError(f"slabs / per_warp * splits must be at most 16, got {self.warps}")
        if self.cluster not in (1, 2, 4, 8):
            raise ValueError(f"cluster must be 1, 2, 4 or 8, got {self.cluster}")
        if self.slotted and not self.grouped:
            raise ValueError("slotted needs a grouped configuration, got one that is not")
        if self.gather and not (self.slotted and self.by_warp):
            raise ValueError(f"gather needs slots and at most {FEW} tokens, got {self.tokens} and slotted={self.slotted}")
        if self.scaled not in ("no", "row", "matrix", "token") or (self.scaled == "token" and not self.slotted):
            raise ValueError(f"scaled must be no, row or matrix, or token of slots, got {self.scaled!r}")
        if self.single and not (self.grouped and self.by_warp):
            raise ValueError(f"single needs a grouped configuration of at most {FEW} tokens, got {self.tokens}")
        if self.beside and not (self.single and self.scaled != "matrix" and not self.requant):
            raise ValueError(
                "beside needs a single configuration whose results stay as they are, of factors a row or token, "
                f"got single={self.single}, requant={self.requant} and scaled={self.scaled!r}"
            )
        if self.two and (self.picks or self.paired or self.grouped):
            raise ValueError(f"two needs plain products, got out={self.out!r}, paired={self.paired} and grouped={self.grouped}")
        if self.grouped and self.cluster > 1:
            raise ValueError(f"cluster must be 1 for a grouped configuration, got {self.cluster}")
        self._check_requant()
        if self.stages < 2 or self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"stages must be >= 2 and fit {SHARED_BYTES} bytes, got {self.stages}: {self.shared_bytes} bytes")

    def _check_requant(self) -> None:
        if not self.requant:
            return
        if not self.paired or self.out != "bf16" or not self.by_warp:
            got = f"paired={self.paired}, out={self.out!r} and tokens={self.tokens}"
            raise ValueError(f"requant needs a pair's results in bf16 and at most {FEW} tokens, got {got}")
        # a block's lanes are in one warp, and of one CTA
        if self.rows_out % BLOCK or self.slice * self.rows_out // self.cluster % BLOCK:
            raise ValueError(f"slabs must be so many that {BLOCK} columns meet, got {self.slabs}")


def with_stages(config: MixedConfig, limit: int) -> MixedConfig:
    """As many stages as fit, at least two and at most eight."""
    two = replace(config, stages=2)
    more = max(limit - two.shared_bytes, 0) // (two.weight_bytes + two.token_bytes)
    return replace(two, stages=min(2 + more, 8))


def chunks_for(k: int, most: int) -> int:
    """Tiles of a stage: as many as divide K and are allowed. k: padded."""
    return next(c for c in (8, 4, 2, 1) if c <= most and k // TILE % c == 0)


def _fed(config: MixedConfig, limit: int) -> MixedConfig:
    """As many stages as fit. Of 128 and 192 tokens two are too few, so shorter ones (H200: FP8, BF16 15 to 33 % less)."""
    found = with_stages(config, limit)
    if found.stages < 3 and config.tokens >= 128 and config.chunks == 2:
        return with_stages(replace(config, chunks=1), limit)
    return found


def _chunks(tokens: int) -> int:
    """Tiles along K of a stage, by warpgroups: two where three stages fit (128 tokens: a quarter less time than one)."""
    return 1 if tokens > 192 else 2


def choose(
    fmt: str, out: str, m: int, n: int, k: int, *, paired: bool = False, scaled: str = "no", groups: int = 1
) -> MixedConfig:
    """The configuration for y (m, n) = x (m, k) W^T, after the measurements in `benchmarks/`.

    n: rows of the weight, both of a pair counted, of each of the groups; k: padded to whole pairs of tiles.
    """
    if m <= FEW:
        return _few(fmt, out, m, n, k, paired, scaled, groups)

    def plan(tokens: int, slabs: int, cluster: int) -> MixedConfig:
        chunks = chunks_for(k, _chunks(tokens))
        narrow = _NARROW.get(tokens, ())
        shape = MixedConfig(fmt, out, tokens, slabs, chunks, 2, narrow, cluster=cluster, paired=paired, scaled=scaled)
        return _fed(shape, HALF_SHARED_BYTES if (tokens, slabs) == (32, 8) else SHARED_BYTES)

    def fits(tokens: int, slabs: int, cluster: int) -> bool:
        if (groups > 1 and n % (slabs * SLAB)) or (out == "peaks" and slabs * SLAB != PART):
            return False
        steps = k // TILE // chunks_for(k, _chunks(tokens))
        return cluster == 1 or (steps >= 4 * cluster and k // TILE % (2 * cluster) == 0)

    def sensible(tokens: int, slabs: int, cluster: int) -> bool:
        """Boxes of tokens that are mostly past the last cost as much as full ones; few tokens, what the model does not know."""
        if tokens <= 64:
            return (tokens == 32) == (m <= 32) and (tokens == 64 or (slabs == 4) == (cluster > 1))
        return m > tokens - 64 and (slabs == 8 or m >= tokens)

    shapes = [(t, s, c) for t, s in _STEP_US for c in _CLUSTERS if fits(t, s, c)]
    shapes = [shape for shape in shapes if sensible(*shape)] or shapes
    return min((plan(*shape) for shape in shapes), key=lambda config: _time(config, m, n, k, groups))


def _time(config: MixedConfig, m: int, n: int, k: int, groups: int) -> float:
    """Microseconds until the last CTA is done. Tiles are dealt in turn; those of the last tokens, maybe narrower, last."""
    rows = -(-n // config.rows) * groups
    ends = [a + b for a, b in zip(_END_US, _CLUSTER_US[config.cluster], strict=True)]

    def tile(width: int) -> float:
        step = _STEP_US[config.tokens, config.slabs] * (1 - _NARROWER * (1 - width / config.tokens))
        return -(-k // TILE // config.cluster) * step + ends[0] + ends[1] * width * config.slabs / 8

    whole, rest = divmod(m, config.tokens)
    narrow = next(w for w in config.widths if rest <= w)
    full, tiles = whole * rows, (whole + (rest > 0)) * rows
    places = _CLUSTERS[config.cluster] * config.resident
    shared = min(max(tiles * config.cluster / _MULTIPROCESSORS, 1.0), config.resident)  # CTAs of a multiprocessor

    def share(first: int) -> float:
        """Of the CTA whose first tile has this number."""
        wide, count = (-(-max(of - first, 0) // places) for of in (full, tiles))
        return wide * tile(config.tokens) + (count - wide) * tile(narrow)

    return shared * max(share(0), share(full % places))  # the first, and the first that has one whole tile less


def _few(fmt: str, out: str, m: int, n: int, k: int, paired: bool, scaled: str, groups: int) -> MixedConfig:
    """Weights at memory speed: eight warps a CTA, and CTAs for all multiprocessors. NVFP4 first as measured (`_one_wave`).

    Two CTAs share a multiprocessor where there are tiles enough for both (on an H200 a tenth faster than one with twice the
    ring), or next to none: the next kernel's start then overlaps with this one's end. Otherwise two could come to lie on one
    multiprocessor and leave another idle (measured: a third slower), so a CTA takes all of the memory. From 5 tokens on, tokens
    cost as much of the L2 cache's bandwidth as weights, so tiles rather have 64 rows, and CTAs share K where those are few.
    """
    tokens = 8 if m <= 8 else 16
    found = _one_wave(out, m, n, k, paired, scaled, groups) if fmt == "nvfp4" and out != "peaks" else None
    if found is not None:
        return found
    fits = [PART // SLAB] if out == "peaks" else [s for s in (8, 4, 2, 1) if groups == 1 or n % (s * SLAB) == 0]
    most = 4 if n > 3 * SLAB else -(-n // SLAB)  # slabs that a small matrix has

    def tiles(slabs: int) -> int:
        return -(-n // (slabs * SLAB)) * groups

    thrifty = m > 4
    wanted = [s for s in fits if s >= (4 if thrifty else 2) and tiles(s) >= _FOR_TWO]
    wanted += [s for s in fits if s >= 4 and tiles(s) >= _ENOUGH and thrifty]
    wanted += [s for s in fits if s >= 2 and tiles(s) >= _ENOUGH and tokens == 8]
    slabs = next(iter(wanted), next((s for s in fits if s <= most), fits[0]))
    cluster = _cluster(tiles(slabs), k // (8 * TILE), 8 if tiles(slabs) < _ENOUGH // 2 else 2)
    if thrifty and slabs >= 4 and _ENOUGH // 2 <= tiles(slabs) < _FOR_TWO and k >= 32 * TILE:
        cluster = 2
    small = n * groups * k // SLAB // TILE * record_words(fmt) * 4 < _SMALL_BYTES
    short = small or cluster > 1
    half = short or (tokens == 8 and tiles(slabs) >= _FOR_TWO)
    per_warp = 2 if tokens == 16 and slabs > 1 and not (short and tiles(slabs) >= _ENOUGH) else 1

    def shape(chunks: int, limit: int) -> MixedConfig:
        splits = min(8 * per_warp // slabs, chunks)
        return with_stages(
            MixedConfig(fmt, out, tokens, slabs, chunks, 2, (), splits, per_warp, cluster, paired=paired, scaled=scaled),
            limit,
        )

    # the longest copies that leave three or four stages
    tries = [shape(chunks_for(k, c), HALF_SHARED_BYTES) for c in (8, 4, 2)] if half else []
    tries = [t for t in tries if t.resident == 2 and (t.stages >= (4 if tokens == 8 else 3) or cluster > 1)]
    tries += [t for t in (shape(chunks_for(k, c), SHARED_BYTES) for c in (8, 4, 2)) if t.stages >= 3]
    return next((t for t in tries if t.shared_bytes <= SHARED_BYTES), shape(1, SHARED_BYTES))


def _one_wave(out: str, m: int, n: int, k: int, paired: bool, scaled: str, groups: int) -> MixedConfig | None:
    """For NVFP4, what a sweep of 260 configurations on an H200 found: a CTA a multiprocessor, whose ring has all of its memory,
    with tiles as small as that allows, shared by clusters where they are few. None where there are more tiles.

    Up to 4 tokens, and 8 of some: two CTAs a multiprocessor, where their tiles have two slabs, or four, and fit. Where tokens
    are as many bytes as weights, tiles twice as large, and two CTAs for each. Flash's and Pro's wq_b, short and with many rows:
    stages as short as still hold all of K, or slabs in pairs from 5 tokens on. Flash's wo_a of 3 to 8: 16 warps.
    """
    tokens, steps = 8 if m <= 8 else 16, k // TILE

    def tiles(slabs: int) -> int:
        return -(-n // (slabs * SLAB)) * groups

    def plan(
        slabs: int, cluster: int, per_warp: int, limit: int, most: tuple[int, ...] = (8, 4, 2, 1), warps: int = 8
    ) -> MixedConfig:
        """With the longest stages of which there are enough."""
        how = dict(per_warp=per_warp, cluster=cluster, paired=paired, scaled=scaled)
        tries = [
            with_stages(MixedConfig("nvfp4", out, tokens, slabs, c, 2, splits=min(warps * per_warp // slabs, c), **how), limit)  # type: ignore[arg-type]
            for c in (chunks_for(k, chunks) for chunks in most)
        ]
        least = 3 if limit == SHARED_BYTES else 4
        return next((c for c in tries if c.stages >= least and c.shared_bytes <= limit), tries[-1])

    if groups == 1 and tiles(16) >= _ENOUGH and steps <= 24:
        if m > 4:
            return plan(16, 1, 2, SHARED_BYTES, (4, 2, 1))
        return plan(8, 1, 1, HALF_SHARED_BYTES, (2, 1)) if tiles(16) <= _MULTIPROCESSORS else None
    if 2 < m <= 8 and steps == 64 and _ENOUGH <= tiles(4) <= _MULTIPROCESSORS and n % (4 * SLAB) == 0:
        return plan(4, 1, 1, SHARED_BYTES, warps=16)
    sizes = [s for s in (2, 4, 8, 16) if groups == 1 or n % (s * SLAB) == 0]
    largest = 4 if m <= 4 else 2 if m <= 8 and 64 <= steps < 128 else 0
    pairs = [s for s in sizes if s <= largest and _MULTIPROCESSORS < tiles(s) <= 2 * _MULTIPROCESSORS]
    if pairs:
        return plan(pairs[0], 1, 2 if steps <= 64 else 1, HALF_SHARED_BYTES)
    sizes = [s for s in sizes if tiles(s) <= _MULTIPROCESSORS]
    if not sizes:
        return None
    slabs = sizes[0]
    if slabs == 2 and m > 4 and 4 in sizes and tiles(2) < 60 <= 4 * tiles(4):
        slabs = 4
    most = steps // chunks_for(k, 8) // 2 if groups == 1 else 1
    cluster = next(c for c in (4, 2, 1) if c <= max(most, 1) and tiles(slabs) <= _CLUSTERS[c])
    if groups == 1 and cluster == 1 and 2 * slabs in sizes and (steps > 64 if m > 8 else m > 4 and steps >= 128):
        slabs, cluster = 2 * slabs, 2
    return plan(slabs, cluster, 2 if slabs >= 8 or (slabs == 4 and cluster < 4) else 1, SHARED_BYTES)


def _cluster(tiles: int, steps: int, most: int) -> int:
    """CTAs that share a tile, where tiles alone leave multiprocessors without work; each has two steps at least."""
    cluster = 1
    while cluster < most and tiles * cluster * 2 <= _MULTIPROCESSORS and steps >= 4 * cluster:
        cluster *= 2
    return cluster


def grouped_tokens(rows: int, experts: int) -> tuple[int, tuple[int, ...]]:
    """Tokens of a grouped product's tiles, and of its narrow products, for `rows` rows that `experts` matrices share out.

    Tiles hold what an evenly loaded matrix has, and a bit more; many rows go in several tiles.
    """
    mean = rows / min(rows, experts) if rows else 1.0
    for tokens, most in ((8, 4), (16, 10), (32, 24)):
        if mean <= most:
            return tokens, ()
    tokens = min(-(-int(mean + 1.5 * mean**0.5) // 64) * 64, 256)
    if mean > 240:
        return 256, (128, 192)
    return tokens, tuple(w for w in (tokens - 64, tokens - 32) if w > 0)


def choose_grouped(
    fmt: str,
    out: str,
    rows: int,
    experts: int,
    slabs: int,
    k: int,
    *,
    paired: bool,
    slotted: bool,
    gather: bool,
    scaled: str,
    single: bool = False,
    beside: bool = False,
) -> MixedConfig:
    """The configuration of a grouped product of so many rows with as many matrices of so many slabs.

    slotted: the first product of an expert, which comes right after the list of its tiles. single: tiles are one token's rows;
    few as they are, one CTA of 16 warps on a multiprocessor is then a fifteenth faster for the layer than two of eight. With a
    matrix beside there are tiles enough for two of eight, of NVFP4's first product those of four slabs (H200). Tiles of eight
    slabs have sums over half as many warps; they are taken where no CTA has more slabs then than in tiles of four. Of 10 to 64
    rows a matrix, two CTAs a multiprocessor, or stages of four tiles of K, take a sixth less (Flash, 1,024 tokens).
    """
    tokens, narrow = grouped_tokens(rows, experts)
    few = tokens <= FEW
    chunks = chunks_for(k, 8 if few else 4 if tokens == 64 else _chunks(tokens))
    wide = single and not (beside and (fmt == "nvfp4" or not slotted))
    of_tile, warps = 4 if few else 8, 16 if wide else 8
    if single and fmt == "nvfp4" and not (slotted and beside):
        places = _MULTIPROCESSORS * 16 // warps
        of_tile = min((8, 4), key=lambda s: -(-(-(-slabs // s) * (rows + beside)) // places) * s)
        chunks = chunks_for(k, warps // 2) if of_tile == 8 else chunks
    config = MixedConfig(
        fmt,
        out,
        tokens,
        of_tile,
        chunks,
        2,
        narrow,
        splits=min(warps // of_tile, chunks) if few else 1,
        grouped=True,
        single=single,
        beside=beside,
        slotted=slotted,
        gather=gather,
        paired=paired,
        scaled=scaled,
        early=not slotted,
    )
    while config.shared_bytes > SHARED_BYTES and config.chunks % 2 == 0:  # two stages of BF16
        config = replace(config, chunks=config.chunks // 2)
    return _fed(config, HALF_SHARED_BYTES if tokens in (8, 32) and not wide else SHARED_BYTES)


def requantises(act: str, *, tokens: int, given: bool) -> bool:
    """Whether a pair's product also quantises its results for the next one, whose activations are `act`.

    tokens: of the product's tiles. given: whether NVFP4's global scale is; else it is a row's own, of columns of many tiles.
    On an H200 that saves 6 to 8 us a layer. With more tokens a tile, and for FP8, whose groups of 128 columns need wide tiles,
    two kernels are faster.
    """
    return act == "nvfp4" and given and tokens <= FEW
