"""Kernels behind operators: in the simulator as `ops` calls them, and on the GPU under torch's own checks of operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dsv4lab
from dsv4lab import dispatch, ops
from dsv4lab.formats import PackedWeight
from dsv4lab.records import allocate_kv_pages
from dsv4lab.reference import gemm
from dsv4lab.reference.rope import rope_frequencies
from tests.kernels.mixed import F32_BOUND, FORMATS, routing, trained_weight, worst
from tests.kernels.test_mhc import HOW, material, on_gpu, written

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("act", ["none", "fp8", "nvfp4"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_linear_in_float32_is_the_reference_s(fmt: str, act: str) -> None:
    """Float32 activations that are not quantised go as three BF16 parts."""
    if (fmt == "bf16") != (act == "none") and act != "nvfp4":
        pytest.skip("no numerics of the model pairs them")
    x, weight = torch.randn(5, 192, generator=torch.Generator().manual_seed(1)), trained_weight(fmt, 72, 192, seed=2)
    with ops.backend("sim", arch="sm_90a") as simulated:
        y = ops.linear(x, weight, act=act)
    assert simulated.launches and worst(y, gemm.linear(x, weight, act=act)) < F32_BOUND


@pytest.mark.parametrize("value", [3.4e38, torch.inf, -torch.inf, torch.nan])
def test_numbers_beyond_bf16_are_the_reference_s(value: float) -> None:
    x, weight = torch.zeros(2, 64), torch.eye(64)[:8].bfloat16()
    x[0, 0], x[1, 1] = value, 1.0
    with ops.backend("sim", arch="sm_90a"):
        assert torch.equal(ops.lm_head(x, weight).nan_to_num(7.0, 8.0, 9.0), gemm.lm_head(x, weight).nan_to_num(7.0, 8.0, 9.0))


def test_rows_may_lie_anywhere() -> None:
    """At addresses that are no multiples of 16, with strides that one row does not use."""
    big, weight = torch.randn(1025).bfloat16(), torch.randn(16, 64).bfloat16()
    for x in (big[1:].view(16, 64), big[1:1025].as_strided((1, 64), (7, 1))):
        with ops.backend("sim", arch="sm_90a"):
            y, (w, _) = ops.lm_head(x, weight), ops.router_topk(x, weight, torch.zeros(16), top_k=2, route_scale=1.0)
        assert worst(y, gemm.lm_head(x, weight)) < F32_BOUND and torch.allclose(w.sum(-1), torch.ones(len(x)))


def test_groups_and_the_head_are_the_reference_s() -> None:
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(6, 2, 256, generator=g), trained_weight("fp8_block", 128, 256, seed=4)
    table = torch.randn(40, 256, generator=g).bfloat16()
    with ops.backend("sim", arch="sm_90a"):
        z, logits = ops.grouped_linear(x, weight, act="none"), ops.lm_head(x[:, 0].contiguous(), table)
    assert worst(z, gemm.grouped_linear(x, weight, act="none")) < F32_BOUND
    assert logits.dtype == torch.float32 and worst(logits, gemm.lm_head(x[:, 0], table)) < F32_BOUND


def test_the_official_experts_are_the_reference_s_to_the_bit() -> None:
    """Nano's own, on real activations: MXFP4 weights, FP8 activations, BF16."""
    model = dsv4lab.load(dsv4lab.nano(), dtype=torch.bfloat16)
    with ops.observe() as calls:
        model.logits(torch.tensor(model.tokenizer.encode("import os\n\ndef main(argv):\n    return 0\n")))
    layers = [call for call in calls if call.name == "moe_layer"]
    assert len(layers) == 3
    op = torch.ops.dsv4lab.moe_layer.default
    for call in layers:
        with ops.backend("sim", arch="sm_90a"):
            y = op(**call.inputs)
        difference = (y - call.output).norm() / call.output.norm()
        assert difference < 1e-3 and (y == call.output).float().mean() > 0.99


# ---- on the GPU --------------------------------------------------------------------------------------------------------
def parts(*weights: PackedWeight) -> tuple[Any, ...]:
    from dsv4lab.ops.weights import pack_all

    return pack_all(*(w.to("cuda") for w in weights))


