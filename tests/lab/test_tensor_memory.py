"""The rules that notebook 07 predicts with, on small cases worked out by hand."""

from __future__ import annotations

import numpy as np
import torch

from dsv4lab.formats import atom128x4_offset
from dsv4lab.kernels.gemm.w4a4.config import W4A4Config
from dsv4lab.lab import tensor_memory
from dsv4lab.reference import quant
from dsv4lab.sim.layouts import MatrixDescriptor


def test_chunks_are_exchanged_by_the_row_number() -> None:
    swizzled = MatrixDescriptor(start=1024, leading=16, stride=1024, mode=3)
    found = tensor_memory.chunks_of_lines(swizzled, lines=9, chunks=2)
    assert found[0].tolist() == [0, 1, -1, -1, -1, -1, -1, -1]
    assert found[3].tolist() == [-1, -1, 1, 0, -1, -1, -1, -1]
    assert torch.equal(found[8], found[0])


def test_scales_lie_where_an_atom_copied_line_by_line_puts_them() -> None:
    """An atom of memory is 32 lines of 16 bytes; a line becomes a lane, four bytes of it a column."""
    places = tensor_memory.scale_places(rows=128, parts=2)
    for lane, column, byte in ((0, 0, 0), (5, 2, 3), (31, 7, 1), (17, 4, 2)):
        atom, within = divmod(column, 4)
        row, block = int(places.row[lane, column, byte]), int(places.block[lane, column, byte])
        assert atom128x4_offset(row, block, 8) == 512 * atom + 16 * lane + 4 * within + byte


def test_owners_follow_the_kernel_s_arithmetic() -> None:
    config = W4A4Config("f32", tile_n=256, stages=3, accumulators=1)
    owner = tensor_memory.owners(config)
    assert [int((owner[0] == i).sum()) for i in range(3)] == [256, 16, 32]
    assert int((owner[0] >= 0).sum()) == config.tmem_columns and (owner == owner[0]).all()


def test_cells_are_read_as_bytes() -> None:
    cells = np.zeros((128, 512), np.uint32)
    cells[33, 7] = 0x04030201
    assert tensor_memory.scale_bytes(cells, lanes=32, column=6, columns=2)[1, 1].tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(tensor_memory.written(cells)).tolist() == [7]


def test_block_products_leave_global_scales_out() -> None:
    x, w = torch.randn(3, 64), torch.randn(5, 64)
    x_codes, x_scale, x_global = quant.quantize_nvfp4(x)
    w_codes, w_scale, w_global = quant.quantize_nvfp4(w)
    sums = tensor_memory.block_products(x_codes, x_scale, w_codes, w_scale)
    whole = (
        quant.dequantize_nvfp4(x_codes, x_scale, x_global).double()
        @ quant.dequantize_nvfp4(w_codes, w_scale, w_global).t().double()
    )
    torch.testing.assert_close(sums * x_global.double() * w_global.double(), whole, rtol=1e-5, atol=1e-6)
