"""The index scores against float64: float32's grade, every record, and -inf exactly where a query does not see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4lab import paging, sim
from dsv4lab.kernels.indexer.operators import ENTRIES
from dsv4lab.kernels.indexer.scores.api import index_scores
from dsv4lab.kernels.indexer.scores.config import HALF_SHARED_BYTES, SHARED_BYTES, IndexScoresConfig
from dsv4lab.records import INDEX_RECORDS, allocate_index_pages
from dsv4lab.reference import indexer
from dsv4lab.reference.rope import rope_frequencies
from tests.kernels.simulated import simulating

DIM = 128
SIMULATED_BOUND = 2.0**-18  # of sum |w relu(q . k)|; the simulator's products and sums are float32's
DOT_BOUND, PRODUCT_BOUND = 2.0**-17, 2.0**-21  # of that, and besides of sum |w| sum |q k|: a tensor core cuts off what it adds
INV_FREQ = rope_frequencies(rope_dim=64, theta=160000.0, scaling=None)


def scene(
    record: str,
    counts: list[int],
    rows: list[int],
    *,
    heads: int = 64,
    page_size: int = 32,
    shuffled: bool = False,
    visible: torch.Tensor | None = None,
    shared: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[torch.Tensor, ...]:
    """Sequences of so many entries and queries, over pages in any order; rows of the block table end in -1. shared: pages of
    the first sequence that the others begin with, as far as they reach.
    """
    g = torch.Generator(device).manual_seed(seed)
    where: dict[str, Any] = dict(generator=g, device=device)
    blocks = [-(-n // page_size) for n in counts]
    order = torch.randperm(sum(blocks) + 3, **where).int()
    pages = allocate_index_pages(
        record, num_pages=len(order), page_size=page_size, dim=DIM, dtype=torch.bfloat16, device=device
    )
    if record == "plain":
        pages.fill_(float("nan"))  # what is in no sequence reaches no score
    table = torch.full((len(counts), max(*blocks, 1) + 1), -1, dtype=torch.int32, device=device)
    for s, (n, first) in enumerate(zip(counts, torch.tensor([0, *blocks]).cumsum(0).tolist(), strict=False)):
        table[s, : blocks[s]] = order[first : first + blocks[s]]
        common = min(shared, blocks[0], blocks[s]) if s else 0
        table[s, :common] = table[0, :common]
        entry = torch.arange(common * page_size, max(n, common * page_size), device=device)
        slots = table[s].long()[entry // page_size] * page_size + entry % page_size
        x = torch.randn(len(entry), DIM, **where) * torch.exp(torch.randn(len(entry), 1, **where))
        norm = 2 * torch.rand(DIM, **where)
        how = dict(eps=1e-6, record=record, page_size=page_size)
        indexer.index_key_write(x.bfloat16(), norm.bfloat16(), entry * 4, INV_FREQ.to(device), pages, slots, **how)  # type: ignore[arg-type]
    seq = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(rows, device=device))
    if shuffled:
        seq = seq[torch.randperm(len(seq), **where)]
    most = torch.tensor(counts, device=device)[seq]
    if visible is None:
        visible = (torch.rand(len(seq), **where) * (most + 1)).long()
        visible[0], visible[-1] = most[0], 0
    q = torch.randn(len(seq), heads, DIM, **where).bfloat16()
    q = indexer.index_query(q, visible * 4, INV_FREQ.to(device), record=record)
    weights = torch.randn(len(seq), heads, **where) * (heads * DIM) ** -0.5
    return q, weights, pages, table, seq, visible


def worst(args: tuple[torch.Tensor, ...], found: torch.Tensor, record: str, page_size: int, rows: Any = slice(None)) -> float:
    """The largest error in units of what the bound allows on a GPU, after -inf has been found where it must be."""
    q, weights, pages, table, seq, visible = args
    entry = torch.arange(found.shape[1], device=found.device)
    assert torch.equal(torch.isneginf(found), entry >= visible[:, None])
    q, weights, seq, visible, found = q[rows], weights[rows], seq[rows], visible[rows], found[rows]
    how = dict(record=record, page_size=page_size, max_entries=found.shape[1])
    want = indexer.index_scores(q, weights, pages, table, seq, visible, **how)  # type: ignore[arg-type]
    size = indexer.index_scores(q, weights.abs(), pages, table, seq, visible, **how)  # type: ignore[arg-type]
    keys = {s: key_sizes(pages, table, s, found.shape[1], record, page_size) for s in seq.unique().tolist()}
    products = torch.stack(
        [(w.abs() @ a.abs().float()) @ keys[s].t() for w, a, s in zip(weights, q, seq.tolist(), strict=True)]
    )
    allowed = DOT_BOUND * size + PRODUCT_BOUND * products
    error = ((found - want).abs() / allowed).masked_fill(entry >= visible[:, None], 0.0)
    return float(error.max())


def key_sizes(pages: torch.Tensor, table: torch.Tensor, s: int, entries: int, record: str, page_size: int) -> torch.Tensor:
    entry = torch.arange(entries, device=pages.device)
    page = table[s].long()[(entry // page_size).clamp(max=table.shape[1] - 1)].clamp(min=0)
    slots = page * page_size + entry % page_size
    return indexer.index_key_read(pages, slots, record=record, page_size=page_size, dim=DIM).abs().nan_to_num()


def run(
    args: tuple[torch.Tensor, ...],
    record: str,
    entries: int,
    *,
    page_size: int = 32,
    config: IndexScoresConfig | None = None,
    multiprocessors: int = 4,
    scale: float = 1.0,
    fill: bool = True,
    **how: Any,
) -> torch.Tensor:
    named: dict[str, Any] = dict(record=record, page_size=page_size, max_entries=entries, scale=scale, fill=fill, config=config)
    with simulating("sm_90a", multiprocessors=multiprocessors, **how):
        return index_scores(*args, **named)


def test_a_scale_is_a_scale_of_the_weights() -> None:
    q, weights, *rest = scene("fp4", [70], [3])
    scaled = run((q, weights, *rest), "fp4", 75, scale=0.3)
    assert torch.equal(scaled, run((q, weights * 0.3, *rest), "fp4", 75))
    how = dict(record="fp4", page_size=32, max_entries=75)
    want = [indexer.index_scores(q, w, *rest, **how, scale=s) for w, s in ((weights, 0.3), (weights * 0.3, 1.0))]  # type: ignore[arg-type]
    assert torch.equal(*want) and not torch.equal(want[0], indexer.index_scores(q, weights, *rest, **how))  # type: ignore[arg-type]


@pytest.mark.parametrize("record", INDEX_RECORDS)
def test_decode_scores_are_the_formula(record: str) -> None:
    """A query a tile, two of a sequence of five tiles of keys and one of a short one; more stages than tiles."""
    args = scene(record, [300, 70], [2, 1], seed=1)
    found = run(args, record, 305)
    assert worst(args, found, record, 32) < SIMULATED_BOUND / DOT_BOUND


def test_sequences_may_begin_with_the_same_pages() -> None:
    """The last one ends inside of them."""
    args = scene("fp4", [300, 200, 40], [2, 1, 1], shared=4, seed=6)
    table = args[3]
    assert torch.equal(table[0, :4], table[1, :4]) and torch.equal(table[0, :2], table[2, :2]) and table[0, 4] != table[1, 4]
    assert worst(args, run(args, "fp4", 305), "fp4", 32) < SIMULATED_BOUND / DOT_BOUND


RACES = [
    # four queries a tile: sequences that end inside it, the last tile short; a ring that goes round; two spans
    ("eager", "fp8", [260, 70, 5], [3, 4, 2], False, IndexScoresConfig("fp8", 64, 32, 4, 2, 4)),
    ("lazy", "fp4", [200, 130], [3, 4], True, IndexScoresConfig("fp4", 8, 48, 4, 2, 2, visible="i32")),
    ("random", "plain", [130, 70], [2, 3], True, IndexScoresConfig("plain", 5, 4, 2, 1, 2, sequence="i32")),
    # a query a tile: parts of several of them for a CTA, some see nothing; more than a warp has lanes
    ("eager", "fp4", [700, 3, 260], [2, 1, 2], False, IndexScoresConfig("fp4", 8, 32, 1, 2, 2, divided=True)),
    (
        "lazy",
        "fp8",
        [300, 70, 5],
        [12, 3, 20],
        True,
        IndexScoresConfig("fp8", 8, 4, 1, 1, 3, visible="i32", sequence="i32", divided=True),
    ),
    ("random", "plain", [260, 70], [2, 3], True, IndexScoresConfig("plain", 64, 32, 1, 2, 2, divided=True)),
    (
        "lazy",
        "fp4",
        [130, 70],
        [2, 1],
        False,
        IndexScoresConfig("fp4", 200, 32, 1, 2, 4, divided=True),
    ),  # registers are handed over
]


@pytest.mark.parametrize(("schedule", "record", "counts", "rows", "shuffled", "config"), RACES)
def test_any_schedule_and_no_race(
    schedule: str, record: str, counts: list[int], rows: list[int], shuffled: bool, config: IndexScoresConfig
) -> None:
    size = config.page_size
    args = scene(record, counts, rows, heads=config.heads, page_size=size, shuffled=shuffled, seed=2)
    q, weights, pages, table, seq, visible = args
    seq = seq.int() if config.sequence == "i32" else seq
    visible = visible.int() if config.visible == "i32" else visible
    args = (q, weights, pages, table, seq, visible)
    how = dict(schedule=schedule, seed=5, checks=sim.Checks(races=True))
    found = run(args, record, max(counts) + 3, page_size=size, config=config, multiprocessors=1, **how)
    assert worst(args, found, record, size) < SIMULATED_BOUND / DOT_BOUND


def test_scores_do_not_depend_on_the_batch() -> None:
    """Entries cut off by max_entries, other queries beside: the same bits."""
    args = scene("fp4", [200, 130], [3, 4], heads=8, page_size=48, seed=3)
    config = IndexScoresConfig("fp4", 8, 48, 4, 2, 2)
    whole = run(args, "fp4", 200, page_size=48, config=config)
    q, weights, pages, table, seq, visible = args
    part = (q[1:3], weights[1:3], pages, table, seq[1:3], visible[1:3])
    found = run(part, "fp4", 150, page_size=48, config=config)
    assert torch.equal(found, whole[1:3, :150])


@pytest.mark.parametrize("queries", [1, 4])
def test_what_is_not_seen_is_left_alone(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = scene("fp4", [200, 130], [3, 4], heads=8, page_size=48, seed=3)
    config = IndexScoresConfig("fp4", 8, 48, queries, 2, 2, divided=queries == 1)
    whole = run(args, "fp4", 700, page_size=48, config=config)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(7))
    found = run(args, "fp4", 700, page_size=48, config=config, fill=False)
    seen = ~torch.isneginf(whole)
    assert torch.equal(found[seen], whole[seen]) and bool((found[:, 256:] == 7).all())


def test_damage_stays_visible_and_outside_values_do_no_harm() -> None:
    q, weights, pages, table, seq, visible = scene("fp4", [200, 130], [3, 4], heads=8, page_size=48, seed=4)
    config = IndexScoresConfig("fp4", 8, 48, 4, 2, 2)
    visible = torch.tensor([200, -7, 2**40, 130, 130, 130, 130])
    visible[2] = 2**40  # more than there can be: the row's end, beyond the block table page 0
    q[3, 2, 5] = float("nan")
    with paging.checked(False):
        found = run((q, weights, pages, table, seq, visible), "fp4", 260, page_size=48, config=config)
    assert bool(found[3, :130].isnan().all()) and bool(torch.isneginf(found[1]).all())
    assert not bool(found[[0, 2, 4, 5, 6]].isnan().any()) and not bool(torch.isneginf(found[2]).any())
    clean = indexer.index_scores(
        q[:1], weights[:1], pages, table, seq[:1], visible[:1], record="fp4", page_size=48, max_entries=260
    )
    torch.testing.assert_close(found[:1], clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("record", INDEX_RECORDS)
@pytest.mark.parametrize("heads", [8, 64, 128])
def test_choices_fit_and_share_the_work(record: str, heads: int) -> None:
    for queries in (1, 3, 8, 64, 257, 300, 1024, 4096, 4097):
        for entries in (1, 64, 513, 4096, 16384, 262144):
            config = IndexScoresConfig.for_shape(queries, entries, 16, 132, heads, record, 32)
            config.check()
            assert config.shared_bytes <= (SHARED_BYTES if config.hands_over else HALF_SHARED_BYTES)
            assert config.queries == (1 if queries <= 256 else 4 if heads <= 64 else 2)
            tiles, places = -(-queries // config.queries), config.resident * 132
            least = queries * -(-entries // (64 * config.groups))
            assert config.divided == (config.queries == 1 and least > places)
            if config.divided:  # no CTA without anything to do, if all is seen
                ctas = config.ctas(queries, entries, 132)
                assert ctas == min(places, least)
                continue
            span = config.span(queries, entries, 132)
            assert span % (64 * config.groups) == 0 and span > 0
            ctas = tiles * -(-entries // span)
            # Where there are keys for all multiprocessors, nine tenths of the time of whole rounds is work.
            if entries >= 4096 and tiles * entries >= places * 4096:
                assert tiles * entries / (places * -(-ctas // places) * span) > 0.9, (queries, entries, span)
    one = IndexScoresConfig.for_shape(512, 600, 256, 132, heads, record, 32)  # a query or two of many sequences
    assert one.queries == 1 and one.divided and one.known >= 512
    lots = IndexScoresConfig.for_shape(2000, 600, 1000, 132, heads, record, 32)
    assert lots.queries == 1 and not lots.divided
    wide = IndexScoresConfig.for_shape(4096, 16384, 1, 132, 200, record, 32)  # a query's heads are most of a tile
    assert wide.queries == 1 and not wide.divided


def test_bad_input_is_refused_and_none_is_nothing() -> None:
    args = scene("fp8", [70, 40], [2, 1], heads=8)
    q, weights, pages, table, seq, visible = args
    how: dict[str, Any] = dict(record="fp8", page_size=32, max_entries=70)
    for bad, named, message in (
        ((q.float(), *args[1:]), {}, "q must be bfloat16 and head_weights float32, got torch.float32"),
        ((q[:, :, :64], *args[1:]), {}, r"q must be \(M, Hi, 128\) with Hi from 1 to 256, got \(3, 8, 64\)"),
        ((q, weights[:2], *args[2:]), {}, r"head_weights must be \(3, 8\), .* got \(2, 8\)"),
        ((q, weights, pages, table.long(), seq, visible), {}, "block_table must be int32, .* got torch.int64"),
        ((q, weights, pages[:, :-576], table, seq, visible), {}, r"fp8 pages must be \(P, 4608\), got"),
        ((q, weights, pages.float(), table, seq, visible), {}, "fp8 pages must be uint8, got torch.float32"),
        ((q.transpose(0, 1).contiguous().transpose(0, 1), *args[1:]), {}, "q must be contiguous, got strides"),
        (args, dict(page_size=30), "page_size must be a positive multiple of 4, got 30"),
        (args, dict(record="nvfp4"), "record must be one of plain, fp8, fp4, got 'nvfp4'"),
        (args, dict(max_entries=-1), "max_entries must be 0 to 268435456, got -1"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            index_scores(*bad, **(how | named))
    good = IndexScoresConfig("fp8", 8, 32, 4, 2, 4)
    for change, message in (
        (dict(stages=3), "stages must be a multiple of groups"),
        (dict(stages=40), f"fit {SHARED_BYTES} bytes, got 40"),
        (dict(heads=65), "with 256 columns at most, got 65 and 4"),
        (dict(queries=3), "1, 2 or 4 queries"),
        (dict(page_size=6), "page_size must be a positive multiple of 4, got 6"),
        (dict(groups=4), "groups must be 1 to 3, got 4"),
        (dict(divided=True), "divided must go with one query a tile, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(good, **change).check()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config must have record, heads"):
        index_scores(*args, **how, config=replace(good, heads=16))
    assert index_scores(q[:0], weights[:0], pages, table, seq[:0], visible[:0], **how).shape == (0, 70)
    assert index_scores(*args, **(how | dict(max_entries=0))).shape == (3, 0)
    with pytest.raises(ValueError, match="must have a page"):
        index_scores(q, weights, pages, table[:, :0].contiguous(), seq, visible, **how)
    assert bool(torch.isneginf(index_scores(q, weights, pages[:0], table * 0 - 1, seq, visible * 0, **how)).all())
    refuses = next(entry.refuses for entry in ENTRIES if entry.operation == "index_scores")
    assert refuses(*args, **how) is None and "got torch.float32" in str(refuses(q.float(), *args[1:], **how))


# ---- GPU ---------------------------------------------------------------------------------------------------------------
BATCHES = [
    ([1], [1]),
    ([40, 1, 513], [1, 1, 1]),
    ([4097], [8]),
    ([16384] * 5 + [300, 64, 0], [1, 2, 4, 3, 8, 2, 1, 1]),
    ([262144], [1]),
    ([30000, 262144, 8], [4, 4, 4]),
    ([4096] * 40 + [9000, 1], [1] * 42),
    ([600, 100], [150, 150]),  # two queries a CTA and more
    ([1024, 5000], [301, 222]),  # prefill of two sequences, and a short last tile
    ([16384], [4096]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("counts", "rows"), BATCHES)
@pytest.mark.parametrize("record", INDEX_RECORDS)
def test_on_the_gpu(record: str, counts: list[int], rows: list[int], seed: int) -> None:
    for heads in (64, 8, 200):
        args = scene(record, counts, rows, heads=heads, seed=seed, device="cuda")
        how = dict(record=record, page_size=32, max_entries=max(counts) + seed)
        found = index_scores(*args, **how)  # type: ignore[arg-type]
        assert torch.equal(found, index_scores(*args, **how))  # type: ignore[arg-type]  # not a matter of timing
        chosen = torch.arange(0, len(args[0]), max(len(args[0]) // 24, 1), device="cuda")
        assert worst(args, found, record, 32, chosen) < 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("record", INDEX_RECORDS)
@pytest.mark.parametrize("rows", [[1, 2, 1, 1], [301, 222, 40, 3]])
def test_pages_of_a_common_prefix_on_the_gpu(record: str, rows: list[int]) -> None:
    args = scene(record, [5000, 4097, 3000, 64], rows, shared=100, shuffled=True, device="cuda")
    table = args[3]
    assert torch.equal(table[0, :94], table[2, :94]) and table[0, 0] == table[3, 0] and table[0, 100] != table[1, 100]
    found = index_scores(*args, record=record, page_size=32, max_entries=5003)
    chosen = torch.arange(0, len(args[0]), max(len(args[0]) // 24, 1), device="cuda")
    assert worst(args, found, record, 32, chosen) < 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("record", INDEX_RECORDS)
def test_a_cuda_graph_replays_with_new_inputs(record: str) -> None:
    for counts, rows in (([700, 90], [1, 2]), ([700, 90], [300, 41])):
        args = scene(record, counts, rows, device="cuda")
        how = dict(record=record, page_size=32, max_entries=710)
        index_scores(*args, **how)  # type: ignore[arg-type]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = index_scores(*args, **how)  # type: ignore[arg-type]
        for seed in range(3):
            for old, new in zip(args, scene(record, counts, rows, shuffled=True, seed=seed + 1, device="cuda"), strict=True):
                old.copy_(new)
            found.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert worst(args, found, record, 32) < 1.0
