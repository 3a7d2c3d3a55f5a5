"""Few tokens' grouped product 1 and the shared expert's, which quantise for the next product: as a quantiser behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from dsv4lab import sim
from dsv4lab.formats import BF16, PackedWeight
from dsv4lab.kernels.gemm.mixed.api import linear
from dsv4lab.kernels.gemm.mixed.config import MixedConfig, choose, choose_grouped, requantises
from dsv4lab.kernels.gemm.mixed.layout import prepare
from dsv4lab.kernels.moe import experts as module
from dsv4lab.kernels.moe.experts import experts, shared_expert
from dsv4lab.kernels.quant.rows.api import activation_values
from dsv4lab.reference import moe as reference
from tests.kernels.mixed import random_weight, routing, trained_weight
from tests.kernels.simulated import simulating

ARCH = "sm_90a"
LIMIT = 1.5


def simulated(call: Callable[[], Any], **how: object) -> Any:
    with simulating(ARCH, multiprocessors=3, **how):
        return call()


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """In every bit."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


FEW_TOKENS = MixedConfig("nvfp4", "bf16", 8, 4, 2, 3, splits=2, paired=True, requant=True)
CASES = [
    (5, 80, 128, FEW_TOKENS),  # the last tile has 16 of 32 columns
    (13, 48, 512, replace(FEW_TOKENS, tokens=16, slabs=2, per_warp=2, cluster=4)),  # the last of a CTA's lanes have no row
]


