"""The choice of the best entries: the reference's, in every place, however the scores are spread or equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels.indexer.operators import ENTRIES
from dsv4lab.kernels.indexer.topk.api import index_topk
from dsv4lab.kernels.indexer.topk.config import MAX_ENTRIES, IndexTopkConfig
from dsv4lab.reference import indexer
from tests.kernels.simulated import simulating

KINDS = 10


def scores_of(entries: int, seed: int = 0, device: str = "cpu", rows: int = KINDS) -> torch.Tensor:
    """A row of each kind in turn: random, few values, all equal, zeros of both signs, denormals, negative, -inf inside, coarse,
    spread over all exponents, one far above the rest.
    """
    g = torch.Generator(device).manual_seed(seed + entries)
    x = torch.randn(rows, entries, generator=g, device=device)
    entry = torch.arange(entries, device=device)
    x[1::KINDS] = x[1::KINDS].round()
    x[2::KINDS] = -2.5
    x[3::KINDS] = torch.where(entry % 3 == 0, 0.0, -0.0)
    x[4::KINDS] = torch.where(entry % 5 == 0, x[4::KINDS], x[4::KINDS] * 1e-42)
    x[5::KINDS] = -x[5::KINDS].exp()
    x[6::KINDS] = torch.where(x[6::KINDS] < 0.5, -torch.inf, x[6::KINDS])
    x[7::KINDS] = (x[7::KINDS] * 16).round() / 16
    x[8::KINDS] = x[8::KINDS].sign() * torch.exp2(40 * x[8::KINDS]).clamp(max=3e38)
    x[9::KINDS, entries // 2] = 1e30
    return x


def masked(x: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores as `index_scores` leaves them, and how many each row has: all in every other row."""
    g = torch.Generator(x.device).manual_seed(seed)
    visible = torch.randint(0, x.shape[1] + 1, (len(x),), generator=g, device=x.device)
    visible[seed % 2 :: 2] = x.shape[1]
    return x.masked_fill(torch.arange(x.shape[1], device=x.device) >= visible[:, None], -torch.inf), visible


def run(
    scores: torch.Tensor, visible: torch.Tensor, k: int, config: IndexTopkConfig | None = None, arch: str = "sm_90a", **how: Any
) -> torch.Tensor:
    with simulating(arch, multiprocessors=4, **how):
        return index_topk(scores, visible, k=k, config=config)


@pytest.mark.parametrize(("entries", "k"), [(1, 512), (511, 512), (512, 512), (513, 512), (1000, 512), (1000, 7), (700, 1)])
def test_the_reference_s_choice(entries: int, k: int) -> None:
    scores, visible = masked(scores_of(entries), seed=k)
    assert torch.equal(run(scores, visible, k), indexer.index_topk(scores, visible, k=k))


RACES = [
    ("sm_90a", "eager", 4099, 512, IndexTopkConfig(4, 64, 1, 4, "i32")),  # more registers of a lane than a word has bits
    ("sm_90a", "lazy", 1999, 1024, IndexTopkConfig(4, 4, 4, 1)),
    ("sm_100a", "random", 900, 64, IndexTopkConfig(4, 4, 2, 2)),
    ("sm_90a", "random", 1700, 300, IndexTopkConfig(4, 4, 4, 1, alone=500)),  # rows of four CTAs, of one, and of no choice
    ("sm_90a", "lazy", 9000, 70, IndexTopkConfig(4, 64, 2, 2, alone=5000)),  # and of one that holds more than it must
]


@pytest.mark.parametrize(("arch", "schedule", "entries", "k", "config"), RACES)
def test_any_schedule_and_no_race(arch: str, schedule: str, entries: int, k: int, config: IndexTopkConfig) -> None:
    scores, visible = masked(scores_of(entries), seed=1)
    some = [0, 1, 2, 6]  # kinds
    scores, visible = scores[some], visible[some]
    if config.alone:
        visible = torch.tensor([config.alone + 1, config.alone, k + 1, k])  # all CTAs, one, one, no choice
    want = indexer.index_topk(scores, visible, k=k)
    number = visible.int() if config.visible == "i32" else visible
    found = run(scores, number, k, config, arch, schedule=schedule, seed=7, checks=sim.Checks(races=True))
    assert torch.equal(found, want)


def test_a_nan_is_behind_every_number_and_what_is_hidden_is_not_read() -> None:
    scores = torch.full((4, 900), -1.0)
    scores[:, ::2] = torch.nan
    scores[1, 1::2] = -torch.inf
    scores[2, 600:] = torch.inf  # hidden
    scores[3, ::2] = -torch.nan
    visible = torch.tensor([900, 900, 600, 2**40])
    config = IndexTopkConfig(8, 4, 1, 4)
    found = run(scores, visible, 300, config)
    assert found.tolist() == [list(range(1, 601, 2))] * 2 + [list(range(1, 600, 2))] + [list(range(1, 601, 2))]
    found = run(scores, visible, 460, config)  # 450 numbers, or 300: the first NaNs too
    assert found[0].tolist() == sorted([*range(1, 900, 2), *range(0, 20, 2)]) == found[1].tolist()
    assert found[2].tolist() == sorted([*range(1, 600, 2), *range(0, 320, 2)])
    assert run(scores, torch.tensor([-3, 0, 2, 460]), 460, config)[:, :3].tolist() == [[-1] * 3] * 2 + [[0, 1, -1], [0, 1, 2]]


