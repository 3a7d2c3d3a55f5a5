"""Compile-time choices of the linear with four-bit weights, and which to take for a shape. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass

TILE = 64  # rows and columns of a weight tile
CODE_BYTES, SCALE_BYTES = TILE * TILE // 2, TILE * TILE // 16  # of a tile
SHARED_BYTES = 227 * 1024  # that a CTA may have
PITCH_PAD = 4  # floats between the epilogue's rows, so that stores hit every bank once
_MARGIN = 2048  # barriers, and alignment of the buffers to 1024 bytes
_FEW_TILES = 100  # fewer leave too many of a Hopper GPU's 132 multiprocessors without work
_MOST_STREAMED = 128  # tokens of a tile whose partial sums are worth adding up through memory


@dataclass(frozen=True)
class W4A16Config:
    """out: "bf16" or "f32". tokens: of an output tile, 8 to 256. warpgroups: each takes 64 weight rows of it.
    chunks: slices of 64 along K of a stage. stages: of the ring. streamed: CTAs share out all tiles' stages evenly and add up
    partial sums; otherwise each takes whole tiles.
    """

    out: str
    tokens: int
    warpgroups: int
    chunks: int
    stages: int
    streamed: bool = False

    @property
    def rows(self) -> int:
        """Weight rows of an output tile."""
        return self.warpgroups * TILE

    @property
    def by_warp(self) -> bool:
        """Whether warps multiply on their own, by `mma.sync`: for few tokens it does more per cycle than `wgmma`."""
        return self.tokens <= 16

    @property
    def slice(self) -> int:
        """Tokens that go through the epilogue's buffer at a time."""
        return min(self.tokens, 64)

    @property
    def weight_bytes(self) -> int:
        """Of a stage."""
        return self.chunks * self.warpgroups * (CODE_BYTES + SCALE_BYTES)

    @property
    def token_bytes(self) -> int:
        """Of a stage."""
        return self.chunks * self.tokens * TILE * 2

    @property
    def sums(self) -> int:
        """Partial sums that a consumer thread holds of a tile."""
        return self.tokens // 2

    @property
    def shared_bytes(self) -> int:
        store = 4 * self.slice * (self.rows + PITCH_PAD)
        return self.stages * (self.weight_bytes + self.token_bytes) + store + _MARGIN

    def tiles(self, m: int, n: int) -> int:
        """Output tiles of an (m, n) result."""
        return -(-m // self.tokens) * -(-n // self.rows)

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.out not in ("bf16", "f32"):
            raise ValueError(f"out must be bf16 or f32, got {self.out!r}")
        if self.tokens not in (8, 16, 32, 64, 128, 256):
            raise ValueError(f"tokens must be 8, 16, 32, 64, 128 or 256, got {self.tokens}")
        if self.warpgroups not in (1, 2, 4) or (self.tokens > 64 and self.warpgroups > 2):
            raise ValueError(f"warpgroups must be 1 or 2, or 4 for up to 64 tokens, got {self.warpgroups}")
        if self.chunks not in (1, 2, 4) or (self.streamed and self.chunks == 1):
            raise ValueError(f"chunks must be 2 or 4, or 1 if not streamed, got {self.chunks}")
        if self.stages < 2 or self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"stages must be >= 2 and fit {SHARED_BYTES} bytes, got {self.stages}: {self.shared_bytes} bytes")


def choose(m: int, n: int, k: int, out: str) -> W4A16Config:
    """The configuration for y (m, n) = x (m, k) W^T, after the measurements on an H200 in `benchmarks/`. k % 128 == 0."""
    tokens = next((t for t in (8, 16, 32, 64, 128) if m <= t), 256)
    if tokens == 256 and -(-m // 256) * -(-n // 128) < _FEW_TILES:
        tokens = 128  # twice the tiles, and their sums can be shared
    groups = 4 if tokens <= 16 and n // 256 >= _FEW_TILES else 2 if n > TILE else 1
    tiles = -(-m // tokens) * -(-n // (groups * TILE))
    chunks = 1 if tokens == 256 else 4 if tokens == 8 and k % 256 == 0 else 2
    streamed = tiles < _FEW_TILES and tokens <= _MOST_STREAMED
    config = W4A16Config(out, tokens, groups, chunks, 2, streamed)
    room = SHARED_BYTES - config.shared_bytes
    stages = 2 + max(room // (config.weight_bytes + config.token_bytes), 0)
    return W4A16Config(out, tokens, groups, chunks, min(stages, 8), streamed)
