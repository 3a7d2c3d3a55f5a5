"""The rotation of heads: BF16 within a bit of the reference's, codes those of the values that come out, on both GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4lab import sim
from dsv4lab.config import ModelConfig
from dsv4lab.kernels.rope import operators
from dsv4lab.kernels.rope.heads import api
from dsv4lab.kernels.rope.heads.config import HEAD_DIM, HeadsConfig
from dsv4lab.reference import norm, quant, rope
from tests.kernels.simulated import simulating

BF16, F32 = torch.bfloat16, torch.float32
EPS = 1e-6
FAR = 2.0**-22  # of a pair's length: what values may be off before their last rounding
TINY_SHARE = 2e-4  # of rotated BF16 values whose last bit may differ; 3e-5 is what is met
FLASH = ModelConfig.flash()
TABLES = {
    "window": rope.rope_frequencies(rope_dim=64, theta=FLASH.rope_theta, scaling=None),
    "entries": rope.rope_frequencies(rope_dim=64, theta=FLASH.compress_rope_theta, scaling=FLASH.rope_scaling),
}
GIVEN = 0.0017


def simulated(arch: str, function: Callable[..., Any], *args: Any, how: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    with simulating(arch, **(how or {})):
        return function(*args, **kwargs)


def material(m: int, heads: int, dtype: torch.dtype = BF16, seed: int = 0, last: int = 2**20) -> tuple[torch.Tensor, ...]:
    """Heads of different sizes, positions up to `last`, the ends among them."""
    g = torch.Generator().manual_seed(seed + m * heads)
    x = torch.randn(m, heads, HEAD_DIM, generator=g) * torch.exp(2 * torch.randn(m, heads, 1, generator=g))
    positions = torch.randint(0, last + 1, (m,), generator=g)
    positions[0], positions[-1] = 0, last
    if heads > 2:
        x[0, 1], x[0, 2, :496] = 0.0, 0.0
    return x.to(dtype), positions, TABLES["entries" if seed % 2 == 0 else "window"]


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def same(got: Any, want: Any) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b)) for a, b in zip(got, want, strict=True)
    )


def check(got: torch.Tensor, want: torch.Tensor, *, share: float = TINY_SHARE) -> float:
    """The share of rotated values that differ, after all that must hold has been asserted."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if got.dtype == BF16:
        assert torch.equal(got[..., :-64], want[..., :-64])
    a, b = got.double(), want.double()
    length = b[..., -64:].unflatten(-1, (32, 2)).norm(dim=-1, keepdim=True).expand(*b.shape[:-1], 32, 2).flatten(-2)
    unit = b.abs() * (2.0**-7 if got.dtype == BF16 else 2.0**-23)
    off = (a - b).abs()
    assert bool((off[..., :-64] <= unit[..., :-64]).all())
    assert bool((off[..., -64:] <= torch.maximum(unit[..., -64:], FAR * length)).all())
    differ = float((a != b)[..., -64:].double().mean())
    assert got.dtype != BF16 or differ <= max(share, 1.5 / a[..., -64:].numel()), differ
    return differ


