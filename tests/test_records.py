"""Record layouts: the specification's byte counts, the parts of a page, rejected names. The bytes: reference/test_cache."""

from __future__ import annotations

import pytest
import torch

from dsv4lab.config import ModelConfig
from dsv4lab.records import Record, allocate_index_pages, allocate_kv_pages, index_record, kv_record


@pytest.mark.parametrize("config", [ModelConfig.flash(), ModelConfig.pro()], ids=["flash", "pro"])
def test_byte_counts_of_the_specification(config: ModelConfig) -> None:
    """Spec 12.2 and 12.3."""
    key = kv_record(config.head_dim, config.qk_rope_head_dim)
    assert (key.data_bytes, key.scale_bytes) == (576, 8)
    assert (key.page_bytes(64), key.page_bytes(2)) == (37_440, 1_728)
    four_bit = kv_record(config.head_dim, config.qk_rope_head_dim, "nvfp4")  # ours, not the specification's
    assert (four_bit.data_bytes, four_bit.scale_bytes) == (352, 32)
    assert [four_bit.page_bytes(n) for n in (64, 32, 2, 1)] == [24_576, 12_288, 768, 384]
    for name, record_bytes, page_bytes in [("fp8", 132, 8_640), ("fp4", 68, 4_608)]:
        index = index_record(name, config.index_head_dim)
        assert index.data_bytes + index.scale_bytes == record_bytes
        assert index.page_bytes(64) == page_bytes


@pytest.mark.parametrize(
    ("dim", "rope_dim", "data", "scales"), [(512, 64, 576, 8), (160, 64, 224, 8), (64, 64, 128, 0), (640, 64, 704, 16)]
)
def test_key_records_of_other_sizes(dim: int, rope_dim: int, data: int, scales: int) -> None:
    assert kv_record(dim, rope_dim) == Record(data_bytes=data, scale_bytes=scales)


@pytest.mark.parametrize(
    ("dim", "rope_dim", "data", "scales"), [(96, 32, 96, 16), (320, 64, 256, 32), (304, 64, 248, 16), (128, 16, 88, 16)]
)
def test_nvfp4_key_records_of_other_sizes(dim: int, rope_dim: int, data: int, scales: int) -> None:
    """A scale part ends with the global scale, and is whole 16-byte vectors."""
    assert kv_record(dim, rope_dim, "nvfp4") == Record(data_bytes=data, scale_bytes=scales, page_align=128)


def test_parts_are_views_of_the_page() -> None:
    record = Record(data_bytes=5, scale_bytes=2)
    pages = torch.arange(2 * 576, dtype=torch.int64).to(torch.uint8).view(2, 576)
    data, scales = record.parts(pages, 3)
    assert data.shape == (2, 3, 5) and scales.shape == (2, 3, 2)
    for page in range(2):
        for place in range(3):
            assert torch.equal(data[page, place], pages[page, 5 * place : 5 * place + 5])
            assert torch.equal(scales[page, place], pages[page, 15 + 2 * place : 17 + 2 * place])
    scales[1, 2, 1] = 77
    data[0, 0, 0] = 78
    assert pages[1, 20] == 77 and pages[0, 0] == 78


def test_page_size_is_the_next_multiple_of_576() -> None:
    assert [Record(64, 0).page_bytes(n) for n in (1, 9, 10, 18)] == [576, 576, 1152, 1152]


def test_pools_are_zeroed_and_shaped() -> None:
    common = dict(num_pages=3, page_size=4, dtype=torch.bfloat16, device="cpu")
    plain = allocate_kv_pages("plain", dim=96, rope_dim=32, **common)
    packed = allocate_kv_pages("fp8", dim=96, rope_dim=32, **common)
    assert (plain.shape, plain.dtype) == ((3, 4, 96), torch.bfloat16)
    assert (packed.shape, packed.dtype) == ((3, 576), torch.uint8)
    four_bit = allocate_kv_pages("nvfp4", dim=96, rope_dim=32, **common)
    assert (four_bit.shape, four_bit.dtype) == ((3, 512), torch.uint8)
    index = {name: allocate_index_pages(name, dim=128, **common) for name in ("plain", "fp8", "fp4")}
    assert [tuple(t.shape) for t in index.values()] == [(3, 4, 128), (3, 576), (3, 576)]
    assert not any(t.any() for t in (plain, packed, four_bit, *index.values()))


def test_unknown_records_are_named() -> None:
    common = dict(num_pages=1, page_size=1, dim=128, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"key record must be one of \('plain', 'fp8', 'nvfp4'\), got 'fp4'"):
        allocate_kv_pages("fp4", rope_dim=64, **common)
    with pytest.raises(ValueError, match=r"packed key record must be one of \('fp8', 'nvfp4'\), got 'plain'"):
        kv_record(512, 64, "plain")
    with pytest.raises(ValueError, match=r"index record must be one of \('plain', 'fp8', 'fp4'\), got 'bf16'"):
        allocate_index_pages("bf16", **common)


@pytest.mark.parametrize(("dim", "rope_dim"), [(168, 64), (64, 64), (32, 64)])
def test_nvfp4_keys_need_whole_blocks(dim: int, rope_dim: int) -> None:
    message = f"dim - rope_dim must be a positive multiple of 16 for nvfp4 keys, got {dim} - {rope_dim}"
    with pytest.raises(ValueError, match=message):
        kv_record(dim, rope_dim, "nvfp4")
