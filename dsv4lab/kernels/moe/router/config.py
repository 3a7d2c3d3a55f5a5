"""Compile-time choices of the router, and which to take for a shape. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass, replace

WARP = 32
STEP = 64  # columns that a warp multiplies between two looks at the loop, and a stage of the tiled kernel
DIRECT_ROWS = 16  # experts of a CTA of the direct kernel: the fixed side of `mma.sync`
WARP_ROWS, WARP_TOKENS = 64, 32  # of a warp of the tiled kernel
TILE_TOKENS = 128  # of the tiled kernel
ROUTE_WARPS = 4  # of a CTA that routes, one token each
MAX_BATCH = 8  # parts of K, of 8 to 12 logits a lane, that registers hold
PAD = 128  # logits are kept in rows of a multiple of this: 16 bytes a lane
MAX_TOP_K = 32  # a lane each
MAX_EXPERTS = 1024  # 32 logits of a lane
SHARED_BYTES = 227 * 1024  # that a CTA may have
_FUSED_TOKENS = 16  # up to here one launch should be quicker than two; not measured yet
_DIRECT_TOKENS = 256  # up to here reading x once for each 16 experts, from L2, should cost less than staging it; likewise
_WIDE_TOKENS = 16  # of a CTA where x or the weights are float32
_ELEMENTS = ("bf16", "f32")
_INTEGERS = ("i32", "i64")


@dataclass(frozen=True)
class RouterConfig:
    """x, weight: "bf16" or "f32". experts, top_k: how many. by: "score" or "hash". tiled: the kernel for many tokens, of BF16.

    tokens: of a CTA. rows: experts of a CTA. warps: of a CTA. depth: steps in flight; of a warp's weights in registers
    (direct), of the CTA's stages in shared memory (tiled). fused: the CTA that comes last routes; otherwise a second launch
    does. table, token: integer types of the hash table and of token ids. batch: parts of K that routing reads together.
    """

    x: str
    weight: str
    experts: int
    top_k: int
    by: str
    tiled: bool
    tokens: int
    rows: int
    warps: int
    depth: int
    fused: bool
    table: str = "i64"
    token: str = "i64"
    batch: int = 8

    @property
    def padded(self) -> int:
        """Logits of a row in memory."""
        return -(-self.experts // PAD) * PAD

    @property
    def expert_tiles(self) -> int:
        return -(-self.experts // self.rows)

    @property
    def stage_bytes(self) -> int:
        """Of the tiled kernel's shared memory."""
        return (self.rows + self.tokens) * STEP * 2

    def tiles(self, m: int) -> int:
        """CTAs for one part of K."""
        return self.expert_tiles * -(-m // self.tokens)

    def splits(self, m: int, d: int, multiprocessors: int) -> int:
        """Parts of K, so that about every multiprocessor has a CTA; a part of the tiled kernel fills its stages at least."""
        most = d // STEP // (self.depth if self.tiled else 1)
        return max(min(multiprocessors // self.tiles(m), most), 1)

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.x not in _ELEMENTS or self.weight not in _ELEMENTS:
            raise ValueError(f"x and weight must be bf16 or f32, got {self.x!r} and {self.weight!r}")
        if self.table not in _INTEGERS or self.token not in _INTEGERS:
            raise ValueError(f"table and token must be i32 or i64, got {self.table!r} and {self.token!r}")
        if self.by not in ("score", "hash"):
            raise ValueError(f"by must be score or hash, got {self.by!r}")
        if not 1 <= self.experts <= MAX_EXPERTS:
            raise ValueError(f"experts must be 1 to {MAX_EXPERTS}, got {self.experts}")
        most = MAX_TOP_K if self.by == "hash" else min(MAX_TOP_K, self.experts)
        if not 1 <= self.top_k <= most:
            raise ValueError(f"top_k must be 1 to {most}, got {self.top_k}")
        if self.tiled:
            self._check_tiled()
        elif self.rows != DIRECT_ROWS or self.tokens not in (8, 16, 32, 64) or not 1 <= self.depth <= 4:
            raise ValueError(f"rows, tokens and depth must be {DIRECT_ROWS}, 8 to 64 and 1 to 4, got {self}")
        if self.warps > 32:
            raise ValueError(f"warps must be 32 at most, got {self.warps}")
        if self.batch not in (1, 2, 4, MAX_BATCH):
            raise ValueError(f"batch must be 1, 2, 4 or {MAX_BATCH}, got {self.batch}")

    def _check_tiled(self) -> None:
        if (self.x, self.weight) != ("bf16", "bf16"):
            raise ValueError(f"tiled must have x and weight bf16, got {self.x} and {self.weight}")
        if self.fused:
            raise ValueError("fused must be false where tiled is true, got True")
        if (
            self.rows % WARP_ROWS
            or self.tokens % WARP_TOKENS
            or self.warps != self.rows * self.tokens // (WARP_ROWS * WARP_TOKENS)
        ):
            raise ValueError(f"warps must be one for {WARP_ROWS} rows and {WARP_TOKENS} tokens, got {self}")
        if self.depth < 2 or self.depth * self.stage_bytes > SHARED_BYTES:
            raise ValueError(f"depth must be >= 2 and fit {SHARED_BYTES} bytes, got {self.depth} of {self.stage_bytes} bytes")


def choose(
    m: int,
    d: int,
    experts: int,
    top_k: int,
    by: str,
    x: str,
    weight: str,
    multiprocessors: int,
    *,
    table: str = "i64",
    token: str = "i64",
) -> RouterConfig:
    """The configuration for m tokens of d columns. d % 64 == 0."""
    tiled = m > _DIRECT_TOKENS and (x, weight) == ("bf16", "bf16") and experts > DIRECT_ROWS
    config = RouterConfig(x, weight, experts, top_k, by, tiled, 0, 0, 0, 4, not tiled and m <= _FUSED_TOKENS, table, token)
    if tiled:
        rows = 192 if experts % 192 == 0 else min(-(-experts // WARP_ROWS), 2) * WARP_ROWS
        config = replace(config, tokens=TILE_TOKENS, rows=rows, warps=rows * TILE_TOKENS // (WARP_ROWS * WARP_TOKENS))
        return replace(config, batch=_batch(config.splits(m, d, multiprocessors)))
    # The three parts of a float32 take three times the registers, so fewer tokens share them.
    most = _WIDE_TOKENS if "f32" in (x, weight) else 64
    config = replace(config, tokens=next(t for t in (8, 16, 32, 64) if t == most or m <= t), rows=DIRECT_ROWS, warps=8)
    splits = config.splits(m, d, multiprocessors)
    steps = -(-(d // STEP) // splits)  # of a CTA: all its weights in one round, if they fit
    depth = min(-(-steps // config.warps), 1 if most == _WIDE_TOKENS else 2 if config.tokens > 16 else 4)
    return replace(config, depth=depth, batch=_batch(splits))


def _batch(splits: int) -> int:
    """A token waits one latency for so many parts; reading more than there are costs bandwidth."""
    return min(1 << (splits - 1).bit_length(), MAX_BATCH)
