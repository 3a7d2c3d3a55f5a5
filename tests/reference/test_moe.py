"""Mixture of experts: routers, clamps, weights before w2, empty experts, scalar float64 and Transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsv4lab.config import ModelConfig
from dsv4lab.reference import moe, quant

MODELS = [ModelConfig.flash(), ModelConfig.pro()]
LIMIT = 10.0


def scalar_score(logit: float) -> float:
    """sqrt(log(1 + e^x)), stable on both sides."""
    return math.sqrt(max(logit, 0.0) + math.log1p(math.exp(-abs(logit))))


def silu(v: float) -> float:
    return v / (1 + math.exp(-v)) if v > -700 else 0.0


# ---- routers -----------------------------------------------------------------------------------------------------------
def test_scores_are_the_formula_also_far_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 33) * torch.tensor([[0.1], [1], [30], [300], [1]])
    gate = torch.randn(17, 33)
    gate[3] = x[4] / x[4].square().sum() * -200  # a logit of -200: softplus is e^-200, not 0
    got = moe.router_scores(x, gate)
    logits = [[float(np.dot(a, b)) for b in gate.double().numpy()] for a in x.double().numpy()]
    want = [[scalar_score(v) for v in row] for row in logits]
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got[:3].numpy(), want[:3], rtol=1e-4, atol=1e-30)
    assert torch.isfinite(got).all() and got[4, 3].item() == pytest.approx(math.exp(-100), rel=1e-3)


@pytest.mark.parametrize("config", MODELS, ids=["flash", "pro"])
def test_router_topk_is_the_formula(config: ModelConfig) -> None:
    torch.manual_seed(1)
    experts, k, route_scale = config.n_routed_experts, config.num_experts_per_tok, config.routed_scaling_factor
    x, gate, bias = torch.randn(9, 64).bfloat16(), torch.randn(experts, 64).bfloat16(), torch.randn(experts)
    weights, idx = moe.router_topk(x, gate, bias, top_k=k, route_scale=route_scale)
    assert weights.dtype == torch.float32 and idx.dtype == torch.int64
    for m in range(9):
        scores = [scalar_score(float(np.dot(x[m].double().numpy(), g))) for g in gate.double().numpy()]
        best = sorted(range(experts), key=lambda e: -(scores[e] + bias[e].item()))[:k]
        assert idx[m].tolist() == best
        total = sum(scores[e] for e in best)
        np.testing.assert_allclose(weights[m].numpy(), [scores[e] / total * route_scale for e in best], rtol=1e-5)
    torch.testing.assert_close(weights.sum(1), torch.full((9,), route_scale))


def test_bias_chooses_but_does_not_weigh() -> None:
    torch.manual_seed(2)
    x, gate = torch.randn(6, 20), torch.randn(8, 20)
    bias = torch.zeros(8)
    bias[5] = 1e3
    weights, idx = moe.router_topk(x, gate, bias, top_k=3, route_scale=1.0)
    scores = moe.router_scores(x, gate)
    assert (idx[:, 0] == 5).all()
    chosen = scores.gather(1, idx)
    torch.testing.assert_close(weights, chosen / chosen.sum(1, keepdim=True))
    bias[5] = -1e3
    assert not (moe.router_topk(x, gate, bias, top_k=7, route_scale=1.0)[1] == 5).any()


def test_ties_go_to_the_lower_expert() -> None:
    x = torch.ones(2, 4)
    gate = torch.zeros(9, 4)  # every score is the same
    weights, idx = moe.router_topk(x, gate, torch.zeros(9), top_k=4, route_scale=2.5)
    assert idx.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(weights, torch.full((2, 4), 2.5 / 4))
    bias = torch.tensor([0.0, 1, 0, 1, 0, 0, 2, 0, 1])
    assert moe.router_topk(x, gate, bias, top_k=5, route_scale=1.0)[1].tolist() == [[6, 1, 3, 8, 0]] * 2


@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64])
def test_hash_router_looks_up_and_weighs_by_the_learned_score(table_dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, gate = torch.randn(7, 24).bfloat16(), torch.randn(11, 24).bfloat16()
    table = torch.stack([torch.randperm(11)[:4] for _ in range(50)]).to(table_dtype)
    ids = torch.tensor([0, 49, 3, 3, 17, 20, 1])
    weights, idx = moe.router_hash(x, gate, table, ids, route_scale=1.5)
    assert idx.dtype == torch.int64 and torch.equal(idx, table[ids].long())
    for m in range(7):
        scores = [scalar_score(float(np.dot(x[m].double().numpy(), gate[e].double().numpy()))) for e in idx[m].tolist()]
        np.testing.assert_allclose(weights[m].numpy(), [s / sum(scores) * 1.5 for s in scores], rtol=1e-5)
    assert not torch.equal(weights[2], weights[3]), "one token id, two inputs: same experts, other weights"


@pytest.mark.parametrize("config", MODELS, ids=["flash", "pro"])
def test_routers_match_transformers(config: ModelConfig) -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    torch.manual_seed(4)
    knobs = dict(route_scale=config.routed_scaling_factor)
    hf = transformers.DeepseekV4Config(
        hidden_size=config.hidden_size,
        n_routed_experts=config.n_routed_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        routed_scaling_factor=config.routed_scaling_factor,
        vocab_size=40,
    )
    x, ids = torch.randn(6, config.hidden_size), torch.randint(0, 40, (6,))
    score, by_token = modeling.DeepseekV4TopKRouter(hf), modeling.DeepseekV4HashRouter(hf)
    gate = torch.randn(config.n_routed_experts, config.hidden_size) * config.hidden_size**-0.5
    score.weight.data = by_token.weight.data = gate
    score.e_score_correction_bias.normal_(std=0.1)
    by_token.tid2eid = torch.stack([torch.randperm(config.n_routed_experts)[: config.num_experts_per_tok] for _ in range(40)])
    with torch.no_grad():
        _, want, want_idx = score(x)
        _, want_hash, want_hash_idx = by_token(x, ids)
    got, idx = moe.router_topk(x, gate, score.e_score_correction_bias, top_k=config.num_experts_per_tok, **knobs)
    ours, theirs = idx.sort(1), want_idx.sort(1)
    assert torch.equal(ours.values, theirs.values)
    torch.testing.assert_close(got.gather(1, ours.indices), want.gather(1, theirs.indices), rtol=1e-5, atol=1e-6)
    got, idx = moe.router_hash(x, gate, by_token.tid2eid, ids, **knobs)
    assert torch.equal(idx, want_hash_idx)
    torch.testing.assert_close(got, want_hash, rtol=1e-5, atol=1e-6)


# ---- experts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("gate", "up", "want"),
    [
        (1.0, 2.0, silu(1.0) * 2),
        (50.0, 1.0, silu(10.0)),  # the gate is held from above ...
        (-50.0, 1.0, silu(-50.0)),  # ... and only from above
        (1.0, 50.0, silu(1.0) * 10),  # up on both sides
        (1.0, -50.0, silu(1.0) * -10),
        (10.0, 10.0, silu(10.0) * 10),
        (-1e4, 5.0, 0.0),
    ],
)
def test_clamps(gate: float, up: float, want: float) -> None:
    got = moe.clamped_swiglu(torch.tensor([gate]), torch.tensor([up]), limit=LIMIT)
    assert got.dtype == torch.float64 and got.item() == pytest.approx(want, rel=1e-12, abs=1e-300)


def scalar_expert(x: np.ndarray, w1: np.ndarray, w3: np.ndarray, w2: np.ndarray, weight: float) -> np.ndarray:
    """Spec 5.2 for one token, no rounding in between."""
    hidden = []
    for a, b in zip(w1, w3, strict=True):
        gate, up = min(float(np.dot(a, x)), LIMIT), min(max(float(np.dot(b, x)), -LIMIT), LIMIT)
        hidden.append(silu(gate) * up * weight)
    return w2 @ np.array(hidden)


def stacked(experts: int, width: int, inner: int, fmt: str, seed: int) -> tuple[quant.PackedWeight, ...]:
    torch.manual_seed(seed)
    shapes = [(experts, inner, width), (experts, inner, width), (experts, width, inner)]
    return tuple(quant.quantize(torch.randn(s) * s[-1] ** -0.5 * 3, fmt) for s in shapes)


@pytest.mark.parametrize("fmt", ["f32", "bf16", "mxfp4", "nvfp4", "fp8_block", "fp8_row"])
def test_routed_experts_are_the_formula_in_every_format(fmt: str) -> None:
    w1, w3, w2 = stacked(6, 64, 96, fmt, seed=5)
    x, weights = torch.randn(7, 64) * 4, torch.rand(7, 3)
    idx = torch.stack([torch.randperm(5)[:3] for _ in range(7)])  # expert 5 gets no token
    idx[idx == 2] = 0  # nor does expert 2, and some rows name one expert twice
    got = moe.moe(x, weights, idx, w1, w3, w2, limit=LIMIT, act="none")
    dense = [quant.dequantize(w).double().numpy() for w in (w1, w3, w2)]
    assert got.dtype == torch.float32
    for m in range(7):
        want = sum(
            scalar_expert(x[m].double().numpy(), *(w[e] for w in dense), weight)
            for e, weight in zip(idx[m].tolist(), weights[m].tolist(), strict=True)
        )
        np.testing.assert_allclose(got[m].numpy(), want, rtol=1e-5, atol=1e-4)


def test_the_clamp_acts_inside_an_expert() -> None:
    w1, w3, w2 = (w[0] for w in stacked(1, 64, 32, "f32", seed=6))
    x = torch.randn(4, 64) * 10
    held, free = (moe.expert(x, w1, w3, w2, limit=limit, act="none") for limit in (LIMIT, 1e9))
    assert (held - free).abs().max() > 1
    want = np.stack([scalar_expert(r, *(w.codes.double().numpy() for w in (w1, w3, w2)), 1.0) for r in x.double().numpy()])
    np.testing.assert_allclose(held.numpy(), want, rtol=1e-5, atol=1e-4)


def test_the_weight_enters_before_w2_and_its_quantisation() -> None:
    """REF's order (spec 5.3): scales are powers of two, so a weight of 0.75 before rounding is not 0.75 after it."""
    w1, w3, w2 = (w[0] for w in stacked(1, 128, 128, "fp8_block", seed=7))
    x = torch.randn(5, 128).bfloat16()
    row_weight = torch.full((5,), 0.75)
    got = moe.expert(x, w1, w3, w2, limit=LIMIT, act="fp8", row_weight=row_weight)
    inputs = quant.fake_fp8_rows(x, group=128).double()
    gate, up = ((inputs @ quant.dequantize(w).double().t()).float().bfloat16().double() for w in (w1, w3))
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    hidden = (gate / (1 + (-gate).exp()) * up * 0.75).bfloat16()
    want = (quant.fake_fp8_rows(hidden, group=128).double() @ quant.dequantize(w2).double().t()).float().bfloat16()
    assert torch.equal(got, want)
    after = (moe.expert(x, w1, w3, w2, limit=LIMIT, act="fp8").float() * 0.75).bfloat16()
    assert not torch.equal(got, after)


