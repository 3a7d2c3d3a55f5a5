"""The head that draws without filters: the sampler's tokens from our own head's logits, to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4lab import ops, sim
from dsv4lab.formats import BF16, PackedWeight
from dsv4lab.kernels.gemm.mixed.api import Draws, linear, partial_sample
from dsv4lab.kernels.gemm.mixed.config import MixedConfig, choose
from dsv4lab.kernels.gemm.mixed.layout import prepare
from dsv4lab.kernels.head.greedy.api import pick_largest
from dsv4lab.kernels.head.sampler import api
from dsv4lab.ops.head import lm_head_sample
from dsv4lab.reference import gemm, head, sampling
from tests.kernels.test_lm_head_greedy import simulated

ARCH = "sm_90a"
FEW = MixedConfig("bf16", "sample", 8, 4, 2, 2, splits=2)
CONFIGS = [
    (1, 64, 128, FEW),  # one tile, one token
    (5, 200, 640, replace(FEW, cluster=2)),  # a tile and a slab half empty; the CTAs' shares of K differ
    (13, 72, 1024, replace(FEW, tokens=16, slabs=2, chunks=8, splits=8, per_warp=2)),
    (3, 264, 200, replace(FEW, slabs=16, splits=1, chunks=1)),  # two parts a tile; K ends inside a pair of tiles
]


def operands(m: int, vocab: int, depth: int) -> tuple[torch.Tensor, torch.Tensor, Draws]:
    """Temperatures from greedy to hot, one below the smallest; seeds and positions of all bits."""
    g = torch.Generator().manual_seed(m)
    x, weight = torch.randn(m, depth, generator=g).bfloat16(), torch.randn(vocab, depth, generator=g).bfloat16()
    temperature = torch.tensor([0.7, 0.0, 40.0, 1e-7, 1.0, 300.0])[torch.arange(m) % 6]
    seed, position = (torch.randint(-(2**63), 2**63 - 1, (m,), generator=g) for _ in range(2))
    return x * depth**-0.5, weight, Draws(temperature, seed, position)


def drawn(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """By the sampler's reference, whose noise is the kernel's to the bit."""
    return sampling.sample(logits, temperature=draws.temperature, seed=draws.seed, position=draws.position)


def both(x: torch.Tensor, weight: torch.Tensor, draws: Draws, config: MixedConfig | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, our own logits), by one configuration."""
    ready = prepare(PackedWeight(BF16, weight))
    if x.is_cuda:
        torch.cuda.synchronize()
    ids = pick_largest(partial_sample(x, ready, draws, config=config))
    return ids, linear(x, ready, out_dtype=torch.float32, config=replace(config, out="f32") if config else None)


@pytest.mark.parametrize(("m", "vocab", "depth", "config"), CONFIGS)
def test_tokens_are_the_sampler_s(m: int, vocab: int, depth: int, config: MixedConfig) -> None:
    x, weight, draws = operands(m, vocab, depth)
    x[-1] = 0  # equal logits: the noise alone decides
    ids, logits = simulated(lambda: both(x, weight, draws, config))
    assert torch.equal(ids, drawn(logits, draws)) and ids.dtype == torch.int64
    if m > 1:
        assert not torch.equal(ids, logits.argmax(-1))  # noise has a say


@pytest.mark.parametrize("schedule", ["lazy", "random"])
def test_any_schedule_and_no_race(schedule: str) -> None:
    how: dict[str, Any] = dict(schedule=schedule, seed=3, checks=sim.Checks(races=True))
    x, weight, draws = operands(9, 72, 256)
    ids, logits = simulated(lambda: both(x, weight, draws, CONFIGS[1][3]), **how)
    assert torch.equal(ids, drawn(logits, draws))


