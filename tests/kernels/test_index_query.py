"""Index queries: what follows the rotation is the reference's to the bit; the rotation is within a bit of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels.indexer.query.api import ARCHITECTURES, index_query
from dsv4lab.kernels.indexer.query.config import HEAD_DIM, RECORDS, QueryConfig
from dsv4lab.kernels.indexer.query.operators import ENTRIES
from dsv4lab.reference import indexer
from tests.kernels.simulated import simulating
from tests.kernels.test_rope_heads import TABLES

BF16, F32 = torch.bfloat16, torch.float32
FAR = 2.0**-22  # of a pair's length: what rotated values may be off before they are rounded
# Heads with a rotated BF16 whose last bit differs: 64 values with a chance of 3e-5 each. Values after quantisation differ in
# fewer places, but by a step of their format.
HEADS_SHARE = 1e-2


def simulated(arch: str, *args: torch.Tensor, how: dict[str, Any] | None = None, **kwargs: Any) -> torch.Tensor:
    with simulating(arch, **(how or {})):
        return index_query(*args, **kwargs)


def material(m: int, heads: int, dtype: torch.dtype = BF16, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Heads of different sizes, some zeros, positions up to 2^20, the ends among them."""
    g = torch.Generator().manual_seed(seed + m * heads)
    q = torch.randn(m, heads, HEAD_DIM, generator=g) * torch.exp(2 * torch.randn(m, heads, 1, generator=g))
    positions = torch.randint(0, 2**20 + 1, (m,), generator=g)
    positions[0], positions[-1] = 0, 2**20
    q[0, 1], q[-1, 2, ::3], q[0, 0, 1] = 0.0, 0.0, -0.0
    return q.to(dtype), positions, TABLES["entries" if seed % 2 == 0 else "window"]


def equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where bits are equal, or both are no number."""
    ints = {BF16: torch.int16, F32: torch.int32}[a.dtype]
    return (a.view(ints) == b.view(ints)) | (a.isnan() & b.isnan())


def check(got: torch.Tensor, args: tuple[torch.Tensor, ...], record: str) -> float:
    """The share of heads that are not the reference's, after all that must hold has been asserted."""
    want = indexer.index_query(*args, record=record)
    assert got.dtype == want.dtype and got.shape == want.shape
    off = (got.double() - want.double()).abs()
    if record == "plain":
        assert bool(equal(got, want)[..., :-64].all())
        length = want[..., -64:].double().unflatten(-1, (32, 2)).norm(dim=-1, keepdim=True)
        length = length.expand(*want.shape[:-1], 32, 2).flatten(-2)
        unit = want[..., -64:].double().abs() * (2.0**-7 if got.dtype == BF16 else 2.0**-23)
        assert bool((off[..., -64:] <= torch.maximum(unit, FAR * length)).all())
    else:
        # E4M3 has 3 bits of mantissa, E2M1's greatest step is a third of amax. A BF16 that was rounded the other way moves all
        # values that it is turned into by 2^-10 of itself, also those that nearly cancel.
        size = want.double().abs()
        block = size.unflatten(-1, (-1, 32)).amax(-1, keepdim=True).expand(*size.shape[:-1], -1, 32).flatten(-2)
        step = torch.maximum(size * 2.0**-3, block * 2.0**-9) if record == "fp8" else block / 2
        assert bool((off <= step).all())
    share = float((~equal(got, want).all(-1)).double().mean())
    plain_f32 = got.dtype == F32 and record == "plain"
    assert plain_f32 or share <= max(HEADS_SHARE, 1.5 / got[..., 0].numel()), share
    return share


CASES = [  # architecture, schedule, tokens, heads, element, record, warps, passes
    ("sm_90a", "eager", 1, 32, BF16, "fp4", 2, 1),
    ("sm_90a", "random", 2, 13, BF16, "fp4", 1, 2),  # a pass that is partly empty
    ("sm_90a", "lazy", 5, 8, BF16, "fp8", 2, 1),
    ("sm_100a", "random", 2, 13, BF16, "fp8", 1, 2),
    ("sm_100a", "lazy", 3, 24, BF16, "plain", 2, 1),
    ("sm_90a", "lazy", 3, 11, F32, "fp4", 2, 1),
    ("sm_90a", "eager", 3, 8, F32, "fp8", 2, 1),
]


@pytest.mark.parametrize(("arch", "schedule", "m", "heads", "dtype", "record", "warps", "passes"), CASES)
def test_any_schedule_and_no_race(
    arch: str, schedule: str, m: int, heads: int, dtype: torch.dtype, record: str, warps: int, passes: int
) -> None:
    args = material(m, heads, dtype)
    config = QueryConfig(record, "bf16" if dtype == BF16 else "f32", warps, passes)
    how = dict(schedule=schedule, checks=sim.Checks(races=True))
    check(simulated(arch, *args, record=record, config=config, how=how), args, record)


