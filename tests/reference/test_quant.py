"""Bit-exactness of the number formats, against the rule written again in numpy: exact arithmetic over the whole grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsv4lab.formats import (
    FORMATS,
    FP8_BLOCK,
    PackedWeight,
    atom128x4_offset,
    from_atom128x4,
    to_atom128x4,
)
from dsv4lab.reference import quant

E2M1_GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float64)
E4M3_GRID = np.array(
    [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
)


def nearest_even(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Index of the grid value nearest to |x|; ties go to the even index; beyond the end, the end. Float64 is exact here."""
    magnitude = np.minimum(np.abs(x.astype(np.float64)), grid[-1])[:, None]
    distance = np.abs(magnitude - grid)
    best = distance.min(axis=1, keepdims=True)
    order = np.where(np.arange(len(grid)) % 2 == 0, 0, 1)
    return np.argmin(np.where(distance == best, order, 2), axis=1)


def all_bf16() -> torch.Tensor:
    """Every bf16 bit pattern, NaNs and infinities included."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def power_of_two_scale(amax: float, max_code: float) -> float:
    """2^ceil(log2(amax / max_code)) by exact rational arithmetic."""
    exponent = math.frexp(amax)[1] - math.frexp(max_code)[1] - 2
    while max_code * 2.0**exponent < amax:
        exponent += 1
    return 2.0**exponent


def to_f32(x: np.ndarray) -> np.ndarray:
    """The largest codes of the block of an infinity decode past float32."""
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


def as_bytes(t: torch.Tensor) -> np.ndarray:
    """Raw bytes, with a trailing dim for wider dtypes."""
    return t.reshape(-1).view(torch.uint8).reshape(*t.shape, *(() if t.element_size() == 1 else (t.element_size(),))).numpy()


# ---- elements --------------------------------------------------------------------------------------------------------
def test_e2m1_decodes_every_code_and_the_spec_bytes() -> None:
    got = quant.decode_e2m1(torch.arange(16, dtype=torch.uint8))
    assert got.tolist() == [*E2M1_GRID.tolist(), *(-E2M1_GRID).tolist()]
    assert torch.signbit(got)[8:].all()
    pairs = quant.decode_e2m1(quant.unpack_e2m1(torch.tensor([0x72, 0x9C], dtype=torch.uint8)))
    assert pairs.tolist() == [1.0, 6.0, -2.0, -0.5]  # low nibble first (spec 17.2)


def test_e2m1_encodes_every_bf16_and_every_neighbour_of_a_midpoint() -> None:
    midpoints = torch.tensor([m for m, _ in quant._E2M1_MIDPOINTS])
    near = torch.cat([midpoints, *(torch.nextafter(midpoints, torch.tensor(t)) for t in (0.0, 9.0))])
    x = torch.cat([all_bf16().float(), near, -near])
    finite = x[~x.isnan()]
    want = nearest_even(finite.numpy(), E2M1_GRID) + 8 * np.signbit(finite.numpy())
    assert np.array_equal(quant.encode_e2m1(finite).numpy(), want)
    assert (quant.encode_e2m1(x[x.isnan()]) & 7 == 7).all()


def test_e2m1_packing_round_trips_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    codes = quant.unpack_e2m1(packed)
    assert torch.equal(quant.pack_e2m1(codes), packed)
    assert torch.equal(quant.unpack_e2m1(packed.view(torch.int8)), codes)
    assert torch.equal(quant.encode_e2m1(quant.decode_e2m1(codes)), codes)
    with pytest.raises(ValueError, match=r"even last dim.*K=3"):
        quant.pack_e2m1(codes[..., :3])


def test_e4m3_encodes_every_bf16_and_decodes_every_code() -> None:
    x = all_bf16()
    finite = x[~x.isnan()]
    want = nearest_even(finite.float().numpy(), E4M3_GRID) + 128 * np.signbit(finite.float().numpy())
    assert np.array_equal(as_bytes(quant.encode_e4m3(finite)), want)
    assert quant.encode_e4m3(x[x.isnan()]).float().isnan().all()
    codes = torch.arange(256, dtype=torch.uint8)
    decoded = quant.decode_e4m3(codes.view(torch.float8_e4m3fn)).numpy()
    assert np.array_equal(decoded[:127], E4M3_GRID.astype(np.float32)) and np.array_equal(decoded[128:255], -decoded[:127])
    assert np.isnan(decoded[[127, 255]]).all()


def test_e8m0_decodes_every_byte() -> None:
    got = quant.decode_e8m0(torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu))
    assert got[:255].tolist() == [2.0 ** (b - 127) for b in range(255)] and got[255].isnan()
    assert got[127] == 1.0 and got[120] == 2.0**-7


@pytest.mark.parametrize("max_code", [6.0, 448.0])
def test_e8m0_scale_of_every_bf16_amax_and_its_float32_neighbours(max_code: float) -> None:
    amax = all_bf16()[:0x7F80].float()
    amax = torch.cat([amax, torch.nextafter(amax, torch.tensor(0.0)), torch.nextafter(amax, torch.tensor(3e38))])
    amax = amax[amax >= max_code * 2.0**-124]
    got = quant.decode_e8m0(quant.encode_e8m0_ceil(amax, max_code)).tolist()
    assert got == [power_of_two_scale(a, max_code) for a in amax.tolist()]
    special = quant.encode_e8m0_ceil(torch.tensor([math.inf, math.nan]), max_code).view(torch.uint8).tolist()
    assert special == [int(math.log2(power_of_two_scale(torch.finfo(torch.float32).max, max_code))) + 127, 255]


# ---- block formats ---------------------------------------------------------------------------------------------------
def numpy_rows(x: np.ndarray, group: int, max_code: float, floor: float, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes (sign in the top bit of the grid's width) and scale bytes of a power-of-two scaled format."""
    sign_bit = 8 if len(grid) == 8 else 128
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros((x.shape[0], -(-x.shape[1] // group)), np.uint8)
    for r in range(x.shape[0]):
        for g in range(scales.shape[1]):
            part = x[r, g * group : (g + 1) * group].astype(np.float64)
            amax = min(max(float(np.abs(part).max()), floor), float(np.finfo(np.float32).max))
            s = power_of_two_scale(amax, max_code)
            scales[r, g] = int(math.log2(s)) + 127
            codes[r, g * group : (g + 1) * group] = nearest_even(part / s, grid) + sign_bit * np.signbit(part)
    return codes, scales


def wide_random(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Values of very different sizes by block, with zero blocks, denormals, negative zeros, exact ties and infinities."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g)
    x *= 2.0 ** torch.randint(-30, 30, (rows, columns // 16 + 1), generator=g).repeat_interleave(16, 1)[:, :columns].float()
    x[0, :32] = 0.0
    x[1, :64] = 1e-41
    x[2, :16] = -0.0
    x[3, :32] = torch.tensor([6.0, -5.0, 2.5, 0.25] * 8)
    x[4, 5] = math.inf
    x[4, 37] = -math.inf
    return x.to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_matches_the_rule(dtype: torch.dtype) -> None:
    x = wide_random(11, 96, seed=0).to(dtype)
    codes, scale = quant.quantize_mxfp4(x)
    want_codes, want_scale = numpy_rows(x.float().numpy(), 32, 6.0, 6 * 2.0**-126, E2M1_GRID)
    assert np.array_equal(quant.unpack_e2m1(codes).numpy(), want_codes)
    assert np.array_equal(as_bytes(scale), want_scale)
    back = quant.dequantize_mxfp4(codes, scale).numpy()
    values = E2M1_GRID[want_codes & 7] * np.where(want_codes & 8, -1.0, 1.0)
    assert np.array_equal(back, to_f32(values * 2.0 ** (want_scale.repeat(32, 1).astype(np.float64) - 127)))


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("columns", [256, 200, 64])
def test_fp8_rows_match_the_rule(group: int, columns: int) -> None:
    x = wide_random(9, columns, seed=group + columns)
    codes, scale = quant.quantize_fp8_rows(x, group=group)
    want_codes, want_scale = numpy_rows(x.float().numpy(), group, 448.0, float(np.float32(1e-4)), E4M3_GRID)
    assert np.array_equal(as_bytes(codes), want_codes) and np.array_equal(as_bytes(scale), want_scale)
    back = quant.dequantize_fp8_rows(codes, scale, group=group).numpy()
    values = E4M3_GRID[want_codes & 127] * np.where(want_codes & 128, -1.0, 1.0)
    factor = 2.0 ** (want_scale.repeat(group, 1)[:, :columns].astype(np.float64) - 127)
    assert np.array_equal(back, to_f32(values * factor))


def test_fp8_row_scales_of_the_spec() -> None:
    x = torch.zeros(3, 128)
    x[0, 3], x[1, 3] = 448.0, 449.0
    assert quant.decode_e8m0(quant.quantize_fp8_rows(x, group=128)[1]).flatten().tolist() == [1.0, 2.0, 2.0**-22]


@pytest.mark.parametrize("shape", [(256, 128), (130, 300), (5, 64)])
def test_fp8_blocks_match_the_rule(shape: tuple[int, int]) -> None:
    w = wide_random(*shape, seed=shape[0])
    w[4] = w[4].nan_to_num(posinf=3.0, neginf=-3.0)
    codes, scale = quant.quantize_fp8_blocks(w)
    assert scale.shape == FP8_BLOCK.scale_shape(*shape)
    back = quant.dequantize_fp8_blocks(codes, scale)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            part = w[at].float().numpy().reshape(1, -1)
            want_codes, want_scale = numpy_rows(part, part.shape[1], 448.0, float(np.float32(1e-4)), E4M3_GRID)
            assert np.array_equal(as_bytes(codes[at]).ravel(), want_codes.ravel())
            assert as_bytes(scale[i : i + 1, j : j + 1]).ravel()[0] == want_scale[0, 0]
            s = 2.0 ** (int(want_scale[0, 0]) - 127)
            assert torch.equal(back[at], codes[at].float() * s)
            loose = PackedWeight(FP8_BLOCK, codes, quant.decode_e8m0(scale) * 1.25)  # Base releases: float32 scales
            assert torch.equal(quant.dequantize(loose)[at], codes[at].float() * (1.25 * s))


def numpy_nvfp4(x: np.ndarray, global_scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Codes and block scale bytes: float32 arithmetic where the rule says so, brute force for the two roundings."""
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros((x.shape[0], x.shape[1] // 16), np.uint8)
    top = np.finfo(np.float32).max
    for r in range(x.shape[0]):
        for g in range(scales.shape[1]):
            part = x[r, 16 * g : 16 * g + 16]
            with np.errstate(over="ignore"):
                ratio = min(np.abs(part).max(), top) / (np.float32(6) * global_scale)
            ratio = np.float32(1) if ratio == 0 else max(ratio, np.float32(2.0**-9))
            scales[r, g] = nearest_even(np.array([ratio]), E4M3_GRID)[0]
            step = E4M3_GRID[scales[r, g]].astype(np.float32) * global_scale
            codes[r, 16 * g : 16 * g + 16] = nearest_even(part / step, E2M1_GRID) + 8 * np.signbit(part)
    return codes, scales


@pytest.mark.parametrize("given", [None, 0.37, 2.0**-20, 1e-30])
def test_nvfp4_matches_the_rule(given: float | None) -> None:
    x = wide_random(11, 80, seed=3)
    if given is None:
        x[4] = x[4].nan_to_num(posinf=3.0, neginf=-3.0)
    codes, scale, global_scale = quant.quantize_nvfp4(x, global_scale=None if given is None else torch.tensor(given))
    if given is None:
        assert global_scale == x.float().abs().max() / 2688
    want_codes, want_scale = numpy_nvfp4(x.float().numpy(), np.float32(global_scale.item()))
    assert np.array_equal(quant.unpack_e2m1(codes).numpy(), want_codes)
    assert np.array_equal(as_bytes(scale), want_scale)
    values = (E2M1_GRID[want_codes & 7] * np.where(want_codes & 8, -1.0, 1.0) * E4M3_GRID[want_scale].repeat(16, 1)).astype(
        np.float32
    )
    assert np.array_equal(quant.dequantize_nvfp4(codes, scale, global_scale).numpy(), values * np.float32(global_scale.item()))


def test_nvfp4_zero_matrix_and_zero_blocks() -> None:
    codes, scale, global_scale = quant.quantize_nvfp4(torch.zeros(3, 32))
    assert global_scale == 1 and (scale.float() == 1).all() and not codes.any()
    x = torch.zeros(2, 32)
    x[0, 0], x[1, 16] = 6 * 448.0, 1e-3
    codes, scale, global_scale = quant.quantize_nvfp4(x)
    assert global_scale == 1 and scale.float().tolist() == [[448.0, 1.0], [1.0, 2.0**-9]]


def test_infinities_saturate_and_nan_stays_in_its_block() -> None:
    x = torch.full((2, 64), 6.0)
    x[0, 3], x[1, 60] = -math.inf, math.nan
    scale = torch.tensor(1.0)
    back = quant.dequantize_nvfp4(*quant.quantize_nvfp4(x, global_scale=scale))
    assert back[0, 3] == -6 * 448 and (back[0, 16:] == 6).all()
    assert back[1, 48:].isnan().all() and (back[1, :48] == 6).all()
    assert torch.isfinite(quant.quantize_nvfp4(x)[2])
    mx, rows = quant.fake_mxfp4(x), quant.fake_fp8_rows(x, group=32)
    for got in (mx, rows):
        assert not got[0].isnan().any() and got[0, 3] < -1e38 and (got[0, 32:] == 6).all()
        assert got[1, 32:].isnan().all() and (got[1, :32] == 6).all()


def test_a_row_s_scale_comes_from_its_numbers() -> None:
    x = torch.tensor([[1.0, -2.0], [math.nan, -4.0], [0.0, -0.0], [math.inf, 1.0], [math.nan, math.nan]]).bfloat16()
    want = torch.tensor([2.0, 4.0, 2688.0, torch.finfo(torch.float32).max, 2688.0]) / torch.tensor(2688.0)
    assert torch.equal(quant.nvfp4_row_scale(x), want)


def test_code_times_block_scale_is_exact_in_bf16() -> None:
    codes = quant.decode_e2m1(torch.arange(16, dtype=torch.uint8))
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    product = codes[:, None] * e4m3
    assert torch.equal(product.bfloat16().float(), product)
    assert not torch.equal(product.to(torch.float8_e4m3fn).float(), product)  # and FP8 would not hold it
    e8m0 = quant.decode_e8m0(torch.arange(2, 250, dtype=torch.uint8).view(torch.float8_e8m0fnu))
    for values in (codes, e4m3):
        product = values[:, None] * e8m0
        product = product[(product.abs() < 3e38) & (product.abs() >= 2.0**-120)]
        assert torch.equal(product.bfloat16().float(), product)


# ---- whole matrices --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_quantize_round_trips_and_stacks(name: str, leading: tuple[int, ...]) -> None:
    w = torch.randn(*leading, 7, 96, generator=torch.Generator().manual_seed(1))
    packed = quant.quantize(w, name)
    back = quant.dequantize(packed)
    assert packed.shape == back.shape == w.shape and back.dtype == torch.float32
    assert packed.codes.dtype == FORMATS[name].code_dtype
    shape = FORMATS[name].scale_shape(7, 96)
    assert (packed.scale is None) if shape is None else (packed.scale is not None and packed.scale.shape == (*leading, *shape))
    bound = {"f32": 0.0, "bf16": 2**-9, "nvfp4": 0.2, "mxfp4": 0.25, "fp8_block": 0.05, "fp8_row": 0.05}[name]
    assert ((back - w).norm() / w.norm()).item() <= bound
    if leading:
        for index in np.ndindex(*leading):
            alone = quant.quantize(w[index], name)
            for part, tensor in alone.tensors().items():
                assert np.array_equal(as_bytes(packed.tensors()[part][index]), as_bytes(tensor))
    again = quant.quantize(back, name, global_scale=packed.global_scale)  # values on the grid survive
    assert torch.equal(quant.dequantize(again), back)


def test_fake_quantisation_keeps_the_dtype_and_rejects_bad_k() -> None:
    x = torch.randn(5, 64).bfloat16()
    for fake in (quant.fake_mxfp4, quant.fake_nvfp4, lambda t: quant.fake_fp8_rows(t, group=64)):
        assert fake(x).dtype == torch.bfloat16 and not torch.equal(fake(x), x)
        assert fake(x[:0]).shape == (0, 64)
    with pytest.raises(ValueError, match=r"K % 32 == 0, got K=48"):
        quant.quantize_mxfp4(torch.zeros(2, 48))
    with pytest.raises(ValueError, match=r"K % 16 == 0, got K=8"):
        quant.quantize_nvfp4(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="nvfp4 weight must have a scale"):
        quant.dequantize(PackedWeight(FORMATS["nvfp4"], torch.zeros(2, 8, dtype=torch.uint8)))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_runs_on_meta(name: str) -> None:
    packed = quant.quantize(torch.empty(2, 130, 96, device="meta"), name)
    real = quant.quantize(torch.zeros(2, 130, 96), name)
    assert {k: (t.shape, t.dtype) for k, t in packed.tensors().items()} == {
        k: (t.shape, t.dtype) for k, t in real.tensors().items()
    }
    assert quant.dequantize(packed).shape == (2, 130, 96)


# ---- scale layouts ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(128, 4), (300, 9), (1, 1), (2, 257, 13), (0, 4)])
def test_atom128x4_round_trips_and_places_every_scale(shape: tuple[int, ...]) -> None:
    scale = torch.randint(0, 127, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    tiles = to_atom128x4(scale)
    rows, columns = shape[-2:]
    assert tiles.dtype == scale.dtype and tiles.shape == (*shape[:-2], -(-rows // 128), -(-columns // 4), 512)
    back = from_atom128x4(tiles, rows, columns)
    assert back.dtype == scale.dtype and np.array_equal(as_bytes(back), as_bytes(scale))
    flat, linear = as_bytes(tiles).reshape(*shape[:-2], -1), as_bytes(scale)
    for r in range(rows):
        for c in range(columns):
            in_tile = (r % 128 % 32) * 16 + (r % 128 // 32) * 4 + c % 4
            want = ((r // 128) * math.ceil(columns / 4) + c // 4) * 512 + in_tile
            assert atom128x4_offset(r, c, columns) == want
            assert np.array_equal(flat[..., want], linear[..., r, c])
    assert int((flat != 0).sum()) == int((linear != 0).sum())  # padding is zero


def test_atom128x4_rejects() -> None:
    with pytest.raises(TypeError, match="one-byte dtype"):
        to_atom128x4(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="129x4 scale must have shape"):
        from_atom128x4(torch.zeros(1, 1, 512, dtype=torch.uint8), 129, 4)
