"""Hyper-connections whose normalised row leaves as codes: bit for bit those of the same kernel's BF16 row."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import dsv4lab.kernels.mhc.api as api
from dsv4lab import ops
from dsv4lab.formats import to_atom128x4
from dsv4lab.kernels.mhc.config import MixConfig
from dsv4lab.kernels.mhc.operators import ENTRIES
from dsv4lab.reference import mhc, quant
from tests.kernels.test_mhc import BF16, F32, HOW, ONE, RACES, TOGETHER, ULP, exact, material, on_gpu, simulate, written

KINDS = ("fp8", "nvfp4", "nvfp4_tiles")
GLOBAL = 4.0 / 2688
# Two warps, most of their lanes past the last column, a group of FP8 that is not full.
PRE = MixConfig(144, 24, False, "bf16", warps=3, ahead=2, finish=2, ring=2)
# One warp that goes over its row twice, the second time with four lanes.
POST_PRE = MixConfig(288, 24, True, "f32", warps=6, ahead=2, finish=1, ring=2)


def how_of(kind: str, given: float = GLOBAL, device: str = "cpu") -> dict[str, Any]:
    if kind == "fp8":
        return dict(act=kind, **HOW)
    layout = "atom128x4" if kind == "nvfp4_tiles" else "linear"
    return dict(act="nvfp4", layout=layout, global_scale=torch.tensor(given, device=device), **HOW)


def same(found: Any, want: Any) -> bool:
    """Types, shapes, bits."""
    pairs = list(zip(found, want, strict=True))
    alike = all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
    return alike and all(torch.equal(*(t.contiguous().view(torch.uint8) for t in pair)) for pair in pairs)


def codes_of(x: torch.Tensor, kind: str, how: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    if kind == "fp8":
        return quant.quantize_fp8_rows(x, group=128)
    codes, scale, _ = quant.quantize_nvfp4(x, global_scale=how["global_scale"])
    return codes, to_atom128x4(scale) if kind == "nvfp4_tiles" else scale


def arguments(config: MixConfig, tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    weight = F32 if config.weight == "f32" else BF16
    streams, *mix = material(tokens, config.columns, seed=seed, weight=weight)
    y, *old = written(tokens, config.columns, seed)
    return (y, streams, *old, *mix) if config.post else (streams, *mix)


def check(config: MixConfig, kind: str, args: Any, named: dict[str, Any], run: Any = lambda f, *a, **k: f(*a, **k)) -> Any:
    """The result, whose codes are those of the BF16 row of the same configuration."""
    names = ("mhc_post_pre", "mhc_post_pre_quantized") if config.post else ("mhc_pre", "mhc_pre_quantized")
    plain, coded = (getattr(api, name) for name in names)
    *new, x, post, comb = run(plain, *args, config=config, **HOW)
    found = run(coded, *args, config=replace(config, quant=kind), **named)
    assert same(found, (*new, *codes_of(x, kind, named), post, comb))
    return found


def check_values(found: Any, args: Any, given: torch.Tensor | None) -> None:
    """Half a step of the codes from float64's row, and what x may be off: 2^-16, and four units of BF16's last place."""
    streams, weight = args[0], args[4].double()
    u = (exact(*args[:4])[0][:, :, None] * streams.double()).sum(1).to(BF16).double()
    want = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-6) * weight
    codes, scale = found
    if given is None:
        values, step = quant.dequantize_fp8_rows(codes, scale, group=128), quant.decode_e8m0(scale).repeat_interleave(128, 1)
        half = torch.maximum(step[:, : want.shape[1]] * 2.0**-10, 2.0**-4 * want.abs())
    else:
        values, half = quant.dequantize_nvfp4(codes, scale, given), (scale.float() * given).repeat_interleave(16, 1)
        want = want.clamp(-6 * 448 * float(given), 6 * 448 * float(given))
    assert bool(((values - want).abs() <= half * 1.001 + 2.0**-16 + 4 * ULP * want.abs()).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arch", "config"), [("sm_90a", PRE), ("sm_90a", POST_PRE), ("sm_90a", replace(ONE, post=True)), ("sm_100a", POST_PRE)]
)
def test_codes_are_those_of_the_row(arch: str, kind: str, config: MixConfig) -> None:
    """A token with a NaN, one with an infinity, one of zeros; other scales: of a power of two, and that make blocks rare."""
    for given in (GLOBAL,) if kind != "nvfp4" else (GLOBAL, 2.0**-9, 2.0**-70, 1e30):
        tokens, how = (7, dict(schedule="lazy", **RACES)) if given == GLOBAL else (1, {})
        args = arguments(config, tokens)
        if tokens > 1:
            streams = args[config.post]
            streams[1, 2, 5], streams[2, 0, 0], streams[3], args[0][3] = torch.nan, torch.inf, 0.0, 0.0
        check(config, kind, args, how_of(kind, given), partial(simulate, arch, how=how))


def test_tiles_of_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_TOKENS", 128)
    plan = MixConfig(48, 24, False, "bf16", warps=3, ahead=2, finish=1, ring=2)
    check(plan, "nvfp4_tiles", arguments(plan, 131), how_of("nvfp4_tiles"), partial(simulate, "sm_90a"))


@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_take_a_launch_more(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, named, taken = arguments(PRE, 65), how_of(kind), []
    name = "quantize_fp8_rows" if kind == "fp8" else "quantize_nvfp4"
    quantize = getattr(api, name)
    monkeypatch.setattr(api, name, lambda *a, **how: (taken.append(name), quantize(*a, **how))[1])
    few = simulate("sm_90a", api.mhc_pre_quantized, *(args[0][:64].clone(), *args[1:]), **named)
    assert not taken and len(few) == 4
    found = simulate("sm_90a", api.mhc_pre_quantized, *args, **named)
    assert taken == [name]
    x, post, comb = simulate("sm_90a", api.mhc_pre, *args, **HOW)
    assert same(found, (*codes_of(x, kind, named), post, comb))


@pytest.mark.parametrize(("act", "given"), [("fp8", None), ("nvfp4", torch.tensor(GLOBAL))])
def test_the_operators_reach_the_kernels(act: str, given: torch.Tensor | None) -> None:
    args, (y, post, comb), named = material(2, 64), written(2, 64), dict(act=act, global_scale=given, **HOW)
    with ops.backend("sim"):
        pre = ops.mhc_pre_quantized(*args, **named)
        new, *rest = ops.mhc_post_pre_quantized(y, args[0], post, comb, *args[1:], **named)
        assert same(rest, ops.mhc_pre_quantized(new, *args[1:], **named))
    assert [(t.dtype, t.shape) for t in pre] == [(t.dtype, t.shape) for t in mhc.mhc_pre_quantized(*args, **named)]
    check_values(pre[:2], args, given)


def test_what_is_refused_and_none_is_nothing() -> None:
    args, one = material(4, 64), torch.tensor(GLOBAL)
    for named, message in (
        (dict(act="nvfp4"), "act must be fp8, or nvfp4 with a global_scale, got 'nvfp4' and None"),
        (dict(act="fp8", global_scale=one), "got 'fp8' and"),
        (dict(act="nvfp4", global_scale=one.double()), "global_scale must be float32"),
        (dict(act="nvfp4", global_scale=one.repeat(4)), r"global_scale must be contiguous \(\), got \(4,\)"),
        (dict(act="fp8", layout="atom128x4"), "layout must be linear, or atom128x4 of nvfp4"),
        (dict(act="fp8", config=replace(PRE, columns=64, warps=4)), "config must have"),
        (dict(act="fp8", config=TOGETHER), "config must have"),
        (dict(act="fp8", config=replace(PRE, quant="int8")), "quant must be empty or one of fp8, nvfp4, nvfp4_tiles"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            simulate("sm_90a", api.mhc_pre_quantized, *args, **named, **HOW)
    refuses = next(e.refuses for e in ENTRIES if e.operation == "mhc_pre_quantized")
    assert refuses(*args, one, act="nvfp4") is None and "one float32" in str(refuses(*args, one.double(), act="nvfp4"))
    shapes = [[tuple(t.shape) for t in api.mhc_pre_quantized(args[0][:0], *args[1:], **how_of(kind))][:2] for kind in KINDS]
    assert shapes == [[(0, 64), (0, 1)], [(0, 32), (0, 4)], [(0, 32), (0, 1, 512)]]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 129, 1025])
@pytest.mark.parametrize("columns", [4096, 7168])
def test_on_the_gpu(columns: int, tokens: int, post: bool, kind: str) -> None:
    """Of three seeds, and again by a graph, with the configuration that is chosen."""
    many = torch.cuda.get_device_properties(0).multi_processor_count
    config, named = MixConfig.for_shape(tokens, columns, 24, post, "bf16", many), how_of(kind, device="cuda")
    args, graph = on_gpu(arguments(config, tokens)), torch.cuda.CUDAGraph()
    operation = api.mhc_post_pre_quantized if post else api.mhc_pre_quantized
    run = partial(operation, *args, config=replace(config, quant=kind), **named)
    run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        held = run()
    for seed in range(3):
        args[post].copy_(arguments(config, tokens, seed)[post])
        found = check(config, kind, args, named)
        if kind != "nvfp4_tiles" and not post:
            check_values(found[:2], args, named.get("global_scale"))
        for _ in range(3):
            graph.replay()
        assert same(held, found)
        *new, x, post_, comb = (api.mhc_post_pre if post else api.mhc_pre)(*args, **HOW)
        if tokens > 64:
            assert same(operation(*args, **named), (*new, *codes_of(x, kind, named), post_, comb))
