"""The Blackwell NVFP4 linear, in the simulator, against float64 products of what its codes and scales stand for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from dsv4lab import ops, sim
from dsv4lab.formats import NVFP4, PackedWeight, to_atom128x4
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.gemm.w4a4.api import linear_w4a4
from dsv4lab.kernels.gemm.w4a4.config import W4A4Config
from dsv4lab.reference import gemm, quant
from tests.kernels.simulated import simulating

ARCH = "sm_100a"
F32_BOUND = 2.0**-20  # of the largest output: sums in float32, products exact
BF16_BOUND = 2.0**-8


@dataclass(frozen=True)
class Problem:
    """Random operands with a different global scale for every row, and their product in float64."""

    operands: tuple[torch.Tensor, ...]
    want: torch.Tensor


def problem(m: int, n: int, k: int) -> Problem:
    g = torch.Generator().manual_seed(m + n + k)
    x, w = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g) * 0.02
    row_scale = quant.nvfp4_global_scale(x.abs().amax(-1))
    x_codes, x_scale, _ = quant.quantize_nvfp4(x[:, None], global_scale=row_scale)
    weight = quant.quantize(w, "nvfp4")
    assert weight.scale is not None and weight.global_scale is not None
    one = torch.tensor(1.0)
    left = quant.dequantize_nvfp4(x_codes[:, 0], x_scale[:, 0], one).double() * row_scale.double()[:, None]
    right = quant.dequantize_nvfp4(weight.codes, weight.scale, one).double() * weight.global_scale.double()
    operands = (
        x_codes[:, 0].contiguous(),
        to_atom128x4(x_scale[:, 0]),
        row_scale,
        weight.codes,
        to_atom128x4(weight.scale),
        weight.global_scale,
    )
    return Problem(operands, left @ right.t())


def run(case: Problem, config: W4A4Config, **settings: object) -> torch.Tensor:
    out = {"bf16": torch.bfloat16, "f32": torch.float32}[config.out]
    with simulating(ARCH, **settings):
        return linear_w4a4(*case.operands, out_dtype=out, config=config)


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 8, 32),  # the smallest there is
        (128, 128, 256),  # one tile exactly
        (131, 136, 160),  # tails everywhere, K within one tile
        (3, 264, 1056),  # several K tiles, the last one partial
        (300, 640, 1024),  # 15 tiles on 4 multiprocessors: more tiles than CTAs
        (5, 128, 4096),  # K of Flash's hidden size
        (2, 128, 7168),  # and of Pro's
    ],
)
def test_products_are_right_at_every_edge(m: int, n: int, k: int) -> None:
    case = problem(m, n, k)
    sim.enable(ARCH, multiprocessors=4)
    assert worst(run(case, W4A4Config("f32")), case.want) < F32_BOUND
    assert worst(run(case, W4A4Config("bf16")), case.want) < BF16_BOUND


@pytest.mark.parametrize(
    "config",
    [
        W4A4Config("f32", stages=1),
        W4A4Config("f32", stages=2, accumulators=1),
        W4A4Config("f32", tile_n=256, stages=3, accumulators=1),
    ],
    ids=str,
)
def test_rings_of_every_length_hold_under_every_schedule(config: W4A4Config) -> None:
    case = problem(140, 384, 800)
    sim.enable(ARCH, multiprocessors=2)
    first = run(case, config)
    assert worst(first, case.want) < F32_BOUND
    for settings in ({"schedule": "lazy"}, {"schedule": "random", "seed": 1}, {"schedule": "random", "seed": 2}):
        assert torch.equal(run(case, config, **settings), first)


def test_nothing_is_found_by_exploring() -> None:
    case = problem(130, 136, 544)
    with sim.capture(ARCH) as launches, running_on(sim.Host(ARCH)):
        out = linear_w4a4(*case.operands, out_dtype=torch.float32)
    assert sim.explore(launches, seeds=3)
    assert worst(out, case.want) < F32_BOUND


def test_empty_sides_need_no_launch() -> None:
    case = problem(2, 8, 32)
    for rows, depth in ((0, 32), (2, 0)):
        x = torch.zeros(rows, depth // 2, dtype=torch.uint8)
        w = case.operands[3][:, : depth // 2].contiguous()
        scales = [to_atom128x4(torch.zeros(count, depth // 16).to(torch.float8_e4m3fn)) for count in (rows, 8)]
        got = linear_w4a4(x, scales[0], torch.ones(rows), w, scales[1], torch.tensor(1.0), out_dtype=torch.float32)
        assert got.shape == (rows, 8) and not got.any()


def test_wrong_arguments_are_named() -> None:
    x, x_scale, row_scale, w, w_scale, weight_scale = problem(2, 8, 32).operands

    def call(*operands: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
        linear_w4a4(*operands, out_dtype=dtype)

    with pytest.raises(TypeError, match=r"out_dtype must be bfloat16 or float32, got torch\.float16"):
        call(x, x_scale, row_scale, w, w_scale, weight_scale, dtype=torch.float16)
    with pytest.raises(ValueError, match="w must have N % 8 == 0, got N=7"):
        call(x, x_scale, row_scale, w[:7], w_scale, weight_scale)
    with pytest.raises(ValueError, match="same K, got 32 and 16"):
        call(x, x_scale, row_scale, w[:, :8].contiguous(), w_scale, weight_scale)
    with pytest.raises(ValueError, match="K % 32 == 0, got K=16"):
        call(x[:, :8].contiguous(), x_scale, row_scale, w[:, :8].contiguous(), w_scale, weight_scale)
    with pytest.raises(ValueError, match=r"w_scale of 8 rows and K=32 must be contiguous \(1, 1, 512\)"):
        call(x, x_scale, row_scale, w, w_scale[:0], weight_scale)
    with pytest.raises(ValueError, match=r"row_scale must be \(2,\)"):
        call(x, x_scale, row_scale[:1], w, w_scale, weight_scale)
    with pytest.raises(ValueError, match="needs CUDA tensors, or the simulator, got device cpu"):
        call(x, x_scale, row_scale, w, w_scale, weight_scale)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (W4A4Config("f16"), "out must be bf16 or f32, got 'f16'"),
        (W4A4Config(tile_n=64), "tile_n must be 128 or 256, got 64"),
        (W4A4Config(stages=6), "stages must be >= 1 and fit 232448 bytes"),
        (W4A4Config(tile_n=256, stages=2), "must fit 512 TMEM columns, got 560 with accumulators=2, tile_n=256"),
    ],
)
def test_impossible_choices_are_named(config: W4A4Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.check()


# ---- the operator ------------------------------------------------------------------------------------------------------
def weight_of(n: int, k: int) -> PackedWeight:
    return quant.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(3)) * 0.02, "nvfp4")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_runs_the_kernel_in_the_simulator(static: bool, dtype: torch.dtype) -> None:
    weight = weight_of(136, 288)
    x = torch.randn(67, 288, generator=torch.Generator().manual_seed(4)).to(dtype)
    if static:
        weight.input_scale = torch.tensor(0.0017)
    with ops.backend("sim", arch=ARCH) as simulated:
        got = ops.linear(x, weight, act="nvfp4", out_dtype=torch.float32)
    # the reference rounds quantised activations to x's dtype; in float32 both multiply the same numbers
    want = gemm.linear(x.float(), weight, act="nvfp4", out_dtype=torch.float32).double()
    assert worst(got, want) < F32_BOUND
    assert len(simulated.launches) == 2 and all(run.stats.instructions > 0 for run in simulated.launches)
    if not static:  # a static scale is not the global scale that a weight's own quantisation would have
        rounded = gemm.linear(x, weight, act="nvfp4", out_dtype=torch.float32)
        assert worst(got, rounded.double()) < (F32_BOUND if dtype is torch.float32 else 2.0**-8)


def test_the_operator_says_what_it_does_not_take() -> None:
    x, weight = torch.randn(3, 64), weight_of(8, 64)
    with ops.backend("sim", arch=ARCH):
        with pytest.raises(ops.MissingKernel, match="weight and act must be nvfp4, got a nvfp4 weight and act fp8"):
            ops.linear(x, weight, act="fp8")
        with pytest.raises(ops.MissingKernel, match=r"x and the output must be bfloat16 or float32, got torch\.float64"):
            ops.linear(x.double(), weight, act="nvfp4")
        with pytest.raises(ops.MissingKernel, match=r"K % 32 == 0 and N % 8 == 0, got .3, 48., N=8"):
            ops.linear(x[:, :48], weight_of(8, 48), act="nvfp4")
        with pytest.raises(ops.MissingKernel, match=r"lm_head has no kernel for sm_100a .has: sm_90a."):
            ops.lm_head(x, x)
        with pytest.raises(ops.MissingKernel, match=r"dequantize has no kernel for sm_100a .has: none."):
            ops.dequantize(weight)
    assert NVFP4.name == weight.format.name
