"""Hopper's linear with NVFP4 weights and BF16 activations, in the simulator and on the GPU, against float64 products."""

from __future__ import annotations

import pytest
import torch

from dsv4lab import sim
from dsv4lab.formats import MXFP4, NVFP4, PackedWeight
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.gemm.w4a16.api import linear_w4a16, prepare
from dsv4lab.kernels.gemm.w4a16.config import SHARED_BYTES, W4A16Config, choose
from dsv4lab.reference import quant

ARCH = "sm_90a"
F32_BOUND = 2.0**-18  # of the largest output: exact products, float32 sums
GPU_BOUND = 2.0**-15  # the tensor core truncates sums: up to 2^-22 of the largest one in each of K / 16 steps
BF16_BOUND = 2.0**-8


def random_weight(n: int, k: int, seed: int) -> PackedWeight:
    """Every code, and scales from zero and the smallest denormal to the largest."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=g)
    scale = torch.randint(0x30, 0x50, (n, k // 16), dtype=torch.uint8, generator=g)
    scale[:, ::5] = torch.randint(0, 9, scale[:, ::5].shape, dtype=torch.uint8, generator=g)
    scale[0, 0] = 0x7E
    return PackedWeight(NVFP4, codes, scale.view(torch.float8_e4m3fn), torch.tensor(0.37))


def worst(y: torch.Tensor, x: torch.Tensor, weight: PackedWeight) -> float:
    want = x.double() @ quant.dequantize(weight).double().t()
    return float((y.double() - want).abs().max() / want.abs().max())


def run(m: int, n: int, k: int, config: W4A16Config | None, out: torch.dtype, multiprocessors: int = 3, **how: object) -> float:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
    weight = random_weight(n, k, n + k)
    sim.enable(ARCH, multiprocessors=multiprocessors)
    with sim.simulating(ARCH, **how), running_on(sim.Host(ARCH)):  # type: ignore[arg-type]
        return worst(linear_w4a16(x, prepare(weight), out_dtype=out, config=config), x, weight)


SHAPES = [
    (1, 64, 128, W4A16Config("f32", 8, 1, 2, 2)),  # the smallest there is
    (5, 320, 512, W4A16Config("f32", 8, 2, 4, 3, streamed=True)),  # a row tile half empty, tiles shared by CTAs
    (13, 192, 1024, W4A16Config("f32", 16, 1, 2, 2, streamed=True)),  # tiles of three CTAs and more
    (3, 512, 256, W4A16Config("f32", 8, 4, 4, 2)),
    (70, 192, 384, W4A16Config("f32", 64, 2, 1, 3)),  # by warpgroups, two token tiles, one slice a stage
    (300, 128, 256, W4A16Config("f32", 256, 2, 1, 4)),
    (33, 128, 512, W4A16Config("f32", 32, 2, 2, 3, streamed=True)),
]


@pytest.mark.parametrize(("m", "n", "k", "config"), SHAPES)
def test_products_are_right_at_every_edge(m: int, n: int, k: int, config: W4A16Config) -> None:
    assert run(m, n, k, config, torch.float32) < F32_BOUND


@pytest.mark.parametrize("schedule", ["lazy", "random"])
@pytest.mark.parametrize("config", [SHAPES[1][3], SHAPES[4][3]])
def test_any_schedule_and_no_race(config: W4A16Config, schedule: str) -> None:
    checks = sim.Checks(races=True)
    assert run(9, 128, 512, config, torch.float32, schedule=schedule, seed=3, checks=checks) < F32_BOUND


def test_bf16_output_and_the_chosen_configuration() -> None:
    assert run(6, 192, 512, None, torch.bfloat16) < BF16_BOUND


@pytest.mark.parametrize(("n", "k"), [(32768, 1024), (65536, 1536), (4096, 8192), (1024, 4096), (129280, 7168), (512, 4096)])
def test_choices_fit_and_cover_the_model(n: int, k: int) -> None:
    for m in (1, 3, 8, 16, 64, 129, 1024, 8192):
        config = choose(m, n, k, "bf16")
        config.check()
        assert config.shared_bytes <= SHARED_BYTES and k % (64 * config.chunks) == 0
        assert config.tokens >= min(m, 256) / 2 or config.tokens == 8


def test_bad_input_is_refused() -> None:
    weight = random_weight(64, 128, 0)
    prepared = prepare(weight)
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    assert prepared.shape == (64, 128) and prepared.nbytes == weight.nbytes
    for wrong, message in (
        (x.float(), "x must be bfloat16"),
        (x[:, :64], r"x must be contiguous \(M, 128\)"),
        (x.t().contiguous().t(), r"x must be contiguous"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            linear_w4a16(wrong, prepared)
    with pytest.raises(ValueError, match="needs CUDA tensors, or the simulator"):
        linear_w4a16(x, prepared)
    with pytest.raises(ValueError, match=r"N % 64 == 0 and K % 128 == 0, got \(48, 128\)"):
        prepare(random_weight(48, 128, 0))
    with pytest.raises(ValueError, match="weight must be nvfp4, got mxfp4"):
        prepare(PackedWeight(MXFP4, weight.codes, weight.scale))
    with pytest.raises(ValueError, match="stages must be >= 2 and fit"):
        W4A16Config("bf16", 256, 2, 2, 9).check()


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m", [1, 3, 8, 16, 64, 129, 1024])
def test_on_the_gpu(m: int, seed: int) -> None:
    for n, k in ((4096, 1024), (1024, 4096), (320, 7168)):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16()
        weight = random_weight(n, k, seed)
        on_gpu = prepare(weight.to("cuda"))
        y = linear_w4a16(x.cuda(), on_gpu, out_dtype=torch.float32)
        error = worst(y.cpu(), x, weight)
        assert error < GPU_BOUND, (n, k, error, choose(m, n, k, "f32"))
        assert torch.equal(y, linear_w4a16(x.cuda(), on_gpu, out_dtype=torch.float32))  # not a matter of timing


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_inputs() -> None:
    weight = random_weight(4096, 1024, 0)
    on_gpu, x = prepare(weight.to("cuda")), torch.zeros(5, 1024, dtype=torch.bfloat16, device="cuda")
    linear_w4a16(x, on_gpu)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_w4a16(x, on_gpu)
    for seed in range(3):
        new = torch.randn(5, 1024, generator=torch.Generator().manual_seed(seed)).bfloat16()
        x.copy_(new)
        graph.replay()
        assert worst(y.cpu(), new, weight) < BF16_BOUND
