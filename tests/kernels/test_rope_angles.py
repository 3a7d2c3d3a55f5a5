"""Sines and cosines of rotary angles on the simulated GPU against numpy's float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from dsv4lab.kernels._common import cache
from dsv4lab.kernels._common.launch import runtime_of
from dsv4lab.reference.rope import rope
from tests.kernels.simulated import simulating
from tests.kernels.test_rope_heads import TABLES

ULPS = 1.25  # largest error met over 9 million angles: 1.187; on a GPU, where ptxas fuses differently, over 4 million 1.206
THREADS = 256


@dataclass(frozen=True)
class Wide:
    """Width of the positions."""

    bits: int


def tabulated(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (N, F) of positions (N,) int32 or int64 times inv_freq (F,), on the device or simulated."""
    wide = Wide(32 if positions.dtype == torch.int32 else 64)
    cos, sin = (torch.empty(len(positions), len(inv_freq), device=positions.device) for _ in range(2))
    runtime = runtime_of(positions)
    runtime.call(cache.kernel(__name__, wide, lambda: _build(wide), runtime), positions, inv_freq, cos, sin)
    return cos, sin


def _build(wide: Wide) -> tuple[Any, tuple[Any, ...]]:
    import cutlass
    import cutlass.cute as cute

    from dsv4lab.kernels._common.fakes import fake, fake_stream
    from dsv4lab.kernels.rope.angles import cos_sin

    @cute.kernel
    def kernel(positions: Any, inv_freq: Any, cos: Any, sin: Any) -> None:
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        at = block * THREADS + thread
        n, f = at // inv_freq.shape[0], at % inv_freq.shape[0]
        if n < positions.shape[0]:
            c, s = cos_sin(positions[n], inv_freq[f])
            cos[n, f] = c
            sin[n, f] = s

    @cute.jit
    def launch(positions: Any, inv_freq: Any, cos: Any, sin: Any, stream: Any) -> None:
        grid = cute.ceil_div(positions.shape[0] * inv_freq.shape[0], THREADS)
        kernel(positions, inv_freq, cos, sin).launch(grid=[grid, 1, 1], block=[THREADS, 1, 1], stream=stream)

    n, f = cute.sym_int(), cute.sym_int()
    integer = cutlass.Int32 if wide.bits == 32 else cutlass.Int64
    one, two = fake(integer, n, align=8), fake(cutlass.Float32, n, f, align=4)
    return launch, (one, fake(cutlass.Float32, f, align=4), two, two, fake_stream())


def errors(positions: torch.Tensor, inv_freq: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Largest errors of cos and sin in units of the last place of the right float32."""
    angle = (positions.float()[:, None] * inv_freq).double().cpu().numpy()
    worst = []
    for got, exact in zip(found, (np.cos(angle), np.sin(angle)), strict=True):
        unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        worst.append(float((np.abs(got.cpu().numpy().astype(np.float64) - exact) / unit).max()))
    return worst[0], worst[1]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_angles_of_positions_up_to_a_million(table: str, dtype: torch.dtype) -> None:
    """Random ones, both ends, and those whose angle lies nearest to a multiple of pi / 2, where a reduction loses most."""
    inv_freq = TABLES[table]
    every = torch.arange(2**20 + 1)
    g = torch.Generator().manual_seed(0)
    chosen = [every[:64], every[-64:], torch.randint(0, 2**20, (1000,), generator=g)]
    for frequency in inv_freq[::3]:
        quarter = (every[1:].float() * frequency).double().numpy() / (np.pi / 2)
        far = torch.from_numpy(np.where(quarter < 0.5, 1.0, np.abs(quarter - np.rint(quarter))))
        chosen.append(1 + far.topk(16, largest=False).indices)
    positions = torch.cat(chosen).to(dtype)
    with simulating("sm_90a"):
        found = tabulated(positions, inv_freq)
    assert max(errors(positions, inv_freq, found)) < ULPS


def test_any_angle_of_the_range() -> None:
    """Angles that are no table's: position 1 times random numbers up to 2^20, evenly and by magnitude."""
    g = torch.Generator().manual_seed(1)
    even = torch.rand(30_000, generator=g) * 2**20
    spread = torch.exp2(torch.rand(30_000, generator=g) * 50 - 30)
    angles, one = torch.cat([even, spread, torch.zeros(1)]), torch.ones(1, dtype=torch.int32)
    with simulating("sm_100a"):
        cos, sin = tabulated(one, angles)
    assert max(errors(one, angles, (cos, sin))) < ULPS
    assert cos[0, -1] == 1.0 and sin[0, -1] == 0.0
    assert ((cos.double().square() + sin.double().square() - 1).abs() < 2.0**-22).all()


@pytest.mark.gpu
@pytest.mark.parametrize("table", TABLES)
def test_every_position_on_the_gpu(table: str) -> None:
    inv_freq = TABLES[table]
    for part in torch.arange(2**20 + 1).split(2**17):
        found = tabulated(part.cuda(), inv_freq.cuda())
        assert max(errors(part, inv_freq, found)) < ULPS


def test_the_reference_rotates_by_these_angles() -> None:
    """cos + i sin is what `reference.rope` makes of the pair (1, 0)."""
    positions, inv_freq = torch.tensor([0, 1, 77, 2**20 - 1]), TABLES["entries"]
    with simulating("sm_90a"):
        cos, sin = tabulated(positions, inv_freq)
    turned = rope(torch.tensor([1.0, 0.0]).repeat(32).expand(4, 64), positions, inv_freq).unflatten(-1, (32, 2))
    assert (torch.stack((cos, sin), -1) - turned).abs().max() < 2.0**-23
