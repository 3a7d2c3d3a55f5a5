"""NVFP4 end to end, activations quantised too: how near linears and experts come to what nothing was quantised for.

Linears, on random data and on nano's, are held against products of the activations and weights as they were before either was
quantised. So are nano's experts. Of random data, experts are held against the dequantised weights: three matrices of random
numbers in four bits, one after the other, leave a cosine of 0.986 by themselves, and 0.973 with their activations.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4lab
from benchmarks.linear import SHAPES, Shape
from dsv4lab import ops
from dsv4lab.dispatch import Call
from dsv4lab.formats import F32, PackedWeight, weights_of
from dsv4lab.model.checkpoint import quantize_checkpoint
from dsv4lab.ops.weights import packed
from dsv4lab.reference import gemm, moe, quant

NVFP4 = "nvfp4"
LINEAR, EXPERTS, NANO = 0.99, 0.985, 0.99
LIMIT = 10.0
WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "reference": lambda: dsv4lab.backend("reference"),
    "sim": lambda: dsv4lab.backend("sim", arch="sm_90a"),
    "kernel": lambda: dsv4lab.backend("kernel"),
}
ON_GPU = pytest.param("kernel", marks=pytest.mark.gpu)
FLASH = {"flash wq_a": 16, "flash wq_b": 1024, "flash wo_b": 1}  # tokens


def cosine(y: torch.Tensor, want: torch.Tensor) -> float:
    return float(torch.cosine_similarity(y.double().flatten(), want.double().flatten(), dim=0))


def plain(weight: PackedWeight) -> PackedWeight:
    """A weight's values in float32."""
    return PackedWeight(F32, quant.dequantize(weight))


# ---- random data -------------------------------------------------------------------------------------------------------
def random_linear(m: int, n: int, k: int, way: str) -> float:
    device = "cuda" if way == "kernel" else "cpu"
    g = torch.Generator(device).manual_seed(n + k + m)
    w = (torch.randn(n, k, generator=g, device=device) * k**-0.5).bfloat16()
    x = torch.randn(m, k, generator=g, device=device).bfloat16()
    with WAYS[way]():
        y = ops.linear(x, quant.quantize(w, NVFP4), act=NVFP4)
    return cosine(y, gemm.matmul_rows(x.float(), w.float()))


@pytest.mark.parametrize("way", ["reference", "sim"])
def test_a_linear_of_random_data(way: str) -> None:
    found = random_linear(8, 200, 128, way)
    assert LINEAR < found < 0.995  # as much as two operands in four bits can have, or one of them was not


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.name in FLASH], ids=lambda s: s.name)
def test_flash_s_linears_of_random_data(shape: Shape) -> None:
    assert LINEAR < random_linear(FLASH[shape.name], shape.n, shape.k, "kernel") < 0.995


def random_experts(m: int, num_experts: int, top_k: int, hidden: int, inner: int, way: str) -> float:
    """The layer, shared expert included, against dequantised weights."""
    device = "cuda" if way == "kernel" else "cpu"
    g = torch.Generator(device).manual_seed(m + hidden)
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    matrices = [
        quant.quantize(torch.randn(*lead, *shape, generator=g, device=device) * shape[-1] ** -0.5, NVFP4)
        for lead in ((num_experts,), ())
        for shape in shapes
    ]
    x = torch.randn(m, hidden, generator=g, device=device).bfloat16()
    gate = (torch.randn(num_experts, hidden, generator=g, device=device) * hidden**-0.5).bfloat16()
    with WAYS[way]():
        routes = ops.router_topk(x, gate, torch.zeros(num_experts, device=device), top_k=top_k, route_scale=1.5)
        y = ops.moe_layer(x, *routes, *matrices, limit=LIMIT, act=NVFP4, shared_act=NVFP4)
    exact = [plain(w) for w in matrices]
    return cosine(y, moe.moe_layer(x.float(), *routes, *exact, limit=LIMIT, act="none", shared_act="none"))


