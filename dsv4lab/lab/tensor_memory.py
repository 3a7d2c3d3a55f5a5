"""Places in shared memory and TMEM that notebook 07 predicts, to compare with what the simulated tensor core read and wrote."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dsv4lab.reference.quant import dequantize_nvfp4
from dsv4lab.sim.layouts import MatrixDescriptor, operand_index

LANES, COLUMNS = 128, 512
CHUNK_BYTES, LINE_BYTES = 16, 128


class ScalePlaces(NamedTuple):
    """Which scale lies in each byte of TMEM: row and K block, (32 lanes, columns, 4 bytes) each."""

    row: torch.Tensor
    block: torch.Tensor


def chunks_of_lines(descriptor: MatrixDescriptor, *, lines: int, chunks: int) -> torch.Tensor:
    """The number of the row's chunk in every 16-byte place of a K-major operand's first lines: (lines, chunks) int64."""
    begins = operand_index(descriptor, lines, chunks * CHUNK_BYTES)[:, ::CHUNK_BYTES]
    found = torch.full((lines, LINE_BYTES // CHUNK_BYTES), -1)
    for line in range(lines):
        for chunk in range(chunks):
            at = int(begins[line, chunk])
            found[at // LINE_BYTES, at % LINE_BYTES // CHUNK_BYTES] = chunk
    return found


def owners(config: Any) -> NDArray[np.int64]:
    """(128, 512): 0 and up for the accumulators, then the scales of x and of W; -1 for columns that the kernel leaves alone."""
    held = np.full((LANES, COLUMNS), -1)
    for index in range(config.accumulators):
        held[:, index * config.tile_n : (index + 1) * config.tile_n] = index
    left, right = config.scale_columns
    held[:, left:right] = config.accumulators
    held[:, right : config.tmem_columns] = config.accumulators + 1
    return held


def written(cells: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """(512,): columns in which any cell is not zero."""
    return (cells != 0).any(axis=0)


def scale_places(*, rows: int, parts: int) -> ScalePlaces:
    """The rule for scales of `rows` rows and `parts` products of 64 columns: row r, block 4 p + i in lane r % 32, byte i of
    column (rows / 32) p + r // 32.
    """
    groups = rows // 32
    lane, column, byte = torch.meshgrid(torch.arange(32), torch.arange(groups * parts), torch.arange(4), indexing="ij")
    return ScalePlaces(lane + 32 * (column % groups), 4 * (column // groups) + byte)


def scale_bytes(cells: NDArray[np.uint32], *, lanes: int, column: int, columns: int) -> torch.Tensor:
    """The bytes of 32 lanes of TMEM from lane `lanes` on: (32, columns, 4) u8."""
    block = np.ascontiguousarray(cells[lanes : lanes + 32, column : column + columns])
    return torch.from_numpy(block.view(np.uint8).reshape(32, columns, 4))


def block_products(x_codes: torch.Tensor, x_scale: torch.Tensor, w_codes: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """Sums over K of (code * block scale) of both sides, without global scales: (M, N) f64."""
    one = torch.ones(())
    left, right = dequantize_nvfp4(x_codes, x_scale, one), dequantize_nvfp4(w_codes, w_scale, one)
    return left.double() @ right.double().t()
