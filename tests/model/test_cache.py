"""The cache's book-keeping: places, blocks, rewinding, sizes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dsv4lab.config import CSA, HCA, ModelConfig
from dsv4lab.model.cache import Batch, Cache, CacheFull
from dsv4lab.model.numerics import EXACT, OFFICIAL, Numerics


def make(numerics: Numerics = OFFICIAL, config: ModelConfig | None = None, **options: int) -> Cache:
    sizes = dict(max_seqs=3, max_tokens=1000, max_step=64, max_rewind=8) | options
    return Cache(config or ModelConfig.nano(), numerics, dtype=torch.float32, device="cpu", **sizes)


def test_blocks_are_never_shared_and_always_returned() -> None:
    cache, rng = make(max_rewind=64), random.Random(0)
    total, live = cache.free_blocks, {}
    for _ in range(600):
        action = rng.choice(["open", "grow", "grow", "grow", "rewind", "close"])
        if action == "open" and len(live) < 3:
            live[cache.open()] = 0
        elif live:
            seq = rng.choice(sorted(live))
            if action == "grow":
                count = rng.randrange(65)
                try:
                    cache.reserve(seq, count)
                except CacheFull:
                    continue
                cache.advance(seq, count)
                live[seq] += count
            elif action == "rewind" and live[seq] > 5:
                try:
                    cache.rewind(seq, live[seq] - 5)
                    live[seq] -= 5
                except ValueError as error:
                    assert "max_rewind" in str(error)
            elif action == "close":
                cache.close(seq)
                del live[seq]
        held = [b for seq in live for b in cache.blocks(seq)]
        assert len(held) == len(set(held)) and len(held) + cache.free_blocks == total
        for seq, length in live.items():
            assert cache.lengths[seq] == length
            assert len(cache.blocks(seq)) >= -(-length // 128)
            row = cache.block_table[seq].tolist()
            assert tuple(b for b in row if b >= 0) == cache.blocks(seq)


def test_full_cache_refuses_and_changes_nothing() -> None:
    cache = make(max_seqs=1, max_tokens=128)
    seq = cache.open()
    with pytest.raises(CacheFull, match="all 1 sequence places"):
        cache.open()
    for _ in range(2):
        cache.reserve(seq, 64)
        cache.advance(seq, 64)
    with pytest.raises(CacheFull, match="1 more blocks of 128 tokens needed, 0 are free"):
        cache.reserve(seq, 1)
    assert cache.lengths[seq] == 128 and len(cache.blocks(seq)) == 1


def test_bad_use_is_refused_by_name() -> None:
    cache = make()
    seq = cache.open()
    with pytest.raises(ValueError, match=r"max_step 64\], got 65"):
        cache.reserve(seq, 65)
    with pytest.raises(ValueError, match="open place"):
        cache.reserve(2 if seq != 2 else 1, 1)
    cache.reserve(seq, 64)
    cache.advance(seq, 64)
    with pytest.raises(ValueError, match=r"\[56, 64\] \(max_rewind 8\), got 55"):
        cache.rewind(seq, 55)
    cache.rewind(seq, 60)
    with pytest.raises(ValueError, match="got 55"):  # counted from the furthest position ever written
        cache.rewind(seq, 55)
    with pytest.raises(ValueError, match="max_rewind must be in"):
        make(max_rewind=65)
    with pytest.raises(ValueError, match="max_seqs must be >= 1"):
        make(max_seqs=0)
    limited = make(config=replace(ModelConfig.nano(), max_position_embeddings=70))
    seq = limited.open()
    limited.reserve(seq, 64)
    limited.advance(seq, 64)
    with pytest.raises(ValueError, match=r"max_position_embeddings 70 \+ max_rewind 8, got 79"):
        limited.reserve(seq, 15)
    with pytest.raises(ValueError, match="each sequence once"):
        Batch.plan(cache, [(0, [1]), (0, [2])])
    with pytest.raises(ValueError, match="at least one token"):
        Batch.plan(cache, [(0, [])])


def test_growing_bytes_per_token_follow_the_specification() -> None:
    """Spec 12.6: the part that grows with the sequence, FP4 index, is 3,514 B a token on Flash and 5,031 on Pro."""
    for config, want in ((ModelConfig.flash(), 3514), (ModelConfig.pro(), 5031)):
        per_token = config.layer_kinds.count(CSA) * (584 + 68) / 4 + config.layer_kinds.count(HCA) * 584 / 128
        assert round(per_token) == want
    config = replace(ModelConfig.nano(), layer_kinds=(CSA,) * 3)
    small, large = (make(config=config, max_seqs=1, max_tokens=n) for n in (128, 128 * 101))
    page = -(-32 * 584 // 576) * 576 + -(-32 * 68 // 576) * 576
    table = 100 * 4
    assert large.nbytes - small.nbytes == 100 * 3 * page + table


def test_plan_addresses() -> None:
    cache = make(EXACT)
    a, b = cache.open(), cache.open()
    cache.reserve(a, 64)
    cache.advance(a, 64)
    for seq in (a, b):
        cache.reserve(seq, 64)
    plan = Batch.plan(cache, [(a, list(range(64))), (b, [5, 6, 7, 8, 9])])
    assert plan.positions.tolist() == [*range(64, 128), *range(5)]
    assert plan.last_rows.tolist() == [63, 68] and plan.first_row.tolist() == [0] * 64 + [64] * 5
    csa, hca = plan.entries[CSA], plan.entries[HCA]
    assert hca.num_visible.tolist() == [0] * 63 + [1] + [0] * 5 and hca.max_visible == 1
    assert csa.num_visible.tolist()[-5:] == [0, 0, 0, 1, 1] and csa.max_visible == 32
    assert plan.window_slots[0] == a * cache.ring_len + 64


def test_a_fixed_plan_takes_the_values_of_later_steps() -> None:
    cache = make()
    seqs = [cache.open(), cache.open()]

    def step(*counts: int, fixed: bool = False) -> Batch:
        for seq, count in zip(seqs, counts, strict=True):
            cache.reserve(seq, count)
        batch = Batch.plan(cache, [(seq, [1 + seq] * count) for seq, count in zip(seqs, counts, strict=True)], fixed=fixed)
        for seq, count in zip(seqs, counts, strict=True):
            cache.advance(seq, count)
        return batch

    step(7, 60)
    static = step(1, 2, fixed=True)
    assert static.entries[CSA].max_visible == cache.num_blocks * cache.page_size(CSA)
    assert static.entries[CSA].num_visible.tolist() == [2, 15, 15]
    address = static.positions.data_ptr()
    later = step(1, 2)
    static.copy_(later)
    assert static.positions.data_ptr() == address
    for name, tensor in later._tensors().items():
        assert torch.equal(static._tensors()[name], tensor), name
    with pytest.raises(ValueError, match="must have the shapes"):
        static.copy_(step(2, 2))
    with pytest.raises(ValueError, match="max_visible <= 16 for CSA, got 17"):
        later.copy_(step(1, 2))
    assert torch.equal(static.positions, later.positions)  # as it was
