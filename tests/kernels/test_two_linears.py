"""Two linears of one input: each as by itself, and x quantised once where that may be; one launch where weights go together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4lab import ops, sim
from dsv4lab.formats import PackedWeight
from dsv4lab.model.layers import Linear, both, share_input_scale
from dsv4lab.model.numerics import OFFICIAL, W4A4
from dsv4lab.reference import quant
from tests.kernels.mixed import trained_weight

ARCH = "sm_90a"
FIRST, SECOND = torch.tensor(3e-4), torch.tensor(3e-4)


def rows(m: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(m, 128, generator=torch.Generator().manual_seed(m)).to(dtype)


def weights(fmts: str, *given: torch.Tensor | None) -> list[PackedWeight]:
    made = [trained_weight(fmt, n, 128, seed=n) for fmt, n in zip(fmts.split(","), (80, 40), strict=True)]
    return [replace(w, input_scale=g) for w, g in zip(made, given or (None, None), strict=True)]


@pytest.mark.parametrize(
    ("fmts", "act", "dtype", "given", "launches"),
    [
        ("fp8_block,fp8_block", "fp8", torch.bfloat16, (), 2),
        ("bf16,bf16", "none", torch.bfloat16, (), 1),
        ("mxfp4,fp8_block", "fp8", torch.float32, (FIRST, 2 * FIRST), 3),  # FP8 has no given scale
        ("nvfp4,nvfp4", "nvfp4", torch.bfloat16, (), 3),
        ("nvfp4,nvfp4", "nvfp4", torch.bfloat16, (FIRST, FIRST), 3),
        ("nvfp4,nvfp4", "nvfp4", torch.bfloat16, (FIRST, SECOND), 4),  # equal, but who knows without looking
        ("nvfp4,nvfp4", "nvfp4", torch.bfloat16, (2 * FIRST, FIRST), 4),
        ("nvfp4,nvfp4", "nvfp4", torch.bfloat16, (None, FIRST), 4),
        ("bf16,nvfp4", "none", torch.bfloat16, (), 2),
        ("nvfp4,bf16", "none", torch.float32, (), 2),
    ],
)
def test_each_is_the_linear_s(fmts: str, act: str, dtype: torch.dtype, given: Any, launches: int) -> None:
    x, pair = rows(5, dtype), weights(fmts, *given)
    with ops.backend("sim", arch=ARCH) as run:
        found = ops.two_linears(x, *pair, act=act)
    assert len(run.launches) == launches
    with ops.backend("sim", arch=ARCH):
        alone = [ops.linear(x, w, act=act) for w in pair]
    for y, want in zip(found, alone, strict=True):
        assert y.dtype == dtype and torch.equal(y, want)  # tiles of these few rows have one order of sums


@pytest.mark.parametrize("m", [1, 9, 40, 300])
@pytest.mark.parametrize(
    ("fmt", "out", "octaves"),
    [("fp8_block", torch.float32, 3), ("mxfp4", torch.float32, -3), ("bf16", torch.bfloat16, 0), ("bf16", torch.float32, 0)],
)
def test_each_has_its_own_columns(fmt: str, out: torch.dtype, octaves: int, m: int) -> None:
    """By warps and warpgroups, through sums and directly; a tile has rows of both matrices, the second's scales so far off."""
    x, pair = rows(m), weights(f"{fmt},{fmt}")
    if (scale := pair[1].scale) is not None:
        scale.view(torch.uint8).add_(octaves)
    with ops.backend("sim", arch=ARCH, checks=sim.Checks(races=True)) as run:
        found = ops.two_linears(x, *pair, act="none", out_dtype=out)
    assert len(run.launches) == 1
    for y, w in zip(found, pair, strict=True):
        want = x.double() @ quant.dequantize(w).double().t()
        assert y.dtype == out and y.is_contiguous() and y.shape == want.shape
        assert float((y - want).abs().max() / want.abs().max()) < (2.0**-8 if out == torch.bfloat16 else 2.0**-20)