def calls() -> dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Arguments of each operator that has a kernel, made on the GPU."""

    def x(m: int = 9, k: int = 256) -> torch.Tensor:
        return torch.randn(m, k, device="cuda").bfloat16()

    def linear() -> tuple[tuple[Any, ...], dict[str, Any]]:
        w = trained_weight("nvfp4", 72, 256, seed=1).to("cuda")
        return (x(), "nvfp4", w.codes, w.scale, w.global_scale, None, "none", None), {}

    def grouped() -> tuple[tuple[Any, ...], dict[str, Any]]:
        w = trained_weight("fp8_block", 128, 256, seed=2).to("cuda")
        return (x(18).view(9, 2, 256), "fp8_block", w.codes, w.scale, None, None, "fp8"), {}

    def two() -> tuple[tuple[Any, ...], dict[str, Any]]:
        w = [trained_weight("fp8_block", n, 256, seed=n) for n in (128, 64)]
        return (x(), *parts(*w)), dict(act="fp8", out_dtype=None)

    def experts() -> tuple[tuple[Any, ...], dict[str, Any]]:
        w = [trained_weight("mxfp4", 6, *shape, seed=3) for shape in ((128, 256), (128, 256), (256, 128))]
        return (x(), *(t.cuda() for t in routing(9, 6, 2, seed=4)), *parts(*w)), dict(limit=10.0, act="fp8")

    def layer() -> tuple[tuple[Any, ...], dict[str, Any]]:
        w = [trained_weight("nvfp4", *shape, seed=6) for shape in ((128, 256), (128, 256), (256, 128))]
        stacks = [trained_weight("nvfp4", 6, *of.shape, seed=7) for of in w]
        routes = (t.cuda() for t in routing(1, 6, 2, seed=8))
        return (x(1), *routes, *parts(*stacks, *w)), dict(limit=10.0, act="none", shared_act="none")

    def shared() -> tuple[tuple[Any, ...], dict[str, Any]]:
        w = [trained_weight("mxfp4", *shape, seed=5) for shape in ((128, 256), (128, 256), (256, 128))]
        return (x(), *parts(*w)), dict(limit=10.0, act="fp8")

    def router() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (x(), x(16), torch.zeros(16, device="cuda")), dict(top_k=3, route_scale=1.5)

    def heads() -> tuple[torch.Tensor, ...]:
        freq = rope_frequencies(rope_dim=64, theta=1e4, scaling=None).cuda()
        return torch.randn(9, 4, 512, device="cuda").bfloat16(), torch.arange(9, device="cuda"), freq

    def reading() -> tuple[tuple[Any, ...], dict[str, Any]]:
        how = dict(page_size=32, dim=512, rope_dim=64)
        pages = allocate_kv_pages("fp8", num_pages=2, **how, dtype=torch.bfloat16, device="cuda")  # type: ignore[arg-type]
        return (pages, torch.arange(9, device="cuda")), dict(record="fp8", **how)

    def coded() -> tuple[tuple[Any, ...], dict[str, Any]]:
        (streams, *mix), (y, *old) = material(9, 64), written(9, 64)
        return on_gpu((y, streams, *old, *mix, torch.tensor(0.01))), dict(act="nvfp4", **HOW)

    norm = torch.ones(256, device="cuda").bfloat16() if torch.cuda.is_available() else torch.empty(0)
    return {
        "linear": linear,
        "grouped_linear": grouped,
        "lm_head": lambda: ((x(), x(40)), {}),
        "lm_head_greedy": lambda: ((x(), x(40)), {}),
        "lm_head_peaks": lambda: ((x(), x(40)), {}),
        "lm_head_sample": lambda: ((x(), x(40), torch.rand(9, device="cuda"), *(torch.arange(9, device="cuda"),) * 2), {}),
        "two_linears": two,
        "moe_experts": experts,
        "shared_expert": shared,
        "moe_layer": layer,
        "router_topk": router,
        "moe_combine": lambda: ((x().float(), x()), {}),
        "quantize_nvfp4": lambda: ((x(),), {}),
        "quantize_mxfp4": lambda: ((x(),), {}),
        "quantize_fp8_rows": lambda: ((x(),), dict(group=128)),
        "rmsnorm": lambda: ((x(), norm), dict(eps=1e-6)),
        "rmsnorm_fp8": lambda: ((x(), norm), dict(eps=1e-6, group=128)),
        "rmsnorm_nvfp4": lambda: ((x(), norm, 1e-6), {}),
        "swiglu": lambda: ((x(), x()), dict(limit=10.0)),
        "swiglu_fp8": lambda: ((x(), x()), dict(limit=10.0, group=128)),
        "swiglu_nvfp4": lambda: ((x(), x()), dict(limit=10.0)),
        "inverse_rope_fp8": lambda: (heads(), dict(group=128)),
        "inverse_rope_nvfp4": lambda: (heads(), {}),
        "cache_read": reading,
        "mhc_pre_quantized": lambda: (on_gpu(material(9, 64)), dict(act="fp8", **HOW)),
        "mhc_post_pre_quantized": coded,
    }


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """`model_calls` of nano on the GPU."""
    return model_calls("cuda")


def model_calls(device: str) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The first call of each operator as nano makes it, long enough for the indexer, greedy and drawn."""
    model = dsv4lab.load(dsv4lab.nano(), dtype=torch.bfloat16, device=device)
    assert model.tokenizer is not None
    prompt = model.tokenizer.encode("import os\n\ndef main(argv):\n    return 0\n" * 12)
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    for temperature in (0.0, 1.0):
        with ops.observe() as seen, dsv4lab.backend("reference"):
            model.complete([prompt], max_new_tokens=1, num_drafts=2, temperature=temperature)
            model.complete([prompt], max_new_tokens=2, num_drafts=2, temperature=temperature)
        for call in seen:
            whole = dict(fill=True) if call.name == "index_scores" else {}  # what nobody may see is then the same each time
            bound = dispatch._operations[call.name].signature.bind(**call.inputs | whole)
            found.setdefault(call.name, (bound.args, bound.kwargs))
    return found


