"""Key records in pages: byte by byte against records assembled by hand, addresses, and the way back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsv4lab.config import ModelConfig
from dsv4lab.records import allocate_kv_pages, kv_record
from dsv4lab.reference.cache import _from_nvfp4, _to_nvfp4, cache_read, cache_write, kv_norm_rope
from dsv4lab.reference.rope import rope_frequencies
from tests.reference.test_quant import E2M1_GRID, E4M3_GRID

EPS = 1e-6
FILL = 0xAB  # what a pool holds before a test writes into it


def table(rope_dim: int = 64) -> torch.Tensor:
    c = ModelConfig.flash()
    return rope_frequencies(rope_dim=rope_dim, theta=c.compress_rope_theta, scaling=c.rope_scaling)


def e4m3_code(x: float) -> int:
    """Nearest value, ties to the even code; no saturation is needed under a fitting scale."""
    distance = np.abs(E4M3_GRID - abs(x))
    best = [i for i in range(127) if distance[i] == distance.min()]
    return min(best, key=lambda i: i % 2) | (0x80 if math.copysign(1, x) < 0 else 0)


def bf16_bytes(x: float) -> bytes:
    return torch.tensor(x).bfloat16().view(torch.int16).numpy().tobytes()


def record_by_hand(key: list[float], nope: int) -> tuple[bytes, bytes]:
    """Spec 12.2 for one key: codes and bf16 rotary part; scale bytes padded to 8."""
    codes, scales = bytearray(), bytearray()
    for start in range(0, nope, 64):
        group = key[start : min(start + 64, nope)]
        amax = max(1e-4, *(abs(v) for v in group))
        exponent = -127
        while 448 * 2.0**exponent < np.float32(amax):
            exponent += 1
        scales.append(exponent + 127)
        codes += bytes(e4m3_code(v / 2.0**exponent) for v in group)
    return bytes(codes) + b"".join(bf16_bytes(v) for v in key[nope:]), bytes(scales).ljust(-(-len(scales) // 8) * 8, b"\0")


def nvfp4_record_by_hand(key: list[float], nope: int) -> tuple[bytes, bytes]:
    """E2M1 codes and bf16 rotary part; an E4M3 scale per 16, then the global power of two, padded to 16 bytes."""
    amax = max(abs(v) for v in key[:nope])
    exponent = -117 if amax else 0
    while 2688 * 2.0**exponent < amax:
        exponent += 1
    nibbles, scales = [], bytearray()
    for start in range(0, nope, 16):
        block = key[start : start + 16]
        ratio = float(np.float32(max(abs(v) for v in block)) / np.float32(6 * 2.0**exponent)) or 1.0
        scales.append(e4m3_code(max(ratio, 2.0**-9)))
        step = E4M3_GRID[scales[-1]] * 2.0**exponent
        for v in block:
            distance = [abs(abs(v) / step - g) for g in E2M1_GRID]
            code = min((i for i in range(8) if distance[i] == min(distance)), key=lambda i: i % 2)
            nibbles.append(code | (8 if math.copysign(1, v) < 0 else 0))
    codes = bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True))
    scales.append(exponent + 127)
    return codes + b"".join(bf16_bytes(v) for v in key[nope:]), bytes(scales).ljust(-(-len(scales) // 16) * 16, b"\0")


def key_by_hand(x: torch.Tensor, weight: torch.Tensor, positions: list[int], freq: torch.Tensor) -> torch.Tensor:
    """RMSNorm and rotation in float64, each rounded to the dtype of x, as two kernels would hand it on."""
    xd = x.double()
    key = (xd / (xd.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()).to(x.dtype)
    out, split = key.double().clone(), x.shape[1] - 2 * len(freq)
    for m, position in enumerate(positions):
        for i, f in enumerate(freq.tolist()):
            t = float(np.float32(position) * np.float32(f))
            a, b = key[m, split + 2 * i].item(), key[m, split + 2 * i + 1].item()
            out[m, split + 2 * i] = a * math.cos(t) - b * math.sin(t)
            out[m, split + 2 * i + 1] = a * math.sin(t) + b * math.cos(t)
    return out.to(x.dtype)


def pool(record: str, num_pages: int, page_size: int, dim: int, rope_dim: int, dtype: torch.dtype) -> torch.Tensor:
    pages = allocate_kv_pages(
        record, num_pages=num_pages, page_size=page_size, dim=dim, rope_dim=rope_dim, dtype=dtype, device="cpu"
    )
    assert not pages.any()
    return pages.fill_(FILL)


# ---- the specification's layout ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("page_size", "page_bytes"), [(64, 37_440), (2, 1_728)])
def test_a_page_of_584_byte_records(page_size: int, page_bytes: int) -> None:
    """Flash and Pro: 512 dims, 64 of them rotary. Every byte of the pool, padding and untouched records included."""
    torch.manual_seed(page_size)
    x, weight = torch.randn(3, 512).bfloat16() * torch.tensor([[1e-3], [1.0], [300.0]]), torch.randn(512).bfloat16()
    x = x.bfloat16()
    x[1, 64:128] = 0  # a group of zeros takes its scale from the floor
    positions, freq = [0, 131, 1_000_000], table(64)
    slots = torch.tensor([page_size + 1, 0, 2 * page_size - 1 if page_size > 2 else page_size])
    pages = pool("fp8", 2, page_size, 512, 64, torch.bfloat16)
    assert pages.dtype == torch.uint8 and pages.shape == (2, page_bytes)
    cache_write(x, weight, torch.tensor(positions), freq, pages, slots, eps=EPS, record="fp8", page_size=page_size)

    want = np.full((2, page_bytes), FILL, dtype=np.uint8)
    for key, slot in zip(key_by_hand(x, weight, positions, freq).tolist(), slots.tolist(), strict=True):
        data, scales = record_by_hand(key, 448)
        assert (len(data), len(scales)) == (576, 8) and scales[7] == 0
        page, place = divmod(slot, page_size)
        want[page, place * 576 : (place + 1) * 576] = np.frombuffer(data, np.uint8)
        start = page_size * 576 + place * 8
        want[page, start : start + 8] = np.frombuffer(scales, np.uint8)
    assert np.array_equal(pages.numpy(), want)


@pytest.mark.parametrize(("page_size", "page_bytes"), [(64, 24_576), (3, 1_152)])
def test_a_page_of_384_byte_records(page_size: int, page_bytes: int) -> None:
    """The same of four-bit keys: small, large, vanishing and zero rows, a block of zeros, one whose scale is the smallest."""
    torch.manual_seed(page_size)
    x, weight = torch.randn(6, 512), torch.randn(512).bfloat16()
    x *= torch.tensor([1e-3, 1.0, 300.0, 1.0, 0.0, 1e-37])[:, None]
    x[1, 64:80] = 0
    x[3, 16:32] *= 1e-5
    x[3, 32:48], x[3, 40] = 0, 1e-5
    x = x.bfloat16()
    positions, freq = [0, 131, 1_000_000, 77, 5, 6], table(64)
    slots = torch.tensor([page_size + 1, 0, 2 * page_size - 1, 3 * page_size, 2 * page_size + 1, 2 * page_size])
    pages = pool("nvfp4", 4, page_size, 512, 64, torch.bfloat16)
    assert pages.dtype == torch.uint8 and pages.shape == (4, page_bytes)
    cache_write(x, weight, torch.tensor(positions), freq, pages, slots, eps=EPS, record="nvfp4", page_size=page_size)

    want = np.full((4, page_bytes), FILL, dtype=np.uint8)
    for key, slot in zip(key_by_hand(x, weight, positions, freq).tolist(), slots.tolist(), strict=True):
        data, scales = nvfp4_record_by_hand(key, 448)
        assert (len(data), len(scales)) == (352, 32) and not any(scales[29:])
        page, place = divmod(slot, page_size)
        want[page, place * 352 : (place + 1) * 352] = np.frombuffer(data, np.uint8)
        start = page_size * 352 + place * 32
        want[page, start : start + 32] = np.frombuffer(scales, np.uint8)
    assert want[2, page_size * 352 + 32 + 28] == 127  # a record of zeros has the global scale 1
    assert want[2, page_size * 352 + 28] == 10  # and one of next to nothing the smallest, 2^-117
    assert np.array_equal(pages.numpy(), want)


@pytest.mark.parametrize(("dim", "rope_dim", "page_size"), [(96, 32, 3), (160, 64, 5), (128, 16, 1), (64, 64, 2)])
@pytest.mark.parametrize("record", ["fp8", "nvfp4"])
def test_other_dimensions_lie_the_same_way(dim: int, rope_dim: int, page_size: int, record: str) -> None:
    """Partial groups, and heads without a non-rotary part, which nvfp4 records do not have."""
    if record == "nvfp4" and dim == rope_dim:
        with pytest.raises(ValueError, match="must be a positive multiple of 16"):
            pool(record, 4, page_size, dim, rope_dim, torch.bfloat16)
        return
    torch.manual_seed(dim)
    layout = kv_record(dim, rope_dim, record)
    x, weight, positions = torch.randn(4, dim).bfloat16(), torch.randn(dim).bfloat16(), [4, 5, 900, 7]
    slots = torch.tensor([3 * page_size - 1, 0, page_size, 4 * page_size - 1])
    pages = pool(record, 4, page_size, dim, rope_dim, torch.bfloat16)
    where = dict(eps=EPS, record=record, page_size=page_size)
    cache_write(x, weight, torch.tensor(positions), table(rope_dim), pages, slots, **where)
    assert pages.shape[1] % (576 if record == "fp8" else 128) == 0 and pages.shape[1] >= page_size * (
        layout.data_bytes + layout.scale_bytes
    )
    for key, slot in zip(key_by_hand(x, weight, positions, table(rope_dim)).tolist(), slots.tolist(), strict=True):
        data, scales = (record_by_hand if record == "fp8" else nvfp4_record_by_hand)(key, dim - rope_dim)
        raw, (page, place) = pages.numpy(), divmod(slot, page_size)
        assert raw[page, place * len(data) : (place + 1) * len(data)].tobytes() == data
        start = page_size * len(data) + place * len(scales)
        assert raw[page, start : start + len(scales)].tobytes() == scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_record_is_the_key_itself(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight, positions = torch.randn(5, 80).to(dtype), torch.randn(80).to(dtype), torch.tensor([0, 1, 5, 77, 128])
    pages = pool("plain", 3, 4, 80, 32, dtype)
    slots = torch.tensor([11, 0, -1, 4, 6])
    cache_write(x, weight, positions, table(32), pages, slots, eps=EPS, record="plain", page_size=4)
    want = key_by_hand(x, weight, positions.tolist(), table(32))
    flat = pages.view(12, 80)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            torch.testing.assert_close(flat[slot], want[row], rtol=0, atol=1e-6 if dtype == torch.float32 else 0)
    untouched = [s for s in range(12) if s not in slots.tolist()]
    assert (flat[untouched] == FILL).all()


def test_key_is_norm_then_rotation() -> None:
    torch.manual_seed(2)
    x, weight, positions = torch.randn(6, 128), torch.randn(128), [0, 3, 99, 4_000, 70_001, 999_999]
    got = kv_norm_rope(x, weight, torch.tensor(positions), table(64), eps=EPS)
    torch.testing.assert_close(got, key_by_hand(x, weight, positions, table(64)), rtol=0, atol=2e-6)


# ---- slots -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("record", ["plain", "fp8", "nvfp4"])
def test_slot_minus_one_stores_nothing_and_reads_zeros(record: str) -> None:
    torch.manual_seed(3)
    x, weight, positions = torch.randn(4, 128), torch.ones(128), torch.arange(4)
    knobs = dict(record=record, page_size=4)
    pages = pool(record, 2, 4, 128, 64, torch.float32)
    before = pages.clone()
    cache_write(x, weight, positions, table(64), pages, torch.full((4,), -1), eps=EPS, **knobs)
    assert torch.equal(pages, before)
    cache_write(x, weight, positions, table(64), pages, torch.tensor([-1, 2, -1, 7]), eps=EPS, **knobs)
    got = cache_read(pages, torch.tensor([7, -1, 2]), dim=128, rope_dim=64, **knobs)
    assert torch.equal(got[1], torch.zeros(128)) and got[0].any() and got[2].any()
    nothing = torch.empty(0, dtype=torch.int64)
    assert cache_read(pages, nothing, dim=128, rope_dim=64, **knobs).shape == (0, 128)
    cache_write(x[:0], weight, nothing, table(64), pages, nothing, eps=EPS, **knobs)


@pytest.mark.parametrize("record", ["plain", "fp8", "nvfp4"])
def test_sequences_share_pages(record: str) -> None:
    """Rings of 96 slots over pages of 64: the second page belongs to two sequences. The oldest positions are overwritten."""
    torch.manual_seed(4)
    ring, lengths = 96, [130, 61, 97]
    pages = pool(record, 5, 64, 128, 64, torch.float32)
    x = [torch.randn(n, 128) for n in lengths]
    knobs = dict(record=record, page_size=64)
    weight = torch.rand(128) + 0.5
    for p in range(max(lengths)):  # a token of every sequence in each step
        seqs = [s for s in range(3) if p < lengths[s]]
        slots = torch.tensor([s * ring + p % ring for s in seqs])
        rows = torch.stack([x[s][p] for s in seqs])
        cache_write(rows, weight, torch.full((len(seqs),), p), table(64), pages, slots, eps=EPS, **knobs)
    for s, n in enumerate(lengths):
        positions = torch.arange(max(n - ring, 0), n)
        got = cache_read(pages, s * ring + positions % ring, dim=128, rope_dim=64, **knobs)
        want = key_by_hand(x[s][positions], weight, positions.tolist(), table(64))
        bound = torch.full_like(want, 2e-6)
        if record == "fp8":  # half a step is at most 1/16 of the value, and 2^-10 of the scale of its group
            bound = want.abs() / 16 + 0.01
        if record == "nvfp4":  # half the widest step: a sixth of the block's largest value; its scale is up to 1/16 too small
            amax = want[:, :64].abs().unflatten(1, (4, 16)).amax(-1)
            bound = torch.cat(((amax * (1 / 6 + 1 / 16)).repeat_interleave(16, dim=1), want[:, 64:].abs() / 256 + 1e-6), dim=1)
        assert ((got - want).abs() <= bound).all()


def test_reading_decodes_the_bytes() -> None:
    """A pool of hand-made bytes: code times scale, then the rotary part as it is."""
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (2, 1_728), dtype=np.uint8)
    raw[raw & 0x7F == 0x7F] = 0  # no NaN codes
    raw[:, 1152:1168] = rng.integers(100, 150, (2, 16))
    slots = [3, 0, 2]
    got = cache_read(torch.from_numpy(raw.copy()), torch.tensor(slots), record="fp8", page_size=2, dim=512, rope_dim=64)
    for row, slot in enumerate(slots):
        page, place = divmod(slot, 2)
        data, scales = raw[page, place * 576 : (place + 1) * 576], raw[page, 1152 + place * 8 : 1160 + place * 8]
        codes = [(-1 if b & 0x80 else 1) * E4M3_GRID[b & 0x7F] for b in data[:448]]
        want = [v * 2.0 ** (int(scales[i // 64]) - 127) for i, v in enumerate(codes)]
        assert got[row, :448].tolist() == want
        rotary = torch.from_numpy(data[448:].copy()).view(torch.bfloat16).float()
        assert torch.equal(got[row, 448:].nan_to_num(), rotary.nan_to_num())


def test_reading_decodes_four_bit_bytes() -> None:
    """code * block scale * global scale, with scales of all sizes; the first of two codes lies in the low nibble."""
    rng = np.random.default_rng(6)
    raw = rng.integers(0, 256, (2, 1_152), dtype=np.uint8)
    scales = raw[:, 1_056:1_152].reshape(2, 3, 32)  # a view
    scales[..., :28] &= 0x7F
    scales[scales == 0x7F] = 0
    scales[..., 28] = rng.integers(60, 160, (2, 3))
    slots = [5, 0, -1, 2]
    knobs = dict(record="nvfp4", page_size=3, dim=512, rope_dim=64)
    got = cache_read(torch.from_numpy(raw.copy()), torch.tensor(slots), **knobs)
    for row, slot in enumerate(slots):
        page, place = divmod(slot, 3)
        data = raw[page, place * 352 : (place + 1) * 352]
        codes = [nibble for byte in data[:224].tolist() for nibble in (byte & 15, byte >> 4)]
        value = [(-1 if c & 8 else 1) * E2M1_GRID[c & 7] for c in codes]
        size, factor = [E4M3_GRID[b] for b in scales[page, place, :28]], 2.0 ** (int(scales[page, place, 28]) - 127)
        rotary = torch.from_numpy(data[224:].copy()).view(torch.bfloat16).float()
        if slot < 0:
            assert not got[row].any()
            continue
        assert got[row, :448].tolist() == [v * size[i // 16] * factor for i, v in enumerate(value)]
        assert torch.equal(got[row, 448:].nan_to_num(), rotary.nan_to_num())


@pytest.mark.parametrize(("record", "least"), [("plain", None), ("fp8", 0.9995), ("nvfp4", 0.994)])
def test_keys_survive_the_round_trip(record: str, least: float | None) -> None:
    """The cosine of every key with itself, read back; keys of very different sizes, as layers have them."""
    torch.manual_seed(8)
    x = torch.randn(96, 512) * torch.logspace(-3, 3, 96)[:, None]
    weight, positions = torch.rand(512) + 0.5, torch.arange(96) * 7
    pages = pool(record, 2, 64, 512, 64, torch.float32)
    cache_write(x, weight, positions, table(64), pages, torch.arange(96), eps=EPS, record=record, page_size=64)
    got = cache_read(pages, torch.arange(96), record=record, page_size=64, dim=512, rope_dim=64).double()
    want = kv_norm_rope(x, weight, positions, table(64), eps=EPS)
    if least is None:
        assert torch.equal(got.float(), want)
    else:
        assert torch.cosine_similarity(got, want.double(), dim=1).min() >= least


def test_damage_stays_in_its_block() -> None:
    """A NaN turns its own block of 16 into NaNs; beside an infinity all else is nothing."""
    key = torch.randn(2, 448)
    key[0, 20], key[1, 40] = torch.nan, -torch.inf
    got = _from_nvfp4(*_to_nvfp4(key))
    assert got[0, 16:32].isnan().all() and got[0, :16].isfinite().all() and got[0, 32:].isfinite().all()
    assert torch.cosine_similarity(got[0, 32:], key[0, 32:], dim=0) > 0.99
    assert got[1, 40] < -(2.0**126) and not got[1].isnan().any() and got[1, :32].isfinite().all()


@pytest.mark.parametrize("call", ["write", "read", "allocate"])
def test_unknown_records_are_named(call: str) -> None:
    x, slots = torch.zeros(1, 96), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"key record must be one of \('plain', 'fp8', 'nvfp4'\), got 'fp4'"):
        if call == "write":
            cache_write(x, x[0], slots, table(32), x[None], slots, eps=EPS, record="fp4", page_size=1)
        elif call == "read":
            cache_read(x[None], slots, record="fp4", page_size=1, dim=96, rope_dim=32)
        else:
            pool("fp4", 1, 1, 96, 32, torch.float32)


@pytest.mark.parametrize("record", ["fp8", "nvfp4"])
def test_a_token_does_not_depend_on_its_batch(record: str) -> None:
    torch.manual_seed(7)
    x, weight, positions = torch.randn(19, 512).bfloat16(), torch.randn(512).bfloat16(), torch.arange(19) * 1_000
    knobs = dict(eps=EPS, record=record, page_size=64)
    together, alone = (pool(record, 1, 64, 512, 64, torch.bfloat16) for _ in range(2))
    cache_write(x, weight, positions, table(64), together, torch.arange(19), **knobs)
    for i in range(19):
        one = slice(i, i + 1)
        cache_write(x[one], weight, positions[one], table(64), alone, torch.tensor([i]), **knobs)
    assert torch.equal(together, alone)
