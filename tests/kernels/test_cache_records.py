"""Keys in page pools by kernel: norm, rotation, records and the way back, in the simulator and on the GPU.

Norms and rotations are float32 in the kernel and float64 in the reference, so a key may round to a neighbour. What a kernel
makes of its own key, which a plain pool shows, has every bit of the reference's quantisation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels.cache import operators
from dsv4lab.kernels.cache.plan import KeyPlan
from dsv4lab.kernels.cache.read.api import read_keys
from dsv4lab.kernels.cache.read.config import ReadConfig
from dsv4lab.kernels.cache.write.api import write_keys
from dsv4lab.kernels.cache.write.config import WriteConfig
from dsv4lab.records import allocate_index_pages, allocate_kv_pages
from dsv4lab.reference import cache as reference_cache
from dsv4lab.reference import indexer as reference_indexer
from dsv4lab.reference.quant import quantize_fp8_rows, quantize_mxfp4
from tests.kernels.simulated import simulating
from tests.kernels.test_rope_heads import TABLES

BF16, F32 = torch.bfloat16, torch.float32
EPS = 1e-6
POISON = 0xAB  # every byte of a pool before a test writes into it
ROUNDED_APART = 5e-5  # of the values of BF16 keys: 7e-6 was measured
WRITE = {"kv": reference_cache.cache_write, "index": reference_indexer.index_key_write}


def table(scaled: bool = True) -> torch.Tensor:
    return TABLES["entries" if scaled else "window"]


def pool(kind: str, record: str, num_pages: int, page_size: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    common: dict[str, Any] = dict(num_pages=num_pages, page_size=page_size, dim=dim, dtype=dtype, device="cpu")
    pages = allocate_kv_pages(record, rope_dim=64, **common) if kind == "kv" else allocate_index_pages(record, **common)
    pages.view(torch.uint8).fill_(POISON)
    return pages


def material(rows: int, dim: int, dtype: torch.dtype, weight: torch.dtype, num_slots: int, seed: int = 0) -> dict[str, Any]:
    """Rows of very different sizes, among them zeros, next to nothing, blocks of zeros and blocks so small that their E4M3
    scale is subnormal; scattered slots, every fifth of them none; positions up to 2^20."""
    g = torch.Generator().manual_seed(seed * 1000 + rows + dim)
    x = torch.randn(rows, dim, generator=g) * torch.exp(3 * torch.randn(rows, 1, generator=g))
    x[0, 32:64] = 0
    x[0, 16:32] *= 2e-5
    if rows > 4:
        x[1], x[2] = 0, x[2] * 1e-36
        x[3] = torch.randn(dim, generator=g)
        x[3, 16:] *= 2.0 ** -(13 + (torch.arange(dim - 16) // 16) / 4)
        x[4] *= 1e12
    slots = torch.randperm(num_slots, generator=g)[:rows]
    slots[1::5] = -1
    return dict(
        x=x.to(dtype),
        norm_weight=(torch.rand(dim, generator=g) + 0.5).to(weight),
        positions=torch.randint(0, 1 << 20, (rows,), generator=g),
        inv_freq=table(),
        slots=slots,
    )


def write(kind: str, pages: torch.Tensor, inputs: dict[str, Any], config: WriteConfig | None = None, **how: Any) -> None:
    """The kernel, on the GPU if its inputs are there, else in the simulator."""
    arguments = [inputs[n] for n in ("x", "norm_weight", "positions", "inv_freq")]
    if pages.is_cuda:
        write_keys(*arguments, pages, inputs["slots"], eps=EPS, kind=kind, config=config, **how)
        return
    arch, schedule = how.pop("arch", "sm_90a"), how.pop("schedule", "eager")
    with simulating(arch, schedule=schedule, checks=sim.Checks(races=True)):
        write_keys(*arguments, pages, inputs["slots"], eps=EPS, kind=kind, config=config, **how)


def expected(kind: str, pages: torch.Tensor, inputs: dict[str, Any], **how: Any) -> torch.Tensor:
    arguments = [inputs[n] for n in ("x", "norm_weight", "positions", "inv_freq")]
    pages = pages.clone()
    WRITE[kind](*arguments, pages, inputs["slots"], eps=EPS, **how)
    return pages


def packed(kind: str, record: str, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Data and scale bytes of keys (M, c) by the reference's quantisers."""
    if kind == "index":
        turned = reference_indexer.hadamard(keys)
        if record == "fp8":
            codes, scale = quantize_fp8_rows(turned, group=keys.shape[1])
            return codes.view(torch.uint8), (scale.view(torch.uint8).int() << 23).view(torch.uint8)
        codes, scale = quantize_mxfp4(turned)
        return codes, scale.view(torch.uint8)
    nope, rotary = keys[:, :-64], keys[:, -64:].to(BF16).contiguous().view(torch.uint8)
    if record == "fp8":
        codes, scale = (part.view(torch.uint8) for part in quantize_fp8_rows(nope, group=64))
    else:
        codes, scale = reference_cache._to_nvfp4(nope)
    return torch.cat((codes, rotary), dim=1), scale