@pytest.mark.parametrize("record", ["fp8", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_without_a_rotation_every_bit_is_the_reference_s(record: str, dtype: torch.dtype) -> None:
    """All magnitudes, and what is no number, at position 0. One BF16 in 64 is a midpoint of E2M1, so ties are met, too."""
    q, positions, inv_freq = material(37, 64, F32)
    positions.zero_()
    q *= torch.exp2(torch.linspace(-135, 120, 37))[:, None, None]
    q[-1, :4] = (torch.randn(4, HEAD_DIM, generator=torch.Generator().manual_seed(0)) * 1e38).clamp(-3e38, 3e38)
    q[-1, 4, 5], q[-1, 5, 7], q[-1, 6, 2:4], q[-2, 7, 100] = torch.inf, torch.nan, -torch.inf, 3e38
    q[-3, :, 1:] = 0.0  # all outputs are equal
    q = q.to(dtype)
    got = simulated("sm_90a", q, positions, inv_freq, record=record)
    want = indexer.index_query(q, positions, inv_freq, record=record)
    assert bool(equal(got, want).all()) and want.isinf().any() and want.isnan().any() and (want != 0).float().mean() > 0.5


def test_few_heads_differ() -> None:
    args = material(37, 64, seed=1)
    share = check(simulated("sm_90a", *args, record="plain"), args, "plain")
    assert share < 1e-2  # 64 rotated values, each with a chance of 3e-5


def test_positions_of_32_bits_and_heads_that_are_a_view() -> None:
    q, positions, inv_freq = material(3, 64)
    want = simulated("sm_90a", q, positions, inv_freq, record="fp4")
    wide = torch.cat((q, q), dim=1)[:, :64]
    entry = next(entry for entry in ENTRIES if entry.arch == "sm_90a")
    with simulating("sm_90a"):
        assert torch.equal(entry.function(wide, positions.int(), inv_freq, record="fp4"), want)
    shifted = torch.empty(q.numel() + 1, dtype=BF16)[1:].view(q.shape).copy_(q)
    assert torch.equal(simulated("sm_90a", shifted, positions, inv_freq, record="fp4"), want)


# ---- plans, refusals ---------------------------------------------------------------------------------------------------
def test_choices_cover_all_heads() -> None:
    for m in (1, 3, 37, 528, 8192):
        for heads in (1, 8, 11, 64):
            for record in RECORDS:
                config = QueryConfig.for_shape(m, heads, record, "bf16")
                config.check()
                assert config.heads <= max(64, heads) and (m < 528 or heads < 64 or config.passes == 2)
    assert QueryConfig.for_shape(1, 64, "fp4", "bf16").heads == 16  # four CTAs for one token
    for change, message in (
        (("mxfp4", "bf16"), "record must be one of plain, fp8, fp4, got 'mxfp4'"),
        (("fp4", "f16"), "element must be bf16 or f32, got 'f16'"),
        (("fp4", "bf16", 9), "warps must be 1 to 8 and passes 1 or 2, got 9 and 1"),
        (("fp4", "bf16", 2, 3), "warps must be 1 to 8 and passes 1 or 2, got 2 and 3"),
    ):
        with pytest.raises(ValueError, match=message):
            QueryConfig(*change).check()


def test_bad_input_is_refused_and_none_is_nothing() -> None:
    q, positions, inv_freq = material(3, 8)
    refuses = ENTRIES[0].refuses
    assert {entry.arch for entry in ENTRIES} == set(ARCHITECTURES)
    assert refuses(q, positions, inv_freq, record="fp4") is None
    for args, record, kind, message in (
        ((q.half(), positions, inv_freq), "fp4", TypeError, "q must be bfloat16 or float32, got torch.float16"),
        ((q, positions, inv_freq), "nvfp4", ValueError, "record must be one of plain, fp8, fp4, got 'nvfp4'"),
        ((q[..., :64], positions, inv_freq), "fp4", ValueError, "q must be (M, H, 128), got (3, 8, 64)"),
    ):
        assert str(refuses(*args, record=record)) == message
        with pytest.raises(kind) as caught:
            index_query(*args, record=record)
        assert str(caught.value) == message
    with pytest.raises(ValueError, match="positions must be 0 to"):
        index_query(q, positions - 2**30, inv_freq, record="fp4")
    with pytest.raises(ValueError, match="q must be contiguous, got strides"):
        index_query(q.transpose(0, 1), positions.new_zeros(8), inv_freq, record="fp4")
    with pytest.raises(ValueError, match="config must be for record fp4 of bf16"):
        index_query(q, positions, inv_freq, record="fp4", config=QueryConfig("fp8", "bf16"))
    assert index_query(q[:0], positions[:0], inv_freq, record="fp4").shape == (0, 8, HEAD_DIM)


# ---- GPU ---------------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("m", "heads"), [(1, 64), (3, 8), (8, 64), (129, 64), (1021, 64), (4097, 37), (8192, 64)])
def test_on_the_gpu(m: int, heads: int, seed: int) -> None:
    for dtype in (BF16, F32) if m < 2000 else (BF16,):
        args = tuple(t.cuda() for t in material(m, heads, dtype, seed))
        for record in RECORDS:
            check(index_query(*args, record=record), args, record)
    still = (args[0], torch.zeros_like(args[1]), args[2])
    for record in ("fp8", "fp4"):
        assert bool(equal(index_query(*still, record=record), indexer.index_query(*still, record=record)).all())


@pytest.mark.gpu
@pytest.mark.parametrize("m", [5, 1000])
def test_a_cuda_graph_replays_with_new_inputs(m: int) -> None:
    args = tuple(t.cuda() for t in material(m, 64))
    index_query(*args, record="fp4")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = index_query(*args, record="fp4")
    for seed in range(3):
        for target, source in zip(args, material(m, 64, seed=seed), strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        check(got, args, "fp4")
