"""Hopper's linear with stored weights of every format, in the simulator and on the GPU, against float64 products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dsv4lab import ops, sim
from dsv4lab.formats import F32, FP8_BLOCK, PackedWeight, get_format
from dsv4lab.kernels.gemm.mixed.api import linear
from dsv4lab.kernels.gemm.mixed.config import SHARED_BYTES, MixedConfig, choose
from dsv4lab.kernels.gemm.mixed.layout import PreparedWeight, prepare
from dsv4lab.kernels.gemm.mixed.prepared import prepared
from dsv4lab.reference import moe, quant
from tests.kernels.mixed import BF16_BOUND, F32_BOUND, FORMATS, GPU_BOUND, products, random_weight, trained_weight, worst
from tests.kernels.simulated import simulating

ARCH = "sm_90a"


def simulated(call: Callable[[], torch.Tensor], multiprocessors: int = 4, **how: object) -> torch.Tensor:
    with simulating(ARCH, multiprocessors=multiprocessors, **how):
        return call()


def tokens_of(m: int, *k: int) -> torch.Tensor:
    return torch.randn(m, *k, generator=torch.Generator().manual_seed(m)).bfloat16()


def run(m: int, n: int, k: int, config: MixedConfig, **how: object) -> float:
    x, weight = tokens_of(m, k), random_weight(config.format, n, k, seed=n + k)
    out = {"bf16": torch.bfloat16, "f32": torch.float32}[config.out]
    y = simulated(lambda: linear(x, prepare(weight), out_dtype=out, config=config), **how)
    return worst(y, products(x, weight))


FEW = MixedConfig("nvfp4", "f32", 8, 4, 2, 2, splits=2)
SHAPES = [
    (1, 64, 128, FEW),  # one tile, one token
    (5, 328, 640, replace(FEW, cluster=2)),  # a row tile half empty, a slab half empty; the CTAs' shares of K differ
    (13, 192, 1024, replace(FEW, tokens=16, slabs=1, chunks=4, splits=4)),
    (16, 96, 1024, replace(FEW, tokens=16, slabs=2, chunks=8, splits=8, per_warp=2)),
    (3, 200, 200, replace(FEW, slabs=8, splits=1)),  # K ends inside a tile of a pair
    (1, 328, 256, replace(FEW, slabs=8, splits=1)),  # CTAs without a tile
    (13, 264, 1024, replace(FEW, tokens=16, cluster=4)),  # several tiles of a cluster
    (33, 128, 512, MixedConfig("nvfp4", "f32", 32, 8, 2, 2, cluster=2)),  # by warpgroups, two token tiles
    (70, 136, 328, MixedConfig("nvfp4", "f32", 64, 4, 1, 3)),  # one slice a stage
    (300, 128, 256, MixedConfig("nvfp4", "f32", 256, 8, 1, 3, (64, 224))),  # a narrow product for the second tile
]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("m", "n", "k", "config"), SHAPES)
def test_products_are_right_at_every_edge(m: int, n: int, k: int, config: MixedConfig, fmt: str) -> None:
    if config.tokens == 256 and fmt in ("mxfp4", "bf16"):
        pytest.skip("half a minute of simulated wgmma; two formats are enough")
    k = k // 32 * 32 if fmt == "mxfp4" else k // 16 * 16 if fmt == "nvfp4" else k
    stages = config.stages if fmt != "bf16" or config.tokens < 256 else 2
    assert run(m, n, k, replace(config, format=fmt, stages=stages)) < F32_BOUND


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("m", [64, 65, 96, 97, 127, 128, 129, 192])
def test_the_last_tiles_of_tokens_have_all_rows_between_them(m: int, cluster: int) -> None:
    config = MixedConfig("nvfp4", "bf16", 64, 4, 2, 3, (32,), cluster=cluster)
    assert run(m, 64, 512, config) < BF16_BOUND


@pytest.mark.parametrize(
    ("m", "config"),
    [
        (9, SHAPES[1][3]),
        (9, SHAPES[3][3]),
        (13, replace(SHAPES[3][3], slabs=16, chunks=2, splits=2)),
        (70, SHAPES[6][3]),
        (140, replace(SHAPES[8][3], tokens=192, narrow=(64, 160))),
    ],
)
@pytest.mark.parametrize("schedule", ["lazy", "random"])
def test_any_schedule_and_no_race(m: int, config: MixedConfig, schedule: str) -> None:
    error = run(m, 128, 512, config, multiprocessors=2, schedule=schedule, seed=3, checks=sim.Checks(races=True))
    assert error < F32_BOUND


def test_bf16_output_factors_and_the_chosen_configuration() -> None:
    x, weight, factor = tokens_of(6, 512), random_weight("nvfp4", 192, 512, seed=1), torch.linspace(0.5, 2, 6)
    y = simulated(lambda: linear(x, prepare(weight), out_dtype=torch.bfloat16, factor=factor))
    assert worst(y, products(x, weight) * factor[:, None]) < BF16_BOUND


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_group_has_its_own_matrix(fmt: str) -> None:
    x, weight, factor = tokens_of(20, 3, 256), random_weight(fmt, 3 * 64, 256, seed=2), torch.rand(20, 3) + 0.5
    y = simulated(lambda: linear(x, prepare(weight), out_dtype=torch.float32, factor=factor))
    want = torch.einsum("mgk,gnk->mgn", x.double(), quant.dequantize(weight).double().view(3, 64, 256))
    assert y.shape == (20, 3, 64) and worst(y, want * factor[..., None]) < F32_BOUND


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_pair_ends_in_swiglu(fmt: str, m: int) -> None:
    x, gate, up = tokens_of(m, 256), trained_weight(fmt, 136, 256, seed=3), trained_weight(fmt, 136, 256, seed=4)
    if gate.global_scale is not None:
        up.global_scale = gate.global_scale * 3  # not the same for both
    y = simulated(lambda: linear(x, prepare(gate, up), out_dtype=torch.bfloat16, limit=1.5))
    want = moe.clamped_swiglu(products(x, gate).bfloat16(), products(x, up).bfloat16(), limit=1.5)
    assert y.shape == (m, 136) and worst(y, want) < 2 * BF16_BOUND


@pytest.mark.parametrize("fmt", FORMATS[:3])
def test_a_nan_in_a_weight_stays_visible(fmt: str) -> None:
    weight = random_weight(fmt, 16, 128, seed=5)
    part = weight.codes if fmt == "fp8_block" else weight.scale
    assert part is not None
    part.view(torch.uint8)[0, 0] = 0x7F if fmt != "mxfp4" else 0xFF
    y = simulated(lambda: linear(tokens_of(2, 128), prepare(weight), out_dtype=torch.float32))
    assert y.isnan().all()


@pytest.mark.parametrize(
    ("n", "k"), [(32768, 1024), (65536, 1536), (4096, 8192), (1024, 4096), (129280, 7168), (512, 4096), (4096, 4224), (8, 128)]
)
@pytest.mark.parametrize("fmt", FORMATS)
def test_choices_fit_and_cover_the_model(n: int, k: int, fmt: str) -> None:
    for m in (1, 3, 8, 16, 24, 40, 64, 129, 257, 640, 1024, 4097, 8192):
        config = choose(fmt, "bf16", m, n, k)
        config.check()
        assert config.shared_bytes <= SHARED_BYTES and k % (64 * config.chunks) == 0
        assert not config.alternates or k // 64 % (2 * config.cluster) == 0
        assert (m <= config.tokens) == (m <= 16) or m > 16
        assert config.stages >= (3 if config.tokens >= 128 else 2)


def test_few_tokens_take_what_was_measured() -> None:
    """(slabs, cluster) of NVFP4 matrices."""
    for m, n, k, want in (
        (1, 32768, 1024, (8, 1)),
        (8, 32768, 1024, (16, 1)),
        (16, 65536, 1536, (16, 1)),
        (1, 65536, 1536, (8, 1)),  # two tiles for a CTA
        (1, 7168, 16384, (2, 1)),  # two CTAs a multiprocessor
        (8, 7168, 16384, (8, 2)),
        (16, 7168, 16384, (8, 2)),
        (8, 7168, 3072, (4, 1)),
        (4, 4096, 8192, (2, 1)),
        (8, 4096, 8192, (4, 2)),
        (16, 4096, 8192, (4, 2)),
        (16, 4096, 4096, (2, 1)),
        (4, 1536, 7168, (2, 2)),
        (8, 1536, 7168, (4, 4)),
        (16, 512, 4096, (2, 4)),
    ):
        config = choose("nvfp4", "bf16", m, n, k)
        assert (config.slabs, config.cluster) == want
    assert choose("nvfp4", "bf16", 16, 4096, 8192).stages == 6
    assert choose("nvfp4", "bf16", 4, 32768, 1024).stages == 8  # all of K


def test_more_tokens_take_what_was_measured() -> None:
    """(tokens, slabs, cluster) of NVFP4 matrices that were best of some twenty, or within a hundredth of it."""
    for m, n, k, want in (
        (32, 512, 7168, (32, 4, 4)),
        (32, 32768, 1024, (32, 8, 1)),
        (64, 1024, 4096, (64, 4, 4)),
        (64, 4096, 8192, (64, 4, 2)),
        (129, 4096, 2048, (128, 4, 1)),
        (512, 4096, 2048, (128, 8, 1)),
        (1024, 1024, 4096, (128, 4, 1)),
        (1024, 7168, 16384, (256, 8, 1)),
    ):
        config = choose("nvfp4", "bf16", m, n, k)
        assert (config.tokens, config.slabs, config.cluster) == want, (m, n, k)


def test_a_prepared_weight_is_remade_when_the_weight_changes() -> None:
    weight = random_weight("nvfp4", 64, 128, seed=6)
    first = prepared(weight)
    assert prepared(weight) is first and first.nbytes <= weight.nbytes + 8
    assert weight.scale is not None
    weight.scale.view(torch.uint8)[1, 1] ^= 1
    assert prepared(weight) is not first
    other = random_weight("nvfp4", 64, 128, seed=6)
    assert prepared(other) is not first and prepared(weight, other).paired


def test_a_change_that_nobody_sees_is_told_of() -> None:
    with torch.inference_mode():
        weight = random_weight("nvfp4", 64, 128, seed=6)
        first = prepared(weight)
        weight.codes ^= 1
    assert prepared(weight) is first
    ops.forget_prepared()
    second = prepared(weight)
    assert second is not first and prepared(weight) is second
    assert not second.records.equal(first.records)


def test_bad_input_is_refused() -> None:
    weight = random_weight("nvfp4", 64, 128, seed=0)
    ready, x = prepare(weight), torch.zeros(2, 128, dtype=torch.bfloat16)
    assert ready.shape == (1, 64, 128)

    def call(x: torch.Tensor, ready: PreparedWeight = ready, **how: object) -> torch.Tensor:
        return linear(x, ready, out_dtype=torch.bfloat16, **how)  # type: ignore[arg-type]

    for wrong, message in (
        (x.float(), "x must be bfloat16"),
        (x[:, :64], r"x must be contiguous \(M, 128\)"),
        (x.t().contiguous().t(), r"x must be contiguous"),
        (torch.zeros(2, 3, 128, dtype=torch.bfloat16), r"N % 192 == 0 for 3 groups"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call(wrong)
    with pytest.raises(ValueError, match="needs CUDA tensors, or the simulator"):
        call(x)
    with pytest.raises(ValueError, match="limit must be given for a paired weight alone"):
        call(x, limit=1.0)
    with pytest.raises(ValueError, match=r"config must have \(format, paired, scaled, slotted, grouped, two\)"):
        call(x, config=replace(FEW, format="bf16"))
    with pytest.raises(ValueError, match=r"N % 8 == 0 and K % 8 == 0, got \(12, 128\)"):
        prepare(random_weight("nvfp4", 12, 128, seed=0))
    with pytest.raises(ValueError, match=r"weight must be one of nvfp4, mxfp4, fp8_block, bf16, got f32"):
        prepare(PackedWeight(F32, torch.zeros(16, 128)))
    with pytest.raises(ValueError, match="gate and up must have one format and shape"):
        prepare(weight, random_weight("nvfp4", 32, 128, seed=0))
    block = random_weight("fp8_block", 128, 128, seed=0)
    assert block.scale is not None
    with pytest.raises(TypeError, match=r"scale of an fp8_block weight must be float8_e8m0fnu, got torch\.float32"):
        prepare(PackedWeight(FP8_BLOCK, block.codes, block.scale.float()))
    for choice, message in (
        (dict(format="f32"), "format must be one of"),
        (dict(tokens=24), "tokens must be 8, 16, 32"),
        (dict(slabs=3), "slabs must be"),
        (dict(chunks=3), "chunks must be"),
        (dict(cluster=3), "cluster must be"),
        (dict(stages=99), "stages must be >= 2 and fit"),
        (dict(slotted=True), "slotted needs a grouped"),
        (dict(scaled="token"), "scaled must be no, row or matrix"),
        (dict(tokens=64, splits=2), "splits must be 1"),
        (dict(grouped=True, cluster=2), "cluster must be 1 for a grouped"),
        (dict(single=True), "single needs a grouped configuration of at most 16 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(FEW, **choice).check()  # type: ignore[arg-type]
    odd = MixedConfig("nvfp4", "f32", 256, 8, 1, 3, cluster=2)
    with pytest.raises(ValueError, match="a cluster that leaves pairs of tiles of K to each CTA, got 2"):
        run(5, 128, 384, odd)


MODEL = [(4096, 1024), (1024, 4096), (320, 7168), (7168, 3072)]


def test_every_pair_of_codes_at_every_place_of_a_word_is_exact() -> None:
    """A column's weights are all 256 pairs of neighbouring codes, beside others at random; x picks them out one by one."""
    random = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 256, (256, 64), dtype=torch.uint8, generator=random)
    columns = torch.tensor([0, 5, 26, 39])  # bytes with all four places between them
    for at in columns:
        codes[:, at] = torch.arange(256, dtype=torch.uint8)
    scale = torch.full((256, 8), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = PackedWeight(get_format("nvfp4"), codes, scale, torch.ones(()))
    x = torch.zeros(8, 128, dtype=torch.bfloat16)
    for token, at in enumerate(columns.tolist()):
        x[2 * token, 2 * at], x[2 * token + 1, 2 * at + 1] = 1, 1
    y = simulated(lambda: linear(x, prepare(weight), out_dtype=torch.float32, config=FEW))
    assert torch.equal(y.double(), products(x, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("m", [1, 3, 8, 16, 64, 129, 1024, 4097, 8192])
def test_on_the_gpu(m: int, fmt: str, seed: int) -> None:
    for n, k in MODEL[: 2 if m > 1024 else 4]:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()
        weight = random_weight(fmt, n, k, seed=seed).to("cuda")
        ready = prepare(weight)
        torch.cuda.synchronize()
        y = linear(x, ready, out_dtype=torch.float32)
        error = worst(y, products(x, weight))
        assert error < GPU_BOUND, (n, k, error, choose(fmt, "f32", m, n, k))
        assert torch.equal(y, linear(x, ready, out_dtype=torch.float32))  # not a matter of timing


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "groups", "rows", "k"), [("flash o_a", 8, 1024, 4096), ("pro o_a", 16, 1024, 4096)])
def test_groups_on_the_gpu(name: str, groups: int, rows: int, k: int, seed: int) -> None:
    weight = random_weight("nvfp4", groups * rows, k, seed=seed).to("cuda")
    ready, dense = prepare(weight), quant.dequantize(weight).double().view(groups, rows, k)
    torch.cuda.synchronize()
    for m in (1, 16, 129, 1024):
        x = torch.randn(m, groups, k, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()
        want = torch.stack([x[:, g].double() @ dense[g].t() for g in range(groups)], dim=1)
        assert worst(linear(x, ready, out_dtype=torch.float32), want) < GPU_BOUND


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_inputs() -> None:
    weight = random_weight("nvfp4", 4096, 1024, seed=0).to("cuda")
    ready, x = prepare(weight), torch.zeros(5, 1024, dtype=torch.bfloat16, device="cuda")
    linear(x, ready, out_dtype=torch.bfloat16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, ready, out_dtype=torch.bfloat16)
    for seed in range(3):
        new = torch.randn(5, 1024, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()
        x.copy_(new)
        graph.replay()
        assert worst(y, products(new, weight)) < BF16_BOUND
