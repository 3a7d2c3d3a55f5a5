"""What reference and kernels refuse alike: weights with wrong parts, shapes that would broadcast, numbers out of range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4lab.formats import PackedWeight
from dsv4lab.kernels.attention.core import api as core
from dsv4lab.kernels.gemm import operators as kernels
from dsv4lab.kernels.gemm.mixed.layout import prepare
from dsv4lab.records import allocate_kv_pages
from dsv4lab.reference import attention, cache, gemm, indexer, mhc, moe, norm, quant, rope

X = torch.ones(3, 256).bfloat16()
IDS = torch.arange(3)

# ---- weights -----------------------------------------------------------------------------------------------------------
WRONG: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("fp8_block", "scale", lambda s: s[:, :1], r"scale of a .* must be .*2, 2\), got .*2, 1\)"),
    ("fp8_block", "scale", lambda s: s[:1], r"2, 2\), got .*1, 2\)"),
    ("fp8_block", "codes", lambda c: c.view(torch.uint8), "codes of a fp8_block weight must be"),
    ("nvfp4", "codes", lambda c: c[:, :12], r"nvfp4 weight must be .* with K % 16 == 0, got"),
    ("nvfp4", "scale", lambda s: s[:, ::2], r"must be .*256, 16\), got .*256, 8\)"),
    ("nvfp4", "scale", lambda s: s.view(torch.uint8), r"scale of a nvfp4 weight must be torch\.float8_e4m3fn"),
    ("nvfp4", "scale", lambda s: None, "nvfp4 weight must have a scale, got None"),
    ("nvfp4", "global_scale", lambda s: None, "must have a global_scale, got None"),
    ("nvfp4", "global_scale", lambda s: s.expand(256), r"global_scale of .*256\)"),
    ("nvfp4", "input_scale", lambda s: torch.ones(3), r"input_scale of .*3,?\)"),
    ("mxfp4", "scale", lambda s: s[:1], r"must be .*256, 8\), got .*1, 8\)"),
    ("mxfp4", "global_scale", lambda s: torch.ones(()), "must have no global_scale"),
]


@pytest.mark.parametrize(("name", "part", "change", "message"), WRONG)
def test_a_weight_with_wrong_parts(name: str, part: str, change: Callable[[Any], Any], message: str) -> None:
    right = quant.quantize(torch.randn(256, 256), name)
    right.check()
    wrong = replace(right, **{part: change(getattr(right, part))})
    parts: Any = (wrong.codes, wrong.scale, wrong.global_scale, wrong.input_scale)
    stack = PackedWeight(wrong.format, **{key: t[None] for key, t in wrong.tensors().items()})
    for call in (
        lambda: gemm.linear(X, wrong, act="nvfp4"),
        lambda: gemm.grouped_linear(X[:, None], wrong, act="none"),
        lambda: gemm.two_linears(X, right, wrong, act="none"),
        lambda: moe.moe(X[:0], torch.ones(0, 1), IDS[:0, None], stack, stack, stack, limit=1.0, act="none"),
        lambda: prepare(wrong),
        lambda: prepare(right, wrong),
        lambda: kernels.linear_sm90(X, name, *parts, "nvfp4", None),
        lambda: kernels.linear_sm100(X, name, *parts, "nvfp4", None),
        lambda: kernels.grouped_linear_sm90(X[:, None], name, *parts, "none"),
        lambda: kernels.two_linears_sm90(
            X, f"{name},{name}", *([torch.empty(0) if t is None else t] * 2 for t in parts), act="none", out_dtype=None
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


# ---- operations --------------------------------------------------------------------------------------------------------
HEADS, TURNS, F32 = torch.ones(3, 2, 128), torch.ones(32), torch.ones(3, 4)
POOL: dict[str, Any] = dict(num_pages=2, page_size=4, dim=128, rope_dim=64, dtype=torch.float32, device="cpu")
FP8, PLAIN = allocate_kv_pages("fp8", **POOL), allocate_kv_pages("plain", **POOL)


def write(pages: torch.Tensor, record: str, page_size: int) -> None:
    cache.cache_write(HEADS[:, 0], F32, IDS, TURNS, pages, IDS, eps=1e-6, record=record, page_size=page_size)


def score(record: str = "plain", weights: torch.Tensor = F32[:, :2]) -> None:
    how: dict[str, Any] = dict(record=record, page_size=4, max_entries=4)
    indexer.index_scores(HEADS, weights, PLAIN, IDS[None], IDS, IDS, **how)


def attend(of: Any, window: int, ring_len: int, **rest: int) -> None:
    q, table = torch.ones(1, 64, 512).bfloat16(), torch.zeros(1, 1, dtype=torch.int32)
    how = dict(window=window, ring_len=ring_len, ratio=0, scale=1.0, record="plain", window_page=4, entry_page=4) | rest
    of.attention(q, torch.ones(64), PLAIN, None, table, IDS[:1], IDS[:1], None, **how)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: attend(core, 8, 4), "window must be 1 to ring_len = 4, got 8"),
    (lambda: attend(core, 1, 0), "window must be 1 to ring_len = 0, got 1"),
    (lambda: attend(attention, 8, 4, rope_dim=64), "window must be 1 to ring_len = 4, got 8"),
    (lambda: attend(attention, 0, 0, rope_dim=64), "window must be 1 to ring_len = 0, got 0"),
    (lambda: quant.quantize_nvfp4(X, global_scale=TURNS), r"global_scale must be \(\) or .*, got \(32,\)"),
    (lambda: quant.quantize_nvfp4(X[None], global_scale=F32), r"x\.shape\[:-2\] = \(1,\), got \(3, 4\)"),
    (lambda: quant.quantize_fp8_rows(X, group=0), "group must be at least 1, got 0"),
    (lambda: norm.rmsnorm(X, TURNS[:1], eps=1e-6), r"weight must be \(256,\), got \(1,\)"),
    (lambda: norm.q_norm_rope(HEADS, IDS[:1], TURNS, eps=1e-6), r"positions must be \(3,\), got \(1,\)"),
    (lambda: rope.rope(F32, IDS, TURNS[:3]), "at most c / 2 frequencies for c=4, got 3"),
    (lambda: moe.swiglu(F32, F32, limit=-1.0), "limit must be positive and finite, got"),
    (lambda: moe.swiglu(F32, F32[:1], limit=1.0), r"up must be \(3, 4\), got \(1, 4\)"),
    (lambda: moe.swiglu(F32, F32, TURNS[:1], limit=1.0), r"row_weight must be \(3,\), got \(1,\)"),
    (lambda: moe.router_topk(F32, F32, TURNS[:3], top_k=4, route_scale=1.0), "top_k must be 1 to E = 3, got 4"),
    (lambda: moe.router_topk(F32, F32, TURNS[:1], top_k=1, route_scale=1.0), r"bias must be \(3,\), got \(1,\)"),
    (lambda: mhc.sinkhorn(F32, iters=0, eps=0.0), "sinkhorn_iters must be at least 1, got 0"),
    (lambda: mhc.sinkhorn(F32, iters=1, eps=1.0), "hc_eps must be at least 0 and below 1, got 1.0"),
    (lambda: indexer.index_topk(F32, IDS, k=-1), "k must be at least 1, got -1"),
    (lambda: indexer.index_topk(F32, IDS[:1], k=1), r"num_visible must be \(3,\), got \(1,\)"),
    (lambda: indexer.index_query(HEADS, IDS, TURNS, record="fp6"), "index record must be one of"),
    (lambda: score("fp6"), "index record must be one of"),
    (lambda: score("fp8"), "fp8 pages must be uint8, got"),
    (lambda: score(weights=F32[:, :1]), r"head_weights must be \(3, 2\), got \(3, 1\)"),
    (lambda: write(FP8, "fp8", 8), r"fp8 pages must be \(P, 1728\), got \(2, 1152\)"),
    (lambda: write(FP8, "fp8", 0), "page_size must be at least 1, got 0"),
    (lambda: write(FP8, "plain", 4), "plain pages must be floats, got"),
    (lambda: write(PLAIN, "plain", 8), r"plain pages must be \(P, 8, 128\), got \(2, 4, 128\)"),
    (lambda: write(PLAIN, "plain", 4), r"weight must be \(128,\), got \(3, 4\)"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# ---- what is left out --------------------------------------------------------------------------------------------------
def test_an_unused_slot_adds_nothing() -> None:
    """A stack read from its end would give the last expert's rows for -1."""
    w = [quant.quantize(torch.randn(4, *shape), "f32") for shape in ((6, 256), (6, 256), (256, 6))]
    weights, ids = torch.ones(3, 3), torch.tensor([[0, -1, 3], [-1, 4, -4], [2, 1, 9]])
    got = moe.moe(X, weights, ids, *w, limit=9.0, act="none")
    used = (ids >= 0) & (ids < 4)
    want = moe.moe(X, weights * used, ids.clamp(0, 3), *w, limit=9.0, act="none")
    assert got[0].any() and not got[1].any() and torch.equal(got, want)


def test_scores_past_the_visible_are_not_looked_at() -> None:
    scores, visible = torch.tensor([[-1.0, -3, -2, 7, 9], [-torch.inf, 1, 2, 8, torch.nan]]), torch.tensor([3, 2])
    assert indexer.index_topk(scores, visible, k=2).tolist() == [[0, 2], [0, 1]]