@pytest.mark.parametrize(
    ("m", "dtype", "launches"), [(0, torch.bfloat16, 0), (6, torch.bfloat16, 2), (17, torch.bfloat16, 2), (5, torch.float32, 2)]
)
def test_the_operator_is_the_reference(m: int, dtype: torch.dtype, launches: int) -> None:
    """Few rows of bf16 by the product, others by the sampler."""
    x, weight, draws = operands(m, 200, 256)
    args = (x.to(dtype), weight, draws.temperature, draws.seed, draws.position)
    with ops.backend("sim", arch=ARCH) as run:
        ids = lm_head_sample(*args)
    how = dict(temperature=draws.temperature, seed=draws.seed, position=draws.position)
    assert torch.equal(ids, head.lm_head_sample(x.to(dtype), weight, **how)) and len(run.launches) == launches


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x, weight, draws = operands(7, 136, 128)
    with ops.backend("sim", arch=ARCH):
        whole = lm_head_sample(x, weight, draws.temperature, draws.seed, draws.position)
        last = slice(5, 7)
        part = lm_head_sample(x[last], weight, draws.temperature[last], draws.seed[last], draws.position[last])
    assert torch.equal(whole[last], part)


@pytest.mark.parametrize("vocab", [129_280, 8])
def test_configurations_are_those_of_the_logits(vocab: int) -> None:
    for depth in (4096, 7168):
        for m in (1, 3, 8, 16):
            config = choose("bf16", "sample", m, vocab, depth)
            config.check()
            assert replace(config, out="f32") == choose("bf16", "f32", m, vocab, depth)


def test_bad_input_is_refused() -> None:
    x, weight, draws = operands(2, 64, 128)
    ready = prepare(PackedWeight(BF16, weight))
    for call, message in (
        (lambda: partial_sample(x.repeat(9, 1), ready, draws), "x must have at most 16 rows, got 18"),
        (lambda: partial_sample(x[:1], ready, draws), r"temperature must be contiguous \(1,\), got \(2,\)"),
        (lambda: partial_sample(x, ready, draws, config=replace(FEW, out="argmax")), "config must have out = sample"),
        (lambda: replace(FEW, scaled="row").check(), "sample needs one matrix's products as they are"),
        (lambda: replace(FEW, tokens=64, splits=1).check(), "tokens must be at most 16 for sample"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="seed must be int64, got"):
        partial_sample(x, ready, replace(draws, seed=draws.seed.int()))
    args = (torch.zeros(9, 128).bfloat16(), draws.temperature, draws.seed, draws.position)
    with ops.backend("sim", arch=ARCH), pytest.raises(ops.MissingKernel, match="N % 8 == 0"):
        lm_head_sample(x, *args)


# ---- on the GPU --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m", [1, 3, 8, 16, 17, 129])
@pytest.mark.parametrize("depth", [4096, 7168])
def test_on_the_gpu(depth: int, m: int, seed: int) -> None:
    """The sampler's own tokens from our logits, in a graph with new inputs too."""
    x, _, draws = operands(m, 8, depth)
    x, (temperature, key, position) = x.cuda(), (t.cuda() for t in (draws.temperature, draws.seed + seed, draws.position))
    weight = torch.randn(129_280, depth, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").bfloat16()
    off = torch.zeros_like(key), torch.ones_like(temperature)

    def want() -> torch.Tensor:
        return api.sample(ops.lm_head(x, weight), temperature, *off, key, position)

    assert torch.equal(lm_head_sample(x, weight, temperature, key, position), want())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = lm_head_sample(x, weight, temperature, key, position)
    x.mul_(-3.0)
    position.add_(1)
    graph.replay()
    assert torch.equal(ids, want())
    logits = gemm.lm_head(x[:1], weight).cpu()  # the reference's, where it is not a near thing
    keys = logits / temperature[:1].cpu()[:, None] + sampling.gumbel_noise(key[:1].cpu(), position[:1].cpu(), 129_280)
    first, second = keys.topk(2).values[0]
    if first - second > 1e-3 and temperature[0] > 0:
        assert ids[0] == keys.argmax()
