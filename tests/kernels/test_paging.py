"""Indices are looked at before a kernel follows them, and what a kernel writes stays inside its pool."""

from __future__ import annotations

import pytest
import torch

from dsv4lab import paging
from dsv4lab.kernels.cache.read.api import read_keys
from dsv4lab.kernels.cache.write.api import write_keys
from dsv4lab.lab import trace
from dsv4lab.reference.attention import attention as attend
from dsv4lab.reference.cache import cache_read, cache_write
from dsv4lab.reference.indexer import index_scores
from dsv4lab.reference.mhc import embed_streams
from dsv4lab.reference.moe import router_hash
from tests.kernels.simulated import simulating

PAGES, SIZE, DIM = 3, 4, 128
HOW = dict(eps=1e-6, record="plain", page_size=SIZE)


def keys(slots: list[int], first: int = 0) -> tuple[torch.Tensor, ...]:
    """Arguments of `cache_write` for these slots."""
    x = torch.randn(len(slots), DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    pool = torch.zeros(PAGES, SIZE, DIM)
    return x, torch.ones(DIM), torch.arange(first, first + len(x)), torch.linspace(1, 0.1, 32), pool, torch.tensor(slots)


@pytest.mark.parametrize(
    ("slots", "first", "eps", "message"),
    [
        ([0, PAGES * SIZE], 0, 1e-6, "slots must be -2147483648 to 11, got 12"),
        ([0, 3 - 2**32], 0, 1e-6, "slots must be .*, got -4294967293"),
        ([5, -1, 5, 9, 9, 9], 0, 1e-6, "slots must name no place twice, got 5 2 times"),
        ([0, -1], -1, 1e-6, "positions must be 0 to 1048576, got -1"),
        ([0, -1], 2**20, 1e-6, "positions must be .*, got 1048577"),
        ([0, -1], 0, torch.nan, "eps must be finite"),
    ],
)
def test_slots_are_looked_at(slots: list[int], first: int, eps: float, message: str) -> None:
    arguments, how = keys(slots, first), HOW | dict(eps=eps)
    with pytest.raises(ValueError, match=message):
        cache_write(*arguments, **how)
    assert not arguments[4].any(), "nothing was written"
    with pytest.raises(ValueError, match=message):
        write_keys(*arguments, kind="kv", **how)
    if slots[1] != -1:
        for read in (cache_read, read_keys):
            with pytest.raises(ValueError, match=message):
                read(arguments[4], arguments[5], record="plain", page_size=SIZE, dim=DIM, rope_dim=64)


@pytest.mark.parametrize(("pages", "slots"), [(1, [[0, 1]]), (0, [-1])])
def test_slots_are_a_row(pages: int, slots: list) -> None:
    with pytest.raises(ValueError, match=r"slots must be \(2,\), got"):
        cache_write(*keys([0, 1])[:5], torch.tensor(slots), **HOW)
    for read in (cache_read, read_keys):
        with pytest.raises(ValueError, match=r"slots must be .*\(N,\)"):
            read(torch.zeros(pages, SIZE, DIM), torch.tensor(slots), record="plain", page_size=SIZE, dim=DIM, rope_dim=64)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("beyond", [PAGES * SIZE, 1 << 20, (1 << 31) - 1])
def test_a_slot_beyond_the_pool_is_not_stored_and_reads_zeros(beyond: int, arch: str) -> None:
    arguments = keys([1, beyond, -1])
    x, *rest, pool, slots = arguments
    want = pool.clone()
    cache_write(x[:1], *(t[:1] if t is rest[1] else t for t in rest), want, slots[:1], **HOW)
    with simulating(arch), paging.checked(False):
        write_keys(*arguments, kind="kv", **HOW)
        found = read_keys(pool, slots, record="plain", page_size=SIZE, dim=DIM, rope_dim=64)
    torch.testing.assert_close(pool, want, rtol=1e-5, atol=1e-6)
    assert found[0].equal(pool.view(-1, DIM)[1]) and not found[1:].any()


def test_entries_need_pages() -> None:
    q, weights = torch.randn(2, 4, DIM), torch.rand(2, 4)
    pool, seqs = torch.randn(PAGES, SIZE, DIM), torch.tensor([0, 1])
    how = dict(record="plain", page_size=SIZE, max_entries=8)
    for table, visible, message in (
        ([[0, 1], [2, -1]], [8, 5], r"got none for entry 4 of sequence 1 \(query 1\)"),
        ([[0, 1], [3, 1]], [8, 4], "block_table must be below 3, got 3"),
        ([[0, 1]], [8, 4], "seq_idx must be 0 to 0, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            index_scores(q, weights, pool, torch.tensor(table), seqs, torch.tensor(visible), **how)
    index_scores(q, weights, pool, torch.tensor([[0, 1], [2, -1]]), seqs, torch.tensor([8, 4]), **how)


@pytest.mark.parametrize(
    ("table", "chosen", "message"),
    [
        ([[0, 1, -1]], None, "for entry 8 of sequence 0"),
        ([[0, 1, -1]], [[0, 9, -1]], "for entry 9 of sequence 0"),
        ([[0, 1, 2]], [[0, 12, -1]], "for entry 12 of sequence 0"),
        ([[0, 1, 2]], [[0, 11, -1]], None),
        ([[0, 1, -1]], [[-1, 7, -1]], None),
    ],
)
def test_attention_s_entries_need_pages(table: list, chosen: list | None, message: str | None) -> None:
    pool = torch.randn(PAGES, SIZE, DIM)
    arguments = (
        torch.randn(1, 2, DIM),
        torch.zeros(2),
        pool,
        pool,
        torch.tensor(table, dtype=torch.int32),
        torch.tensor([47]),
        torch.tensor([0]),
        None if chosen is None else torch.tensor(chosen, dtype=torch.int32),
    )
    how = dict(window=8, ring_len=8, ratio=4, scale=0.1, record="plain", window_page=SIZE, entry_page=SIZE, rope_dim=64)
    if message is None:
        assert attend(*arguments, **how).isfinite().all()
    else:
        with pytest.raises(ValueError, match=message):
            attend(*arguments, **how)


def test_ids_are_looked_at() -> None:
    weight = torch.randn(5, 16)
    with pytest.raises(ValueError, match="token_ids must be -5 to 4, got 5"):
        embed_streams(torch.tensor([0, 5]), weight, num_streams=4)
    with pytest.raises(ValueError, match="token_ids must be 0 to 1, got -1"):
        router_hash(torch.randn(1, 16), torch.randn(5, 16), torch.zeros(2, 2).long(), torch.tensor([-1]), route_scale=1.0)


def test_who_looks() -> None:
    bad = torch.tensor([7])
    with paging.checked(False):
        paging.check_range("ids", bad, 7)
    with pytest.raises(ValueError, match="ids must be below 7, got 7"):
        paging.check_range("ids", bad, 7)
    paging.check_range("ids", bad, 8)
    with paging.checked():
        paging.check_range("ids", bad.to("meta"), 7)


@pytest.mark.gpu
def test_a_gpu_is_asked_only_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = torch.tensor([7], device="cuda")
    paging.check_range("ids", bad, 7)
    with paging.checked(), pytest.raises(ValueError, match="ids must be below 7, got 7"):
        paging.check_range("ids", bad, 7)
    monkeypatch.setattr(paging, "_EVERYWHERE", True)
    with pytest.raises(ValueError, match="ids must be below 7, got 7"):
        paging.check_range("ids", bad, 7)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        paging.check_range("ids", bad, 7)


@pytest.mark.gpu
def test_a_gpu_that_is_not_asked_computes_nothing() -> None:
    """No eager arithmetic beside the kernels."""
    many = [torch.zeros(1, 1, dtype=torch.int64, device="cuda") for _ in range(4)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        paging.check_slots(many[0][0], 1, 1, written=True)
        paging.check_entries(many[0], many[1][0], 1, 1, visible=many[2][0], most=3)
        paging.check_keys(many[0], many[1][0], many[2][0], None, rings=1, num_pages=1, page_size=1, ratio=4)
        torch.cuda.synchronize()
    assert not trace.foreign(profile)
