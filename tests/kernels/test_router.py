"""The routers against float64: weights of float32 grade, and selections that differ only where scores are as good as equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4lab import paging, sim
from dsv4lab.kernels.moe.operators import ENTRIES
from dsv4lab.kernels.moe.router.api import router_hash, router_topk
from dsv4lab.kernels.moe.router.config import RouterConfig, choose
from dsv4lab.reference import moe
from tests.kernels.simulated import simulating

ARCHES = ("sm_90a", "sm_100a")
BF16, F32 = torch.bfloat16, torch.float32
LOGIT_BOUND = 2.0**-18  # of sum |w x|, on random numbers
SCORE_BOUND = 2.0**-20  # of the score, besides
SLOPE = 0.33  # the steepest that sqrt(softplus) gets
SCALE = 2.5


def material(
    tokens: int, experts: int, depth: int, x_dtype: torch.dtype = BF16, w_dtype: torch.dtype = BF16, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weights that give logits of a few units, a bias."""
    g = torch.Generator().manual_seed(seed + tokens + experts * depth)
    x = torch.randn(tokens, depth, generator=g).to(x_dtype)
    weight = (2 * torch.randn(experts, depth, generator=g) / depth**0.5).to(w_dtype)
    return x, weight, 0.3 * torch.randn(experts, generator=g)