def quantised_and_not(m: int, n: int, k: int, config: MixedConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair's results, quantised by the product and by the quantiser behind it."""
    weight = prepare(trained_weight(config.format, n, k, seed=3), trained_weight(config.format, n, k, seed=4))
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
    scale = torch.tensor([3e-4])

    def run(requant: torch.Tensor | None) -> torch.Tensor:
        plan = replace(config, requant=requant is not None)
        return linear(x, weight, out_dtype=torch.bfloat16, limit=LIMIT, requant=requant, config=plan)

    return run(scale), activation_values(run(None), "nvfp4", scale)[0]


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
@pytest.mark.parametrize(("m", "n", "k", "config"), CASES)
def test_values_are_the_quantiser_s(m: int, n: int, k: int, config: MixedConfig, schedule: str) -> None:
    """In any schedule and without a race."""
    how = dict(schedule=schedule, seed=2, checks=sim.Checks(races=schedule != "eager"))
    assert equal(*simulated(lambda: quantised_and_not(m, n, k, config), **how))


def rare_blocks() -> torch.Tensor:
    """(8, 256) BF16 of every size: zeros, a few, tiny, vast and subnormal numbers."""
    g = torch.Generator().manual_seed(0)
    u = torch.randn(8, 256, generator=g)
    u[1] = 0
    u[1, ::40] = -1.0
    u[2] *= torch.logspace(-36, 36, 256)
    u[3] *= 1e-38
    u[4] *= 2.0**100
    u[5, :128] = -0.0
    u[6] *= 448.0
    return u.bfloat16()


def test_blocks_of_any_kind() -> None:
    """One-hot tokens give the numbers themselves, as 64 times u: infinities of a doubled one, NaN where gate is -infinity."""
    u = rare_blocks()
    gate, up = torch.full((256, 128), 64.0), torch.zeros(256, 128)
    up[:, :8] = u.t() / 64
    gate[17, 3], up[40, 4] = -(2.0**127), 1.5 * 2.0**127
    x = torch.eye(8, 128)
    x[3, 3] = x[4, 4] = 2.0
    weight = prepare(PackedWeight(BF16, gate.bfloat16()), PackedWeight(BF16, up.bfloat16()))

    def run(requant: torch.Tensor | None) -> torch.Tensor:
        return linear(x.bfloat16(), weight, out_dtype=torch.bfloat16, limit=float("inf"), requant=requant)

    h = simulated(lambda: run(None))
    assert h[3].isnan().any() and h[4].isinf().any() and (h[:3] == u[:3].float().bfloat16()).float().mean() > 0.9
    for size in (1.0, 3e-4, 2.0**-126, 2.0**-70, 1e37):
        scale = torch.tensor([size])
        assert equal(*simulated(lambda: (run(scale), activation_values(h, "nvfp4", scale)[0]))), size  # noqa: B023


# ---- the experts -------------------------------------------------------------------------------------------------------
def stacks(num_experts: int, hidden: int, inner: int) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
    """w1, w3, w2 in NVFP4 with calibrated scales, different ones."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    w1, w3, w2 = (trained_weight("nvfp4", num_experts, *shape, seed=i) for i, shape in enumerate(shapes))
    for weight in (w1, w3, w2):
        weight.input_scale = torch.linspace(1.0, 2.0, num_experts) * 3 / 2688
    return w1, w3, w2


def apart() -> Any:
    """Inside, products quantise nothing."""
    return mock.patch.object(module, "requantises", lambda *_, **__: False)


def test_experts() -> None:
    w1, w3, w2 = stacks(5, 128, 96)
    weights, ids = routing(9, 5, 3, seed=3)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(4)).bfloat16()
    one = [PackedWeight(w.format, **{name: t[1] for name, t in w.tensors().items()}) for w in (w1, w3, w2)]

    def both() -> torch.Tensor:
        routed = experts(x, weights, ids, w1, w3, w2, limit=LIMIT, act="nvfp4")
        return torch.cat([routed, shared_expert(x, *one, limit=LIMIT, act="nvfp4").float()])

    got = simulated(both)
    with apart():
        assert torch.equal(got, simulated(both))
    right = reference.moe(x, weights, ids, w1, w3, w2, limit=LIMIT, act="nvfp4")
    # the reference rounds quantised activations to BF16, the kernel does not
    assert (got[:9] - right).norm() < 0.05 * right.norm()


# ---- plans -------------------------------------------------------------------------------------------------------------
def test_who_quantises() -> None:
    assert requantises("nvfp4", tokens=8, given=True) and requantises("nvfp4", tokens=16, given=True)
    assert not requantises("nvfp4", tokens=32, given=True) and not requantises("nvfp4", tokens=8, given=False)
    assert not any(requantises(act, tokens=8, given=given) for act in ("fp8", "none") for given in (True, False))


def test_choices_of_few_tokens_can_quantise() -> None:
    for rows, inner, hidden in ((1, 2048, 4096), (16, 3072, 7168), (8, 64, 256), (4, 16, 128)):
        for fmt in ("nvfp4", "mxfp4", "fp8_block", "bf16"):
            replace(choose(fmt, "bf16", rows, 2 * inner, hidden, paired=True), requant=True).check()
            how: dict[str, Any] = dict(paired=True, slotted=True, gather=False, scaled="matrix")
            replace(choose_grouped(fmt, "bf16", rows * 6, 256, inner // 8, hidden, **how), requant=True).check()


def test_bad_input_is_refused() -> None:
    many = MixedConfig("nvfp4", "bf16", 64, 4, 2, 3, paired=True, requant=True)
    for config, message in (
        (replace(FEW_TOKENS, out="f32"), "requant needs a pair's results in bf16 and at most 16 tokens"),
        (replace(FEW_TOKENS, paired=False), "requant needs a pair's results in bf16 and at most 16 tokens"),
        (many, "requant needs a pair's results in bf16 and at most 16 tokens"),
        (replace(FEW_TOKENS, slabs=1), "slabs must be so many that 16 columns meet"),
    ):
        with pytest.raises(ValueError, match=message):
            config.check()
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    one, other = random_weight("nvfp4", 40, 128, seed=0), random_weight("nvfp4", 64, 128, seed=0)
    pair, scale = prepare(other, other), torch.ones(1)

    def call(requant: torch.Tensor, weight: object = pair, **how: object) -> torch.Tensor:
        return linear(x, weight, out_dtype=torch.bfloat16, limit=1.0, requant=requant, **how)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"requant must be contiguous \(1,\), got \(2,\)"):
        call(torch.ones(2))
    with pytest.raises(TypeError, match="requant must be float32"):
        call(scale.half())
    with pytest.raises(ValueError, match=r"weight must have N % 16 == 0 where results are quantised, got N=40"):
        call(scale, prepare(one, one))
    with pytest.raises(ValueError, match="config must have requant = True, got False"):
        call(scale, config=replace(FEW_TOKENS, requant=False))


# ---- on the GPU --------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 32, 129])
@pytest.mark.parametrize(("hidden", "inner"), [(4096, 2048), (7168, 3072)])
def test_experts_on_the_gpu(hidden: int, inner: int, tokens: int, seed: int) -> None:
    """16 experts, calibrated, in every bit."""
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()
    weights, ids = (t.cuda() for t in routing(tokens, 15, 6, seed))
    w1, w3, w2 = (w.to("cuda") for w in stacks(16, hidden, inner))
    one = [PackedWeight(w.format, **{name: t[1] for name, t in w.tensors().items()}) for w in (w1, w3, w2)]

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        routed = experts(x, weights, ids, w1, w3, w2, limit=LIMIT, act="nvfp4")
        return routed, shared_expert(x, *one, limit=LIMIT, act="nvfp4")

    got = both()
    with apart():
        want = both()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_inputs() -> None:
    w1, w3, w2 = (w.to("cuda") for w in stacks(32, 1024, 512))
    x = torch.zeros(16, 1024, dtype=torch.bfloat16, device="cuda")
    weights, ids = (t.cuda() for t in routing(16, 32, 6, seed=0))
    experts(x, weights, ids, w1, w3, w2, limit=LIMIT, act="nvfp4")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = experts(x, weights, ids, w1, w3, w2, limit=LIMIT, act="nvfp4")
    for seed in range(3):
        for target, value in zip((weights, ids), routing(16, 32, 6, seed + 1), strict=True):
            target.copy_(value)
        x.copy_(torch.randn(16, 1024, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        with apart():
            assert torch.equal(y, experts(x, weights, ids, w1, w3, w2, limit=LIMIT, act="nvfp4"))