KERNELS = [name for name, backends in ops.implementations().items() if "sm_90a" in backends]


def test_every_kernel_has_a_call_for_torch_s_checks() -> None:
    """A GPU is not needed to see that one is missing."""
    assert not set(KERNELS) - set(calls()) - set(model_calls("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_torch_s_checks_of_operators(name: str, made: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    args, kwargs = calls()[name]() if name in calls() else made[name]
    op = getattr(torch.ops.dsv4lab, name).default
    with dsv4lab.backend("kernel"):
        op(*args, **kwargs)
    narrow = any(t.dtype.itemsize == 1 and t.is_floating_point() for t in _tensors((*args, *kwargs.values())))
    # torch's schema check multiplies its inputs, which float8 cannot
    torch.library.opcheck(op, args, kwargs, test_utils=CHECKS[1:] if narrow else CHECKS)


# What a model has for good: kernels keep weights in an order of their own, made at the first call.
CONSTANT = {
    *("codes", "scale", "global_scale", "input_scale", "weight", "gate_weight", "bias", "tid2eid", "ape", "fn", "base"),
    *("norm_weight", "enorm_weight", "hnorm_weight", "inv_freq", "sinks", "temperature", "top_k", "top_p"),
}
REVERSED = {"token_ids", "step_ids", "draft_ids", "choices", "expert_idx", "num_visible"}  # integers that may go anywhere
SHIFTED = {"known", "next_ids", "seed"}  # or be one more


def other_inputs(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Of the same shapes and as valid: columns of floats in reverse, so that distributions stay such; indices mostly stay."""

    def other(argument: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or argument in CONSTANT:
            return value
        if argument in REVERSED:
            return value.flip(*range(value.ndim))
        if argument in SHIFTED:
            return value + 1
        if name == "cache_read" and argument == "pages":  # bytes that are no NaN in any format
            return torch.arange(value.numel(), device=value.device).remainder(97).to(torch.uint8).view(value.shape)
        return value.flip(-1) if value.dtype in (torch.bfloat16, torch.float32) else value

    return {argument: other(argument, value) for argument, value in given.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_a_graph_replayed_with_other_inputs_is_a_call(
    name: str, made: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
) -> None:
    """To the bit, in what is returned and in what is written in place."""
    torch.manual_seed(0)
    args, kwargs = calls()[name]() if name in calls() else made[name]
    first = dict(dispatch._operations[name].signature.bind(*args, **kwargs).arguments)
    other, op = other_inputs(name, first), getattr(torch.ops.dsv4lab, name).default
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]

    def fresh(given: dict[str, Any]) -> dict[str, Any]:
        return {n: v.clone() if isinstance(v, torch.Tensor) and n not in CONSTANT else v for n, v in given.items()}

    def bits(output: Any, given: dict[str, Any]) -> list[torch.Tensor]:
        found = _tensors((output, tuple(given[n] for n in written)))
        return [t.reshape(-1).view(torch.uint8).clone() for t in found]

    def called(given: dict[str, Any]) -> list[torch.Tensor]:
        given = fresh(given)
        return bits(op(**given), given)

    with dsv4lab.backend("kernel"):
        before, want, held = called(first), called(other), fresh(first)  # compiled, and weights are in order
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = op(**held)
    for n, value in other.items():
        if isinstance(value, torch.Tensor) and n not in CONSTANT:
            held[n].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(t, w) for t, w in zip(bits(output, held), want, strict=True))
    assert not all(torch.equal(b, w) for b, w in zip(before, want, strict=True)), "the other inputs change nothing"


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []
