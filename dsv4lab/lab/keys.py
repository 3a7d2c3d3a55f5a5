"""Keys of the cache outside it: their records laid out by hand, what a record loses of them, and what a cache of them takes.

Written from the specification (12.2 to 12.6) with the quantisers alone, beside `reference.cache`: two ways to the same bytes.
"""

from __future__ import annotations

import torch

from dsv4lab.config import CSA, HCA, ModelConfig
from dsv4lab.records import INDEX_RECORDS, KV_RECORDS, allocate_kv_pages, index_record, kv_record
from dsv4lab.reference import quant

ROTARY = 64  # dims at a key's end that stay BF16
_GROUP = 64  # codes that share an fp8 record's scale
_STATE_NUMBERS = 2  # float32 numbers that a compressor keeps of a token's channel: value and score


def pack(keys: torch.Tensor, record: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and scale bytes of keys: (M, c) float -> (M, data_bytes), (M, scale_bytes) u8. Raises ValueError on the name."""
    layout = kv_record(keys.shape[1], ROTARY, record)
    nope, rotary = keys[:, :-ROTARY], keys[:, -ROTARY:].to(torch.bfloat16).contiguous().view(torch.uint8)
    if record == "fp8":
        codes, scale = (part.view(torch.uint8) for part in quant.quantize_fp8_rows(nope, group=_GROUP))
    else:
        power = quant.nvfp4_power_scale(nope)
        nibbles, blocks, _ = quant.quantize_nvfp4(nope[:, None], global_scale=quant.decode_e8m0(power))
        codes = nibbles[:, 0]
        scale = torch.cat([blocks[:, 0].view(torch.uint8), power.view(torch.uint8)[:, None]], dim=1)
    padding = layout.scale_bytes - scale.shape[1]
    return torch.cat([codes, rotary], dim=1), torch.nn.functional.pad(scale, (0, padding))


def in_pages(keys: torch.Tensor, record: str, slots: torch.Tensor, pages: torch.Tensor, page_size: int) -> torch.Tensor:
    """A copy of a pool (P, page_bytes) u8 with keys (M, c) in their slots (M,), -1 = nowhere."""
    found = pages.clone()
    data, scales = kv_record(keys.shape[1], ROTARY, record).parts(found, page_size)
    kept = slots >= 0
    page, place = slots[kept] // page_size, slots[kept] % page_size
    data[page, place], scales[page, place] = pack(keys[kept], record)
    return found


def round_trip(keys: torch.Tensor, record: str) -> torch.Tensor:
    """What a record gives back of keys: (M, c) float, rounded to BF16 first as a model's are -> (M, c) f32."""
    rounded = keys.to(torch.bfloat16)
    if record == "plain":
        return rounded.float()
    data, scales = pack(rounded, record)
    rotary, codes = data[:, -2 * ROTARY :].contiguous().view(torch.bfloat16).float(), data[:, : -2 * ROTARY].contiguous()
    if record == "fp8":
        groups = -(-codes.shape[1] // _GROUP)
        powers = scales[:, :groups].contiguous().view(torch.float8_e8m0fnu)
        nope = quant.dequantize_fp8_rows(codes.view(torch.float8_e4m3fn), powers, group=_GROUP)
    else:
        blocks = codes.shape[1] // 8
        each = scales[:, :blocks].contiguous().view(torch.float8_e4m3fn)
        power = quant.decode_e8m0(scales[:, blocks].contiguous())
        nope = quant.dequantize_nvfp4(codes[:, None], each[:, None], power)[:, 0]
    return torch.cat([nope, rotary], dim=1)


def record_bytes(config: ModelConfig, record: str, *, index: bool = False) -> int:
    """Bytes of one key, or of one index key; a plain one is BF16. Raises ValueError on the name."""
    names, dim = (INDEX_RECORDS, config.index_head_dim) if index else (KV_RECORDS, config.head_dim)
    if record not in names:
        raise ValueError(f"record must be one of {names}, got {record!r}")
    if record == "plain":
        return 2 * dim
    layout = index_record(record, dim) if index else kv_record(dim, config.qk_rope_head_dim, record)
    return layout.data_bytes + layout.scale_bytes


def growing_bytes(config: ModelConfig, record: str, index: str) -> float:
    """Bytes that a token adds to the cache of a sequence, without padding of pages."""
    key, index_key = record_bytes(config, record), record_bytes(config, index, index=True)
    csa, hca = (config.layer_kinds.count(kind) for kind in (CSA, HCA))
    return csa * (key + index_key) / config.csa_ratio + hca * key / config.hca_ratio


def fixed_bytes(config: ModelConfig, record: str) -> tuple[int, int]:
    """Bytes of a sequence whatever its length: its window's keys, and its compressors' state without room to rewind."""
    csa, hca = (config.layer_kinds.count(kind) for kind in (CSA, HCA))
    window = len(config.layer_kinds) * config.sliding_window * record_bytes(config, record)
    per_csa = 2 * config.csa_ratio * 2 * (config.head_dim + config.index_head_dim)  # channels of the tokens of two blocks
    channels = csa * per_csa + hca * config.hca_ratio * config.head_dim
    return window, 4 * _STATE_NUMBERS * channels


def repacked(pages: torch.Tensor, record: str) -> torch.Tensor:
    """A pool of plain keys (P, page, c) as a pool of another record. Raises ValueError on the name."""
    if record == "plain":
        return pages
    num_pages, page_size, dim = pages.shape
    empty = allocate_kv_pages(
        record, num_pages=num_pages, page_size=page_size, dim=dim, rope_dim=ROTARY, dtype=pages.dtype, device=pages.device
    )
    slots = torch.arange(num_pages * page_size, device=pages.device)
    return in_pages(pages.flatten(0, 1), record, slots, empty, page_size)
