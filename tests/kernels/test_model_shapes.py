"""Linears and experts at Flash's and Pro's true shapes on the GPU: what `choose` picks there, against float64.

The yardstick is cuBLAS in BF16 on the same operands. NVFP4's global scale is not among them: a code times its block scale is
exact in BF16, so cuBLAS gets those, and the global scale goes on its result. Rows of a result do not depend on how many there
are, so the oracle is computed once, for most tokens, and fewer tokens are the first of those.
"""

from __future__ import annotations

import fcntl
import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import dsv4lab
from benchmarks import compiling, experts, linear
from benchmarks.linear import QUANTISED, SHAPES, TOKENS, Shape, Weights
from dsv4lab import ops
from dsv4lab.formats import PackedWeight
from dsv4lab.kernels._common import cache
from dsv4lab.kernels.gemm.mixed.config import choose
from dsv4lab.kernels.gemm.mixed.layout import K_PAD
from dsv4lab.reference import quant
from tests.kernels.mixed import BF16_BOUND, GPU_BOUND, worst

NVFP4, FP8 = "nvfp4", "fp8_block"
PLAIN = [shape for shape in SHAPES if shape not in QUANTISED]  # activations as they are
LINEARS = [shape for shape in PLAIN if NVFP4 in shape.formats]
HEADS, HEAD_TOKENS = [shape for shape in PLAIN if NVFP4 not in shape.formats], (1, 16, 1024)
MODELS = (experts.FLASH, experts.PRO)
FEW = (1, 16)  # tokens that the second format is tested with
SECOND = [shape for shape in LINEARS if shape.name.startswith("flash")]
MOE_TOKENS = (1, 3, 16, 64, 129, 8192)
pytestmark = pytest.mark.timeout(900)  # all wait for all kernels, which other tests may be compiled beside