def check_bytes(kind: str, record: str, pages: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor, page_size: int) -> None:
    """All bytes of a poisoned pool, given the keys (M, c) that belong there: records of slots, and nothing else."""
    stored = slots >= 0
    layout = KeyPlan(kind, record, keys.shape[1], page_size).layout
    want = torch.full_like(pages, POISON)
    data, scales = layout.parts(want, page_size)
    page, place = slots[stored] // page_size, slots[stored] % page_size
    codes, scale = packed(kind, record, keys[stored])
    data[page, place] = codes
    scales[page, place] = torch.nn.functional.pad(scale, (0, layout.scale_bytes - scale.shape[1]))
    wrong = (pages != want).nonzero()
    assert not len(wrong), f"{len(wrong)} bytes differ, first at {wrong[0].tolist()} of pages of {want.shape[1]}"


def check_keys(got: torch.Tensor, want: torch.Tensor) -> None:
    """Plain pools, the reference's and the kernel's: equal where nothing was written, else up to rounding."""
    if got.dtype == BF16:
        apart = (got.view(torch.int16) != want.view(torch.int16)).sum().item()
        assert apart <= 1 + ROUNDED_APART * got.numel(), f"{apart} of {got.numel()} differ"
    poison = torch.full((1,), POISON, dtype=torch.uint8).expand(got.element_size()).contiguous().view(got.dtype)
    rows = (want != poison).any(-1)
    assert torch.equal(got[~rows].view(torch.uint8), want[~rows].view(torch.uint8))
    size = want[rows].abs().amax(-1, keepdim=True).float()
    # A place of BF16 is 2^-7 of the smallest number that has it; products of the smallest rows are subnormal numbers.
    error = (got[rows].float() - want[rows].float()).abs() / size.clamp(min=2.0**-116)
    assert error.max() <= (2.0**-7 if got.dtype == BF16 else 2.0**-21)


# ---- writing -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "dim", "dtype", "weight", "page_size", "arch"),
    [
        ("kv", 512, BF16, BF16, 32, "sm_90a"),
        ("kv", 512, F32, BF16, 1, "sm_100a"),
        ("kv", 176, BF16, F32, 3, "sm_90a"),  # 7 lanes of codes: the last group of 64 is partial
        ("index", 128, BF16, BF16, 32, "sm_90a"),
        ("index", 128, F32, F32, 5, "sm_100a"),
    ],
)
def test_keys_have_the_reference_s_bytes(
    kind: str, dim: int, dtype: torch.dtype, weight: torch.dtype, page_size: int, arch: str
) -> None:
    rows, num_pages = 37, 96 // page_size + 2
    inputs = material(rows, dim, dtype, weight, num_pages * page_size)
    plain = pool(kind, "plain", num_pages, page_size, dim, dtype)
    want = expected(kind, plain, inputs, record="plain", page_size=page_size)
    write(kind, plain, inputs, record="plain", page_size=page_size, arch=arch)
    check_keys(plain, want)
    keys = plain.view(-1, dim)[inputs["slots"].clamp(min=0)]
    for record in ("fp8", "nvfp4") if kind == "kv" else ("fp8", "fp4"):
        pages = pool(kind, record, num_pages, page_size, dim, dtype)
        want = expected(kind, pages, inputs, record=record, page_size=page_size)
        write(kind, pages, inputs, record=record, page_size=page_size, arch=arch)
        check_bytes(kind, record, pages, keys, inputs["slots"], page_size)
        assert (pages != want).sum() <= 64  # one key of the reference's may have rounded to another scale