@pytest.mark.parametrize("config", MODELS, ids=["flash", "pro"])
def test_block_matches_transformers(config: ModelConfig) -> None:
    """Routed and shared experts together, at the models' count of choices and clamp."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    hf = transformers.DeepseekV4Config(
        hidden_size=96,
        moe_intermediate_size=40,
        n_routed_experts=12,
        num_experts_per_tok=config.num_experts_per_tok,
        routed_scaling_factor=config.routed_scaling_factor,
        num_hidden_layers=1,
        mlp_layer_types=["moe"],
    )
    torch.manual_seed(8)
    theirs = modeling.DeepseekV4SparseMoeBlock(hf, 0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.4)
    x = torch.randn(11, 96) * 2
    with torch.no_grad():
        want = theirs(x[None])[0]
    weights, idx = moe.router_topk(
        x, theirs.gate.weight.data, torch.zeros(12), top_k=config.num_experts_per_tok, route_scale=config.routed_scaling_factor
    )
    w1, w3 = (quant.quantize(part.data, "f32") for part in theirs.experts.gate_up_proj.chunk(2, dim=1))
    routed = moe.moe(
        x, weights, idx, w1, w3, quant.quantize(theirs.experts.down_proj.data, "f32"), limit=config.swiglu_limit, act="none"
    )
    s = theirs.shared_experts
    parts = [quant.quantize(m.weight.data, "f32") for m in (s.gate_proj, s.up_proj, s.down_proj)]
    got = moe.moe_combine(routed, moe.expert(x, *parts, limit=config.swiglu_limit, act="none"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


# ---- combination, batches ----------------------------------------------------------------------------------------------
def test_combine_rounds_once() -> None:
    torch.manual_seed(9)
    routed, shared = torch.randn(6, 50), torch.randn(6, 50).bfloat16()
    got = moe.moe_combine(routed, shared)
    assert got.dtype == torch.bfloat16 and torch.equal(got, (routed + shared.float()).bfloat16())
    assert not torch.equal(got, routed.bfloat16() + shared)


@pytest.mark.parametrize("act", ["none", "fp8", "nvfp4"])
def test_a_token_does_not_depend_on_its_batch(act: str) -> None:
    w1, w3, w2 = stacked(4, 64, 48, "nvfp4", seed=10)
    x, gate, bias = torch.randn(40, 64).bfloat16(), torch.randn(4, 64), torch.randn(4)

    def run(rows: torch.Tensor) -> torch.Tensor:
        weights, idx = moe.router_topk(rows, gate, bias, top_k=2, route_scale=2.5)
        return moe.moe(rows, weights, idx, w1, w3, w2, limit=LIMIT, act=act)

    together = run(x)
    for start, stop in [(0, 1), (1, 2), (2, 11), (11, 22), (22, 40)]:
        assert torch.equal(run(x[start:stop]), together[start:stop])


def test_no_token() -> None:
    w1, w3, w2 = stacked(3, 64, 32, "mxfp4", seed=11)
    x = torch.empty(0, 64)
    weights, idx = moe.router_topk(x, torch.randn(3, 64), torch.zeros(3), top_k=2, route_scale=1.0)
    assert weights.shape == idx.shape == (0, 2)
    assert moe.moe(x, weights, idx, w1, w3, w2, limit=LIMIT, act="none").shape == (0, 64)


def test_swiglu_weighs_rows_rounds_once_and_is_quantised() -> None:
    g = torch.Generator().manual_seed(8)
    gate, up = (torch.randn(5, 160, generator=g).bfloat16() * 8 for _ in range(2))
    weight = torch.rand(5, generator=g)
    exact = moe.clamped_swiglu(gate, up, limit=10.0)
    assert torch.equal(moe.swiglu(gate, up, limit=10.0), exact.bfloat16())
    h = moe.swiglu(gate, up, weight, limit=10.0)
    assert torch.equal(h, (exact * weight[:, None]).bfloat16())
    for got, want in (
        (moe.swiglu_fp8(gate, up, weight, limit=10.0, group=64), quant.quantize_fp8_rows(h, group=64)),
        (moe.swiglu_nvfp4(gate, up, weight, limit=10.0), quant.quantize_nvfp4(h)),
    ):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.float(), b.float())