def chosen(shape: Shape, fmt: str, m: int) -> tuple[int, ...]:
    """What tells configurations of a shape apart: tokens, slabs, cluster, stages."""
    k = -(-shape.k // K_PAD) * K_PAD
    config = choose(fmt, "bf16", m, shape.rows // shape.groups, k, paired=shape.paired, groups=shape.groups)
    return config.tokens, config.slabs, config.cluster, config.stages


def test_the_shapes_take_every_way_that_was_measured() -> None:
    """Which the tests on the GPU are for: if these are no longer chosen there, they test something else."""
    ways = {chosen(shape, NVFP4, m) for shape in LINEARS for m in TOKENS}
    few = {(8, 2, 1, 5), (8, 2, 1, 6), (8, 2, 1, 8), (8, 2, 2, 8), (8, 2, 4, 8), (8, 4, 1, 7), (8, 4, 1, 8), (8, 4, 2, 8)}
    few |= {(8, 4, 4, 8), (8, 8, 1, 4), (8, 8, 1, 8), (8, 8, 2, 4), (8, 16, 1, 5), (16, 2, 1, 8), (16, 2, 4, 8), (16, 4, 1, 6)}
    few |= {(16, 4, 2, 6), (16, 4, 4, 6), (16, 8, 1, 3), (16, 8, 2, 3), (16, 16, 1, 4)}
    many = {(64, 4, 1, 8), (64, 4, 2, 8), (64, 4, 4, 8), (64, 8, 1, 7), (64, 8, 2, 7), (64, 8, 4, 7), (256, 8, 1, 5)}
    many |= {(128, 4, 1, 5), (128, 4, 2, 5), (128, 8, 1, 4), (128, 8, 2, 4), (128, 8, 4, 4), (192, 8, 1, 3), (192, 8, 2, 3)}
    assert few | many <= ways
    assert {shape.name.split()[1] for shape in LINEARS} == {"wq_a", "wkv", "wq_b", "wo_a", "wo_b", "shared"}


@pytest.fixture(scope="module")
def compiled(kernel_cache: Path) -> None:
    """Kernels of these tests, compiled by all cores as for the benchmarks, whose cases they are: by one of xdist's workers, for
    which the others wait, and find them."""
    kernel_cache.mkdir(parents=True, exist_ok=True)
    with open(kernel_cache / "model_shapes.lock", "w") as lock, mock.patch.object(cache, "folder", lambda: kernel_cache):
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not compiling.compile_all(["linear", "experts"], quick=False, wanted=wanted)


def wanted(suite: str, case: Sequence[Any]) -> bool:
    """Whether a benchmark's case is one of these tests."""
    *what, m = case
    if suite == "experts":
        return what[0] in MODELS and m in MOE_TOKENS
    shape, fmt = what
    few = fmt == FP8 and shape in SECOND and m in FEW
    return (shape in LINEARS and fmt == NVFP4) or few or (shape in HEADS and m in HEAD_TOKENS)


def judge(y: torch.Tensor, want: torch.Tensor, cublas: torch.Tensor, bound: float) -> None:
    """bound: of the worst value. want: float64."""
    found, want = y.flatten(0, -2).double(), want.flatten(0, -2)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(found.flatten(), want.flatten(), dim=0) > 0.9999
    assert cosine(found, want, dim=1).min() > 0.999
    assert worst(found, want) < bound
    error, allowed = ((v - want).norm() / want.norm() for v in (found, cublas.flatten(0, -2).double()))
    assert error <= 2 * allowed, (float(error), float(allowed))


def stored(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in BF16 without its global scale, exactly; and that scale."""
    if weight.global_scale is None:
        return quant.dequantize(weight).bfloat16(), torch.ones((), device=weight.codes.device)
    return quant.dequantize(replace(weight, global_scale=torch.ones_like(weight.global_scale))).bfloat16(), weight.global_scale


def in_bf16(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """cuBLAS's x W^T, which it rounds to BF16, in float32."""
    codes, gain = stored(weight)
    return (x @ codes.t()).float() * gain


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("shape", "fmt", "tokens", "seed"),
    [
        *(pytest.param(shape, NVFP4, TOKENS, seed, id=f"{shape.name} {seed}") for shape in LINEARS for seed in range(3)),
        *(pytest.param(shape, FP8, FEW, 0, id=f"{shape.name} {FP8}") for shape in SECOND),
    ],
)
def test_linears_of_the_models(shape: Shape, fmt: str, tokens: tuple[int, ...], seed: int) -> None:
    check_linear(shape, fmt, tokens, seed, "cuda")


def check_linear(shape: Shape, fmt: str, tokens: tuple[int, ...], seed: int, device: str) -> None:
    torch.manual_seed(seed)
    weights = Weights.make(shape, fmt, device)
    if shape.paired and fmt == NVFP4:
        gate, up = weights.parts
        assert up.global_scale is not None
        weights = replace(weights, parts=(gate, replace(up, global_scale=up.global_scale * 0.7)))
    ready = weights.prepared()
    if device == "cuda":
        torch.cuda.synchronize()  # kernels read weights early
    x = torch.randn(shape.x_shape(max(tokens)), device=device).bfloat16()
    dense = torch.cat([quant.dequantize(part) for part in weights.parts]).double()
    want = linear.finish(shape, linear.product(shape, x.double(), dense))
    each = [stored(part) for part in weights.parts]
    products = linear.product(shape, x, torch.cat([codes for codes, _ in each])).float()
    gains = torch.cat([gain.expand(shape.n // shape.groups) for _, gain in each])  # of a result's columns
    cublas = linear.finish(shape, products * gains).bfloat16()
    for m in tokens:
        y = linear.call_linear(shape, ready, x[:m])
        judge(y, want[:m], cublas[:m], 2 * BF16_BOUND if shape.paired else BF16_BOUND)
        assert torch.equal(y, linear.call_linear(shape, ready, x[:m])), "a matter of timing"


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shape", HEADS, ids=lambda shape: shape.name)
def test_heads_of_the_models(shape: Shape) -> None:
    """Logits stay float32."""
    for seed in range(3):
        check_head(shape, HEAD_TOKENS, seed, "cuda")


def check_head(shape: Shape, tokens: tuple[int, ...], seed: int, device: str) -> None:
    torch.manual_seed(seed)
    weights = Weights.make(shape, "bf16", device)
    ready, x = weights.prepared(), torch.randn(max(tokens), shape.k, device=device).bfloat16()
    if device == "cuda":
        torch.cuda.synchronize()
    want = x.double() @ quant.dequantize(weights.parts[0]).double().t()
    for m in tokens:
        y = linear.call_linear(shape, ready, x[:m])
        assert y.dtype == torch.float32 and worst(y, want[:m]) < GPU_BOUND


# ---- experts -----------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_experts_of_the_models(model: experts.Model) -> None:
    """All of them, and the router's choice: Pro's are 14 GB, and as much again in the kernels' order, so one test has three
    seeds; 8,192 tokens, which hit every expert, have one.
    """
    torch.manual_seed(0)
    layer = experts.Layer.make(model, "cuda", copies=1)
    layer.prepare()
    with dsv4lab.backend("kernel"):
        for seed in range(3):
            torch.cuda.empty_cache()
            check_layer(layer, MOE_TOKENS if seed == 0 else MOE_TOKENS[:-1], seed, "cuda")
    del layer
    gc.collect()
    torch.cuda.empty_cache()


def check_layer(layer: experts.Layer, tokens: tuple[int, ...], seed: int, device: str) -> None:
    torch.manual_seed(seed)
    x = torch.randn(max(tokens), layer.model.d, device=device).bfloat16()
    weights, ids = ops.router_topk(x, layer.gate_weight, layer.bias, top_k=layer.model.top_k, route_scale=experts.ROUTE_SCALE)
    if max(tokens) > 1000:
        assert len(ids.unique()) == layer.model.experts
    want, cublas = oracle(layer, x, weights, ids)
    how: dict[str, Any] = dict(limit=linear.LIMIT, act="none", shared_act="none")
    for m in tokens:
        args = (x[:m], weights[:m], ids[:m], *layer.three, *layer.shared[0])
        y = ops.moe_layer(*args, **how)
        judge(y, want[:m], cublas[:m], 2 * BF16_BOUND)
        assert torch.equal(y, ops.moe_layer(*args, **how)), "a matter of timing"


def oracle(
    layer: experts.Layer, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer in float64, and by cuBLAS in BF16; an expert at a time is decoded, those that are hit."""
    exact = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    rounded = torch.zeros(x.shape, device=x.device)

    def add(rows: torch.Tensor, factor: torch.Tensor | None, matrices: list[PackedWeight]) -> None:
        taken = x[rows]
        dense = [quant.dequantize(w).double() for w in matrices]
        exact.index_add_(0, rows, experts.one_expert(taken.double(), factor, dense))
        h = experts.swiglu(in_bf16(taken, matrices[0]), in_bf16(taken, matrices[1]))
        h = (h if factor is None else h * factor).bfloat16()
        rounded.index_add_(0, rows, in_bf16(h, matrices[2]))

    for e in ids.unique().tolist():
        rows, slot = (ids == e).nonzero(as_tuple=True)
        add(rows, weights[rows, slot, None], [w[e] for w in layer.three])
    add(torch.arange(len(x), device=x.device), None, list(layer.shared[0]))
    return exact, rounded.bfloat16()