def quantised(y: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    """What must come out of each operation that quantises, from the values that `inverse_rope` gives."""
    many = GIVEN * torch.linspace(0.5, 2.0, len(positions), device=y.device)
    return {
        "fp8 128": quant.quantize_fp8_rows(y, group=128),
        "fp8 64": quant.quantize_fp8_rows(y, group=64),
        "one": quant.quantize_nvfp4(y, global_scale=torch.tensor(GIVEN, device=y.device)),
        "many": quant.quantize_nvfp4(y, global_scale=many),
        "tensor": quant.quantize_nvfp4(y),
    }


def call(name: str, args: tuple[torch.Tensor, ...], config: HeadsConfig | None = None) -> Any:
    """The operation of that name on (x, positions, inv_freq)."""
    if name.startswith("fp8"):
        return api.inverse_rope_fp8(*args, group=int(name.split()[1]), config=config)
    given = None  # nothing else is made: a CUDA graph may be recording
    if name == "one":
        given = torch.tensor(GIVEN, device=args[0].device)
    elif name == "many":
        given = GIVEN * torch.linspace(0.5, 2.0, len(args[1]), device=args[0].device)
    return api.inverse_rope_nvfp4(*args, given, config=config)


def shaped(name: str, element: str, passes: int) -> HeadsConfig:
    """The configuration of `call`'s operations with so many passes."""
    fp8 = name.startswith("fp8")
    how: dict[str, Any] = dict(group=int(name.split()[1])) if fp8 else dict(scale="many" if name == "many" else "one")
    return HeadsConfig("fp8" if fp8 else "nvfp4", element, passes=passes, **how)


CASES = [  # architecture, schedule, tokens, heads, element, passes, what is quantised
    ("sm_90a", "random", 2, 12, "bf16", 1, ("fp8 128", "one", "many", "tensor")),  # a CTA with heads that are none
    ("sm_90a", "lazy", 7, 4, "bf16", 1, ("tensor",)),
    ("sm_90a", "random", 2, 5, "f32", 1, ("one",)),
    ("sm_100a", "lazy", 2, 21, "bf16", 2, ("fp8 64",)),  # passes that are partly or wholly empty
]


@pytest.mark.parametrize(("arch", "schedule", "m", "heads", "element", "passes", "names"), CASES)
def test_any_schedule_and_no_race(
    arch: str, schedule: str, m: int, heads: int, element: str, passes: int, names: tuple[str, ...]
) -> None:
    sim.enable(arch, multiprocessors=1)  # two or three CTAs of NVFP4 go on from one run of heads to the next
    args = material(m, heads, BF16 if element == "bf16" else F32, seed=m)
    how = dict(schedule=schedule, checks=sim.Checks(races=True))
    same_config = HeadsConfig("same", element, passes=passes)
    y = simulated(arch, api.inverse_rope, *args, config=same_config, how=how)
    check(y, rope.inverse_rope(*args))
    normed = simulated(arch, api.q_norm_rope, *args, eps=EPS, config=replace(same_config, norm=True), how=how)
    check(normed, norm.q_norm_rope(*args, eps=EPS))
    for name in names:
        found = simulated(arch, call, name, args, shaped(name, element, passes), how=how)
        assert same(found, quantised(y, args[1])[name]), name


def test_positions_of_32_bits_and_rows_off_a_vector() -> None:
    x, positions, inv_freq = material(3, 64)
    shifted = torch.empty(x.numel() + 1, dtype=BF16)[1:].view(x.shape).copy_(x)
    found = simulated("sm_90a", api.inverse_rope, shifted, positions.int(), inv_freq)
    assert same([found], [simulated("sm_90a", api.inverse_rope, x, positions, inv_freq)])


def test_what_is_no_number_stays_where_it_is() -> None:
    """Infinities and NaNs of a pair stay in it; a norm spreads them over the head; a block that has a NaN is one."""
    x, positions, inv_freq = material(3, 64)
    x[0, 5, 3], x[1, 6, 450], x[2, 7, 511], x[2, 8, 100] = torch.nan, torch.inf, torch.nan, -torch.inf
    x[1, 9, 448:] = 3.0e38 * torch.randn(64).sign()
    x[1, 10] *= 1e-38
    x[1, 11] *= 1e37 / x[1, 11].abs().amax()
    args = (x, positions, inv_freq)
    y, want = simulated("sm_90a", api.inverse_rope, *args), rope.inverse_rope(*args)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    finite = want.isfinite()
    check(torch.where(finite, y, 0), torch.where(finite, want, 0), share=1e-3)
    found = simulated("sm_90a", call, "fp8 128", args)
    for a, b in zip(found, quantised(y, positions)["fp8 128"], strict=True):
        assert torch.equal(a.float().nan_to_num(nan=-1), b.float().nan_to_num(nan=-1))
    assert same(simulated("sm_90a", call, "one", args)[1:], quantised(y, positions)["one"][1:])
    normed, want = simulated("sm_90a", api.q_norm_rope, *args, eps=EPS), norm.q_norm_rope(*args, eps=EPS)
    assert torch.equal(normed.isnan(), want.isnan())
    check(normed.nan_to_num(nan=0), want.nan_to_num(nan=0), share=1e-3)


def test_few_bits_differ() -> None:
    """Over a hundred thousand rotated values; and rotating back gives the heads again, but for two roundings."""
    args = material(27, 64, last=2**20)
    y, normed = simulated("sm_90a", api.inverse_rope, *args), simulated("sm_90a", api.q_norm_rope, *args, eps=EPS)
    assert check(y, rope.inverse_rope(*args), share=1e-4) < 1e-4
    assert check(normed, norm.q_norm_rope(*args, eps=EPS), share=1e-4) < 1e-4
    back = rope.rope(y, *args[1:])
    assert (back - args[0]).abs().max() <= 2.0**-6 * args[0].abs().max()


def test_as_operators() -> None:
    """Heads that are a view; results share no memory with arguments."""
    x, positions, inv_freq = material(37, 4)
    wide, given = torch.cat((x, x), dim=1)[:, :4], torch.tensor(GIVEN)
    y = simulated("sm_90a", operators.inverse_rope, wide, positions, inv_freq)
    normed = simulated("sm_90a", operators.q_norm_rope, wide, positions, inv_freq, eps=EPS)
    codes = simulated("sm_90a", operators.inverse_rope_fp8, wide, positions, inv_freq, group=128)
    fp4 = simulated("sm_90a", operators.inverse_rope_nvfp4, wide, positions, inv_freq, given)
    computed = simulated("sm_90a", operators.inverse_rope_nvfp4, wide, positions, inv_freq)
    check(y, rope.inverse_rope(x, positions, inv_freq))
    check(normed, norm.q_norm_rope(x, positions, inv_freq, eps=EPS))
    want = quantised(y, positions)
    assert same(codes, want["fp8 128"]) and same(fp4, want["one"]) and same(computed, want["tensor"])
    assert fp4[2].data_ptr() != given.data_ptr()


def test_what_operators_refuse() -> None:
    x, positions, inv_freq = material(3, 4)
    refuses = {entry.operation: entry.refuses for entry in operators.ENTRIES}
    assert len(operators.ENTRIES) == 8 and {entry.arch for entry in operators.ENTRIES} == set(api.ARCHITECTURES)
    for name, more, bad, message in (
        ("q_norm_rope", dict(eps=EPS), dict(eps=0.0), "eps must be finite and at least 1e-30, got 0.0"),
        ("inverse_rope", {}, None, "x must be bfloat16 or float32, got torch.float16"),
        ("inverse_rope_fp8", dict(group=64), dict(group=32), "group must be 64 or 128, got 32"),
        ("inverse_rope_nvfp4", {}, dict(global_scale=torch.ones(4)), "global_scale must be a scalar or (3,), got (4,)"),
    ):
        assert refuses[name](x, positions, inv_freq, **more) is None
        assert str(refuses[name](x if bad else x.half(), positions, inv_freq, **(bad or more))) == message


# ---- plans, refusals ---------------------------------------------------------------------------------------------------
def test_choices_cover_all_heads_and_keep_the_gpu_busy() -> None:
    for m in (1, 3, 8, 37, 129, 1024, 8192):
        for heads in (1, 4, 5, 64, 96, 128):
            for element in ("bf16", "f32"):
                config = HeadsConfig.for_shape(m, heads, out="same", element=element)
                config.check()
                assert config.tasks(m, heads) * config.heads >= m * heads
                assert config.passes == 1 or (heads % config.heads == 0 and config.tasks(m, heads) >= 4 * 132)
    assert HeadsConfig.for_shape(8192, 64, out="fp8", element="bf16", group=128).passes == 4
    assert HeadsConfig.for_shape(1, 64, out="fp8", element="bf16", group=128).tasks(1, 64) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(out="mxfp4"), "out must be one of same, fp8, nvfp4, amax, got 'mxfp4'"),
        (dict(out="fp8", norm=True, group=128), "out must be same for normalised heads"),
        (dict(passes=3), "passes must be 1, 2 or 4, got 3"),
        (dict(out="fp8"), "group of fp8 must be 64 or 128, got 16"),
        (dict(element="f16"), "element must be one of bf16, f32"),
        (dict(out="nvfp4"), "scale"),
    ],
)
def test_plans_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(HeadsConfig("same", "bf16"), **change).check()


