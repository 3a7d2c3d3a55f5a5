"""Rotary embedding: frequencies, the rotation pair by pair, its inverse, long positions, and Transformers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dsv4lab.config import ModelConfig, RopeScaling
from dsv4lab.reference import quant
from dsv4lab.reference.rope import inverse_rope, inverse_rope_fp8, inverse_rope_nvfp4, rope, rope_frequencies
from tests.reference.test_cache import table as compress_table

MILLION = 1_000_000


def rotate(x: np.ndarray, positions: list[int], freq: torch.Tensor, sign: int = 1) -> np.ndarray:
    """The rotation in scalar float64, with the model's float32 angle. x (M, H, c)."""
    out, split = x.copy(), x.shape[-1] - 2 * len(freq)
    for m, position in enumerate(positions):
        for i, f in enumerate(freq.tolist()):
            t = sign * float(np.float32(position) * np.float32(f))
            for h in range(x.shape[1]):
                a, b = x[m, h, split + 2 * i], x[m, h, split + 2 * i + 1]
                out[m, h, split + 2 * i] = a * math.cos(t) - b * math.sin(t)
                out[m, h, split + 2 * i + 1] = a * math.sin(t) + b * math.cos(t)
    return out


# ---- frequencies -------------------------------------------------------------------------------------------------------
def test_plain_table() -> None:
    want = [10000.0 ** (-2 * i / 64) for i in range(32)]
    np.testing.assert_allclose(rope_frequencies(rope_dim=64, theta=10000.0, scaling=None).numpy(), want, rtol=1e-6)


def test_yarn_facts_of_the_specification() -> None:
    """Spec 4.2 and 17 item 4: lo 15, hi 25, f_0 = 1, f_31 = 5.6805e-7."""
    table = compress_table()
    unscaled = np.array([160000.0 ** (-2 * i / 64) for i in range(32)])
    ratio = table.double().numpy() / unscaled
    np.testing.assert_allclose(ratio[:16], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[25:], 1 / 16, rtol=1e-6)
    for i in range(16, 25):
        g = 1 - (i - 15) / 10
        assert ratio[i] == pytest.approx(g + (1 - g) / 16, rel=1e-6)
    assert table[0].item() == 1.0
    assert table[31].item() == pytest.approx(5.6805e-7, rel=1e-5)
    assert table.dtype == torch.float32


@pytest.mark.parametrize(
    ("rope_dim", "theta", "scaling"),
    [
        (64, 160000.0, RopeScaling(16.0, 65536, 32.0, 1.0)),
        (32, 160000.0, RopeScaling(16.0, 256, 32.0, 1.0)),  # beta_fast beyond the first pair: lo is held at 0
        (64, 10000.0, RopeScaling(4.0, 4096, 32.0, 1.0)),
        (16, 50.0, RopeScaling(8.0, 1 << 20, 2.0, 1.0)),  # hi held at the last dim
    ],
)
def test_yarn_is_the_formula(rope_dim: int, theta: float, scaling: RopeScaling) -> None:
    def bound(turns: float) -> float:
        return rope_dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    lo = max(math.floor(bound(scaling.beta_fast)), 0)
    hi = min(math.ceil(bound(scaling.beta_slow)), rope_dim - 1)
    got = rope_frequencies(rope_dim=rope_dim, theta=theta, scaling=scaling)
    for i in range(rope_dim // 2):
        f = theta ** (-2 * i / rope_dim)
        g = 1 - min(max((i - lo) / max(hi - lo, 1e-3), 0), 1)
        assert got[i].item() == pytest.approx(f * (g + (1 - g) / scaling.factor), rel=2e-6)


def test_tables_match_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    yarn = dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1)
    theirs = modeling.DeepseekV4RotaryEmbedding(transformers.DeepseekV4Config(rope_parameters=yarn))
    torch.testing.assert_close(compress_table(), theirs.compress_inv_freq, rtol=2e-6, atol=0)
    torch.testing.assert_close(rope_frequencies(rope_dim=64, theta=1e4, scaling=None), theirs.main_inv_freq, rtol=2e-6, atol=0)
    assert theirs.compress_attention_scaling == 1.0


