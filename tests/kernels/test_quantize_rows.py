"""The NVFP4 row quantiser, in the simulator: every bit is the reference's."""

from __future__ import annotations

import pytest
import torch

from dsv4lab import sim
from dsv4lab.formats import to_atom128x4
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.quant.nvfp4_rows.api import quantize_nvfp4_rows
from dsv4lab.reference import quant

ARCH = "sm_100a"


def rows(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows whose blocks differ by orders of magnitude, with zeros of both signs, empty blocks and an empty row."""
    g = torch.Generator().manual_seed(m * k)
    spread = torch.exp(3 * torch.randn(m, k // 16, 1, generator=g)).expand(-1, -1, 16).reshape(m, k)
    x = torch.randn(m, k, generator=g) * spread
    x[0, 3] = -0.0
    if m > 2:
        x[1], x[2, :16] = 0.0, 0.0
        x[2, 16:32] *= 1e-7  # below the smallest block scale
    return x.to(dtype)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "dtype"),
    [(1, 16, torch.float32), (3, 160, torch.bfloat16), (130, 208, torch.float32), (5, 7168, torch.bfloat16)],
)
def test_every_bit_is_the_reference_s(m: int, k: int, dtype: torch.dtype, static: bool) -> None:
    x = rows(m, k, dtype)
    given = torch.tensor(0.013) if static else None
    with sim.simulating(ARCH), running_on(sim.Host(ARCH)):
        codes, scale, row_scale = quantize_nvfp4_rows(x, given)
    want_scale = quant.nvfp4_global_scale(x.float().abs().amax(-1)) if given is None else given.expand(m)
    want_codes, want_blocks, _ = quant.quantize_nvfp4(x[:, None], global_scale=want_scale)
    assert torch.equal(row_scale, want_scale)
    assert torch.equal(codes, want_codes[:, 0])
    assert torch.equal(scale.view(torch.uint8), to_atom128x4(want_blocks[:, 0]).view(torch.uint8))


def test_ties_of_every_code_go_to_even() -> None:
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.0])
    with sim.simulating(ARCH), running_on(sim.Host(ARCH)):
        codes, scale, _ = quantize_nvfp4_rows(midpoints[None].contiguous(), torch.tensor(1.0))
    assert scale.float()[0, 0, 0] == 1.0
    assert torch.equal(codes, quant.quantize_nvfp4(midpoints[None], global_scale=torch.tensor(1.0))[0])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"x must be bfloat16 or float32, got torch\.float16"):
        quantize_nvfp4_rows(torch.zeros(2, 16, dtype=torch.float16))
    with pytest.raises(ValueError, match="K % 16 == 0, got K=24"):
        quantize_nvfp4_rows(torch.zeros(2, 24))
    with pytest.raises(ValueError, match="contiguous matrix"):
        quantize_nvfp4_rows(torch.zeros(32, 16).t())
    codes, scale, row_scale = quantize_nvfp4_rows(torch.zeros(0, 32))
    assert codes.shape == (0, 16) and scale.shape == (0, 1, 512) and row_scale.shape == (0,)