@pytest.mark.parametrize("way", ["reference", "sim"])
def test_experts_of_random_data(way: str) -> None:
    assert EXPERTS < random_experts(9, 6, 2, 128, 128, way) < 0.992


@pytest.mark.gpu
def test_flash_s_experts_of_random_data() -> None:
    assert EXPERTS < random_experts(64, 16, 6, 4096, 2048, "kernel") < 0.992


# ---- nano --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pair:
    """A call of nano's whose weights are NVFP4 in the other checkpoint: those, and the ones that they were made from."""

    call: Call
    shipped: list[PackedWeight]
    quantised: list[PackedWeight]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Linears and experts as shipped, with their inputs on a text, beside their weights in the nvfp4 layout."""
    where = tmp_path_factory.mktemp("nano") / NVFP4
    quantize_checkpoint(dsv4lab.nano(), where, layout=NVFP4, progress=False)
    return pairs(dsv4lab.nano(), where)


def pairs(shipped: Path, quantised: Path) -> list[Pair]:
    found = []
    for path, numerics in ((shipped, "exact"), (quantised, "w4a4")):
        model = dsv4lab.load(path, dtype=torch.bfloat16, numerics=numerics)
        assert model.tokenizer is not None
        ids = model.tokenizer.encode("def main(argv):\n    for name in argv:\n        print(name)\n" * 5)
        with torch.inference_mode(), ops.observe() as calls:
            model.logits(torch.tensor(ids))
        products = [call for call in calls if call.name in ("linear", "two_linears", "grouped_linear", "moe_layer")]
        found.append([(call, some) for call in products for some in weights(call)])
    both = zip(*found, strict=True)
    return [Pair(call, old, new) for (call, old), (_, new) in both if new[0].format.name == NVFP4]


def weights(call: Call) -> list[list[PackedWeight]]:
    """Of each linear that a call is, and of a layer of experts."""
    names = ("codes", "scale", "global_scale", "input_scale")
    parts = [call.inputs[name] for name in names]
    if "fmt" in call.inputs:
        return [[packed(call.inputs["fmt"], *parts)]]
    some = list(weights_of(call.inputs["fmts"], *parts))
    return [some] if call.name == "moe_layer" else [[w] for w in some]


@pytest.mark.parametrize("way", ["reference", ON_GPU])
def test_linears_on_nano_s_activations(nano: list[Pair], way: str) -> None:
    linears = [pair for pair in nano if pair.call.name != "moe_layer"]
    assert len(linears) == 16 and {pair.shipped[0].format.name for pair in linears} == {"fp8_block"}
    for pair in linears:
        x, grouped = pair.call.inputs["x"], pair.call.name == "grouped_linear"
        (ours, reference) = (ops.grouped_linear, gemm.grouped_linear) if grouped else (ops.linear, gemm.linear)
        device = "cuda" if way == "kernel" else "cpu"
        with WAYS[way]():
            y = ours(x.to(device), pair.quantised[0].to(device), act=NVFP4).cpu()
        found = cosine(y, reference(x.float(), plain(pair.shipped[0]), act="none"))
        assert found > NANO, (pair.call.scope, pair.call.name, tuple(pair.shipped[0].shape), found)


@pytest.mark.parametrize("way", ["reference", ON_GPU])
def test_experts_on_nano_s_activations(nano: list[Pair], way: str) -> None:
    layers = [pair for pair in nano if pair.call.name == "moe_layer"]
    assert len(layers) == 3
    device = "cuda" if way == "kernel" else "cpu"
    for pair in layers:
        x, routes = pair.call.inputs["x"], [pair.call.inputs[name] for name in ("weights", "expert_idx")]
        limit = pair.call.inputs["limit"]
        args = (t.to(device) for t in (x, *routes, *pair.quantised))
        with WAYS[way]():
            y = ops.moe_layer(*args, limit=limit, act=NVFP4, shared_act=NVFP4).cpu()
        exact = [plain(w) for w in pair.shipped]
        found = cosine(y, moe.moe_layer(x.float(), *routes, *exact, limit=limit, act="none", shared_act="none"))
        assert found > NANO, (pair.call.scope, found)
