"""Packed keys decoded once, before attention: places that queries see have the reference's numbers, all others are left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels.cache.plan import KeyPlan
from dsv4lab.kernels.cache.unpack.api import unpack_keys
from dsv4lab.kernels.cache.unpack.config import UnpackConfig
from dsv4lab.records import allocate_kv_pages
from dsv4lab.reference.cache import cache_read
from tests.kernels.attention import BF16, DIM, ROPE_DIM
from tests.kernels.simulated import simulating

UNTOUCHED = -12288.0  # in every place of the plain pools before


@dataclass
class Scene:
    """Arguments of `unpack_keys`, in its order, and the keyword ones."""

    args: tuple[Any, ...]
    how: dict[str, Any]


def make_scene(
    record: str,
    spans: dict[int, tuple[int, int]],
    rings: int,
    *,
    queries: int,
    entries: bool = True,
    shared: int = 0,
    sorted_queries: bool = False,
    seed: int = 0,
) -> Scene:
    """Pools of random bytes, for small windows and rings. spans: of the sequences that ask, least and greatest position.
    shared: blocks of the table that are the first sequence's for all.
    """
    g = torch.Generator().manual_seed(seed)
    how: dict[str, Any] = dict(
        window=5, ring_len=12, ratio=2, record=record, window_page=4, entry_page=3, dim=DIM, rope_dim=ROPE_DIM
    )
    width = max(last + 1 for _, last in spans.values()) // how["ratio"] // how["entry_page"] + 2
    common = dict(dim=DIM, rope_dim=ROPE_DIM, dtype=BF16, device="cpu")
    window = allocate_kv_pages(record, num_pages=rings * 3, page_size=4, **common)
    far = allocate_kv_pages(record, num_pages=rings * width + 1, page_size=3, **common)
    for pages in (window, far):
        pages.view(torch.uint8).random_(0, 256, generator=g)
    table = torch.randperm(rings * width, generator=g).int().view(rings, width)
    table[:, :shared] = table[0, :shared]
    table[:, -1] = -1
    names = torch.tensor(list(spans))
    seq = names.repeat(-(-queries // len(names)))[:queries]
    low, high = (torch.tensor([spans[s][end] for s in seq.tolist()]) for end in (0, 1))
    at = low + (torch.rand(queries, generator=g) * (high - low + 1)).long()
    at[: len(names)], at[-len(names) :] = low[: len(names)], high[-len(names) :]
    order = seq.argsort(stable=True) if sorted_queries else torch.randperm(queries, generator=g)
    return Scene((window, far if entries else None, table, at[order], seq[order]), how)


def simulated(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, ctas: int = 2, *, line: bool = False, quads: bool = False, **how: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    with simulating("sm_90a", multiprocessors=ctas, **how), monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape, **of: torch.full(shape, UNTOUCHED, **of))
        return unpack_keys(*scene.args, **scene.how, line=line, quads=quads)


def expected(scene: Scene) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What must stand in the plain pools."""
    window, far, table, positions, seq_idx = (None if a is None else a.cpu() for a in scene.args)
    how = scene.how
    ring_len, size = how["ring_len"], how["entry_page"]
    near_slots, far_slots = set(), set()
    for s in seq_idx.unique().tolist():
        at = positions[seq_idx == s]
        first, last = int(at.min()), int(at.max())
        near_slots |= {
            s * ring_len + p % ring_len for p in range(max(first - how["window"] + 1, last - ring_len + 1, 0), last + 1)
        }
        if far is not None:
            for j in range((last + 1) // how["ratio"]):
                page = int(table[s, j // size])
                far_slots |= {page * size + j % size} if page >= 0 else set()

    def filled(pages: torch.Tensor, page_size: int, slots: set[int]) -> torch.Tensor:
        want = torch.full((pages.shape[0] * page_size, DIM), UNTOUCHED, dtype=BF16)
        at = torch.tensor(sorted(slots), dtype=torch.int64)
        want[at] = cache_read(pages, at, record=how["record"], page_size=page_size, dim=DIM, rope_dim=ROPE_DIM).to(BF16)
        return want.view(-1, page_size, DIM)

    near = filled(window, how["window_page"], near_slots)
    return near, None if far is None else filled(far, size, far_slots)


def check(scene: Scene, found: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    for got, want in zip(found, expected(scene), strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            got = got.cpu()
            assert got.dtype == BF16 and got.shape == want.shape
            same = (got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan())
            wrong = (~same.all(-1)).nonzero().tolist()
            assert not wrong, f"{len(wrong)} records differ, first at page and place {wrong[0]}"


def check_quads(found: tuple[torch.Tensor, Any], other: tuple[torch.Tensor, Any]) -> None:
    """The same rows in quads' order: of every 32 dims 2 (4 t + i) and the next at 2 (4 i + t)."""
    pairs = found[0].view(torch.int32).view(-1, DIM // 32, 4, 4)
    assert torch.equal(other[0].view(torch.int32).view_as(pairs), pairs.transpose(2, 3))


def check_line(scene: Scene, found: tuple[torch.Tensor, Any], *, filled: bool = True) -> None:
    """Every sequence's tokens and entries, each followed by zeros; all other rows as they were, where those had been filled."""
    rows, places = (t.cpu() for t in found)
    window, far, table, positions, seq_idx = (None if a is None else a.cpu() for a in scene.args)
    how = scene.how
    ring_len, size = how["ring_len"], how["entry_page"]
    read = dict(record=how["record"], dim=DIM, rope_dim=ROPE_DIM)
    want, taken = torch.full_like(rows, UNTOUCHED), 0
    for s in sorted(seq_idx.unique().tolist()):
        at = positions[seq_idx == s]
        last = int(at.max())
        tokens = torch.arange(max(int(at.min()) - how["window"] + 1, last - ring_len + 1, 0), last + 1)
        entries = torch.arange(0 if far is None else (last + 1) // how["ratio"])
        far_row = taken + -(-(len(tokens) + 7) // 8) * 8
        assert places[s].tolist() == [taken, int(tokens[0]), far_row, len(entries)]
        end = far_row + -(-len(entries) // 8) * 8
        want[taken:end] = 0
        want[taken : taken + len(tokens)] = cache_read(window, s * ring_len + tokens % ring_len, page_size=4, **read).to(BF16)
        if len(entries):
            page = table[s, entries // size].long()
            keys = cache_read(far, page.clamp(min=0) * size + entries % size, page_size=size, **read).to(BF16)
            want[far_row : far_row + len(entries)] = torch.where(page[:, None] >= 0, keys, 0)
        taken = end
    assert taken <= rows.shape[0]
    if not filled:
        rows, want = rows[:taken], want[:taken]
    same = (rows.view(torch.int16) == want.view(torch.int16)) | (rows.isnan() & want.isnan())
    wrong = (~same.all(-1)).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} rows differ, first {wrong[0]}"


# ---- in the simulator --------------------------------------------------------------------------------------------------
SCENES = [
    # a sequence from its first token; one that goes round its ring; one without queries
    ("fp8", dict(spans={0: (0, 3), 2: (7, 30)}, rings=4, queries=9), "lazy"),
    ("nvfp4", dict(spans={1: (0, 0), 0: (9, 10), 2: (40, 41)}, rings=3, queries=7), "random"),
    ("fp8", dict(spans={0: (5, 60)}, rings=1, queries=33, sorted_queries=True), "eager"),
    ("nvfp4", dict(spans={3: (2, 9)}, rings=5, queries=5, entries=False), "lazy"),
    # pages that sequences share, of which a later one sees more
    ("fp8", dict(spans={0: (0, 7), 1: (3, 20), 3: (10, 35)}, rings=4, queries=11, shared=3), "random"),
]


@pytest.mark.parametrize(("record", "what", "schedule"), SCENES)
def test_what_is_seen_is_unpacked_and_nothing_else(
    record: str, what: dict[str, Any], schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_scene(record, **what)
    found = simulated(scene, monkeypatch, schedule=schedule, checks=sim.Checks(races=True))
    check(scene, found)


@pytest.mark.parametrize(("record", "what", "schedule"), [*SCENES, ("plain", SCENES[4][1], "lazy")])
def test_keys_in_line(record: str, what: dict[str, Any], schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_scene(record, **what)
    how: dict[str, Any] = dict(line=True, schedule=schedule, checks=sim.Checks(races=True))
    check_line(scene, simulated(scene, monkeypatch, **how))
    scene.args[2][0, :2] = -1
    found = simulated(scene, monkeypatch, **how)
    check_line(scene, found)
    check_quads(found, simulated(scene, monkeypatch, quads=True, **how))


def test_pages_that_are_none_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_scene("fp8", {0: (3, 30), 1: (10, 24)}, 2, queries=6)
    table = scene.args[2]
    table[0, 1], table[1, :3] = -1, -1
    check(scene, simulated(scene, monkeypatch))


def test_many_sequences_and_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """More queries than a CTA reads at once, warps of one sequence and of several; sequences past the first 32, sharing."""
    spans = {s: (s % 7, s % 7 + s % 11) for s in range(0, 70, 3)}
    scene = make_scene("nvfp4", spans, 70, queries=4500, shared=1, sorted_queries=True)
    check(scene, simulated(scene, monkeypatch, ctas=3))


# ---- refusals ----------------------------------------------------------------------------------------------------------
def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = make_scene("fp8", {0: (0, 3)}, 2, queries=4)
    window, far, table, positions, seq_idx = scene.args

    def given(at: int, value: Any, **how: Any) -> Scene:
        return Scene((*scene.args[:at], value, *scene.args[at + 1 :]), scene.how | how)

    for changed, message in (
        (given(0, window[:, :-16].contiguous()), r"fp8 pages must be contiguous \(P, 2880\), got \(6, 2864\)"),
        (given(0, window[:0]), "window_pages must have at least one page, got none"),
        (given(1, far.view(torch.int8)), "fp8 pages must be uint8, got torch.int8"),
        (given(2, table.long()), "block_table must be int32, got torch.int64"),
        (given(2, table[:, ::2]), r"block_table must be contiguous \(sequences, pages\), got"),
        (given(2, table[:, :0].contiguous()), r"block_table must have pages where there are entries, got \(2, 0\)"),
        (given(3, positions[:0]), r"positions must be one a query, as seq_idx, got \(0,\), \(4,\)"),
        (given(4, seq_idx.int()), "seq_idx must be int64, got torch.int32"),
        (given(4, seq_idx, rope_dim=32), "rope_dim must be 64, got 32"),
        (given(4, seq_idx, ratio=0), "ratio must be at least 1, got 0"),
        (given(0, window.repeat(700, 1), ring_len=4), "window_pages must have at most 1024 rings, got 4200"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            simulated(changed, monkeypatch)
    key = KeyPlan("kv", "fp8", DIM, 4)
    for config, message in (
        (
            UnpackConfig(KeyPlan("kv", "plain", DIM, 4, stored="bf16"), None),
            "window must be packed kv keys, got kv keys as 'plain'",
        ),
        (
            UnpackConfig(key, None, quads=True),
            "quads must be false for rows that are not in line, got True",
        ),
        (
            UnpackConfig(key, replace(key, record="nvfp4")),
            "entries must be as the window's keys, 'fp8' of 512, got 'nvfp4' of 512",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            config.check()


# ---- on a GPU ----------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("record", ["fp8", "nvfp4"])
def test_unpacking_on_the_gpu(record: str, seed: int) -> None:
    for what in (
        *(what for _, what, _ in SCENES),
        dict(spans={s: (s % 7, s % 7 + s % 11) for s in range(0, 900, 3)}, rings=900, queries=4500, shared=1),
        dict(spans={0: (100, 9000), 1: (3, 700)}, rings=3, queries=5000, sorted_queries=True),
    ):
        scene = make_scene(record, seed=seed, **what)
        scene.args = tuple(None if a is None else a.cuda() for a in scene.args)
        found = unpack_keys(*scene.args, **scene.how)
        check_line(scene, unpack_keys(*scene.args, **scene.how, line=True), filled=False)
        for got, want in zip(found, expected(scene), strict=True):
            if got is not None and want is not None:
                there = (want != UNTOUCHED).any(-1)
                got, want = got.cpu()[there], want[there]
                assert bool(((got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan())).all())