@pytest.mark.parametrize("which", [0, 1])
def test_a_nan_in_either_stays_visible(which: int) -> None:
    pair = weights("fp8_block,fp8_block")
    assert pair[which].scale is not None
    pair[which].scale.view(torch.uint8)[0, 0] = 255
    with ops.backend("sim", arch=ARCH):
        assert ops.two_linears(rows(2), *pair, act="none")[which].isnan().all()


def test_no_rows_and_what_is_refused() -> None:
    pair = weights("nvfp4,nvfp4")
    with ops.backend("sim", arch=ARCH):
        assert [y.shape for y in ops.two_linears(rows(0), *pair, act="nvfp4")] == [(0, 80), (0, 40)]
        with pytest.raises(ops.MissingKernel, match="weight must be one of nvfp4"):
            ops.two_linears(rows(2), pair[0], weights("bf16,f32")[1], act="fp8")
    with ops.backend("sim", arch="sm_100a"), pytest.raises(ops.MissingKernel, match="sm_100a"):
        ops.two_linears(rows(2), *weights("bf16,bf16"), act="none")


# ---- modules -----------------------------------------------------------------------------------------------------------
def modules(numerics: Any, *pair: PackedWeight) -> list[Linear]:
    made = [Linear(w.shape[0], w.shape[1], numerics) for w in pair]
    for module, weight in zip(made, pair, strict=True):
        module.assign("weight", weight)
    return made


@pytest.mark.parametrize(
    ("fmts", "numerics", "names"),
    [
        ("fp8_block,fp8_block", OFFICIAL, ["two_linears"]),
        ("nvfp4,nvfp4", W4A4, ["two_linears"]),
        ("nvfp4,fp8_block", W4A4, ["linear", "linear"]),  # they quantise in different ways
        ("bf16,bf16", OFFICIAL, ["two_linears"]),  # and these not at all
    ],
)
def test_modules_go_together_where_they_quantise_alike(fmts: str, numerics: Any, names: list[str]) -> None:
    x, (first, second) = rows(3), modules(numerics, *weights(fmts))
    with ops.observe() as calls:
        y, z = both(first, second, x)
    assert [call.name for call in calls] == names
    assert torch.equal(y, first(x)) and torch.equal(z, second(x))


@pytest.mark.parametrize("scale", [SECOND, 2 * FIRST, FIRST / 2])
def test_calibrated_scales_become_the_larger(scale: torch.Tensor) -> None:
    first, second = modules(W4A4, *weights("nvfp4,nvfp4", FIRST, scale))
    share_input_scale(first, second)
    assert second.input_scale is first.input_scale and second.input_scale == max(FIRST, scale)
    for pair in (weights("nvfp4,nvfp4"), [weights("nvfp4,nvfp4", FIRST, FIRST)[0], weights("nvfp4,nvfp4")[1]]):
        first, second = modules(W4A4, *pair)
        share_input_scale(first, second)
        assert first.input_scale is pair[0].input_scale and second.input_scale is None


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 17, 1025])
@pytest.mark.parametrize(("fmt", "act"), [("fp8_block", "fp8"), ("nvfp4", "nvfp4"), ("bf16", "none")])
def test_on_the_gpu(fmt: str, act: str, m: int) -> None:
    pair = [trained_weight(fmt, n, 4096, seed=n).to("cuda") for n in (1024, 512)]
    x = torch.randn(m, 4096, generator=torch.Generator("cuda").manual_seed(m), device="cuda").bfloat16()
    with ops.backend("kernel"):
        for y, w in zip(ops.two_linears(x, *pair, act=act), pair, strict=True):
            want = ops.linear(x, w, act=act)
            apart = float((y - want).abs().max() / want.abs().max())
            assert torch.equal(y, want) if fmt == "nvfp4" else apart < 2.0**-7