# ---- rotation ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tokens", "heads", "width"), [(5, 3, 64), (3, 2, 512), (7, 1, 70), (0, 4, 128)])
def test_rope_is_the_formula(tokens: int, heads: int, width: int) -> None:
    torch.manual_seed(width)
    x = torch.randn(tokens, heads, width)
    positions = [0, 1, 4095, 65_537, MILLION, 3, 1_048_575][:tokens]
    got = rope(x, torch.tensor(positions, dtype=torch.int64), compress_table())
    np.testing.assert_allclose(got.numpy(), rotate(x.double().numpy(), positions, compress_table()), rtol=0, atol=1e-6)
    assert torch.equal(got[..., : width - 64], x[..., : width - 64])  # the leading dims pass through untouched


def test_bf16_is_rounded_once() -> None:
    torch.manual_seed(0)
    x, positions = torch.randn(4, 2, 128).bfloat16(), [0, 9, 70_000, MILLION]
    want = torch.from_numpy(rotate(x.double().numpy(), positions, compress_table())).to(torch.bfloat16)
    assert torch.equal(rope(x, torch.tensor(positions), compress_table()), want)


def test_the_angle_is_a_float32_product() -> None:
    """At a million the exact angle of some pair differs by a hundredth of a radian: the two give different results."""
    freq = compress_table()
    x = torch.tensor([1.0, 0.0] * 32)[None]
    got = rope(x, torch.tensor([999_983]), freq).double()[0, 0::2]
    product = np.float32(999_983) * freq.numpy()
    exact = 999_983 * freq.double().numpy()
    np.testing.assert_allclose(got.numpy(), np.cos(product.astype(np.float64)), rtol=0, atol=1e-7)
    assert np.abs(np.cos(exact) - got.numpy()).max() > 5e-3


@pytest.mark.parametrize("position", [0, 1, 127, 65_536, MILLION])
def test_inverse_undoes_the_rotation(position: int) -> None:
    torch.manual_seed(position)
    x = torch.randn(3, 5, 512)
    positions = torch.full((3,), position)
    turned = rope(x, positions, compress_table())
    assert position == 0 or (turned - x).abs().max() > 0.1
    torch.testing.assert_close(inverse_rope(turned, positions, compress_table()), x, rtol=0, atol=1e-6)


def test_rotated_products_see_only_the_distance() -> None:
    torch.manual_seed(6)
    q, k = torch.randn(1, 64).double(), torch.randn(1, 64).double()
    freq = torch.tensor([2.0**-i for i in range(32)])  # powers of two: the float32 angles are exact

    def product(a: int, b: int) -> float:
        return (rope(q, torch.tensor([a]), freq) * rope(k, torch.tensor([b]), freq)).sum().item()

    assert product(107, 100) == pytest.approx(product(1007, 1000), abs=1e-9)
    assert abs(product(107, 100) - product(100, 107)) > 1e-3  # and on its sign


def test_rope_matches_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    torch.manual_seed(7)
    x, positions, freq = torch.randn(33, 4, 128), torch.arange(33) * 11, compress_table()
    angle = positions[:, None].float() * freq
    for sign, ours in ((1, rope), (-1, inverse_rope)):
        want = modeling.apply_rotary_pos_emb(x, angle.cos(), sign * angle.sin())
        torch.testing.assert_close(ours(x, positions, freq), want, rtol=0, atol=1e-6)


# ---- quantised outputs -------------------------------------------------------------------------------------------------
def test_inverse_rope_with_quantised_output_is_the_composition() -> None:
    for config in (ModelConfig.flash(), replace(ModelConfig.pro(), head_dim=160)):  # 160: a partial group of 128
        torch.manual_seed(8)
        x = torch.randn(2, config.num_attention_heads, config.head_dim).bfloat16() * 4
        positions = torch.tensor([5, MILLION])
        plain = inverse_rope(x, positions, compress_table())
        codes, scale = inverse_rope_fp8(x, positions, compress_table(), group=128)
        want_codes, want_scale = quant.quantize_fp8_rows(plain, group=128)
        assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
        assert torch.equal(scale.view(torch.uint8), want_scale.view(torch.uint8))
        for given in (None, torch.tensor(0.01)):
            got = inverse_rope_nvfp4(x, positions, compress_table(), global_scale=given)
            for a, b in zip(got, quant.quantize_nvfp4(plain, global_scale=given), strict=True):
                assert a.dtype == b.dtype and torch.equal(a.float(), b.float())
