"""Cache records: how one key (or one index key) lies in a page, byte by byte (spec 12.2 to 12.4).

A *record* is one token's or one compressed entry's key. A *page* holds `page_size` records: first all their data parts, then
all their scale parts, then padding. `slot` = page index * page_size + place in the page; slot -1 means "nowhere".
The `plain` record is an ordinary float row, for numerics without cache quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4lab.formats import NVFP4

NOPE_GROUP = 64  # E4M3 codes of the non-rotary part that share a power-of-two scale (spec 8.3)
INDEX_FP4_GROUP = 32  # E2M1 codes of an index key that share a scale (spec 8.3)
PAGE_ALIGN_BYTES = 576  # page sizes are padded to this multiple (spec 12.2)
NVFP4_PAGE_ALIGN_BYTES = 128  # of `nvfp4` pages: whole lines of memory
_SCALE_PAD = 8  # bytes: the scale part of an fp8 record is padded to whole 8-byte words
_NVFP4_SCALE_PAD = 16  # bytes: that of an nvfp4 record to whole 16-byte vectors

KV_RECORDS = ("plain", "fp8", "nvfp4")
INDEX_RECORDS = ("plain", "fp8", "fp4")


@dataclass(frozen=True)
class Record:
    """Byte layout of one packed record: `data_bytes` in the first part of a page, `scale_bytes` in the second.

    page_align: pages are padded to a multiple of this many bytes.
    """

    data_bytes: int
    scale_bytes: int
    page_align: int = PAGE_ALIGN_BYTES

    def page_bytes(self, page_size: int) -> int:
        """Stored bytes of a page of `page_size` records, padding included."""
        raw = page_size * (self.data_bytes + self.scale_bytes)
        return -(-raw // self.page_align) * self.page_align

    def parts(self, pages: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a page pool (P, page_bytes) u8: data (P, page_size, data_bytes), scales (P, page_size, scale_bytes)."""
        split = page_size * self.data_bytes
        end = split + page_size * self.scale_bytes
        data = pages[:, :split].unflatten(1, (page_size, self.data_bytes))
        return data, pages[:, split:end].unflatten(1, (page_size, self.scale_bytes))


def kv_record(dim: int, rope_dim: int, record: str = "fp8") -> Record:
    """A packed key record; 512 dims of which 64 are rotary take 584 bytes as `fp8` and 384 as `nvfp4`.

    `fp8`: (dim - rope_dim) E4M3 codes and rope_dim bf16, then E8M0 scales per 64. `nvfp4`: (dim - rope_dim) / 2 bytes of E2M1
    codes (the even dim in the low nibble) and rope_dim bf16; then an E4M3 block scale per 16, one byte with the record's E8M0
    global scale, and zeros. Raises ValueError on the name, and on dims that nvfp4's blocks do not divide.
    """
    nope = dim - rope_dim
    if record == "fp8":
        groups = -(-nope // NOPE_GROUP)
        return Record(data_bytes=nope + 2 * rope_dim, scale_bytes=-(-groups // _SCALE_PAD) * _SCALE_PAD)
    if record == "nvfp4":
        if nope <= 0 or nope % NVFP4.group:
            raise ValueError(
                f"dim - rope_dim must be a positive multiple of {NVFP4.group} for nvfp4 keys, got {dim} - {rope_dim}"
            )
        scale_bytes = nope // NVFP4.group + 1
        scale_bytes = -(-scale_bytes // _NVFP4_SCALE_PAD) * _NVFP4_SCALE_PAD
        return Record(nope // 2 + 2 * rope_dim, scale_bytes, NVFP4_PAGE_ALIGN_BYTES)
    raise ValueError(f"packed key record must be one of {KV_RECORDS[1:]}, got {record!r}")


def index_record(record: str, dim: int) -> Record:
    """An index key: `fp8` is dim E4M3 codes and one f32 scale (132 bytes at 128), `fp4` packed E2M1 and E8M0 per 32 (68).

    Raises ValueError on the name.
    """
    if record == "fp8":
        return Record(data_bytes=dim, scale_bytes=4)
    if record == "fp4":
        return Record(data_bytes=dim // 2, scale_bytes=-(-dim // INDEX_FP4_GROUP))
    raise ValueError(f"packed index record must be one of {INDEX_RECORDS[1:]}, got {record!r}")


def check_record(kind: str, record: str) -> None:
    """Raises ValueError unless "key" or "index" records, as kind has it, come in this form."""
    known = KV_RECORDS if kind == "key" else INDEX_RECORDS
    if record not in known:
        raise ValueError(f"{kind} record must be one of {known}, got {record!r}")


def _packed(kind: str, record: str, dim: int, rope_dim: int) -> Record | None:
    """None for plain ones."""
    check_record(kind, record)
    if record == "plain":
        return None
    return kv_record(dim, rope_dim, record) if kind == "key" else index_record(record, dim)


def check_pool(pages: torch.Tensor, kind: str, record: str, *, page_size: int, dim: int, rope_dim: int = 0) -> Record | None:
    """The records of a page pool, as `_allocate` makes it; None for plain ones.

    Raises ValueError on the name, on page_size, and on a pool of other pages, TypeError on its dtype.
    """
    packed = _packed(kind, record, dim, rope_dim)
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1, got {page_size}")
    if (pages.dtype != torch.uint8) if packed else not pages.is_floating_point():
        raise TypeError(f"{record} pages must be {'uint8' if packed else 'floats'}, got {pages.dtype}")
    want = (packed.page_bytes(page_size),) if packed else (page_size, dim)
    if tuple(pages.shape[1:]) != want:
        raise ValueError(f"{record} pages must be (P, {', '.join(map(str, want))}), got {tuple(pages.shape)}")
    return packed


def _allocate(
    packed: Record | None, num_pages: int, page_size: int, dim: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    if packed is None:
        return torch.zeros(num_pages, page_size, dim, dtype=dtype, device=device)
    return torch.zeros(num_pages, packed.page_bytes(page_size), dtype=torch.uint8, device=device)


def allocate_kv_pages(
    record: str, *, num_pages: int, page_size: int, dim: int, rope_dim: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """A zeroed key page pool: `plain` (P, page_size, dim) of dtype, else (P, page_bytes) u8. Raises ValueError on the name."""
    return _allocate(_packed("key", record, dim, rope_dim), num_pages, page_size, dim, dtype, device)


def allocate_index_pages(
    record: str, *, num_pages: int, page_size: int, dim: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """A zeroed pool of index keys: `plain` (P, page_size, dim) of dtype, else (P, page_bytes) u8. Raises as for keys."""
    return _allocate(_packed("index", record, dim, 0), num_pages, page_size, dim, dtype, device)
