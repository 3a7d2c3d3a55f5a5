"""Keys outside the cache: the bytes that the reference stores, what comes back, and the specification's table of memory."""

from __future__ import annotations

import pytest
import torch

from dsv4lab.config import ModelConfig
from dsv4lab.lab import keys
from dsv4lab.records import allocate_kv_pages
from dsv4lab.reference.cache import cache_read, cache_write, kv_norm_rope

FLASH, PRO = ModelConfig.flash(), ModelConfig.pro()


@pytest.mark.parametrize("record", ["fp8", "nvfp4"])
def test_records_by_hand_are_those_of_the_reference(record: str) -> None:
    g = torch.Generator().manual_seed(3)
    x = (torch.randn(23, 512, generator=g) * torch.exp(2 * torch.randn(23, 1, generator=g))).bfloat16()
    weight = (torch.rand(512, generator=g) + 0.5).bfloat16()
    positions, freq = torch.randint(0, 1 << 20, (23,), generator=g), torch.rand(32, generator=g)
    slots = torch.randperm(64, generator=g)[:23]
    slots[::4] = -1
    pages = allocate_kv_pages(record, num_pages=2, page_size=32, dim=512, rope_dim=64, dtype=torch.bfloat16, device="cpu")
    pages.fill_(0xAB)
    before = pages.clone()
    cache_write(x, weight, positions, freq, pages, slots, eps=1e-6, record=record, page_size=32)
    exact = kv_norm_rope(x, weight, positions, freq, eps=1e-6)
    assert torch.equal(keys.in_pages(exact, record, slots, before, 32), pages)
    assert bool((before == 0xAB).all())
    kept = slots >= 0
    back = cache_read(pages, slots[kept], record=record, page_size=32, dim=512, rope_dim=64)
    assert torch.equal(keys.round_trip(exact[kept], record), back)


def test_a_plain_record_is_bf16() -> None:
    x = torch.randn(3, 512)
    assert torch.equal(keys.round_trip(x, "plain"), x.bfloat16().float())


@pytest.mark.parametrize(
    ("config", "fp8", "fp4", "window", "state", "total"),
    [(FLASH, 3850, 3514, 3.21, 12.2, 4.05), (PRO, 5511, 5031, 4.56, 18.7, 5.80)],
)
def test_memory_is_the_specification_s(
    config: ModelConfig, fp8: float, fp4: float, window: float, state: float, total: float
) -> None:
    assert int(keys.growing_bytes(config, "fp8", "fp8")) == fp8
    assert int(keys.growing_bytes(config, "fp8", "fp4")) == fp4
    ring, rest = keys.fixed_bytes(config, "fp8")
    assert (round(1e-6 * ring, 2), round(1e-6 * rest, 1)) == (window, state)
    assert 1e-9 * (2**20 * keys.growing_bytes(config, "fp8", "fp8") + ring + rest) == pytest.approx(total, abs=0.01)


def test_bytes_of_a_record() -> None:
    assert [keys.record_bytes(FLASH, r) for r in ("plain", "fp8", "nvfp4")] == [1024, 584, 384]
    assert [keys.record_bytes(FLASH, r, index=True) for r in ("plain", "fp8", "fp4")] == [256, 132, 68]
    with pytest.raises(ValueError, match=r"record must be one of \('plain', 'fp8', 'nvfp4'\), got 'fp4'"):
        keys.record_bytes(FLASH, "fp4")
    with pytest.raises(ValueError, match="packed key record"):
        keys.pack(torch.zeros(1, 512), "plain")


@pytest.mark.parametrize("record", ["plain", "fp8", "nvfp4"])
def test_a_pool_as_another_record_holds_the_same_keys_rounded(record: str) -> None:
    pages = torch.randn(3, 32, 512, generator=torch.Generator().manual_seed(5)).bfloat16()
    slots = torch.randperm(96, generator=torch.Generator().manual_seed(6))
    got = cache_read(keys.repacked(pages, record), slots, record=record, page_size=32, dim=512, rope_dim=64)
    assert torch.equal(got, keys.round_trip(pages.flatten(0, 1), record)[slots])
