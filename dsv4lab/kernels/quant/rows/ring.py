"""Rows of SwiGLU's two inputs, a turn ahead, in a part of shared memory that a warp has for itself: registers that wait for
memory were spilled. Copies of 16 bytes a lane, which a warp asks for and waits for without the others.

    stage of a warp: for each input and chunk, 64 pieces, those of 32 neighbouring chunks; two lanes' swapped by eights, so that
    neither the copies nor a lane's two loads meet in a bank

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass.cute as cute
from cutlass import Int64, Uint32

from dsv4lab.kernels._common.ptx import copy_async, load_words
from dsv4lab.kernels.quant.rows.config import CHUNK, WARP, RowsConfig

INPUTS, STAGES = 2, 2  # with three stages there is room for fewer CTAs (H200: 46.9 us for 8192 x 4096, not 41.3)
_PIECE = 16  # bytes of a copy


def warp_stage(config: RowsConfig) -> int:
    """Bytes of a warp's chunks."""
    return config.chunks * INPUTS * 2 * WARP * _PIECE


def stage_bytes(config: RowsConfig) -> int:
    """Of a CTA."""
    return config.threads * config.rows // WARP * warp_stage(config)


def ask(config: RowsConfig, inputs: Any, row: Any, blocks: Any, place: Any) -> None:
    """Have a warp's chunks of a row of both inputs come to its place in a stage. blocks: chunks of a row."""
    thread, _, _ = cute.arch.thread_idx()
    lane, begin = thread % WARP, thread % config.threads // WARP * WARP
    piece = Uint32(row * blocks + begin) * 2 + Uint32(lane)
    target = place + (lane ^ ((lane >> 3) & 1)) * _PIECE
    for n in range(INPUTS):
        start = inputs[n].iterator.toint() + Int64(piece) * _PIECE
        for c in range(config.chunks):
            for half in range(2):
                to = ((n * config.chunks + c) * 2 + half) * WARP * _PIECE
                copy_async(target + to, start + (c * config.threads * 2 + half * WARP) * _PIECE, _PIECE)
    cute.arch.cp_async_commit_group()


def take(config: RowsConfig, held: Any, place: Any) -> None:
    """A lane's chunks of both inputs to registers."""
    thread, _, _ = cute.arch.thread_idx()
    first, swapped = thread % WARP * 2, (thread % WARP * 2 >> 3) & 1
    for n in range(INPUTS):
        for c in range(config.chunks):
            part = place + (n * config.chunks + c) * 2 * WARP * _PIECE
            found = [word for i in range(2) for word in load_words(part + ((first + i) ^ swapped) * _PIECE)]
            for i in range(CHUNK // 2):
                held[n][c * (CHUNK // 2) + i] = found[i]