def test_bad_input_is_refused_and_none_is_nothing() -> None:
    x, positions, inv_freq = material(3, 4)
    for args, kind, message in (
        ((x.half(), positions, inv_freq), TypeError, "x must be bfloat16 or float32, got torch.float16"),
        ((x[..., :256], positions, inv_freq), ValueError, r"x must be \(M, H, 512\), got \(3, 4, 256\)"),
        ((x[0], positions, inv_freq), ValueError, r"x must be \(M, H, 512\), got \(4, 512\)"),
        ((x, positions.float(), inv_freq), TypeError, "positions must be int32 or int64, got torch.float32"),
        ((x, positions - 2**30, inv_freq), ValueError, "positions must be 0 to"),
        ((x, positions[:2], inv_freq), ValueError, r"positions must be \(3,\), got \(2,\)"),
        ((x, positions, inv_freq.double()), TypeError, "inv_freq must be float32, got torch.float64"),
        ((x, positions, inv_freq[:16]), ValueError, r"inv_freq must be \(32,\), got \(16,\)"),
        ((x.transpose(0, 1), positions.new_zeros(4), inv_freq), ValueError, "x must be contiguous, got strides"),
    ):
        with pytest.raises(kind, match=message):
            api.inverse_rope(*args)
    with pytest.raises(ValueError, match="group must be 64 or 128, got 16"):
        api.inverse_rope_fp8(x, positions, inv_freq, group=16)
    with pytest.raises(ValueError, match=r"eps must be finite and at least 1e-30, got 0\.0"):
        api.q_norm_rope(x, positions, inv_freq, eps=0.0)
    with pytest.raises(ValueError, match=r"global_scale must be a scalar or contiguous \(3,\), got \(4,\)"):
        api.inverse_rope_nvfp4(x, positions, inv_freq, torch.ones(4))
    with pytest.raises(ValueError, match="config must have"):
        api.inverse_rope(x, positions, inv_freq, config=HeadsConfig("same", "f32"))
    codes, scale, used = api.inverse_rope_nvfp4(x[:0], positions[:0], inv_freq)
    assert codes.shape == (0, 4, 256) and scale.shape == (0, 4, 32) and used == 1.0
    assert api.q_norm_rope(x[:, :0], positions, inv_freq, eps=EPS).shape == (3, 0, 512)


