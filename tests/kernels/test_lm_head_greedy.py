"""The greedy head: ids of the largest of our own head's logits, to the bit, and of the reference's where that is clear.

The head with peaks: the same logits, and the numbers that the greedy one picks from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4lab import ops, sim
from dsv4lab.formats import BF16, PackedWeight
from dsv4lab.kernels.gemm.mixed.api import linear, linear_peaks, partial_argmax
from dsv4lab.kernels.gemm.mixed.config import PART, MixedConfig, choose
from dsv4lab.kernels.gemm.mixed.layout import prepare
from dsv4lab.kernels.head.greedy.api import pick_largest
from dsv4lab.kernels.head.greedy.config import PickConfig
from dsv4lab.ops.head import lm_head_greedy, lm_head_peaks
from dsv4lab.reference import gemm, head, sampling
from tests.kernels.mixed import GPU_BOUND, random_weight
from tests.kernels.simulated import simulating

ARCH = "sm_90a"
SIGN = -(1 << 63)  # added to an int64, it makes the order of signed numbers that of unsigned ones
FEW = MixedConfig("bf16", "argmax", 8, 4, 2, 2, splits=2)
CONFIGS = [
    (1, 64, 128, FEW),  # one tile, one token
    (5, 200, 640, replace(FEW, cluster=2)),  # a tile and a slab half empty; the CTAs' shares of K differ
    (8, 40, 512, replace(FEW, slabs=1, splits=1, chunks=1, cluster=8)),  # a CTA finishes one token, on four lanes
    (13, 72, 1024, replace(FEW, tokens=16, slabs=2, chunks=8, splits=8, per_warp=2)),
    (3, 264, 200, replace(FEW, slabs=16, splits=1, chunks=1)),  # two parts a tile; K ends inside a pair of tiles
    (9, 136, 640, replace(FEW, tokens=16, slabs=8, cluster=2, per_warp=2)),
    (33, 136, 256, MixedConfig("bf16", "argmax", 32, 8, 2, 2, cluster=2)),  # by warpgroups, two tiles of tokens
    (70, 72, 200, MixedConfig("bf16", "argmax", 64, 4, 1, 3)),
]


def simulated(call: Callable[[], Any], multiprocessors: int = 4, **how: Any) -> Any:
    with simulating(ARCH, multiprocessors=multiprocessors, **how):
        return call()


def operands(m: int, vocab: int, depth: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, D), weight (V, D), bf16. Each token's largest logit comes twice, at random places."""
    g = torch.Generator().manual_seed(seed + m)
    x, weight = torch.randn(m, depth, generator=g).bfloat16(), torch.randn(vocab, depth, generator=g).bfloat16()
    best = gemm.lm_head(x, weight).argmax(-1)
    places = torch.randperm(vocab, generator=g)
    places = places[~torch.isin(places, best)][: min(m, vocab // 4)]
    weight[places] = weight[best[: len(places)]]
    return x, weight


def special(x: torch.Tensor) -> torch.Tensor:
    """With a token whose logits are all equal, one whose are all NaN, and one whose are infinite, of both signs."""
    x = x.clone()
    x[1:2], x[2:3, 3], x[3:4, 5] = 0, torch.nan, torch.inf
    return x


def both(x: torch.Tensor, weight: torch.Tensor, config: MixedConfig | None) -> tuple[torch.Tensor, ...]:
    """(parts, ids, our own logits), by one configuration."""
    ready = prepare(PackedWeight(BF16, weight))
    if x.is_cuda:
        torch.cuda.synchronize()
    parts = partial_argmax(x, ready, config=config)
    logits = linear(x, ready, out_dtype=torch.float32, config=replace(config, out="f32") if config else None)
    if config is None or config.rows % PART == 0:
        again, peaks = linear_peaks(x, ready, config=replace(config, out="peaks") if config else None)
        assert torch.equal(again.view(torch.int32), logits.view(torch.int32)) and torch.equal(peaks, parts[:, : peaks.shape[1]])
    return parts, pick_largest(parts), logits


def unpacked(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What packed numbers hold: float32 values, rows."""
    code = (parts >> 32) & 0xFFFFFFFF
    raw = torch.where(code >= 1 << 31, code - (1 << 31), 0xFFFFFFFF - code)
    raw = torch.where(raw >= 1 << 31, raw - (1 << 32), raw)
    return raw.to(torch.int32).view(torch.float32), 0xFFFFFFFF - (parts & 0xFFFFFFFF)


def check(x: torch.Tensor, weight: torch.Tensor, config: MixedConfig | None, **how: Any) -> None:
    """Every part holds its rows' largest logit, and the ids are those of the largest."""
    parts, ids, logits = simulated(lambda: both(x, weight, config), **how)
    assert torch.equal(ids, logits.argmax(-1)) and ids.dtype == torch.int64
    if config is not None:
        for i, rows in enumerate(logits.split(config.part_rows, dim=1)):
            value, row = unpacked(parts[:, i])
            at = rows.argmax(-1, keepdim=True)
            assert torch.equal(row, at[:, 0] + i * config.part_rows)
            torch.testing.assert_close(value, rows.gather(1, at)[:, 0] + 0.0, rtol=0, atol=0, equal_nan=True)
        assert not parts[:, -(-len(weight) // config.part_rows) :].any()  # past the vocabulary


# ---- in the simulator --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("m", "vocab", "depth", "config"), CONFIGS)
def test_every_part_s_largest_logit_is_found(m: int, vocab: int, depth: int, config: MixedConfig) -> None:
    x, weight = operands(m, vocab, depth)
    check(special(x), weight, config)


@pytest.mark.parametrize("schedule", ["lazy", "random"])
@pytest.mark.parametrize("config", [CONFIGS[i][3] for i in (1, 2, 5, 6)])
def test_any_schedule_and_no_race(config: MixedConfig, schedule: str) -> None:
    how: dict[str, Any] = dict(multiprocessors=2, schedule=schedule, seed=3, checks=sim.Checks(races=True))
    x, weight = operands(config.tokens + 1 if config.tokens < 32 else 20, 72, 64 * config.chunks * config.cluster)
    check(special(x), weight, config, **how)


@pytest.mark.parametrize(("m", "dtype"), [(0, torch.bfloat16), (6, torch.bfloat16), (19, torch.bfloat16), (5, torch.float32)])
def test_the_operator_is_the_reference(m: int, dtype: torch.dtype) -> None:
    x, weight = operands(m, 200, 256)
    x = x.to(dtype)
    with ops.backend("sim", arch=ARCH) as run:
        ids = lm_head_greedy(x, weight)
        if dtype == torch.bfloat16:
            logits, peaks = lm_head_peaks(x, weight)
            assert logits.shape == (m, 200) and torch.equal(peaks, head.peaks_of(logits))
        else:
            with pytest.raises(ops.MissingKernel, match="x must be bfloat16"):
                lm_head_peaks(x, weight)
    assert torch.equal(ids, head.lm_head_greedy(x, weight))
    assert len(run.launches) == (0 if not m else 3 if dtype == torch.bfloat16 else 1)


def test_a_nan_is_the_largest() -> None:
    x, weight = operands(2, 200, 128)
    weight[[150, 71], 7] = torch.nan
    with ops.backend("sim", arch=ARCH):
        assert lm_head_greedy(x, weight).tolist() == [71, 71]


@pytest.mark.parametrize(("parts", "warps"), [(1, 1), (97, 1), (1010, 8), (300, 2)])
@pytest.mark.parametrize("schedule", ["eager", "random"])
def test_the_largest_part_is_picked(parts: int, warps: int, schedule: str) -> None:
    """Numbers with the top bit and without, equals in the upper word, and a row's largest in every place of the loop."""
    g = torch.Generator().manual_seed(parts)
    high = torch.randint(0, 8, (5, parts), generator=g) << 61  # wraps into the sign
    packed = high | torch.randint(0, 1 << 32, (5, parts), generator=g)
    packed[1, -1], packed[2, parts // 2], packed[3, 0] = -1, -2, -3
    how: dict[str, Any] = dict(schedule=schedule, checks=sim.Checks(races=True))
    ids = simulated(lambda: pick_largest(packed, config=PickConfig(warps)), **how)
    largest = (packed + SIGN).amax(-1) - SIGN
    want = ~largest & 0xFFFFFFFF
    assert torch.equal(ids, torch.where(want >= 1 << 31, want - (1 << 32), want))


# ---- on any machine ----------------------------------------------------------------------------------------------------
def test_the_reference_is_the_greedy_sampler_s() -> None:
    x, weight = operands(7, 90, 64)
    x[0] = 0
    logits, none = gemm.lm_head(x, weight), torch.zeros(7, dtype=torch.int64)
    greedy = sampling.sample(logits, temperature=torch.zeros(7), seed=none, position=none)
    assert torch.equal(head.lm_head_greedy(x, weight), greedy) and greedy[0] == 0
    x[1, 0] = torch.nan
    assert head.lm_head_greedy(x, weight)[1] == 0


@pytest.mark.parametrize("vocab", [129_280, 129_288, 8])
@pytest.mark.parametrize("depth", [4096, 7168])
def test_configurations_are_those_of_the_logits(vocab: int, depth: int) -> None:
    for m in (1, 3, 8, 16, 64, 129, 1024):
        config = choose("bf16", "argmax", m, vocab, depth)
        config.check()
        assert replace(config, out="f32") == choose("bf16", "f32", m, vocab, depth)
        peaks = choose("bf16", "peaks", m, vocab, depth)
        peaks.check()
        assert vocab == 8 or peaks == replace(config, out="peaks")
        quads = config.part_rows // 4
        assert config.rows % config.part_rows == 0 and config.slice * config.rows // 4 // config.cluster % quads == 0


def test_warps_for_parts() -> None:
    assert [PickConfig.for_shape(p).warps for p in (1, 128, 129, 505, 1010, 9000)] == [1, 1, 2, 4, 8, 8]


def test_bad_input_is_refused() -> None:
    x, ready = torch.zeros(2, 128).bfloat16(), prepare(random_weight("bf16", 64, 128, seed=0))
    stack = prepare(random_weight("bf16", 2, 64, 128, seed=0))
    pair = prepare(random_weight("bf16", 64, 128, seed=0), random_weight("bf16", 64, 128, seed=1))
    assert partial_argmax(x[:0], ready).shape[0] == 0 and pick_largest(torch.zeros(0, 3, dtype=torch.int64)).shape == (0,)
    for call, message in (
        (lambda: partial_argmax(x[:, :64], ready), r"x must be contiguous \(M, 128\), got \(2, 64\)"),
        (lambda: partial_argmax(x, stack), "weight must be one matrix, no pair, got a stack of 2"),
        (lambda: partial_argmax(x, pair), "weight must be one matrix, no pair, .* paired=True"),
        (lambda: partial_argmax(x, ready, config=replace(FEW, out="f32")), "config must have out = argmax, got 'f32'"),
        (lambda: linear(x, ready, out_dtype=torch.float32, config=FEW), "config must have out = f32, got 'argmax'"),
        (lambda: replace(FEW, out="peaks").check(), "slabs must be a multiple of 8 for peaks, got 4"),
        (lambda: replace(FEW, scaled="row").check(), "argmax needs one matrix's products as they are, .* scaled='row'"),
        (lambda: replace(FEW, grouped=True).check(), "argmax needs one matrix's products as they are, .* grouped=True"),
        (lambda: pick_largest(torch.zeros(2, 0, dtype=torch.int64)), r"parts must be contiguous \(M, P\) with P >= 1"),
        (lambda: pick_largest(torch.zeros(2, 4, dtype=torch.int64).t()), r"parts must be contiguous \(M, P\)"),
        (lambda: PickConfig(0).check(), "warps must be 1 to 32, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="x must be bfloat16"):
        partial_argmax(x.float(), ready)
    with pytest.raises(TypeError, match="parts must be int64"):
        pick_largest(torch.zeros(2, 3, dtype=torch.int32))
    with ops.backend("sim", arch=ARCH), pytest.raises(ops.MissingKernel, match="N % 8 == 0"):
        lm_head_greedy(x, torch.zeros(9, 128).bfloat16())


# ---- on the GPU --------------------------------------------------------------------------------------------------------
MODEL = [(129_280, 4096), (129_280, 7168), (129_288, 4096), (32_776, 7168)]


def check_on_the_gpu(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor) -> None:
    """Our own logits' to the bit; the reference's but where its id's logit is as close to the largest as ours are to it."""
    assert torch.equal(ids, logits.argmax(-1))
    want = torch.cat([x.double() @ part.double().t() for part in weight.split(9999)], -1)
    largest, chosen = want.amax(-1), want.gather(1, ids[:, None])[:, 0]
    bound = 2 * GPU_BOUND * want.abs().amax(-1)
    assert bool((chosen >= largest - bound).all())
    clear = want.topk(2).values.diff(dim=-1).abs()[:, 0] > bound
    assert clear.any() and torch.equal(ids[clear], want.argmax(-1)[clear])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m", [1, 3, 8, 16, 64, 129])
@pytest.mark.parametrize(("vocab", "depth"), MODEL)
def test_on_the_gpu(vocab: int, depth: int, m: int, seed: int) -> None:
    g = torch.Generator(device="cuda").manual_seed(seed)
    x = torch.randn(m, depth, generator=g, device="cuda").bfloat16()
    weight = torch.randn(vocab, depth, generator=g, device="cuda").bfloat16()
    _, ids, logits = both(x, weight, None)
    check_on_the_gpu(x, weight, ids, logits)
    assert torch.equal(lm_head_greedy(x, weight), ids) and torch.equal(ops.lm_head(x, weight), logits)

    # each token's largest twice more, at random places: equals
    twins = torch.randint(vocab, (2, m), generator=g, device="cuda")
    weight[twins] = weight[ids].clone()
    tokens = torch.cat([x, torch.zeros_like(x[:1])])
    for batch in (tokens[:m], tokens):
        _, found, logits = both(batch, weight, None)
        assert torch.equal(found, logits.argmax(-1))
    assert found[-1] == 0
    poisoned = weight.clone()
    poisoned[vocab - 5, 7] = torch.nan
    assert torch.equal(lm_head_greedy(x, poisoned), torch.full_like(ids, vocab - 5))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 7, 40])
def test_a_cuda_graph_replays_with_new_inputs(m: int) -> None:
    weight = torch.randn(129_280, 4096, device="cuda").bfloat16()
    x = torch.zeros(m, 4096, device="cuda").bfloat16()
    lm_head_greedy(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, (logits, peaks) = lm_head_greedy(x, weight), lm_head_peaks(x, weight)
    for seed in range(3):
        x.copy_(torch.randn(m, 4096, generator=torch.Generator().manual_seed(seed)).bfloat16())
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(ids, logits.argmax(-1)) and torch.equal(logits, ops.lm_head(x, weight))
        assert torch.equal(peaks, head.peaks_of(logits))
