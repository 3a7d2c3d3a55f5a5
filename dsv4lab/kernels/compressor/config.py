"""Compile-time choices of the compressor kernel, and which to take for a size. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4lab.kernels.cache.plan import WARP, KeyPlan

LANE = 4  # channels of a lane: 16 bytes of float32
GROUP = WARP * LANE  # channels of a warp
TOKENS = 8  # that a lane holds together: 16 loads of 16 bytes
MAX_ELEMENTS = 2**31  # rows and ring places are 32 bits wide
_MAX_WARPS = 32
_MAX_EARLY = 15  # named barriers
_MANY = 1056  # tokens, of which fewer CTAs are faster
_MULTIPROCESSORS = 132
_SHARED_BYTES = 228 * 1024  # the most of a multiprocessor, 1 KiB for each CTA among them
_POOLERS = 8  # warps that share an entry of many tokens
_HELD = 4  # vectors of a thread of rows that wait in shared memory on their way into the ring
_ENTRIES = 8  # that a CTA makes in turn, at most, of one sequence


@dataclass(frozen=True)
class CompressConfig:
    """ratio: tokens of a block. overlap: an entry pools the block before its own, too. keys: what becomes of an entry.

    rows: of the step, that a cluster looks through. warps: of a CTA. cluster: CTAs that share an entry's channels. resident:
    CTAs that a multiprocessor's registers are to hold. settled: the kernel before wrote no embeddings, norm weight or
    frequencies, so they are read while it still runs.
    """

    ratio: int
    overlap: bool
    keys: KeyPlan
    rows: int = 4
    warps: int = 4
    cluster: int = 1
    resident: int = 4
    settled: bool = True

    @property
    def width(self) -> int:
        """Channels of a token: o * d."""
        return self.keys.dim * (2 if self.overlap else 1)

    @property
    def span(self) -> int:
        """Tokens that an entry pools."""
        return self.ratio * (2 if self.overlap else 1)

    @property
    def channels(self) -> int:
        """Of an entry, that a CTA has."""
        return self.keys.dim // self.cluster

    @property
    def lanes(self) -> int:
        """Of a warp, side by side along the channels: all, or half of them where a CTA has no more channels."""
        return min(WARP, self.channels // LANE)

    @property
    def groups(self) -> int:
        """Such `lanes` side by side along a CTA's channels of an entry."""
        return self.channels // (self.lanes * LANE)

    @property
    def slices(self) -> int:
        """Such `lanes` that share an entry's tokens."""
        return min(self.span // TOKENS, self.threads // self.lanes // self.groups)

    @property
    def rounds(self) -> int:
        """Times that a lane takes `TOKENS` tokens of an entry."""
        return self.span // TOKENS // self.slices

    @property
    def teams(self) -> int:
        """Entries that a CTA pools side by side."""
        return self.threads // (self.lanes * self.groups * self.slices)

    @property
    def threads(self) -> int:
        return self.warps * WARP

    @property
    def moved(self) -> int:
        """Rows that a CTA moves into the ring, at most."""
        return -(-self.rows // self.cluster)

    @property
    def masks(self) -> int:
        """Words with a bit for each row that a cluster looks through."""
        return -(-self.rows // WARP)

    @property
    def shared_bytes(self) -> int:
        """Of a CTA, all but exact."""
        described = 32 * (self.rows + self.moved) + 4 * self.masks
        pooled = 0 if self.teams > 1 else (1 if self.cluster > 1 else 2) * 4 * self.keys.dim
        parts = 0 if self.slices == 1 else 2 * 4 * 3 * self.channels * self.slices
        constants = 4 * LANE * self.threads // self.teams * self.rounds * TOKENS
        constants += 4 * WARP * self.teams * (self.weight_words + 1)
        held = 32 * self.threads * self.units * self.moved if self.held else 0
        return described + pooled + parts + constants + held + 64

    @property
    def weight_words(self) -> int:
        """32-bit words of the norm weight that a lane multiplies by."""
        return self.keys.width // (2 if self.keys.weight == "bf16" else 1)

    @property
    def carveout(self) -> int:
        """Percent of L1 for shared memory."""
        return -(-100 * self.resident * (self.shared_bytes + 1024) // _SHARED_BYTES)

    @property
    def batch(self) -> int:
        """Rows that a thread moves together."""
        return min(self.moved, 1 if self.early else 4)

    @property
    def units(self) -> int:
        """Vectors of a token's values and scores that a thread moves into the ring."""
        return -(-2 * self.width // LANE // self.threads)

    @property
    def held(self) -> bool:
        """Rows to be moved are few enough to be on their way with those to be pooled, in memory of their own."""
        return self.moved <= self.teams and self.units * self.moved <= _HELD

    @property
    def long(self) -> bool:
        """A step of many tokens, whose entries are mostly all in it."""
        return not self.held

    @property
    def early(self) -> int:
        """Warps that load tokens before they know positions, each before another warp: half, where all would load at once."""
        return self.warps // 2 if self.long and (self.teams > 1 or self.rounds > 1) else 0

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        self.keys.check()
        if self.ratio < TOKENS // 2 or self.ratio & (self.ratio - 1) or self.span % TOKENS:
            raise ValueError(f"ratio must be a power of two with a span of {TOKENS} tokens or more, got {self.ratio}")
        if self.overlap and self.span != TOKENS:
            raise ValueError(f"ratio must be {TOKENS // 2} with overlap, got {self.ratio}")
        if self.keys.dim not in (128, 512) or self.cluster not in (1, 2, 4, 8) or (self.cluster > 1 and self.keys.dim == 128):
            raise ValueError(f"dim must be 128 or 512, and 512 for a cluster of 2, 4 or 8 CTAs, got {self}")
        if not 1 <= self.warps <= _MAX_WARPS or self.warps % self.groups:
            raise ValueError(f"warps must be a multiple of {self.groups} up to {_MAX_WARPS}, got {self.warps}")
        if self.span % (self.slices * TOKENS) or self.threads % (self.lanes * self.groups * self.slices):
            raise ValueError(f"warps must share {self.span} tokens equally, got {self.warps}")
        if self.teams > 1 and (self.keys.dim != GROUP or self.slices > 1 or TOKENS % self.teams):
            raise ValueError(f"warps must all pool one entry, or each {TOKENS} tokens and divide them, got {self.warps}")
        if self.slices > 1 and self.channels > self.threads:
            raise ValueError(f"warps must have a thread for each of {self.channels} channels, got {self.warps}")
        if self.early > _MAX_EARLY:
            raise ValueError(f"warps must be at most {2 * _MAX_EARLY} of many tokens, got {self.warps}")
        if self.rows < 1 or self.rows + self.moved > self.threads:
            raise ValueError(f"rows must be at least 1 and at most {self.threads} with those moved, got {self.rows}")
        if self.cluster > 1 and self.slices == 1:
            raise ValueError(f"cluster must be 1 where a warp pools all tokens of an entry, got {self.cluster}")
        if self.resident * self.threads > 2048 or self.carveout > 100:
            raise ValueError(f"resident must be what a multiprocessor has threads and memory for, got {self.resident}")
        if 2 * self.width // LANE % self.threads and self.threads % (2 * self.width // LANE):
            raise ValueError(f"warps must share the {2 * self.width} numbers of a token equally, got {self.warps}")

    @classmethod
    def for_shape(cls, tokens: int, ratio: int, keys: KeyPlan, *, overlap: bool) -> CompressConfig:
        """A step's rows in pieces that complete a few entries each where they are one sequence's; fewer rows of short steps.

        A long prefill is one wave of CTAs, or few: what a CTA waits for before its first entry and after its last is paid once
        a wave. In a decode step neighbouring rows may all complete entries, which a CTA would make one after another, so rows
        are spread over all.
        Raises ValueError.
        """
        config = cls(ratio, overlap, keys)
        most = ratio
        if config.span > TOKENS:
            # Eight warps share the many tokens and four CTAs the channels. In a decode step of few tokens eight CTAs do, half a
            # warp a token, so that a multiprocessor has half the bytes to take in and a lane takes all its tokens at once. Of
            # many tokens two CTAs of 16 warps do, and those of 8192 run at once. (H200, 600, 1024, 2048, 4096, 8192 tokens:
            # 6.1, 5.9, 6.3, 7.4, 11.1 us, by four CTAs 5.2, 5.9, 6.4, 7.6, 14.)
            width = keys.dim // GROUP
            config = replace(config, rows=1, warps=_POOLERS, cluster=width, resident=2)
            if 2 * width * tokens <= _MULTIPROCESSORS:
                config = replace(config, cluster=2 * width)
            elif tokens > _MANY:
                config = replace(config, warps=2 * _POOLERS, cluster=width // 2, resident=1)
        elif keys.dim > GROUP:  # an entry is a CTA's
            most = ratio * _ENTRIES
        config.check()
        rows = _pieces(tokens, config.resident * _MULTIPROCESSORS // config.cluster, most)
        return replace(config, rows=rows * config.teams)


def _pieces(tokens: int, enough: int, most: int) -> int:
    """Rows of a piece, a power of two up to `most`: the fewest that make no more than `enough` pieces."""
    rows = 1
    while rows < most and tokens > rows * enough:
        rows *= 2
    return rows