# ---- GPU ---------------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("m", "heads"), [(1, 64), (3, 128), (8, 64), (37, 4), (129, 128), (1021, 64), (2049, 128), (8192, 64)])
def test_on_the_gpu(m: int, heads: int, seed: int) -> None:
    for dtype in (BF16, F32) if m < 2000 else (BF16,):
        args = tuple(t.cuda() for t in material(m, heads, dtype, seed))
        y = api.inverse_rope(*args)
        check(y, rope.inverse_rope(*args))
        check(api.q_norm_rope(*args, eps=EPS), norm.q_norm_rope(*args, eps=EPS))
        for name, want in quantised(y, args[1]).items():
            assert same(call(name, args), want), name


@pytest.mark.gpu
@pytest.mark.parametrize("m", [5, 1000])
def test_a_cuda_graph_replays_with_new_inputs(m: int) -> None:
    args = tuple(t.cuda() for t in material(m, 64))

    def run() -> list[Any]:
        return [api.q_norm_rope(*args, eps=EPS), api.inverse_rope(*args), call("fp8 128", args), call("tensor", args)]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        normed, y, fp8, fp4 = run()
    for seed in range(3):
        for target, source in zip(args, material(m, 64, seed=seed), strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        check(normed, norm.q_norm_rope(*args, eps=EPS))
        check(y, rope.inverse_rope(*args))
        want = quantised(y, args[1])
        assert same(fp8, want["fp8 128"]) and same(fp4, want["tensor"])