def test_ties_of_all_block_scales_round_like_the_reference_s() -> None:
    inputs, g = material(99, 512, BF16, BF16, 128), torch.Generator().manual_seed(1)
    inputs["norm_weight"][:] = 1
    sizes = (8 + torch.arange(512) // 16 % 11) * 2.0 ** -(torch.arange(512) // 16 % 7)
    inputs["x"] = (torch.randint(-255, 256, (99, 512), generator=g) * sizes).to(BF16)
    plain, pages = (pool("kv", record, 4, 32, 512, BF16) for record in ("plain", "nvfp4"))
    write("kv", plain, inputs, record="plain", page_size=32)
    write("kv", pages, inputs, record="nvfp4", page_size=32)
    check_bytes("kv", "nvfp4", pages, plain.view(-1, 512)[inputs["slots"].clamp(min=0)], inputs["slots"], 32)


@pytest.mark.parametrize("schedule", ["lazy", "random"])
def test_any_schedule_and_no_race(schedule: str) -> None:
    """Several rows a CTA, the last CTA with some to spare; slots of one page come from many CTAs."""
    inputs = material(21, 512, BF16, BF16, 64)
    pages = pool("kv", "nvfp4", 2, 32, 512, BF16)
    want = expected("kv", pages, inputs, record="nvfp4", page_size=32)
    key = KeyPlan("kv", "nvfp4", 512, 32)
    write("kv", pages, inputs, WriteConfig(key, warps=8), record="nvfp4", page_size=32, schedule=schedule)
    assert (pages != want).sum() <= 64


@pytest.mark.parametrize(("dtype", "stored"), [(BF16, F32), (F32, BF16)])
def test_a_plain_pool_may_have_another_dtype(dtype: torch.dtype, stored: torch.dtype) -> None:
    inputs = material(6, 176, dtype, dtype, 12)
    pages = pool("kv", "plain", 4, 3, 176, stored)
    want = expected("kv", pages, inputs, record="plain", page_size=3)
    write("kv", pages, inputs, record="plain", page_size=3)
    check_keys(pages, want)


@pytest.mark.parametrize("record", ["plain", "nvfp4"])
def test_rows_without_a_slot_are_stored_nowhere(record: str) -> None:
    inputs = material(3, 512, BF16, BF16, 32)
    inputs["slots"][:] = torch.tensor([-1, -1, -(2**31) + 5])
    pages = pool("kv", record, 1, 32, 512, BF16)
    before = pages.clone()
    write("kv", pages, inputs, record=record, page_size=32)
    assert torch.equal(pages.view(torch.uint8), before.view(torch.uint8))
    write(
        "kv",
        pages,
        {n: v if n in ("norm_weight", "inv_freq") else v[:0] for n, v in inputs.items()},
        record=record,
        page_size=32,
    )
    assert torch.equal(pages.view(torch.uint8), before.view(torch.uint8))


def test_damage_makes_a_key_nan_and_no_other() -> None:
    inputs = material(6, 512, BF16, BF16, 32)
    inputs["slots"] = torch.arange(6)
    clean = pool("kv", "nvfp4", 1, 32, 512, BF16)
    write("kv", clean, inputs, record="nvfp4", page_size=32)
    inputs["x"][1, 300], inputs["x"][4, 500] = torch.nan, torch.inf
    pages = pool("kv", "nvfp4", 1, 32, 512, BF16)
    write("kv", pages, inputs, record="nvfp4", page_size=32)
    before, after = (
        reference_cache.cache_read(p, torch.arange(6), record="nvfp4", page_size=32, dim=512, rope_dim=64)
        for p in (clean, pages)
    )
    assert after[[1, 4]].isnan().all()
    assert torch.equal(after[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_damage_of_a_weight_stays_in_its_block() -> None:
    inputs = material(6, 512, BF16, BF16, 32)
    inputs["norm_weight"][20], inputs["norm_weight"][100] = torch.nan, torch.inf
    inputs["x"] = torch.randn(6, 512, generator=torch.Generator().manual_seed(1)).to(BF16)
    inputs["slots"] = torch.arange(6)
    pages = pool("kv", "nvfp4", 1, 32, 512, BF16)
    write("kv", pages, inputs, record="nvfp4", page_size=32)
    got = reference_cache.cache_read(pages, torch.arange(6), record="nvfp4", page_size=32, dim=512, rope_dim=64)
    damaged = torch.zeros(512, dtype=torch.bool)
    damaged[16:32] = damaged[96:112] = True
    assert got[:, damaged].isnan().all() and got[:, ~damaged].isfinite().all()


# ---- reading -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("record", "dim", "stored", "arch"),
    [
        ("plain", 512, BF16, "sm_90a"),
        ("plain", 176, F32, "sm_100a"),
        ("fp8", 512, BF16, "sm_90a"),
        ("nvfp4", 512, BF16, "sm_90a"),
        ("nvfp4", 320, BF16, "sm_100a"),
        ("fp8", 176, BF16, "sm_90a"),
    ],
)
def test_reading_is_the_reference_s(record: str, dim: int, stored: torch.dtype, arch: str) -> None:
    """Random bytes: all codes, all scales, NaNs among them; slots in any order, repeated, none."""
    g = torch.Generator().manual_seed(dim)
    pages = pool("kv", record, 5, 7, dim, stored)
    pages.view(torch.uint8).random_(0, 256, generator=g)
    slots = torch.randint(0, 35, (23,), generator=g)
    slots[[3, 22]] = -1
    how: dict[str, Any] = dict(record=record, page_size=7, dim=dim, rope_dim=64)
    with simulating(arch, schedule="lazy", checks=sim.Checks(races=True)):
        got = operators.cache_read(pages, slots, **how)
    same_numbers(got, reference_cache.cache_read(pages, slots, **how))
    assert not got[[3, 22]].any()


def same_numbers(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    assert ((got.view(torch.int32) == want.view(torch.int32)) | (got.isnan() & want.isnan())).all()


@pytest.mark.parametrize(("record", "least"), [("fp8", 0.9995), ("nvfp4", 0.994)])
def test_keys_survive_the_round_trip(record: str, least: float) -> None:
    """Through both operators, with inputs that are not contiguous."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(19, 1024, generator=g).to(BF16)[:, 256:768]
    weight, positions = (torch.rand(512, generator=g) + 0.5).to(BF16), torch.arange(19) * 50_000
    slots = torch.stack((torch.randperm(64, generator=g)[:19], torch.zeros(19).long()), dim=1)[:, 0]
    pages = pool("kv", record, 2, 32, 512, BF16)
    with simulating("sm_90a"):
        operators.cache_write(x, weight, positions, table(), pages, slots, eps=EPS, record=record, page_size=32)
        got = operators.cache_read(pages, slots, record=record, page_size=32, dim=512, rope_dim=64)
    same_numbers(got, reference_cache.cache_read(pages, slots, record=record, page_size=32, dim=512, rope_dim=64))
    want = reference_cache.kv_norm_rope(x, weight, positions, table(), eps=EPS)
    assert torch.cosine_similarity(got.double(), want.double(), dim=1).min() >= least


# ---- plans and refusals ------------------------------------------------------------------------------------------------
def test_plans_know_where_bytes_lie() -> None:
    for record, page_size, page_bytes in (("fp8", 64, 37_440), ("fp8", 1, 1_152), ("nvfp4", 32, 12_288), ("nvfp4", 1, 384)):
        key = KeyPlan("kv", record, 512, page_size)
        assert (key.width, key.words, key.lanes, key.nope_lanes, key.page_bytes) == (16, 8, 32, 28, page_bytes)
    assert KeyPlan("kv", "plain", 512, 64, stored="bf16").page_bytes == 65_536
    assert KeyPlan("kv", "plain", 176, 3, stored="f32").page_bytes == 2_112
    assert KeyPlan("kv", "fp8", 176, 3, element="f32").words == 16
    index = KeyPlan("index", "fp4", 128, 64)
    assert (index.width, index.words, index.lanes, index.nope_lanes, index.page_bytes) == (4, 2, 32, 16, 4_608)


def test_choices_take_what_they_are_for() -> None:
    key = KeyPlan("kv", "fp8", 512, 64)
    for rows in (1, 131, 2112, 2113, 8192):
        for config in (WriteConfig.for_shape(rows, key), ReadConfig.for_shape(rows, key)):
            config.check()
            assert -(-rows // config.warps) <= 2112 or config.warps == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kind="query"), "kind must be kv or index, got 'query'"),
        (dict(record="fp4"), r"kv record must be one of \('plain', 'fp8', 'nvfp4'\), got 'fp4'"),
        (dict(kind="index", dim=64), "index keys must have 128 dims, got 64"),
        (dict(dim=64), "keys must have a multiple of 16 dims from 80 to 512, got 64"),
        (dict(dim=520), "keys must have a multiple of 16 dims from 80 to 512, got 520"),
        (dict(page_size=0), "page_size must be positive, got 0"),
        (dict(element="f16"), "element and weight must be bf16 or f32, got 'f16' and 'bf16'"),
        (dict(stored="bf16"), "stored must be bf16 or f32 for plain records, else u8, got 'bf16' for 'fp8'"),
        (dict(record="plain"), "stored must be bf16 or f32 for plain records, else u8, got 'u8' for 'plain'"),
    ],
)
def test_plans_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(KeyPlan("kv", "fp8", 512, 64), **change).check()


def test_bad_arguments_are_refused() -> None:
    inputs = material(3, 512, BF16, BF16, 8)
    pages = pool("kv", "fp8", 2, 4, 512, BF16)
    shifted = torch.zeros(pages.numel() + 8, dtype=torch.uint8)[8:].view_as(pages)
    for change, target, message in (
        (dict(x=inputs["x"].double()), pages, "x must be bfloat16 or float32, got torch.float64"),
        (dict(x=inputs["x"].t()), pages, r"x must be contiguous \(M, c\), got \(512, 3\)"),
        (dict(norm_weight=inputs["norm_weight"][:500]), pages, r"norm_weight must be contiguous \(512,\), got \(500,\)"),
        (dict(positions=inputs["positions"].int()), pages, "positions must be int64, got torch.int32"),
        (dict(slots=inputs["slots"][:2]), pages, r"slots must be contiguous \(3,\), got \(2,\)"),
        (dict(inv_freq=table()[:16]), pages, r"inv_freq must be contiguous \(32,\), got \(16,\)"),
        (dict(inv_freq=table().double()), pages, "inv_freq must be float32, got torch.float64"),
        ({}, pages[:, :-16], r"fp8 pages must be contiguous \(P, 2880\), got \(2, 2864\)"),
        ({}, pages.to(torch.int8), "fp8 pages must be uint8, got torch.int8"),
        ({}, shifted, "pages must begin at a multiple of 16 bytes, got address"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            write("kv", target, inputs | change, record="fp8", page_size=4)
    other = WriteConfig(KeyPlan("kv", "fp8", 512, 8))
    with pytest.raises(ValueError, match=r"config must be for KeyPlan.*page_size=4.*, got KeyPlan.*page_size=8"):
        write("kv", pages, inputs, other, record="fp8", page_size=4)
    with pytest.raises(TypeError, match=r"plain pages must be bfloat16 or float32, got torch\.uint8"):
        write("kv", pages, inputs, record="plain", page_size=4)
    how: dict[str, Any] = dict(record="fp8", page_size=4, dim=512, rope_dim=64)
    for slots, change, message in (
        (inputs["slots"].int(), {}, "slots must be int64, got torch.int32"),
        (inputs["slots"], dict(rope_dim=32), "rope_dim must be 64, got 32"),
        (inputs["slots"], dict(dim=496), r"fp8 pages must be contiguous \(P, 2880\)|got \(2, 2880\)"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            read_keys(pages, slots, **how | change)
    with pytest.raises(ValueError, match="keys to read must be kv keys, got 'index'"):
        ReadConfig(KeyPlan("index", "fp8", 128, 4)).check()
    assert read_keys(pages, inputs["slots"][:0], **how).shape == (0, 512)


def test_operators_say_what_they_do_not_take() -> None:
    refuses = {entry.operation: entry.refuses for entry in operators.ENTRIES}
    inputs = material(3, 512, BF16, BF16, 8)
    names = ("x", "norm_weight", "positions", "inv_freq")
    pages = pool("kv", "fp8", 2, 4, 512, BF16)
    for change, how, message in (
        ({}, {}, None),
        (dict(x=inputs["x"].half()), {}, "x must be bfloat16 or float32, got torch.float16"),
        (dict(x=inputs["x"][:, :72]), {}, "keys must have a multiple of 16 dims from 80 to 512, got 72"),
        (dict(positions=inputs["positions"].int()), {}, "positions must be int64, got torch.int32"),
        (dict(inv_freq=table()[:8]), {}, "inv_freq must be float32 (32,), got torch.float32 (8,)"),
        (dict(slots=inputs["slots"].int()), {}, "slots must be int64, got torch.int32"),
        ({}, dict(record="fp4"), "record must be one of ('plain', 'fp8', 'nvfp4'), got 'fp4'"),
        ({}, dict(record="plain"), "plain pages must be bfloat16 or float32, got torch.uint8"),
    ):
        given = inputs | change
        arguments = (*(given[n] for n in names), pages, given["slots"])
        assert refuses["cache_write"](*arguments, **dict(eps=EPS, record="fp8", page_size=4) | how) == message
    read = refuses["cache_read"]
    how = dict(record="fp8", page_size=4, dim=512, rope_dim=64)
    assert read(pages, inputs["slots"], **how) is None
    assert read(pages, inputs["slots"], **how | dict(rope_dim=32)) == "rope_dim must be 64, got 32"
    assert "pages must be contiguous" in read(pages[:, ::2], inputs["slots"], **how)
    assert {(e.operation, e.arch) for e in operators.ENTRIES} == {
        (o, a) for o in ("cache_write", "cache_read") for a in ("sm_90a", "sm_100a")
    }


# ---- GPU ---------------------------------------------------------------------------------------------------------------
RECORDS = [("kv", 512, "fp8", 64), ("kv", 512, "nvfp4", 64), ("kv", 512, "fp8", 1), ("kv", 512, "nvfp4", 32)]
RECORDS += [("index", 128, "fp8", 32), ("index", 128, "fp4", 32)]


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() for name, value in inputs.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [1, 3, 16, 129, 1024, 2113, 8192])
def test_on_the_gpu(rows: int, seed: int) -> None:
    """Flash's and Pro's keys, which are alike; small batches with one warp a CTA, large ones with eight."""
    for kind, dim, record, page_size in RECORDS:
        for dtype in (BF16, F32):
            num_pages = 2 * rows // page_size + 2
            inputs = material(rows, dim, dtype, BF16, num_pages * page_size, seed)
            plain, pages = (pool(kind, r, num_pages, page_size, dim, dtype) for r in ("plain", record))
            want = expected(kind, plain.cuda(), on_gpu(inputs), record="plain", page_size=page_size).cpu()
            plain, pages = plain.cuda(), pages.cuda()
            write(kind, plain, on_gpu(inputs), record="plain", page_size=page_size)
            write(kind, pages, on_gpu(inputs), record=record, page_size=page_size)
            check_keys(plain.cpu(), want)
            keys = plain.view(-1, dim)[inputs["slots"].clamp(min=0).cuda()].cpu()
            check_bytes(kind, record, pages.cpu(), keys, inputs["slots"], page_size)
            if kind == "kv":
                how: dict[str, Any] = dict(record=record, page_size=page_size, dim=dim, rope_dim=64)
                slots = inputs["slots"].cuda()
                same_numbers(read_keys(pages, slots, **how), reference_cache.cache_read(pages, slots, **how))
                how["record"] = "plain"
                same_numbers(read_keys(plain, slots, **how), reference_cache.cache_read(plain, slots, **how))


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "dim", "record", "page_size"), RECORDS)
def test_a_cuda_graph_replays_with_new_inputs(kind: str, dim: int, record: str, page_size: int) -> None:
    inputs = on_gpu(material(100, dim, BF16, BF16, 128))
    plain, pages = (pool(kind, r, 128 // page_size, page_size, dim, BF16).cuda() for r in ("plain", record))
    for _ in range(2):
        write(kind, plain, inputs, record="plain", page_size=page_size)
        write(kind, pages, inputs, record=record, page_size=page_size)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write(kind, plain, inputs, record="plain", page_size=page_size)
        write(kind, pages, inputs, record=record, page_size=page_size)
    for seed in range(1, 4):
        for name, value in material(100, dim, BF16, BF16, 128, seed).items():
            inputs[name].copy_(value)
        plain.view(torch.uint8).fill_(POISON)
        pages.fill_(POISON)
        graph.replay()
        torch.cuda.synchronize()
        keys = plain.view(-1, dim)[inputs["slots"].clamp(min=0)]
        check_bytes(kind, record, pages.cpu(), keys.cpu(), inputs["slots"].cpu(), page_size)