def exact(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, how far a computed one may be away), float64, on the CPU or the GPU."""
    logits, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    score = torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()
    # Below zero the score falls with e^(z/2), and its error with it.
    slope = torch.minimum(torch.full_like(score, SLOPE), score / 2)
    return score, slope * LOGIT_BOUND * size + SCORE_BOUND * score


def check_score(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, top_k: int, found: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """The largest relative error of a weight, after everything that must hold has been asserted."""
    weights, ids = found
    score, slack = exact(x, weight)
    key = score + bias.double()
    slack = slack + 2.0**-23 * (score + key.abs())
    want = torch.sort(key, dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert weights.dtype == F32 and ids.dtype == torch.int64 and ids.shape == want.shape
    assert all(len(set(row)) == top_k for row in ids.tolist())
    gap = (key.gather(1, want) - key.gather(1, ids)).abs()
    assert bool((gap <= slack.gather(1, want) + slack.gather(1, ids)).all()), "a selection that the error does not excuse"
    return check_weights(score, slack, ids, weights)


def check_weights(score: torch.Tensor, slack: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> float:
    chosen = score.gather(1, ids)
    share = chosen / chosen.sum(-1, keepdim=True) * SCALE
    relative = slack.gather(1, ids) / chosen
    error = (weights.double() - share).abs() / share
    assert bool((error <= relative + relative.max(-1, keepdim=True).values + 2.0**-21).all()), float(error.max())
    return float(error.max())


def topk(
    arch: str, args: tuple, top_k: int, config: RouterConfig | None = None, multiprocessors: int = 6, **how: object
) -> tuple:
    with simulating(arch, multiprocessors=multiprocessors, **how):
        return router_topk(*args, top_k=top_k, route_scale=SCALE, config=config)


@pytest.mark.parametrize(
    ("tokens", "experts", "depth", "top_k", "x_dtype", "w_dtype"),
    [
        (1, 8, 128, 2, BF16, BF16),
        (17, 8, 128, 2, F32, BF16),
        (3, 256, 4096, 6, BF16, BF16),
        (1, 384, 7168, 6, BF16, BF16),
        (129, 24, 64, 6, BF16, BF16),
        (3, 40, 256, 6, F32, F32),
    ],
)
def test_routes_are_those_of_float64(
    tokens: int, experts: int, depth: int, top_k: int, x_dtype: torch.dtype, w_dtype: torch.dtype
) -> None:
    args = material(tokens, experts, depth, x_dtype, w_dtype)
    found = topk("sm_90a", args, top_k)
    assert check_score(*args, top_k, found) < 2.0**-19
    want = moe.router_topk(*args, top_k=top_k, route_scale=SCALE)
    assert torch.equal(found[1], want[1])  # nothing in this material is close


DIRECT = RouterConfig("bf16", "bf16", 40, 6, "score", False, 8, 16, 2, 2, True)
TILED = RouterConfig("bf16", "bf16", 72, 6, "score", True, 64, 64, 2, 3, False)
RACES = [
    ("sm_90a", "lazy", 11, 512, DIRECT),  # two token tiles, a tile of experts with some that are none
    ("sm_100a", "eager", 11, 448, DIRECT),  # seven steps, which parts of K and warps share unevenly
    ("sm_90a", "lazy", 67, 256, TILED),  # two tiles of tokens and of experts, both short; parts of K; two launches
]


@pytest.mark.parametrize(("arch", "schedule", "tokens", "depth", "config"), RACES)
def test_any_schedule_and_no_race(arch: str, schedule: str, tokens: int, depth: int, config: RouterConfig) -> None:
    args = material(tokens, config.experts, depth)
    found = topk(arch, args, 6, config, 12, schedule=schedule, checks=sim.Checks(races=True))
    assert check_score(*args, 6, found) < 2.0**-19


def test_a_wide_tile() -> None:
    args = material(37, 192, 192)
    found = topk("sm_100a", args, 6, RouterConfig("bf16", "bf16", 192, 6, "score", True, 32, 192, 3, 2, False), 1)
    assert check_score(*args, 6, found) < 2.0**-19


def test_ties_go_to_the_lower_id_and_bias_only_selects() -> None:
    x, weight, _ = material(5, 256, 4096)
    weight[100:] = weight[7]  # equal scores, in every lane
    bias = torch.zeros(256)
    bias[7], bias[200:] = 40.0, 40.0
    weights, ids = topk("sm_90a", (x, weight, bias), 6)
    assert ids.tolist() == [[7, 200, 201, 202, 203, 204]] * 5
    assert (weights - SCALE / 6).abs().max() < 2.0**-20
    x.zero_()  # all scores are sqrt(log 2); a bias of -0 is one of 0
    bias = torch.tensor([-0.0, 0.0]).repeat(128)
    assert topk("sm_90a", (x, weight, bias), 6)[1].tolist() == [list(range(6))] * 5


@pytest.mark.parametrize("size", [30.0, 88.0, 160.0, 1e4])
def test_scores_of_large_logits(size: float) -> None:
    """Of both signs, where e^z is 0 or infinite in float32."""
    x = torch.zeros(6, 128)
    x[:, 0] = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.25, -0.25]) * size
    weight = torch.zeros(8, 128)
    weight[:, 0] = torch.tensor([1.0, 0.9375, 0.875, 0.75, -1.0, -0.875, 0.5, 0.0])
    bias = torch.zeros(8)
    weights, ids = topk("sm_90a", (x, weight, bias), 8)
    score, _ = exact(x, weight)
    want = score.gather(1, ids) / score.sum(-1, keepdim=True) * SCALE
    clear = want > 1e-37  # what float32 keeps to its full precision
    # A float32 logit z is within 2^-24 |z|, and the score with half that share of it.
    assert bool(((weights - want).abs()[clear] <= ((size + 8) * 2.0**-22 * want)[clear]).all())
    assert bool((weights[~clear] < 2e-37).all())
    assert torch.equal(ids, moe.router_topk(x, weight, bias, top_k=8, route_scale=SCALE)[1]) or size == 1e4


@pytest.mark.parametrize(
    ("arch", "tokens", "experts", "depth", "top_k", "table_dtype", "token_dtype"),
    [
        ("sm_90a", 19, 8, 64, 2, torch.int32, torch.int64),
        ("sm_100a", 3, 40, 512, 6, torch.int64, torch.int32),
    ],
)
def test_hash_routes(
    arch: str, tokens: int, experts: int, depth: int, top_k: int, table_dtype: torch.dtype, token_dtype: torch.dtype
) -> None:
    x, weight, _ = material(tokens, experts, depth)
    table = torch.randint(0, experts, (50, top_k))
    table[::2, 1] = table[::2, 0]  # the same expert twice
    token_ids = torch.randint(0, 50, (tokens,))
    with simulating(arch, multiprocessors=6):
        weights, ids = router_hash(x, weight, table.to(table_dtype), token_ids.to(token_dtype), route_scale=SCALE)
        with paging.checked(False):
            broken = router_hash(x, weight, torch.full_like(table, experts), token_ids + 2**40, route_scale=SCALE)
    assert torch.equal(ids, table[token_ids])
    assert check_weights(*exact(x, weight), ids, weights) < 2.0**-19
    assert bool((broken[1] == experts).all()) and bool(broken[0].isnan().all())  # 0 / 0, and nothing read out of bounds


@pytest.mark.parametrize(("experts", "depth"), [(8, 128), (256, 4096), (384, 7168)])
def test_choices_fit_and_cover_the_gpu(experts: int, depth: int) -> None:
    for x, weight in (("bf16", "bf16"), ("f32", "bf16"), ("f32", "f32")):
        for tokens in (1, 3, 16, 17, 129, 256, 257, 1024, 8192):
            config = choose(tokens, depth, experts, 6, "score", x, weight, 132)
            config.check()
            splits = config.splits(tokens, depth, 132)
            assert 1 <= splits <= depth // 64 and config.fused == (tokens <= 16)
            assert splits == 1 or config.tiles(tokens) * splits <= 132
            if tokens <= 16 and experts > 8:
                assert config.tiles(tokens) * splits >= 0.9 * 132  # so that all memory channels are asked


def test_bad_input_is_refused_and_none_is_nothing() -> None:
    x, weight, bias = material(4, 8, 128)
    for args, message in (
        ((x.half(), weight, bias), "x and gate_weight must be bfloat16 or float32"),
        ((x.t(), weight, bias), "x must be contiguous"),
        ((x[:, :96].contiguous(), weight, bias), "must share D % 64 == 0, got D=96 and 128"),
        ((x, weight, bias.double()), "bias must be float32, got torch"),
        ((x, weight, bias[:7]), r"bias must be contiguous \(8,\), got \(7,\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            router_topk(*args, top_k=2, route_scale=1.0)
    with pytest.raises(ValueError, match="top_k must be 1 to E = 8, got 9"):
        router_topk(x, weight, bias, top_k=9, route_scale=1.0)
    with pytest.raises(TypeError, match="tid2eid and token_ids must be int32 or int64"):
        router_hash(x, weight, torch.zeros(9, 2), torch.zeros(4, dtype=torch.int64), route_scale=1.0)
    with pytest.raises(ValueError, match=r"token_ids must be contiguous \(4,\), got \(3,\)"):
        router_hash(x, weight, torch.zeros(9, 2).long(), torch.zeros(3).long(), route_scale=1.0)
    with pytest.raises(ValueError, match="tiled must have x and weight bf16, got f32 and bf16"):
        replace(TILED, x="f32").check()
    with pytest.raises(ValueError, match="depth must be >= 2 and fit"):
        replace(TILED, depth=20).check()
    weights, ids = router_topk(x[:0], weight, bias, top_k=2, route_scale=1.0)
    assert weights.shape == ids.shape == (0, 2)


def test_operators_say_what_they_do_not_take() -> None:
    x, weight, bias = material(4, 8, 128)
    refuses = {entry.operation: entry.refuses for entry in ENTRIES if entry.arch == "sm_90a"}
    assert refuses["router_topk"](x, weight, bias, top_k=2, route_scale=1.0) is None
    assert "D % 64 == 0, got (4, 96)" in str(refuses["router_topk"](x[:, :96], weight, bias, top_k=2, route_scale=1.0))
    assert "int32 or int64" in str(refuses["router_hash"](x, weight, bias[None], bias, route_scale=1.0))
    assert refuses["moe_combine"](x.float(), x) is None and "routed must be float32" in str(refuses["moe_combine"](x, x))
    assert {entry.arch for entry in ENTRIES} == set(ARCHES)


# ---- GPU ---------------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 17, 129, 257, 1024, 4097, 8192])
def test_on_the_gpu(tokens: int, seed: int) -> None:
    for experts, depth, top_k, x_dtype in ((256, 4096, 6, BF16), (384, 7168, 6, BF16), (8, 128, 2, F32)):
        args = tuple(t.cuda() for t in material(tokens, experts, depth, x_dtype, seed=seed))
        found = router_topk(*args, top_k=top_k, route_scale=SCALE)
        again = router_topk(*args, top_k=top_k, route_scale=SCALE)
        assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])  # not a matter of timing
        check_score(*args, top_k, found)
        table = torch.randint(0, experts, (1000, top_k), device="cuda")
        token_ids = torch.randint(0, 1000, (tokens,), device="cuda")
        weights, ids = router_hash(*args[:2], table, token_ids, route_scale=SCALE)
        assert torch.equal(ids, table[token_ids])
        check_weights(*exact(*args[:2]), ids, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 100, 1000])
def test_a_cuda_graph_replays_with_new_inputs(tokens: int) -> None:
    x, weight, bias = (t.cuda() for t in material(tokens, 256, 4096))
    router_topk(x, weight, bias, top_k=6, route_scale=SCALE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = router_topk(x, weight, bias, top_k=6, route_scale=SCALE)
    for seed in range(3):
        x.copy_(material(tokens, 256, 4096, seed=seed + 1)[0])
        for _ in range(3):  # counters are as they were
            graph.replay()
        torch.cuda.synchronize()
        check_score(x, weight, bias, 6, found)
