"""The row quantisers: every bit is the reference's, in the simulator on both architectures, and on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv4lab import ops, sim
from dsv4lab.formats import to_atom128x4
from dsv4lab.kernels.quant.rows import api, config
from dsv4lab.kernels.quant.rows.config import RowsConfig, for_shape
from dsv4lab.reference import gemm, moe, norm, quant
from tests.kernels.simulated import simulating

BF16, F32 = torch.bfloat16, torch.float32
each_arch = pytest.mark.parametrize("arch", api.ARCHITECTURES)
EPS, LIMIT = 1e-6, 10.0
SWIGLU_BOUND = 2.0**-20  # of the value in float32


def simulated(arch: str, function: Callable[..., Any], *args: Any, how: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    with simulating(arch, **(how or {})):
        return function(*args, **kwargs)


def wild(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows whose blocks differ by orders of magnitude; an empty row and block, both zeros, denormals, infinities and NaNs."""
    g = torch.Generator().manual_seed(seed + m * k)
    spread = torch.exp(4 * torch.randn(m, -(-k // 16), 1, generator=g)).expand(-1, -1, 16).reshape(m, -1)[:, :k]
    x = torch.randn(m, k, generator=g) * spread
    x[0, 3] = -0.0
    if m > 2:
        x[1] = 0.0
        x[2, :16] = 0.0
        x[2, 16:32] *= 1e-12  # below the smallest block scale
        x[2, 32:48] = torch.linspace(-1e-40, 1e-38, x[2, 32:48].numel())
    if m > 4 and k > 48:
        x[3] *= 1e30
        x[3, 20], x[4, 5], x[4, 40] = -torch.inf, torch.nan, -torch.nan
        x[4, 0], x[4, 1] = torch.inf, -0.0
    return x.to(dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def same(got: Any, want: Any) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b)) for a, b in zip(got, want, strict=True)
    )


def per_row(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`reference.quantize_nvfp4` with a global scale for each row."""
    scale = quant.nvfp4_row_scale(x)
    codes, blocks, _ = quant.quantize_nvfp4(x[:, None], global_scale=scale)
    return codes[:, 0], blocks[:, 0], scale


def pairs(x: torch.Tensor) -> dict[str, tuple[Callable[[], Any], Any]]:
    """Calls that quantise x (M, K), K % 32 == 0, each with what must come out."""
    given = torch.tensor(0.013)
    codes, blocks, scale = per_row(x)
    mx_codes, mx_scale = quant.quantize_mxfp4(x)
    mx_tiles = to_atom128x4(mx_scale.view(torch.uint8)).view(mx_scale.dtype)
    return {
        "tensor": (lambda: api.quantize_nvfp4(x), quant.quantize_nvfp4(x)),
        "one": (lambda: api.quantize_nvfp4(x, given), quant.quantize_nvfp4(x, global_scale=given)),
        "row": (lambda: api.quantize_nvfp4(x, per_row=True), (codes, blocks, scale)),
        "row tiles": (
            lambda: api.quantize_nvfp4(x, layout="atom128x4", per_row=True),
            (codes, to_atom128x4(blocks), scale),
        ),
        "mxfp4": (lambda: api.quantize_mxfp4(x), (mx_codes, mx_scale)),
        "mxfp4 tiles": (lambda: api.quantize_mxfp4(x, layout="atom128x4"), (mx_codes, mx_tiles)),
        "fp8 64": (lambda: api.quantize_fp8_rows(x, 64), quant.quantize_fp8_rows(x, group=64)),
        "fp8 128": (lambda: api.quantize_fp8_rows(x, 128), quant.quantize_fp8_rows(x, group=128)),
    }


# ---- x itself ----------------------------------------------------------------------------------------------------------
# Shapes are few, and shared between tests: compiling takes most of the time.
@pytest.mark.parametrize(
    ("arch", "m", "k", "dtype", "which"),
    [
        ("sm_90a", 5, 192, BF16, ("tensor", "one", "row", "row tiles", "mxfp4", "mxfp4 tiles", "fp8 64")),
        ("sm_90a", 5, 192, F32, ("tensor", "mxfp4")),
        ("sm_90a", 1, 4096, BF16, ("row",)),  # one row of Flash's width by many threads
        ("sm_90a", 1, 7168, BF16, ("fp8 128",)),  # and of Pro's
        ("sm_100a", 131, 96, BF16, ("row tiles", "mxfp4")),
        ("sm_100a", 5, 192, F32, ("one",)),
    ],
)
def test_every_bit_is_the_reference_s(arch: str, m: int, k: int, dtype: torch.dtype, which: tuple[str, ...]) -> None:
    cases = pairs(wild(m, k, dtype))
    for name in which:
        call, want = cases[name]
        assert same(simulated(arch, call), want), name


def test_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows a CTA and several chunks a thread, the last CTA and the last threads without work."""
    monkeypatch.setattr(config, "_FEW_ROWS", 8)
    cases = pairs(wild(19, 704, BF16))
    for name in ("tensor", "row tiles"):
        call, want = cases[name]
        assert same(simulated("sm_90a", call), want), name


def test_a_computed_scale_knows_nothing_of_the_call_before() -> None:
    for size in (100.0, 1.0, 0.0):
        x = size * torch.randn(5, 192, generator=torch.Generator().manual_seed(3)).bfloat16()
        assert same(simulated("sm_90a", api.quantize_nvfp4, x), quant.quantize_nvfp4(x))


def test_every_bfloat16() -> None:
    """All 2^16 bit patterns, beside their neighbours and shuffled."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(BF16)
    mixed = patterns[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(1))]
    for x, scale in ((patterns, 0.37), (mixed, 2.0**-100)):
        x, given = torch.nn.functional.pad(x, (0, -x.numel() % 192)).view(-1, 192), torch.tensor(scale)
        for part in x.split(128):
            assert same(simulated("sm_90a", api.quantize_nvfp4, part, given), quant.quantize_nvfp4(part, global_scale=given))
    part = x[:128]
    assert same(simulated("sm_90a", api.quantize_fp8_rows, part, 64), quant.quantize_fp8_rows(part, group=64))
    assert same(simulated("sm_90a", api.quantize_mxfp4, part), quant.quantize_mxfp4(part))


@each_arch
def test_ties_of_every_code_go_to_even(arch: str) -> None:
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.0])
    x, one = midpoints.repeat(12)[None].contiguous(), torch.tensor(1.0)
    codes, scale, _ = simulated(arch, api.quantize_nvfp4, x, one)
    assert scale.float().eq(1.0).all()
    assert torch.equal(codes, quant.quantize_nvfp4(x, global_scale=one)[0])


def hard_quotients() -> tuple[torch.Tensor, torch.Tensor]:
    """Dividends within a few units of a midpoint times the step, for the steps where a quotient is hardest to round.

    -> rows f32 (M, 192) with block scales of 1, steps (M,).
    """
    near = torch.cat([torch.arange(-8, 9) + base for base in (1 << 23, 5 << 21, 3 << 22, 7 << 21, (1 << 24) - 9)])
    near = near[(near >= 1 << 23) & (near < 1 << 24)].double()
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    ideal = (near[:, None, None] * midpoints[:, None]).float()
    x = (ideal.view(torch.int32) + torch.arange(-2, 3)).view(torch.float32).flatten(1)
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 15)).unflatten(1, (-1, 15))
    top = (6.0 * near.float())[:, None, None].expand(*x.shape[:2], 1)
    return torch.nn.functional.pad(torch.cat([top, x], dim=-1).flatten(1), (0, 192 - 16 * x.shape[1])), near.float()


def test_quotients_next_to_ties() -> None:
    x, scale = hard_quotients()
    want = quant.quantize_nvfp4(x[:, None], global_scale=scale)
    codes, blocks, _ = simulated("sm_90a", api.quantize_nvfp4, x, scale)
    assert torch.equal(codes, want[0][:, 0]) and torch.equal(bits(blocks), bits(want[1][:, 0]))
    assert blocks.float().eq(1.0).all()


def test_multiplied_codes_round_like_quotients() -> None:
    """Scales whose steps are, or nearly are, an 8-bit number over a midpoint; all significands of BF16."""
    patterns = (torch.arange(128) + 128.0).repeat(7) * 2.0 ** torch.arange(-4, 3).repeat_interleave(128)
    rows = []
    for top in torch.linspace(448.0, 800.0, 12).tolist():  # of a block: all significands of block scales
        block = torch.nn.functional.pad(patterns.clamp(max=top), (0, -patterns.numel() % 15)).view(-1, 15)
        rows.append(torch.nn.functional.pad(block, (1, 0), value=top).flatten())
    x = torch.stack(rows).bfloat16()
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 192)).view(-1, 192).contiguous()
    for scale in (1.0, 2.0**-3, 0.75, 1.0 / 3, 255 / 896, 129 / 168, 0.7, 1.0000001, 191 / 21, 3.0**-20, 2.0**50, 6 / 2688):
        given = torch.tensor(scale)
        x_scaled = (x.float() * 2.0 ** float(torch.tensor(scale / 2).log2().floor())).bfloat16()
        got = simulated("sm_90a", api.quantize_nvfp4, x_scaled, given)
        assert same(got, quant.quantize_nvfp4(x_scaled, global_scale=given)), scale


@pytest.mark.parametrize("scale", [1.2e-38, 3e-20, 4.2484e-18, 2.0**60, 1e21])
def test_extreme_global_scales(scale: float) -> None:
    for dtype in (BF16, F32):
        x = (wild(6, 192, dtype).float() * scale).to(dtype)
        x[5] = (torch.linspace(0.2, 1, 192) * 3000 * scale).to(dtype)  # saturates
        x[4] = torch.finfo(dtype).max  # over 6 scale it may overflow
        given = torch.tensor(scale)
        assert same(simulated("sm_90a", api.quantize_nvfp4, x, given), quant.quantize_nvfp4(x, global_scale=given))


@pytest.mark.parametrize(("arch", "dtype"), [("sm_90a", BF16), ("sm_90a", F32), ("sm_100a", BF16)])
def test_activation_values(arch: str, dtype: torch.dtype) -> None:
    x = wild(7, 192, dtype)
    x[3:5] = x[5:7]  # numbers only: a NaN has many names
    settings = [("fp8", None), ("nvfp4", None), ("nvfp4", torch.tensor(0.013))]
    for act, given in settings if (arch, dtype) == ("sm_90a", BF16) else settings[1:2]:
        values, factor = simulated(arch, api.activation_values, x, act, given)
        assert values.dtype == BF16 and (factor is None) == (act == "fp8")
        back = values.float() if factor is None else values.float() * factor[:, None]
        assert torch.equal(bits(back.to(dtype)), bits(gemm.quantize_activation(x, act, given)))
    x[3, 5] = torch.nan
    values, factor = simulated(arch, api.activation_values, x, "nvfp4")
    assert torch.equal(values.isnan(), gemm.quantize_activation(x, "nvfp4").isnan()) and factor.isfinite().all()


def test_rows_come_to_l2_ahead() -> None:
    """Of a scale each: no byte past the last row is asked for, and who asks is none the worse."""
    x = wild(1059, 3072, BF16)
    assert for_shape(*x.shape, source="x", element="bf16", out="nvfp4", scale="row", decoded=True).rows == 2
    values, factor = simulated("sm_90a", api.activation_values, x, "nvfp4")
    assert factor is not None
    want, asked = gemm.quantize_activation(x, "nvfp4"), x.isfinite().all(-1)
    assert torch.equal(bits((values.float() * factor[:, None]).bfloat16()[asked]), bits(want[asked]))


def test_ragged_rows() -> None:
    for k, dtype in ((203, BF16), (130, F32)):
        x = wild(5, k, dtype)
        assert same(simulated("sm_90a", api.quantize_fp8_rows, x, 64), quant.quantize_fp8_rows(x, group=64))
    x, weight = wild(3, 45, BF16), torch.randn(45, generator=torch.Generator().manual_seed(1))
    assert same([simulated("sm_90a", api.rmsnorm, x, weight, eps=EPS)], [norm.rmsnorm(x, weight, eps=EPS)])


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
def test_any_schedule_and_no_race(schedule: str) -> None:
    how = dict(schedule=schedule, seed=3, checks=sim.Checks(races=True))
    x = wild(4, 1056, BF16)  # several warps a row
    x[3] = x[2]
    weight = torch.rand(1056).bfloat16()
    got = simulated("sm_90a", api.rmsnorm_nvfp4, x, weight, EPS, per_row=True, how=how)
    assert same(got, per_row(norm.rmsnorm(x, weight, eps=EPS)))
    x = wild(5, 192, BF16)
    assert same(simulated("sm_90a", api.quantize_nvfp4, x, how=how), quant.quantize_nvfp4(x))


@pytest.mark.parametrize("schedule", ["lazy", "random"])
def test_ctas_go_on_from_rows_to_rows(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several turns of each CTA; rows that meet in a warp and in a CTA, the last CTA without some of its rows; far rows."""
    monkeypatch.setattr(config, "_FEW_ROWS", 4)
    sim.enable("sm_90a", multiprocessors=1)
    how = dict(schedule=schedule, seed=5, checks=sim.Checks(races=True))
    # rows of 48 threads, which meet in warps, and of 64, which wait for themselves, with seven chunks and two
    for k, lanes in ((1536, 16), (7168, 32), (2048, 32)):
        x = wild(33, k, BF16)
        x[3:5], x[7], x[8], x[9] = x[5:7], x[7] * 1e30, x[8] * 1e-30, 1e-39
        weight = torch.randn(k, generator=torch.Generator().manual_seed(2)).bfloat16()
        chosen = for_shape(33, k, source="norm", element="bf16", out="nvfp4", scale="one")
        assert (chosen.rows, chosen.lanes) == (2, lanes) and chosen.streams and chosen.keeps
        for given, eps in ((0.02, EPS), (6 / 2688, 1e-300)):  # of the second, one step in eight is a power of two
            got = simulated("sm_90a", api.rmsnorm_nvfp4, x, weight, eps, torch.tensor(given), how=how)
            assert same(got, norm.rmsnorm_nvfp4(x, weight, eps=eps, global_scale=torch.tensor(given)))
    for group in (64, 128):  # the rows of 2048
        assert for_shape(33, k, source="norm", element="bf16", out="fp8", group=group).streams
        got = simulated("sm_90a", api.rmsnorm_fp8, x, weight, eps=EPS, group=group, how=how)
        assert same(got, norm.rmsnorm_fp8(x, weight, eps=EPS, group=group))
    weight[5], weight[300], weight[900] = torch.nan, torch.inf, 3e38  # groups of finite rows that are not finite
    got = simulated("sm_90a", api.rmsnorm_fp8, x, weight, eps=EPS, group=128, how=how)
    want = norm.rmsnorm_fp8(x, weight, eps=EPS, group=128)
    assert torch.equal(bits(got[1]), bits(want[1])) and want[0].isnan().any() and not want[0].isnan().all()
    assert torch.equal(got[0].float().nan_to_num(500.0), want[0].float().nan_to_num(500.0))  # a product's NaN has any sign
    if schedule == "random":
        return
    for m, k in ((9, 512), (19, 1024)):  # by the ring, a warp a row: the second
        x, up, factor = wild(m, k, BF16), wild(m, k, BF16, seed=1), torch.rand(m)
        h = simulated("sm_90a", api.swiglu, x, up, factor, limit=LIMIT)
        for layout in ("linear", "atom128x4"):
            got = simulated("sm_90a", api.swiglu_nvfp4, x, up, factor, None, limit=LIMIT, layout=layout, how=how)
            codes, blocks, used = quant.quantize_nvfp4(h)
            assert same(got, (codes, blocks if layout == "linear" else to_atom128x4(blocks), used))
    streams = (for_shape(19, k, source="swiglu", element="bf16", out="nvfp4", scale="one").streams for k in (512, 1024))
    assert tuple(streams) == (False, True)
    given = torch.tensor(0.013)
    assert same(simulated("sm_90a", api.quantize_nvfp4, x, given, how=how), quant.quantize_nvfp4(x, global_scale=given))


# ---- RMSNorm -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(BF16, BF16), (BF16, F32), (F32, F32)])
def test_norms(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x = wild(7, 192, dtype)
    x[3:5] = x[5:7]
    x[3] *= 1e30  # squares beyond float32
    weight = torch.randn(192, generator=torch.Generator().manual_seed(2)).to(weight_dtype)
    assert same([simulated("sm_90a", api.rmsnorm, x, weight, eps=EPS)], [norm.rmsnorm(x, weight, eps=EPS)])
    if weight_dtype == BF16:
        want = norm.rmsnorm_fp8(x, weight, eps=EPS, group=64)
        assert same(simulated("sm_90a", api.rmsnorm_fp8, x, weight, eps=EPS, group=64), want)
        got = simulated("sm_90a", api.rmsnorm_nvfp4, x, weight, EPS)
        assert same(got, norm.rmsnorm_nvfp4(x, weight, eps=EPS))


def test_norms_of_the_models() -> None:
    for k, arch in ((4096, "sm_90a"), (7168, "sm_100a")):
        x, weight = wild(1, k, BF16), torch.randn(k, generator=torch.Generator().manual_seed(2)).bfloat16()
        given = torch.tensor(0.02)
        want = norm.rmsnorm_nvfp4(x, weight, eps=EPS, global_scale=given)
        assert same(simulated(arch, api.rmsnorm_nvfp4, x, weight, EPS, given), want)


def test_norms_of_tiny_and_special_rows() -> None:
    x = wild(5, 192, BF16)
    x[0] = (torch.linspace(-3, 3, 192) * 1e-39).bfloat16()
    x[2, 7] = torch.inf
    weight = torch.ones(192).bfloat16()
    for eps in (0.0, 1e-6):
        got, want = simulated("sm_90a", api.rmsnorm, x, weight, eps=eps), norm.rmsnorm(x, weight, eps=eps)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(bits(got.nan_to_num(nan=0.0)), bits(want.nan_to_num(nan=0.0)))


# ---- SwiGLU ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arch", "dtype", "weighted"), [("sm_90a", BF16, True), ("sm_90a", F32, False), ("sm_100a", BF16, False)]
)
def test_swiglu(arch: str, dtype: torch.dtype, weighted: bool) -> None:
    """The value is within its bound of float64's, and what follows is the reference's quantisation of it, bit for bit."""
    g = torch.Generator().manual_seed(4)
    gate = (8 * torch.randn(5, 192, generator=g)).to(dtype)
    up = (6 * torch.randn(5, 192, generator=g)).to(dtype)
    gate[0, :8] = torch.tensor([0.0, -0.0, 1e4, -1e4, 3e38, -3e38, -90.0, torch.nan])
    up[0, 8:12] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    factor = torch.rand(5, generator=g) if weighted else None
    h = simulated(arch, api.swiglu, gate, up, factor, limit=LIMIT)
    within(h, moe.clamped_swiglu(gate, up, limit=LIMIT) * (1.0 if factor is None else factor[:, None]))
    if dtype == BF16:
        given = torch.tensor(0.02)
        got = simulated(arch, api.swiglu_nvfp4, gate, up, factor, given, limit=LIMIT)
        assert same(got, quant.quantize_nvfp4(h, global_scale=given))


def test_swiglu_of_every_bfloat16() -> None:
    """All gates that are numbers, and limits that are no BF16 or lie beyond where exp underflows."""
    gate = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(BF16)
    gate = gate[gate.isfinite()]
    gate = torch.nn.functional.pad(gate, (0, -gate.numel() % 192)).view(-1, 192)
    up, factor = torch.full_like(gate, -1.5), torch.ones(len(gate))
    for limit in (LIMIT, 0.7123456, 1e30):
        h = simulated("sm_90a", api.swiglu, gate, up, factor, limit=limit)
        within(h, moe.clamped_swiglu(gate, up, limit=limit))


def within(h: torch.Tensor, exact: torch.Tensor) -> None:
    """h is a float64 rounded to its dtype, up to `SWIGLU_BOUND` before that."""
    room = exact.abs() * SWIGLU_BOUND + 2.0**-110
    low, high = (exact - room).float().to(h.dtype), (exact + room).float().to(h.dtype)
    assert torch.equal(h.isnan(), exact.isnan())
    assert ((h >= low) & (h <= high) | h.isnan()).all()


# ---- around it ---------------------------------------------------------------------------------------------------------
def test_operators_take_leading_dims() -> None:
    x, weight = wild(6, 192, BF16).view(2, 3, 192), torch.rand(192).bfloat16()
    x[1] = x[0]
    scale, factor = torch.tensor([0.02, 0.5]), torch.rand(2, 3)
    with ops.backend("sim", arch="sm_90a"):
        assert same(ops.quantize_nvfp4(x), quant.quantize_nvfp4(x))
        assert same(ops.quantize_nvfp4(x, global_scale=scale), quant.quantize_nvfp4(x, global_scale=scale))
        assert same(ops.quantize_mxfp4(x), quant.quantize_mxfp4(x))
        assert same(ops.quantize_fp8_rows(x, group=64), quant.quantize_fp8_rows(x, group=64))
        assert same([ops.rmsnorm(x, weight, eps=EPS)], [norm.rmsnorm(x, weight, eps=EPS)])
        assert same(ops.rmsnorm_fp8(x, weight, eps=EPS, group=64), norm.rmsnorm_fp8(x, weight, eps=EPS, group=64))
        assert same(ops.rmsnorm_nvfp4(x, weight, eps=EPS), norm.rmsnorm_nvfp4(x, weight, eps=EPS))
        h = ops.swiglu(x, x, factor, limit=LIMIT)
        assert same(ops.swiglu_fp8(x, x, factor, limit=LIMIT, group=64), quant.quantize_fp8_rows(h, group=64))
        one = torch.tensor(0.1)
        assert same(ops.swiglu_nvfp4(x, x, factor, one, limit=LIMIT), quant.quantize_nvfp4(h, global_scale=one))
        for call, message in (
            (lambda: ops.quantize_mxfp4(x.half()), "x must be bfloat16 or float32, got torch.float16"),
            (lambda: ops.quantize_nvfp4(x[..., :24]), r"K % 16 == 0, got shape \(2, 3, 24\)"),
            (lambda: ops.quantize_fp8_rows(x, group=32), "group must be 64 or 128, got 32"),
            (lambda: ops.quantize_nvfp4(x, global_scale=torch.ones(3)), r"must be a scalar or \(2,\), got \(3,\)"),
            (lambda: ops.rmsnorm(x, weight.half(), eps=EPS), "weight must be bfloat16 or float32"),
            (lambda: ops.swiglu(x, x.float(), limit=LIMIT), "up must be like gate"),
            (lambda: ops.swiglu(x, x, factor.double(), limit=LIMIT), "row_weight must be float32"),
            (lambda: ops.swiglu(x, x, limit=-1.0), "limit must be positive"),
        ):
            with pytest.raises(ops.MissingKernel, match=message):
                call()


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(2, 32)
    for call, error, message in (
        (lambda: api.quantize_nvfp4(x.half()), TypeError, r"x must be bfloat16 or float32, got torch\.float16"),
        (lambda: api.quantize_nvfp4(x[:, :24].contiguous()), ValueError, "K % 16 == 0, got K=24"),
        (lambda: api.quantize_mxfp4(x[:, :16].contiguous()), ValueError, "K % 32 == 0, got K=16"),
        (lambda: api.quantize_nvfp4(x.t()), ValueError, "x must be contiguous"),
        (lambda: api.quantize_nvfp4(x, layout="swizzled"), ValueError, "layout must be one of linear, atom128x4"),
        (lambda: api.quantize_nvfp4(x, torch.ones(()), per_row=True), ValueError, "per_row must be False"),
        (lambda: api.quantize_nvfp4(x, torch.ones(3)), ValueError, r"divide the 2 rows, got shape \(3,\)"),
        (lambda: api.quantize_nvfp4(x, torch.ones(()).double()), TypeError, "global_scale must be float32"),
        (lambda: api.quantize_fp8_rows(x, 32), ValueError, "group must be 64 or 128, got 32"),
        (lambda: api.activation_values(x, "none"), ValueError, "act must be fp8 or nvfp4, got 'none'"),
        (lambda: api.rmsnorm(x, torch.ones(16), eps=EPS), ValueError, r"weight must be contiguous \(32,\)"),
        (lambda: api.rmsnorm(x, torch.ones(32).half(), eps=EPS), TypeError, "weight must be bfloat16 or float32"),
        (lambda: api.swiglu(x, x.bfloat16(), limit=LIMIT), TypeError, "up must be float32, got"),
        (lambda: api.swiglu(x, x, torch.ones(3), limit=LIMIT), ValueError, r"row_weight must be contiguous \(2,\)"),
        (lambda: api.swiglu(x, x, limit=0.0), ValueError, "limit must be positive and finite, got 0.0"),
        (lambda: api.quantize_mxfp4(x), ValueError, "needs CUDA tensors, or the simulator"),
        (lambda: RowsConfig("x", "bf16", "nvfp4", 64, 1, 1).check(), ValueError, "scale of nvfp4 must be one of"),
        (lambda: RowsConfig("norm", "bf16", "same", 96, 1, 11).check(), ValueError, "rows must fill warps and fit"),
        (lambda: RowsConfig("x", "bf16", "mxfp4", 64, 1, 1).check(), ValueError, "group of mxfp4 must be 32, got 16"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_nothing_to_quantise() -> None:
    codes, scale, used = api.quantize_nvfp4(torch.zeros(0, 32), layout="atom128x4", per_row=True)
    assert codes.shape == (0, 16) and scale.shape == (0, 1, 512) and used.shape == (0,)
    assert same(api.quantize_nvfp4(torch.zeros(0, 32)), quant.quantize_nvfp4(torch.zeros(0, 32)))
    assert api.rmsnorm(torch.zeros(0, 32), torch.ones(32), eps=EPS).shape == (0, 32)


def test_choices_suit_the_models() -> None:
    """Rows of the models leave no thread without work, few rows have a chunk a thread, many share CTAs of 256 threads."""
    for k in (512, 1024, 1536, 2048, 4096, 7168):
        for source, out, rest in (
            ("x", "nvfp4", dict(scale="row")),
            ("x", "fp8", dict(group=128)),
            ("norm", "nvfp4", dict(scale="one")),
            ("swiglu", "mxfp4", dict(group=32)),
        ):
            few = for_shape(3, k, source=source, element="bf16", out=out, **rest)
            many = for_shape(8192, k, source=source, element="bf16", out=out, **rest)
            assert few.chunks == 1 and few.threads >= k // 16
            assert many.full and many.threads * many.rows <= 256 and 2 <= many.chunks <= 7, many


# ---- on the GPU --------------------------------------------------------------------------------------------------------
BIG = [(1, 4096), (8, 7168), (129, 4096), (4097, 7168), (8192, 4096)]


def on_cpu(result: Any) -> list[torch.Tensor]:
    return [t.cpu() for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("m", "k"), BIG)
def test_quantisers_on_the_gpu(m: int, k: int, seed: int) -> None:
    x = wild(m, k, BF16, seed)
    on_gpu = x.cuda()
    given = torch.tensor(0.013)
    assert same(on_cpu(api.quantize_nvfp4(on_gpu)), quant.quantize_nvfp4(x))
    assert same(on_cpu(api.quantize_nvfp4(on_gpu, given.cuda())), quant.quantize_nvfp4(x, global_scale=given))
    codes, blocks, scale = per_row(x)
    got = on_cpu(api.quantize_nvfp4(on_gpu, per_row=True, layout="atom128x4"))
    assert same(got, (codes, to_atom128x4(blocks), scale))
    assert same(on_cpu(api.quantize_mxfp4(on_gpu)), quant.quantize_mxfp4(x))
    for group in (64, 128):
        assert same(on_cpu(api.quantize_fp8_rows(on_gpu, group)), quant.quantize_fp8_rows(x, group=group))
    numbers = x.nan_to_num(nan=1.0)
    for act in ("fp8", "nvfp4"):
        values, factor = api.activation_values(numbers.cuda(), act)
        back = values.cpu().float() * (1.0 if factor is None else factor.cpu()[:, None])
        assert torch.equal(bits(back.bfloat16()), bits(gemm.quantize_activation(numbers, act)))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("m", "k"), BIG)
def test_norms_and_swiglu_on_the_gpu(m: int, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, up = wild(m, k, BF16, seed).nan_to_num(nan=1.0, posinf=1.0, neginf=-1.0), torch.randn(m, k, generator=g).bfloat16()
    for dtype in (BF16, F32):
        weight = torch.randn(k, generator=g).to(dtype)
        want = norm.rmsnorm(x, weight, eps=EPS)
        assert same(on_cpu(api.rmsnorm(x.cuda(), weight.cuda(), eps=EPS)), [want])
        got = on_cpu(api.rmsnorm_fp8(x.cuda(), weight.cuda(), eps=EPS, group=128))
        assert same(got, quant.quantize_fp8_rows(want, group=128))
        assert same(on_cpu(api.rmsnorm_nvfp4(x.cuda(), weight.cuda(), EPS)), quant.quantize_nvfp4(want))
    factor = torch.rand(m, generator=g)
    args = (x.cuda(), up.cuda(), factor.cuda())
    h = api.swiglu(*args, limit=LIMIT).cpu()
    within(h, moe.clamped_swiglu(x, up, limit=LIMIT) * factor[:, None])
    assert same(on_cpu(api.swiglu_fp8(*args, limit=LIMIT, group=128)), quant.quantize_fp8_rows(h, group=128))
    assert same(on_cpu(api.swiglu_nvfp4(*args, limit=LIMIT)), quant.quantize_nvfp4(h))


@pytest.mark.gpu
def test_every_bfloat16_and_hard_quotients_on_the_gpu() -> None:
    x, steps = hard_quotients()
    want = quant.quantize_nvfp4(x[:, None], global_scale=steps)
    got = on_cpu(api.quantize_nvfp4(x.cuda(), steps.cuda()))
    assert same(got[:2], (want[0][:, 0], want[1][:, 0]))
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(BF16).view(16, 4096)
    for scale in torch.exp(torch.linspace(-40, 40, 50)):
        got = on_cpu(api.quantize_nvfp4(x.cuda(), scale.cuda()))
        assert same(got, quant.quantize_nvfp4(x, global_scale=scale))
    assert same(on_cpu(api.quantize_nvfp4(x.cuda())), quant.quantize_nvfp4(x))


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_inputs() -> None:
    x, weight = torch.zeros(33, 4096, dtype=BF16, device="cuda"), torch.rand(4096, device="cuda").bfloat16()
    calls: list[Callable[[], Any]] = [
        lambda: api.quantize_nvfp4(x),
        lambda: api.quantize_nvfp4(x, per_row=True),
        lambda: api.rmsnorm_nvfp4(x, weight, EPS),
        lambda: api.rmsnorm_fp8(x, weight, eps=EPS, group=128),
    ]
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    for seed in range(3):
        new = wild(33, 4096, BF16, seed).nan_to_num(nan=1.0, posinf=1.0, neginf=-1.0)
        x.copy_(new)
        graph.replay()
        w = weight.cpu()
        wants = (
            quant.quantize_nvfp4(new),
            per_row(new),
            norm.rmsnorm_nvfp4(new, w, eps=EPS),
            norm.rmsnorm_fp8(new, w, eps=EPS, group=128),
        )
        for result, want in zip(results, wants, strict=True):
            assert same(on_cpu(result), want)
