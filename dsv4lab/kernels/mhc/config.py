"""Compile-time choices of the hyper-connections' kernels, and which to take for a size. Imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4lab.formats import FP8_ROW, NVFP4

WARP = 32
STREAMS = 4
BLOCK = 16  # columns of D that a projecting warp owns, of all four streams: a product's K each
TILE = 16  # tokens of a product
PARTS = 3  # BF16 numbers whose sum is a float32
CHUNK = 8  # BF16 of 16 bytes
COEFFICIENTS = STREAMS + STREAMS * STREAMS  # post and comb of a token
BATCH = 8  # tokens whose Sinkhorn iterations a warp runs together, a lane each
HALVES = 2  # FP16 numbers whose sum has 22 bits of a float32
MIXERS = 2  # warps that make coefficients, in turn
RANKS = 16  # CTAs of a cluster, which is also how many tokens a tile has: a CTA makes the coefficients of one
BOX = 64  # columns of a TMA box
MAX_TOKENS = 8192  # of a launch, which bounds the scratch for sums
MAX_WARPS = 8  # of a projecting CTA; each has 72 registers a thread of `fn`
FEW_FINISH, MANY_FINISH = 11, 7  # warps of a finishing CTA, with one more that fills its last quarter
_ONE_FINISH, _ONE_SPLIT = 4, 8  # warps of a finishing CTA and finishing CTAs of a token, in one kernel
_ONE_TOKENS = 8  # up to which one kernel is faster: 16 are slower (H200)
SHARED_BYTES = 227 * 1024  # that a CTA may have
_FINISH_BYTES = 192 * 1024  # of a finishing CTA, so that a projecting one, of 30 kB, fits beside it
_HELD_REGISTERS = 128  # of a thread of `together` that projects, for `fn`
_MANY_WARPS = 132 * 16  # as for the gather of experts' rows
_ELEMENTS = ("bf16", "f32")
_INTEGERS = ("i32", "i64")
GROUPS = {"fp8": FP8_ROW.group, "nvfp4": NVFP4.group, "nvfp4_tiles": NVFP4.group}  # columns that share a scale


@dataclass(frozen=True)
class MixConfig:
    """Of `pre`, `post_pre` and `head`: projection and what follows from it.

    columns: D. outputs: rows of fn, 24 or 4 (head). post: the sub-layer's output is written back first. weight: "bf16" or
    "f32", of the norm. Projecting CTAs have `warps` warps, of 16 columns each, and `ahead` tiles of 16 tokens in flight;
    `slices` of them cover D. Finishing CTAs have `finish` warps, one more for Sinkhorn, and `ring` tokens in shared memory.
    split: 1, and both kinds of CTAs are kernels of their own; or more, and they are of one kernel, of up to 16 tokens: then so
    many finishing CTAs, a cluster, share the columns of a token, their only one.
    quant: "" for a BF16 row, "fp8" or "nvfp4" for its codes and scales, "nvfp4_tiles" for scales in atom128x4.
    """

    columns: int
    outputs: int
    post: bool
    weight: str
    warps: int
    ahead: int
    finish: int
    ring: int
    quant: str = ""
    split: int = 1

    @property
    def leading(self) -> int:
        """CTAs of one kernel before those that finish, in whole clusters."""
        return -(-self.slices // self.split) * self.split if self.split > 1 else 0

    @property
    def share(self) -> int:
        """Columns of a finishing CTA."""
        return self.columns // self.split

    @property
    def blocks(self) -> int:
        """Scales of a row, each a byte; of a BF16 row its bytes."""
        return -(-self.columns // GROUPS[self.quant]) if self.quant else 2 * self.columns

    @property
    def chunk_words(self) -> int:
        """32-bit words of 8 columns of the result."""
        return {"": 4, "fp8": 2}.get(self.quant, 1)

    @property
    def slices(self) -> int:
        """CTAs that share a token's columns."""
        return self.columns // (BLOCK * self.warps)

    @property
    def tiles(self) -> int:
        """Products side by side: 8 outputs each."""
        return -(-self.outputs // 8)

    @property
    def fragment_words(self) -> int:
        """32-bit words of `fn` that a lane holds."""
        return STREAMS * PARTS * self.tiles * 2

    @property
    def row(self) -> int:
        """Floats of a slice's sums of a token: the outputs, the sum of squares. No padding, which would leave sectors of L2
        half written, to be read from memory first.
        """
        return self.outputs + 1

    @property
    def slot_bytes(self) -> int:
        """Of a token in the finishing kernel's shared memory: its streams; with `post` also y, post and comb."""
        return self.share * 2 * (STREAMS + self.post) + self.post * COEFFICIENTS * 4

    @property
    def fixed_bytes(self) -> int:
        """Of the finishing kernel's shared memory beside its slots, at most: a collapsed token, sums, logits, barriers."""
        return self.share * 2 + 2 * self.finish * (WARP * 8 + 4 * self.split) + 2 * BATCH * STREAMS * STREAMS * 8 + 1024

    @property
    def finish_threads(self) -> int:
        return (self.finish + (self.outputs > STREAMS)) * WARP

    @property
    def chunks(self) -> int:
        """Runs of 8 columns of a finishing thread."""
        return -(-self.share // (CHUNK * WARP * self.finish))

    @property
    def finish_bound(self) -> int:
        """Threads that the compiler is to think of, for it has no other way to be told of registers. It rounds warps to fours.

        A quarter of a multiprocessor has 16,384 registers. Few tokens: 96 for each of its three warps of a finishing CTA, and
        224 for one of a projecting CTA. Many: 80 for each of two, and 168 for each of two. One kernel: what it takes.
        """
        if self.split > 1:
            return 256
        return max(self.finish_threads, 640 if self.finish > MANY_FINISH else 768)

    @property
    def project_bound(self) -> int:
        """Likewise."""
        return 256 if self.finish > MANY_FINISH else 384

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.columns < BLOCK or self.columns % BLOCK:
            raise ValueError(f"columns must be a multiple of {BLOCK}, got {self.columns}")
        _check_mix(self.outputs, self.post, self.weight)
        if not 1 <= self.warps <= MAX_WARPS or self.columns % (BLOCK * self.warps):
            raise ValueError(f"warps must be 1 to {MAX_WARPS} and divide {self.columns // BLOCK}, got {self.warps}")
        if self.quant not in ("", *GROUPS):
            raise ValueError(f"quant must be empty or one of {', '.join(GROUPS)}, got {self.quant!r}")
        if self.split == 1 and self.ahead not in (2, 3, 4):
            raise ValueError(f"ahead must be 2, 3 or 4, got {self.ahead}")
        if self.split > 1 and not (self.ahead == self.ring == 1 and self.warps <= self.finish < 8):
            raise ValueError(f"one kernel must have ahead 1, ring 1 and finish from warps to 7, got {self}")
        if not 1 <= self.finish <= 16:
            raise ValueError(f"finish must be 1 to 16, got {self.finish}")
        if self.split not in (1, 2, 4, 8) or (self.split > 1 and self.columns % (self.split * FP8_ROW.group)):
            raise ValueError(f"split must be 1, 2, 4 or 8, in whole groups of {self.columns} columns, got {self.split}")
        if self.ring < 1 or self.ring * self.slot_bytes > SHARED_BYTES - 16 * 1024:
            raise ValueError(
                f"ring must be >= 1 and fit {SHARED_BYTES - 16 * 1024} bytes, got {self.ring} of {self.slot_bytes}"
            )

    @classmethod
    def for_shape(
        cls, tokens: int, columns: int, outputs: int, post: bool, weight: str, multiprocessors: int, quant: str = ""
    ) -> MixConfig:
        """Few tokens: as many projecting CTAs as there are multiprocessors, and a wide finishing CTA for every token; up to 8:
        one kernel. Many: 8 warps share a slice's sums, which bounds the bytes of partial sums, and both kernels fit one
        multiprocessor together.
        """
        tiles = -(-tokens // TILE)
        blocks = max(columns // BLOCK, 1)

        def ctas(warps: int) -> int:
            slices = blocks // warps
            return min(max(multiprocessors // slices, 1), tiles) * slices

        choices = [w for w in range(1, MAX_WARPS + 1) if blocks % w == 0]
        fitting = [w for w in choices if blocks // w <= multiprocessors] or choices[-1:]
        most = max(ctas(w) for w in fitting)
        # within a tenth the larger: fewer sums to write and to read
        warps = max(w for w in fitting if ctas(w) >= 0.9 * most)
        few = tokens <= multiprocessors
        finish = min(FEW_FINISH if few else MANY_FINISH, -(-columns // (CHUNK * WARP)))
        config = cls(columns, outputs, post, weight, warps, 2, finish, 1)
        ring = 1 if few else max(min((_FINISH_BYTES - config.fixed_bytes) // config.slot_bytes, 4), 1)
        ahead = 2 if few or post else 3  # as far as registers go
        # in whatever order CTAs start, those that wait leave half of the multiprocessors to those that project
        most = min(_ONE_TOKENS, multiprocessors // (2 * _ONE_SPLIT))
        if tokens <= most and warps <= _ONE_FINISH and columns % (_ONE_SPLIT * FP8_ROW.group) == 0:
            return cls(columns, outputs, post, weight, warps, 1, _ONE_FINISH, 1, quant, _ONE_SPLIT)
        return cls(columns, outputs, post, weight, warps, ahead, finish, ring, quant)


@dataclass(frozen=True)
class TogetherConfig:
    """Of `pre`, `post_pre` and `head` of many tokens, by clusters of 16 CTAs: see `together`.

    columns, outputs, post, weight: as for `MixConfig`. warps: that project; held: words of `fn` that each of their threads
    keeps, the rest is in shared memory. collapse: warps that collapse. Four more have other things to do. stages: tiles of 16
    tokens in shared memory; buffers: places for a tile's sums. scaled: `fn` is two FP16 and not three BF16, and streams are
    scaled to be FP16.
    """

    columns: int
    outputs: int
    post: bool
    weight: str
    warps: int
    held: int
    collapse: int
    stages: int
    buffers: int = 1
    scaled: bool = False

    @property
    def slice(self) -> int:
        """Columns of a CTA."""
        return self.columns // RANKS

    @property
    def boxes(self) -> int:
        return self.slice // BOX

    @property
    def blocks(self) -> int:
        return self.slice // BLOCK

    @property
    def per_warp(self) -> int:
        """Blocks of a warp, at most."""
        return -(-self.blocks // self.warps)

    @property
    def rows(self) -> int:
        """Outputs that there are products for: of a row of comb, whose softmax does not change with it, not the first."""
        return self.outputs - STREAMS * (self.outputs > STREAMS)

    @property
    def tiles(self) -> int:
        """Sums side by side: 8 outputs each, of the last 4 outputs in two parts."""
        return -(-self.rows // 8)

    @property
    def parts(self) -> int:
        """Numbers that a float32 of `fn` is."""
        return HALVES if self.scaled else PARTS

    @property
    def order(self) -> list[int]:
        """The tile that each product of a stream's block adds to."""
        return [tile for _, tile in products(self.tiles, self.parts)]

    @property
    def block_words(self) -> int:
        """32-bit words of a block of `fn` that a lane has."""
        return STREAMS * len(self.order) * 2

    @property
    def shared_vectors(self) -> tuple[int, int]:
        """Of four words of `fn` of a warp, those in shared memory: of blocks that all warps have, of the last."""
        last = (self.per_warp - 1) * self.block_words
        return max(last - self.held, 0) // 4, (last + self.block_words - max(last, self.held)) // 4

    @property
    def last_warps(self) -> int:
        """Warps that have a last block."""
        return self.blocks - (self.per_warp - 1) * self.warps

    @property
    def shared_words(self) -> int:
        """Of `fn` in shared memory."""
        whole, last = self.shared_vectors
        return (whole * self.warps + last * self.last_warps) * 4 * WARP

    @property
    def pitch(self) -> int:
        """Floats from a token's sums to the next's: with products of streams 24 or 40, so that a warp's stores of pairs meet
        every bank twice.
        """
        return self.tiles * 8 + STREAMS * STREAMS

    @property
    def vectors(self) -> int:
        """16-byte messages with the sums of a token, and with the products of its streams, four times four."""
        return self.rows // 4 + STREAMS

    @property
    def passes(self) -> int:
        """Of a collapsing warp over its token's columns, 8 a lane."""
        return -(-self.slice // (CHUNK * WARP))

    @property
    def threads(self) -> int:
        return (self.warps + self.collapse + 4) * WARP

    @property
    def registers(self) -> tuple[int, int, int]:
        """Of a thread that projects, collapses, does something else.

        Projecting ones have what the others leave of what a CTA starts with: as many for each thread, in eights, as there are.
        """
        collapse, service = 64, 48
        whole = 65536 // self.threads // 8 * 8 * (self.threads // WARP)
        return min((whole - service * 4 - collapse * self.collapse) // self.warps // 8 * 8, 232), collapse, service

    @property
    def tile_bytes(self) -> int:
        """Of the streams of a tile in a CTA."""
        return STREAMS * self.stream_bytes

    @property
    def stream_bytes(self) -> int:
        """From a stream to the next: two rows more than it has, so that rows of one token lie in different banks."""
        return TILE * self.slice * 2 + 2 * BOX * 2

    @property
    def stage_bytes(self) -> int:
        return self.tile_bytes + self.post * TILE * self.slice * 2 + self.post * TILE * COEFFICIENTS * 4

    @property
    def message_bytes(self) -> tuple[int, int]:
        """That a CTA is sent of a tile: sums, coefficients."""
        return RANKS * self.vectors * 16, TILE * (STREAMS + 1) * 4

    @property
    def fixed_bytes(self) -> int:
        """Of shared memory beside the stages, at most."""
        sums = TILE * self.warps * self.pitch * 4 * self.buffers
        messages = self.stages * sum(self.message_bytes)
        logits = BATCH * STREAMS * STREAMS * 8 * (2 if self.outputs > STREAMS else 1)
        weight = self.slice * (2 if self.weight == "bf16" else 4)
        return self.shared_words * 4 + sums + messages + logits + weight + 512  # barriers, alignment

    @property
    def most_stages(self) -> int:
        """As many as fit."""
        return (SHARED_BYTES - replace(self, stages=0).fixed_bytes) // (self.stage_bytes + sum(self.message_bytes))

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.columns < RANKS * BOX or self.columns % (RANKS * BOX):
            raise ValueError(f"columns must be a multiple of {RANKS * BOX}, got {self.columns}")
        _check_mix(self.outputs, self.post, self.weight)
        if self.warps not in (4, 8, 12, 16) or self.collapse not in (4, 8):
            raise ValueError(f"warps must be 4, 8, 12 or 16, and collapse 4 or 8, got {self.warps} and {self.collapse}")
        most = min(self.per_warp * self.block_words, _HELD_REGISTERS)
        if not 4 <= self.held <= most or self.held % 4:
            raise ValueError(f"held must be a multiple of 4 from 4 to {most}, got {self.held}")
        if not 1 <= self.buffers <= MIXERS:
            raise ValueError(f"buffers must be 1 to {MIXERS}, got {self.buffers}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")
        if self.stages * self.stage_bytes + self.fixed_bytes > SHARED_BYTES:
            raise ValueError(f"{self.stages} stages of {self.stage_bytes} bytes must fit {SHARED_BYTES - self.fixed_bytes}")

    @classmethod
    def for_shape(cls, tokens: int, columns: int, outputs: int, post: bool, weight: str) -> TogetherConfig | None:
        """None where D does not fit, and where `MixConfig` is faster: of Flash never, not even one token's; of Pro, whose `fn`
        a cluster takes longer to read, up to 64 tokens, with `post` up to 384 (H200). As many stages as fit, up to 8.
        """
        if columns < RANKS * BOX or columns % (RANKS * BOX):
            return None
        blocks = columns // RANKS // BLOCK
        if blocks > 16 and tokens < (384 if post else 64):
            return None
        one = cls(columns, outputs, post, weight, min(8, -(-blocks // 4) * 4), 1, 4, 1)
        one = replace(one, scaled=one.per_warp * one.block_words > _HELD_REGISTERS)  # three BF16 have no room
        one = replace(one, held=min(one.per_warp * one.block_words, _HELD_REGISTERS))
        choices = [replace(one, buffers=buffers) for buffers in (MIXERS, 1)]
        for least in (4, 3, 2):  # a second place for sums is worth a fifth or later stage, not the fourth (H200)
            for choice in choices:
                if choice.most_stages >= least:
                    return replace(choice, stages=min(choice.most_stages, 8))
        return None


def products(tiles: int, parts: int) -> list[tuple[int, int]]:
    """Of a stream's block: part and tile of `fn`, the smallest part first. The last tile's 4 rows have the next part beside."""
    return [(part, tile) for part in reversed(range(parts)) for tile in range(tiles) if tile < tiles - 1 or part % 2 == 0]


def _check_mix(outputs: int, post: bool, weight: str) -> None:
    if outputs not in (STREAMS, STREAMS * (2 + STREAMS)):
        raise ValueError(f"outputs must be {STREAMS} or {STREAMS * (2 + STREAMS)}, got {outputs}")
    if post and outputs == STREAMS:
        raise ValueError("post must be false for the head's 4 outputs, got True")
    if weight not in _ELEMENTS:
        raise ValueError(f"weight must be bf16 or f32, got {weight!r}")


@dataclass(frozen=True)
class PostConfig:
    """Of `post` alone. units: chunks of 8 columns of a lane; warps: of a CTA."""

    units: int = 2
    warps: int = 4

    @property
    def piece(self) -> int:
        """Columns of a warp."""
        return self.units * WARP * CHUNK

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.units not in (1, 2, 4) or not 1 <= self.warps <= 32:
            raise ValueError(f"units must be 1, 2 or 4, and warps 1 to 32, got {self}")

    @classmethod
    def for_shape(cls, tokens: int, columns: int) -> PostConfig:
        """Two chunks of a lane, ten loads in flight, where that leaves warps enough and a row is long enough."""
        two = cls(2)
        return two if columns >= two.piece and tokens * -(-columns // two.piece) >= _MANY_WARPS else cls(1)


@dataclass(frozen=True)
class EmbedConfig:
    """Of the embedding: copies of a row, 16-byte words of a row, integer type of ids, warps of a CTA (one word a lane)."""

    streams: int
    words: int
    token: str
    warps: int = 4

    def check(self) -> None:
        """Raises ValueError naming the choice that cannot be."""
        if self.streams < 1 or self.words < 1 or self.token not in _INTEGERS or not 1 <= self.warps <= 32:
            raise ValueError(f"streams, words and warps must be positive, token i32 or i64, got {self}")