def test_choices_fit() -> None:
    for rows in (1, 3, 8, 64, 512, 4096):
        for entries in (1, 513, 2048, 2049, 16384, 16385, 65537, MAX_ENTRIES):
            config = IndexTopkConfig.for_shape(rows, entries, 132)
            config.check()
            assert entries <= config.capacity <= max(4 * entries, 1024)
            assert config.cluster == 1 or entries > 16384 or rows * config.cluster <= 132
            fits = rows * config.cluster <= 132
            assert config.alone == (0 if config.cluster == 1 else 4096 if fits else config.threads * config.values)
    for change, message in (
        (dict(warps=5), "warps must be 4, 8 or 16, got 5"),
        (dict(values=12), "values must be 4, 8, 16, 32 or 64, got 12"),
        (dict(cluster=16), "cluster must be 1, 2, 4 or 8, got 16"),
        (dict(copies=3), "copies must be 1, 2, 4 or 8, got 3"),
        (dict(visible="u32"), "visible must be i32 or i64, got 'u32'"),
        (dict(alone=1), "alone must be 0 to 0 for 1 CTAs a row, got 1"),
        (dict(cluster=2, alone=1025), "alone must be 0 to 1024 for 2 CTAs a row, got 1025"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(IndexTopkConfig(8, 4, 1, 4), **change).check()  # type: ignore[arg-type]


def test_bad_input_is_refused_and_none_is_nothing() -> None:
    scores, visible = masked(scores_of(40))
    for args, k, message in (
        ((scores.double(), visible), 8, "scores must be float32, num_visible int32 or int64, got torch.float64"),
        ((scores, visible.float()), 8, "got torch.float32 and torch.float32"),
        ((scores[0], visible), 8, r"scores must be \(M, T\) with T <= 262144, got \(40,\)"),
        ((torch.empty(1, MAX_ENTRIES + 1), visible[:1]), 8, r"got \(1, 262145\)"),
        ((scores, visible[:3]), 8, r"num_visible must be \(10,\), got \(3,\)"),
        ((scores, visible), 0, "k must be 1 to 2048, got 0"),
        ((scores, visible), 2049, "k must be 1 to 2048, got 2049"),
        ((scores[:, ::2], visible), 8, "scores must be contiguous, got strides"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            index_topk(*args, k=k)
    with pytest.raises(ValueError, match="config must be for i64 and hold 1000 entries"):
        run(torch.zeros(1, 1000), torch.tensor([1000]), 8, IndexTopkConfig(4, 4, 1, 1))
    assert index_topk(scores[:0], visible[:0], k=8).shape == (0, 8)
    assert index_topk(scores[:, :0], visible, k=2).tolist() == [[-1, -1]] * 10
    refuses = {entry.arch: entry.refuses for entry in ENTRIES if entry.operation == "index_topk"}
    assert refuses["sm_90a"](scores, visible, k=8) is None and "got 0" in str(refuses["sm_100a"](scores, visible, k=0))


# ---- GPU ---------------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rows", "entries"),
    [
        (1, 1),
        (8, 600),
        (20, 1025),
        (1, 4096),
        (300, 5000),
        (20, 16384),
        (4096, 16384),
        (20, 65537),
        (1, MAX_ENTRIES),
        (50, MAX_ENTRIES),
    ],
)
def test_on_the_gpu(rows: int, entries: int, seed: int) -> None:
    scores, visible = masked(scores_of(entries, seed, "cuda", rows), seed)
    for k in (512, 1024, 2048, 5):
        want = indexer.index_topk(scores, visible, k=k)
        assert torch.equal(index_topk(scores, visible, k=k), want)
        assert torch.equal(index_topk(scores, visible.int(), k=k), want)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 300])
def test_rows_that_show_less_than_they_may_on_the_gpu(rows: int) -> None:
    """As a captured graph has them: a row alone, by all its CTAs, or nothing to choose, side by side."""
    scores, _ = masked(scores_of(MAX_ENTRIES, 0, "cuda", rows))
    for most in (600, 4096, 4097, 32768, 32769):
        visible = torch.arange(rows, device="cuda") % 3 * -100 + most
        assert torch.equal(index_topk(scores, visible, k=512), indexer.index_topk(scores, visible, k=512))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "entries"), [(3, 700), (40, 16384), (2, 100000)])
def test_a_cuda_graph_replays_with_new_inputs(rows: int, entries: int) -> None:
    scores, visible = masked(scores_of(entries, 0, "cuda", rows))
    index_topk(scores, visible, k=512)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = index_topk(scores, visible, k=512)
    for seed in range(3):
        for old, new in zip((scores, visible), masked(scores_of(entries, seed + 1, "cuda", rows), seed), strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, indexer.index_topk(scores, visible, k=512))
