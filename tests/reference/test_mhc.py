"""Hyper-connections: coefficients and mixing in scalar float64, Sinkhorn's properties, the direction of comb, Transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsv4lab.config import ModelConfig
from dsv4lab.reference import mhc

EPS, HC_EPS, ITERS = 1e-6, 1e-6, 20
KNOBS = dict(eps=EPS, hc_eps=HC_EPS, sinkhorn_iters=ITERS)


def weights(streams: int, dim: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fn, base and scale of a sub-layer."""
    torch.manual_seed(seed)
    n = (2 + streams) * streams
    return torch.randn(n, streams * dim) * (streams * dim) ** -0.5 * spread, torch.randn(n), torch.randn(3) * spread


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def scalar_coefficients(
    x: np.ndarray, fn: np.ndarray, base: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spec 3 for one token, term by term: x (S, D)."""
    s = x.shape[0]
    v = [float(value) for stream in x for value in stream]
    inv = 1 / math.sqrt(sum(value * value for value in v) / len(v) + EPS)
    mix = [sum(w * value for w, value in zip(row, v, strict=True)) * inv for row in fn]
    pre = [sigmoid(mix[j] * scale[0] + base[j]) + HC_EPS for j in range(s)]
    post = [2 * sigmoid(mix[s + j] * scale[1] + base[s + j]) for j in range(s)]
    a = np.zeros((s, s))
    for j in range(s):
        logits = [mix[2 * s + s * j + i] * scale[2] + base[2 * s + s * j + i] for i in range(s)]
        largest = max(logits)
        total = sum(math.exp(v - largest) for v in logits)
        for i in range(s):
            a[j, i] = math.exp(logits[i] - largest) / total + HC_EPS

    def columns() -> None:
        for i in range(s):
            total = sum(a[j, i] for j in range(s)) + HC_EPS
            for j in range(s):
                a[j, i] /= total

    def rows() -> None:
        for j in range(s):
            total = sum(a[j, i] for i in range(s)) + HC_EPS
            for i in range(s):
                a[j, i] /= total

    columns()
    for _ in range(ITERS - 1):
        rows()
        columns()
    return np.array(pre), np.array(post), a


@pytest.mark.parametrize(("tokens", "streams", "dim"), [(5, 4, 33), (1, 2, 7), (9, 3, 16), (0, 4, 8)])
def test_coefficients_are_the_formula(tokens: int, streams: int, dim: int) -> None:
    fn, base, scale = weights(streams, dim, seed=tokens, spread=2.0)
    x = torch.randn(tokens, streams, dim) * 3
    got = mhc.mhc_coefficients(x, fn, base, scale, **KNOBS)
    assert [t.shape for t in got] == [(tokens, streams), (tokens, streams), (tokens, streams, streams)]
    assert all(t.dtype == torch.float32 for t in got)
    for m in range(tokens):
        want = scalar_coefficients(x[m].double().numpy(), fn.double().numpy(), base.double().numpy(), scale.double().numpy())
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a[m].numpy(), b, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("config", [ModelConfig.flash(), ModelConfig.pro()], ids=["flash", "pro"])
def test_model_dimensions_match_transformers(config: ModelConfig) -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    hf = transformers.DeepseekV4Config(hidden_size=config.hidden_size)
    fn, base, scale = weights(config.hc_mult, config.hidden_size, seed=1)
    x = torch.randn(3, config.hc_mult, config.hidden_size)
    theirs = modeling.DeepseekV4HyperConnection(hf)
    theirs.fn.data, theirs.base.data, theirs.scale.data = fn, base, scale
    with torch.no_grad():
        post, comb, collapsed = (t[0] for t in theirs(x[None]))
    knobs = dict(eps=config.rms_norm_eps, hc_eps=config.hc_eps, sinkhorn_iters=config.hc_sinkhorn_iters)
    our_pre, our_post, our_comb = mhc.mhc_coefficients(x, fn, base, scale, **knobs)
    torch.testing.assert_close(our_post, post, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_comb, comb, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mhc.mhc_collapse(x, our_pre), collapsed, rtol=1e-5, atol=1e-5)

    head = modeling.DeepseekV4HyperHead(hf)
    s = config.hc_mult
    head.hc_fn.data, head.hc_base.data, head.hc_scale.data = fn[:s], base[:s], scale[:1]
    norm = modeling.DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        want = norm(head(x[None]))[0]
    got = mhc.mhc_head(x, fn[:s], base[:s], scale[:1], norm.weight, eps=config.rms_norm_eps, hc_eps=config.hc_eps)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ---- Sinkhorn ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("streams", [2, 3, 4])
def test_comb_is_doubly_stochastic(streams: int) -> None:
    torch.manual_seed(streams)
    logits = torch.randn(201, streams, streams) * 0.5  # the steeper the logits, the slower the convergence
    comb = mhc.sinkhorn(logits, iters=ITERS, eps=HC_EPS)
    assert (comb > 0).all()
    assert (comb.sum(-2) - 1).abs().max() < 1e-4 and (comb.sum(-1) - 1).abs().max() < 1e-4
    few = mhc.sinkhorn(logits, iters=1, eps=HC_EPS)
    assert (few.sum(-2) - 1).abs().max() < 1e-4 and (few.sum(-1) - 1).abs().max() > 1e-2  # columns first, rows not yet


def test_coefficient_ranges() -> None:
    """Spec 17 item 5: post in (0, 2), pre in (1e-6, 1 + 1e-6)."""
    fn, base, scale = weights(4, 24, seed=3)
    pre, post, _ = mhc.mhc_coefficients(torch.randn(64, 4, 24), fn, base, scale, **KNOBS)
    assert ((pre > 1e-6) & (pre < 1 + 1e-6)).all() and ((post > 0) & (post < 2)).all()


def test_a_constant_logit_matrix_mixes_evenly() -> None:
    comb = mhc.sinkhorn(torch.full((1, 4, 4), 5.0), iters=ITERS, eps=HC_EPS)
    torch.testing.assert_close(comb, torch.full((1, 4, 4), 0.25, dtype=torch.float64), rtol=0, atol=1e-6)


# ---- collapse and expansion --------------------------------------------------------------------------------------------
def scalar_post(y: np.ndarray, x: np.ndarray, post: np.ndarray, comb: np.ndarray) -> np.ndarray:
    """X'[i] = post[i] y + sum_j comb[j, i] X[j], for one token."""
    return np.array([post[i] * y + sum(comb[j, i] * x[j] for j in range(len(x))) for i in range(len(x))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_post_is_the_formula_and_comb_has_a_direction(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    y, x = torch.randn(6, 29).to(dtype), torch.randn(6, 4, 29).to(dtype)
    post, comb = torch.rand(6, 4) * 2, mhc.sinkhorn(torch.randn(6, 4, 4), iters=ITERS, eps=HC_EPS).float()
    got = mhc.mhc_post(y, x, post, comb)
    want = np.stack([scalar_post(*(t[m].double().numpy() for t in (y, x, post, comb))) for m in range(6)])
    assert got.dtype == dtype
    if dtype == torch.bfloat16:  # rounded once
        assert torch.equal(got, torch.from_numpy(want).to(dtype))
    else:
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-6)
    transposed = mhc.mhc_post(y, x, post, comb.transpose(1, 2))
    assert (got.float() - transposed.float()).abs().max() > 0.1


def test_an_idle_sub_layer_keeps_the_sum_of_the_streams() -> None:
    """Columns over the new index sum to one: with y = 0 mixing loses nothing of the streams' sum."""
    torch.manual_seed(5)
    x = torch.randn(8, 4, 17)
    comb = mhc.sinkhorn(torch.randn(8, 4, 4), iters=200, eps=1e-12).float()
    mixed = mhc.mhc_post(torch.zeros(8, 17), x, torch.ones(8, 4), comb)
    torch.testing.assert_close(mixed.sum(1), x.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pre_is_collapse_then_norm(dtype: torch.dtype) -> None:
    fn, base, scale = weights(4, 31, seed=6)
    x, norm_weight = torch.randn(5, 4, 31).to(dtype), torch.randn(31).to(dtype)
    got, post, comb = mhc.mhc_pre(x, fn, base, scale, norm_weight, **KNOBS)
    pre, want_post, want_comb = mhc.mhc_coefficients(x, fn, base, scale, **KNOBS)
    assert torch.equal(post, want_post) and torch.equal(comb, want_comb)
    u = torch.stack([sum(pre[m, j].double() * x[m, j].double() for j in range(4)) for m in range(5)]).to(dtype)
    want = u.double() / (u.double().square().mean(-1, keepdim=True) + EPS).sqrt() * norm_weight.double()
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=1e-6, atol=1e-6)


def test_post_pre_is_post_then_pre() -> None:
    fn, base, scale = weights(4, 40, seed=7)
    x, y, norm_weight = torch.randn(7, 4, 40).bfloat16(), torch.randn(7, 40).bfloat16(), torch.randn(40)
    _, post, comb = mhc.mhc_pre(x, fn, base, scale, norm_weight, **KNOBS)
    other, other_base, other_scale = weights(4, 40, seed=8)
    got = mhc.mhc_post_pre(y, x, post, comb, other, other_base, other_scale, norm_weight, **KNOBS)
    new = mhc.mhc_post(y, x, post, comb)
    want = (new, *mhc.mhc_pre(new, other, other_base, other_scale, norm_weight, **KNOBS))
    assert len(got) == 4 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["y", "post", "comb", "fn", "base", "scale"])
def test_nothing_is_broadcast(name: str) -> None:
    x, (fn, base, scale) = torch.ones(5, 4, 8), weights(4, 8, seed=1)
    given = dict(y=x[:, 0], streams=x, post=x[..., 0], comb=x[..., :4], fn=fn, base=base, scale=scale, norm_weight=x[0, 0])
    with pytest.raises(ValueError, match=f"{name} must be"):
        mhc.mhc_post_pre(**given | {name: given[name][:1]}, **KNOBS)
    with pytest.raises(ValueError, match=r"scale must be \(1,\)"):
        mhc.mhc_head(x, fn[:4], base[:4], scale[:2], x[0, 0], eps=EPS, hc_eps=HC_EPS)


def test_embed_copies_the_row_into_every_stream() -> None:
    torch.manual_seed(9)
    table, ids = torch.randn(11, 6).bfloat16(), torch.tensor([3, 0, 10, 3])
    got = mhc.embed_streams(ids, table, num_streams=4)
    assert got.shape == (4, 4, 6) and got.dtype == torch.bfloat16
    assert all(torch.equal(got[m, j], table[ids[m]]) for m in range(4) for j in range(4))
    got[0, 0] = 0  # streams are copies, not views of one row
    assert torch.equal(got[0, 1], table[3])


def test_a_token_does_not_depend_on_its_batch() -> None:
    fn, base, scale = weights(4, 96, seed=10)
    x, y, norm_weight = torch.randn(41, 4, 96).bfloat16(), torch.randn(41, 96).bfloat16(), torch.randn(96)
    _, post, comb = mhc.mhc_pre(x, fn, base, scale, norm_weight, **KNOBS)
    together = mhc.mhc_post_pre(y, x, post, comb, fn, base, scale, norm_weight, **KNOBS)
    for start, stop in [(0, 1), (1, 10), (10, 21), (21, 41)]:
        part = slice(start, stop)
        alone = mhc.mhc_post_pre(y[part], x[part], post[part], comb[part], fn, base, scale, norm_weight, **KNOBS)
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, together, strict=True))
