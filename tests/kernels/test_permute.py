"""The token permutation and the row gather: equal to torch's stable sort and indexing, in the simulator and on the GPU."""

from __future__ import annotations

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels.moe.gather.api import gather_rows
from dsv4lab.kernels.moe.gather.config import GatherConfig
from dsv4lab.kernels.moe.permute.api import Permutation, permute
from dsv4lab.kernels.moe.permute.config import MAX_ENTRIES, PermuteConfig, max_tiles
from tests.kernels.simulated import simulating


def routing(tokens: int, top_k: int, experts: int, kind: str, seed: int = 0) -> torch.Tensor:
    """Expert ids (M, k): random, all of one expert, a few experts hit, or a table's with repeats and ids that are none."""
    g = torch.Generator().manual_seed(seed + tokens)
    if kind == "one":
        return torch.full((tokens, top_k), experts // 2)
    if kind == "few":
        return torch.randint(0, 3, (tokens, top_k), generator=g) * (experts // 3)
    ids = torch.randint(0, experts, (tokens, top_k), generator=g)
    if kind == "dropped":
        ids.view(-1)[::5] = torch.tensor([-1, experts, 2**40, -(2**33) + 1])[torch.arange(0, ids.numel(), 5) % 4]
    return ids


def expected_tiles(counts: list[int], size: int) -> list[list[int]]:
    """Every expert's rows in ceil(n / T) tiles, equal up to the multiple of 8."""
    tiles: list[list[int]] = []
    first = hit = 0
    for expert, n in enumerate(counts):
        num = -(-n // size)
        step = -(-n // (8 * num)) * 8 if n else 0  # ceil(ceil(n / num) / 8) is ceil(n / 8 num)
        tiles += [[expert, first + t * step, min(first + (t + 1) * step, first + n), hit] for t in range(num)]
        first, hit = first + n, hit + (n > 0)
    return tiles


def check(expert_idx: torch.Tensor, experts: int, size: int, found: Permutation) -> None:
    """Every output against a stable sort of the ids that are one."""
    flat = expert_idx.flatten().cpu()
    kept = ((flat >= 0) & (flat < experts)).nonzero()[:, 0]
    order = kept[torch.sort(flat[kept], stable=True).indices]
    position = torch.full((flat.numel(),), -1)
    position[order] = torch.arange(order.numel())
    assert found.slots.tolist() == order.tolist() + [-1] * (flat.numel() - order.numel())
    assert found.position.tolist() == position.tolist()
    tiles = expected_tiles(torch.bincount(flat[kept], minlength=experts).tolist(), size)
    assert found.num_tiles.tolist() == [len(tiles)]
    assert len(tiles) <= found.tiles.shape[0] == max_tiles(flat.numel(), experts, size)
    assert found.tiles[: len(tiles)].tolist() == tiles
    assert all(0 < end - start <= size for _, start, end, _ in tiles)


def run(
    arch: str, expert_idx: torch.Tensor, experts: int, size: int, config: PermuteConfig | None = None, **how: object
) -> None:
    with simulating(arch, **how):
        found = permute(expert_idx, num_experts=experts, tile_tokens=size, config=config)
    check(expert_idx, experts, size, found)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "size", "kind"),
    [
        (1, 2, 8, 8, "random"),
        (17, 2, 8, 8, "one"),
        (3, 6, 256, 16, "random"),
        *((129, 6, 256, 64, kind) for kind in ("random", "one", "few", "dropped")),  # one full CTA
        (403, 6, 384, 24, "random"),  # a cluster
        (403, 6, 384, 24, "dropped"),
    ],
)
def test_permutations_are_the_stable_sort(tokens: int, top_k: int, experts: int, size: int, kind: str) -> None:
    run("sm_90a", routing(tokens, top_k, experts, kind), experts, size)


@pytest.mark.parametrize(("arch", "schedule"), [("sm_90a", "lazy"), ("sm_100a", "eager")])
@pytest.mark.parametrize(
    ("tokens", "config"),
    [
        (37, PermuteConfig(256, 8, 1)),
        (129, PermuteConfig(256, 8, 2, 4)),  # four CTAs, two of which have nothing to do; two rounds
    ],
)
def test_any_schedule_and_no_race(arch: str, tokens: int, config: PermuteConfig, schedule: str) -> None:
    checks = sim.Checks(races=True)
    run(arch, routing(tokens, 6, 256, "dropped"), 256, 32, config, schedule=schedule, checks=checks)


def test_every_size_of_every_tile_is_even() -> None:
    counts = torch.arange(0, 8 * 37, 37).tolist()  # 0 to 259 rows
    ids = torch.cat([torch.full((n,), e) for e, n in enumerate(counts)])[torch.randperm(sum(counts))]
    for size in (8, 40, 128, 256):
        run("sm_90a", ids[:, None].contiguous(), 8, size)


def test_the_bound_on_tiles_is_reached_and_never_passed() -> None:
    for entries, experts, size in ((1, 8, 8), (7, 8, 8), (100, 8, 8), (1000, 256, 64), (49152, 256, 64), (65, 1, 64)):
        bound = max_tiles(entries, experts, size)
        hit = min(entries, experts)
        worst = [1] * (hit - 1) + [entries - hit + 1]  # one expert has all the rest
        assert sum(-(-n // size) for n in worst) == bound
        for seed in range(20):
            cuts = torch.randint(0, experts, (entries,), generator=torch.Generator().manual_seed(seed))
            assert sum(-(-n // size) for n in torch.bincount(cuts).tolist()) <= bound
    assert max_tiles(0, 8, 8) == 0


@pytest.mark.parametrize("experts", [8, 256, 384, 1024])
def test_choices_take_what_they_are_for(experts: int) -> None:
    for entries in (1, 6, 96, 1000, 2048, 2049, 49152, 65536, MAX_ENTRIES):
        config = PermuteConfig.for_shape(entries, experts)
        config.check()
        assert config.entries >= entries
    with pytest.raises(ValueError, match=f"at most {MAX_ENTRIES} entries, got {MAX_ENTRIES + 1}"):
        PermuteConfig.for_shape(MAX_ENTRIES + 1, experts)


def test_bad_routing_is_refused_and_none_is_nothing() -> None:
    ids = torch.zeros(4, 2, dtype=torch.int64)
    for wrong, size, message in (
        (ids.int(), 8, r"expert_idx must be int64, got torch\.int32"),
        (ids.t(), 8, r"expert_idx must be contiguous \(M, k\), got \(2, 4\)"),
        (ids, 12, "tile_tokens must be a positive multiple of 8, got 12"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            permute(wrong, num_experts=8, tile_tokens=size)
    with pytest.raises(ValueError, match="config must have experts == 8 and take 8 entries"):
        permute(ids, num_experts=8, tile_tokens=8, config=PermuteConfig(16, 4, 1))
    with pytest.raises(ValueError, match="warps must be 32 at most, with a thread for every expert, got 4"):
        PermuteConfig(256, 4, 1).check()
    found = permute(ids[:0], num_experts=8, tile_tokens=8)
    assert found.num_tiles.tolist() == [0] and found.tiles.shape == (0, 4) and found.slots.shape == (0,)


# ---- gather ------------------------------------------------------------------------------------------------------------
def gathered(x: torch.Tensor, slots: torch.Tensor, top_k: int) -> torch.Tensor:
    rows = x[slots.long().clamp(min=0) // top_k]
    return torch.where(slots[:, None] < 0, torch.zeros_like(rows), rows)


@pytest.mark.parametrize(
    ("arch", "tokens", "depth", "dtype", "config"),
    [
        ("sm_90a", 1, 4096, torch.bfloat16, None),
        ("sm_100a", 17, 128, torch.float32, None),
        ("sm_90a", 3, 7168, torch.bfloat16, GatherConfig(4)),
        ("sm_100a", 5, 1096, torch.bfloat16, GatherConfig(2, warps=3)),  # 137 accesses: the last piece is short
    ],
)
def test_rows_are_copied(arch: str, tokens: int, depth: int, dtype: torch.dtype, config: GatherConfig | None) -> None:
    x = torch.randn(tokens, depth, generator=torch.Generator().manual_seed(depth)).to(dtype)
    slots = torch.randperm(tokens * 6).int()
    slots[-2:] = -1
    with simulating(arch, schedule="lazy", checks=sim.Checks(races=True)):
        y = gather_rows(x, slots, top_k=6, config=config)
    assert torch.equal(y, gathered(x, slots, 6))


def test_bad_rows_are_refused_and_none_is_nothing() -> None:
    x, slots = torch.zeros(4, 16), torch.zeros(8, dtype=torch.int32)
    for args, message in (
        ((x.double(), slots), "x must be bfloat16 or float32 and slots int32"),
        ((x.t(), slots), r"x must be contiguous \(M, D\), got \(16, 4\)"),
        ((x, slots[::2]), r"slots must be contiguous \(N,\)"),
        ((x[:, :6].contiguous(), slots), "rows of a multiple of 16 bytes, got D=6"),
        ((x[:0], slots), "x must have rows to gather, got none for 8 slots"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            gather_rows(*args, top_k=2)
    assert gather_rows(x, slots[:0], top_k=2).shape == (0, 16)


@pytest.mark.parametrize("rows", [1, 6, 600, 49152])
def test_pieces_are_no_longer_than_rows(rows: int) -> None:
    for row_bytes in (256, 512, 8192, 14336, 28672):
        config = GatherConfig.for_shape(rows, row_bytes)
        config.check()
        assert config.units == 1 or config.piece * 16 <= row_bytes


# ---- GPU ---------------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [1, 3, 16, 129, 1024, 4097, 8192])
def test_on_the_gpu(tokens: int, seed: int) -> None:
    for experts, top_k, kind, depth in ((256, 6, "random", 4096), (384, 6, "dropped", 7168), (8, 2, "one", 128)):
        ids = routing(tokens, top_k, experts, kind, seed).cuda()
        found = permute(ids, num_experts=experts, tile_tokens=64)
        check(ids, experts, 64, found)
        x = torch.randn(tokens, depth, device="cuda").bfloat16()
        assert torch.equal(gather_rows(x, found.slots, top_k=top_k), gathered(x, found.slots, top_k))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 1000])
def test_a_cuda_graph_replays_with_new_inputs(tokens: int) -> None:
    ids, x = routing(tokens, 6, 256, "random").cuda(), torch.randn(tokens, 4096, device="cuda").bfloat16()
    gather_rows(x, permute(ids, num_experts=256, tile_tokens=64).slots, top_k=6)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = permute(ids, num_experts=256, tile_tokens=64)
        y = gather_rows(x, found.slots, top_k=6)
    for seed in range(3):
        ids.copy_(routing(tokens, 6, 256, ("random", "few", "dropped")[seed], seed))
        x.copy_(torch.randn(tokens, 4096, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.cuda.synchronize()
        check(ids, 256, 64, found)
        assert torch.equal(y, gathered(x, found.slots, 6))
