"""The indexer: Hadamard, key records byte by byte, scores in scalar float64, top-k with ties, Transformers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dsv4lab.config import ModelConfig
from dsv4lab.records import allocate_index_pages
from dsv4lab.reference import indexer, quant
from dsv4lab.reference.compressor import compressor_pool
from dsv4lab.reference.norm import rmsnorm
from dsv4lab.reference.rope import rope
from tests.reference.test_cache import table

EPS = 1e-6
FILL = 0xAB
RECORDS = ["plain", "fp8", "fp4"]


def pool(record: str, num_pages: int, page_size: int, dim: int) -> torch.Tensor:
    return allocate_index_pages(
        record, num_pages=num_pages, page_size=page_size, dim=dim, dtype=torch.float32, device="cpu"
    ).fill_(FILL)


# ---- Hadamard ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 32, 128])
def test_hadamard_is_sylvesters_matrix(n: int) -> None:
    """H[i, j] = (-1)^popcount(i & j) / sqrt(n): natural order, symmetric, orthogonal."""
    want = np.array([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / n**0.5
    got = indexer.hadamard(torch.eye(n))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(indexer.hadamard(got), torch.eye(n), rtol=0, atol=1e-6)


def test_hadamard_keeps_products_and_shape() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(3, 5, 128), torch.randn(3, 5, 128)
    before, after = (q * k).sum(-1), (indexer.hadamard(q) * indexer.hadamard(k)).sum(-1)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert (indexer.hadamard(q) - q).abs().max() > 1
    assert indexer.hadamard(q.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="x must have a power-of-two last dim, got 96"):
        indexer.hadamard(torch.ones(2, 96))


# ---- queries -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("record", RECORDS)
def test_index_query(record: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    q, positions = torch.randn(7, 64, 128).to(dtype), torch.arange(7) * 1_001
    got = indexer.index_query(q, positions, table(), record=record)
    turned = rope(q, positions, table())
    assert got.dtype == dtype and got.shape == q.shape
    if record == "plain":
        assert torch.equal(got, turned)
        return
    sylvester = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)]).double() / 128**0.5
    exact = (turned.double() @ sylvester).to(dtype)
    group = 128 if record == "fp8" else 32
    blocks = exact.double().unflatten(-1, (-1, group))
    amax, limit = blocks.abs().amax(-1, keepdim=True), 448.0 if record == "fp8" else 6.0
    scale = torch.exp2(torch.ceil(torch.log2(amax / limit)))
    # nearest code: E4M3 within 1/16 of the value (or half of 2^-9 scales); E2M1 within half of the widest step of its range
    e2m1 = torch.where(blocks.abs() <= 2 * scale, 0.25, torch.where(blocks.abs() <= 4 * scale, 0.5, 1.0)) * scale
    bound = blocks.abs() / 16 + scale * 2.0**-10 if record == "fp8" else e2m1
    slack = 2.0**-7 * blocks.abs() if dtype == torch.bfloat16 else 1e-5
    difference = got.double().unflatten(-1, (-1, group)) - blocks
    assert (difference.abs() <= bound + slack).all()
    codes = (got.double().unflatten(-1, (-1, group)) / scale).abs().unique()
    if record == "fp4":
        assert set(codes.tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    else:
        assert codes.max() <= 448 and len(codes) <= 127


# ---- key records -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("record", "page_size", "page_bytes"), [("fp8", 64, 8_640), ("fp4", 64, 4_608), ("fp8", 3, 576), ("fp4", 9, 1_152)]
)
def test_key_pages_byte_by_byte(record: str, page_size: int, page_bytes: int, dtype: torch.dtype) -> None:
    """132 bytes a key in fp8, 68 in fp4: codes of the page first, then scales, then padding that nobody touches (spec 12.3)."""
    torch.manual_seed(page_size)
    x, weight = torch.randn(4, 128).to(dtype), torch.randn(128).to(dtype)
    positions, slots = torch.tensor([0, 4, 400_000, 8]), torch.tensor([2 * page_size - 1, 1, -1, page_size])
    pages = pool(record, 2, page_size, 128)
    assert pages.shape == (2, page_bytes)
    indexer.index_key_write(x, weight, positions, table(), pages, slots, eps=EPS, record=record, page_size=page_size)
    keys = indexer.hadamard(rope(rmsnorm(x, weight, eps=EPS), positions, table()))

    want = np.full((2, page_bytes), FILL, dtype=np.uint8)
    width, scale_width = (128, 4) if record == "fp8" else (64, 4)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, place = divmod(slot, page_size)
        start = page_size * width + place * scale_width
        if record == "fp8":
            exponent = max(np.frexp(keys[row].float().abs().max().item() / 448)[1], -22)
            if 448 * 2.0 ** (exponent - 1) >= keys[row].float().abs().max().item():
                exponent -= 1
            codes = (keys[row].double() / 2.0**exponent).float().to(torch.float8_e4m3fn)
            want[page, place * width : (place + 1) * width] = codes.view(torch.uint8).numpy()
            want[page, start : start + 4] = np.frombuffer(np.float32(2.0**exponent).tobytes(), np.uint8)
        else:
            for group in range(4):
                values = keys[row, 32 * group : 32 * group + 32].double().tolist()
                exponent = -126
                while 6 * 2.0**exponent < max(abs(v) for v in values):
                    exponent += 1
                want[page, start + group] = exponent + 127
                grid = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
                for i in range(0, 32, 2):
                    nibbles = []
                    for v in values[i : i + 2]:
                        distance = [abs(abs(v) / 2.0**exponent - g) for g in grid]
                        near = min((c for c in range(8) if distance[c] == min(distance)), key=lambda c: c % 2)
                        nibbles.append(near | (8 if np.signbit(v) else 0))
                    want[page, place * width + 16 * group + i // 2] = nibbles[0] | nibbles[1] << 4
    assert np.array_equal(pages.numpy(), want)

    back = indexer.index_key_read(pages, torch.tensor([1, page_size]), record=record, page_size=page_size, dim=128)
    fake = quant.fake_fp8_rows(keys.float(), group=128) if record == "fp8" else quant.fake_mxfp4(keys.float())
    assert torch.equal(back, fake[[1, 3]])


def test_plain_keys_are_not_turned() -> None:
    torch.manual_seed(2)
    x, weight, positions = torch.randn(3, 64), torch.randn(64), torch.tensor([0, 4, 8])
    pages = pool("plain", 2, 2, 64)
    knobs = dict(record="plain", page_size=2)
    indexer.index_key_write(x, weight, positions, table(32), pages, torch.tensor([3, -1, 0]), eps=EPS, **knobs)
    want = rope(rmsnorm(x, weight, eps=EPS), positions, table(32))
    assert torch.equal(indexer.index_key_read(pages, torch.tensor([3, 0]), dim=64, **knobs), want[[0, 2]])
    assert (pages[0, 1] == FILL).all() and (pages[1, 0] == FILL).all()


# ---- scores ------------------------------------------------------------------------------------------------------------
def scene(record: str, counts: list[int], *, heads: int, dim: int, page_size: int, seed: int) -> dict:
    """Sequences with `counts` entries each over shuffled pages, and three queries a sequence."""
    torch.manual_seed(seed)
    blocks = max(-(-n // page_size) for n in counts) + 1
    order = torch.randperm(blocks * len(counts))
    block_table = order.view(len(counts), blocks).int()
    pages = pool(record, blocks * len(counts), page_size, dim)
    keys = []
    for s, n in enumerate(counts):
        entry = torch.arange(n)
        slots = block_table[s].long()[entry // page_size] * page_size + entry % page_size
        where = dict(record=record, page_size=page_size)
        indexer.index_key_write(torch.randn(n, dim), torch.ones(dim), entry * 4, table(32), pages, slots, eps=EPS, **where)
        keys.append(indexer.index_key_read(pages, slots, dim=dim, **where))
    seq_idx = torch.arange(len(counts)).repeat_interleave(3)
    visible = torch.tensor([random.Random(seed + i).randrange(counts[i // 3] + 1) for i in range(3 * len(counts))])
    visible[0], visible[-1] = counts[0], 0
    q = torch.randn(len(seq_idx), heads, dim)
    head_weights = torch.randn(len(seq_idx), heads) * (heads * dim) ** -0.5
    args = (q, head_weights, pages, block_table, seq_idx, visible)
    return dict(args=args, keys=keys, knobs=dict(record=record, page_size=page_size))


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize(("heads", "dim", "page_size"), [(8, 64, 32), (64, 128, 32), (3, 128, 5)])
def test_scores_are_the_formula(record: str, heads: int, dim: int, page_size: int) -> None:
    s = scene(record, [75, 1, 33], heads=heads, dim=dim, page_size=page_size, seed=heads)
    q, head_weights, _, _, seq_idx, visible = s["args"]
    got = indexer.index_scores(*s["args"], max_entries=80, **s["knobs"])
    assert got.shape == (9, 80) and got.dtype == torch.float32
    for t in range(9):
        keys, n = s["keys"][seq_idx[t]].double().numpy(), visible[t].item()
        for j in range(n):
            dots = [float(np.dot(q[t, h].double().numpy(), keys[j])) for h in range(heads)]
            want = sum(head_weights[t, h].item() * max(d, 0.0) for h, d in enumerate(dots))
            assert got[t, j].item() == pytest.approx(want, rel=1e-5, abs=1e-6)
        assert (got[t, n:] == -torch.inf).all()
    assert (got[got > -torch.inf] < 0).any(), "weights of both signs make scores of both signs"


def test_scores_match_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    flash = ModelConfig.flash()
    theirs = modeling.DeepseekV4IndexerScorer(transformers.DeepseekV4Config(hidden_size=40))
    s = scene("plain", [50], heads=flash.index_n_heads, dim=flash.index_head_dim, page_size=32, seed=3)
    q, _, pages, block_table, seq_idx, _ = s["args"]
    x, visible = torch.randn(3, 40), torch.full((3,), 50)
    with torch.no_grad():
        want = theirs(q[None], s["keys"][0][None], x[None])[0]
        head_weights = theirs.weights_proj(x) * (128**-0.5 * 64**-0.5)
    got = indexer.index_scores(q, head_weights, pages, block_table, seq_idx, visible, max_entries=50, **s["knobs"])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("record", RECORDS)
def test_a_query_does_not_depend_on_its_batch(record: str) -> None:
    """More entries, other queries, other sequences: the same bits. 150 queries are more than one block."""
    s = scene(record, [75, 1, 33], heads=8, dim=128, page_size=32, seed=4)
    _, _, pages, block_table, _, _ = s["args"]
    torch.manual_seed(5)
    seq_idx = torch.tensor([0, 2]).repeat(75)
    visible = torch.tensor([min(i // 2, 33 if i % 2 else 75) for i in range(150)])
    q, head_weights = torch.randn(150, 8, 128), torch.randn(150, 8)
    together = indexer.index_scores(q, head_weights, pages, block_table, seq_idx, visible, max_entries=75, **s["knobs"])
    for start, stop in [(0, 1), (3, 4), (17, 18), (40, 49), (100, 150)]:
        rows = slice(start, stop)
        most = max(int(visible[rows].max()), 1)
        alone = indexer.index_scores(
            q[rows], head_weights[rows], pages, block_table, seq_idx[rows], visible[rows], max_entries=most, **s["knobs"]
        )
        assert torch.equal(alone, together[rows, :most])


# ---- top-k -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("entries", "k"), [(50, 8), (50, 50), (20, 33), (1, 1), (700, 512), (1100, 1024)])
def test_topk_keeps_the_best_and_breaks_ties_downwards(entries: int, k: int) -> None:
    torch.manual_seed(entries + k)
    scores = torch.randint(-3, 4, (9, entries)).float()  # many ties
    scores[4] = 0.0
    scores[5] = torch.where(torch.arange(entries) % 2 == 0, 0.0, -0.0)  # zeros of both signs are equal
    visible = torch.randint(0, entries + 1, (9,))
    visible[0], visible[1], visible[4], visible[5] = 0, entries, entries, entries
    masked = scores.masked_fill(torch.arange(entries) >= visible[:, None], -torch.inf)
    got = indexer.index_topk(masked, visible, k=k)
    assert got.shape == (9, k) and got.dtype == torch.int32
    for row, values, n in zip(got.tolist(), scores.tolist(), visible.tolist(), strict=True):
        best = sorted(sorted(range(n), key=lambda j: (-values[j], j))[:k])
        assert row == best + [-1] * (k - len(best))


def test_topk_takes_all_that_is_visible_when_it_fits() -> None:
    torch.manual_seed(6)
    visible = torch.tensor([0, 1, 7, 8])
    scores = torch.randn(4, 12).masked_fill(torch.arange(12) >= visible[:, None], -torch.inf)
    got = indexer.index_topk(scores, visible, k=8)
    assert [[j for j in row if j >= 0] for row in got.tolist()] == [list(range(n)) for n in visible.tolist()]
    assert indexer.index_topk(torch.empty(0, 12), visible[:0], k=8).shape == (0, 8)


def test_picks_match_transformers() -> None:
    """The whole indexer at the models' head dim: keys pooled, stored and scored here, against their choice, as sets."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    tokens, heads = 203, 32
    yarn = dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1)
    hf = transformers.DeepseekV4Config(
        hidden_size=48, q_lora_rank=16, index_n_heads=heads, index_topk=16, rope_parameters=yarn, num_hidden_layers=1
    )
    torch.manual_seed(7)
    theirs = modeling.DeepseekV4Indexer(hf)
    weights = {name: torch.nn.init.normal_(p.data, std=0.3) for name, p in theirs.named_parameters()}
    x, qr = torch.randn(tokens, 48), torch.randn(tokens, 16)
    positions = torch.arange(tokens)
    with torch.no_grad():
        want = theirs(x[None], qr[None], positions[None], None, 0)[0]

    values, scores = x @ weights["kv_proj.weight"].T, x @ weights["gate_proj.weight"].T
    zeros, last = torch.zeros(tokens, dtype=torch.int64), torch.arange(3, tokens, 4)
    state = torch.zeros(1, 8, 2, 256)
    ape = weights["position_bias"]
    pooled = compressor_pool(values, scores, ape, state, positions, zeros, zeros, last, ratio=4, overlap=True)
    pages, block_table = pool("plain", 2, 32, 128), torch.tensor([[1, 0]])
    entry, knobs = torch.arange(len(pooled)), dict(record="plain", page_size=32)
    slots = (1 - entry // 32) * 32 + entry % 32
    indexer.index_key_write(pooled, weights["kv_norm.weight"], entry * 4, table(), pages, slots, eps=EPS, **knobs)
    q = indexer.index_query((qr @ weights["q_b_proj.weight"].T).view(tokens, heads, 128), positions, table(), record="plain")
    head_weights = x @ weights["scorer.weights_proj.weight"].T * (128 * heads) ** -0.5
    visible = (positions + 1) // 4
    ours = indexer.index_scores(q, head_weights, pages, block_table, zeros, visible, max_entries=len(pooled), **knobs)
    got = indexer.index_topk(ours, visible, k=16)
    assert [set(r) for r in got.tolist()] == [set(r) for r in want.tolist()]
    assert any(len(set(r)) == 16 and max(r) > 40 for r in got.tolist()), "the choice is one"
