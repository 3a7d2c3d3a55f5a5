"""Compressors: the pooling formula in scalar float64, chunk invariance over rings and interleaved sequences, Transformers."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from dsv4lab.config import ModelConfig
from dsv4lab.records import allocate_index_pages, allocate_kv_pages
from dsv4lab.reference.compressor import compress, compressor_pool, compressor_state_update
from dsv4lab.reference.norm import rmsnorm
from dsv4lab.reference.rope import rope, rope_frequencies

Step = list[tuple[int, int]]  # (sequence, tokens of it) in one flat batch


def new_state(seqs: int, ring: int, width: int) -> torch.Tensor:
    """Values 0, scores -inf (spec 12.1)."""
    state = torch.zeros(seqs, ring, 2, width)
    state[:, :, 1] = -torch.inf
    return state


def run(
    values: list[torch.Tensor],
    scores: list[torch.Tensor],
    ape: torch.Tensor,
    steps: list[Step],
    *,
    overlap: bool,
    rewind: int = 0,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Feed sequences step by step: the pooled entries of each, in order, and the state at the end."""
    ratio, width = ape.shape
    state = new_state(len(values), ratio * (2 if overlap else 1) + rewind, width)
    length = [0] * len(values)
    pooled: list[list[torch.Tensor]] = [[] for _ in values]
    for step in steps:
        rows = [(s, length[s] + i, n) for s, n in step for i in range(n)]
        if not rows:
            continue
        starts, at = {}, 0
        for s, n in step:
            starts[s], at = at, at + n
        positions = torch.tensor([p for _, p, _ in rows])
        seq_idx = torch.tensor([s for s, _, _ in rows])
        first_row = torch.tensor([starts[s] for s, _, _ in rows])
        last_position = torch.tensor([length[s] + n - 1 for s, _, n in rows])
        last_row = torch.tensor([i for i, (_, p, _) in enumerate(rows) if p % ratio == ratio - 1], dtype=torch.int64)
        a = torch.stack([values[s][p] for s, p, _ in rows])
        z = torch.stack([scores[s][p] for s, p, _ in rows])
        before = state.clone()
        entries = compressor_pool(a, z, ape, state, positions, seq_idx, first_row, last_row, ratio=ratio, overlap=overlap)
        assert torch.equal(state, before), "pooling only reads"
        for row, entry in zip(last_row.tolist(), entries, strict=True):
            pooled[rows[row][0]].append(entry)
        compressor_state_update(a, z, ape, state, positions, seq_idx, last_position)
        for s, n in step:
            length[s] += n
    return [torch.stack(p) if p else torch.empty(0, width // (2 if overlap else 1)) for p in pooled], state


def scalar_pool(a: np.ndarray, z: np.ndarray, ape: np.ndarray, *, overlap: bool) -> np.ndarray:
    """Spec 4.4 for one sequence: every complete entry, channel by channel."""
    ratio, width = ape.shape
    d = width // 2 if overlap else width
    out = np.zeros((len(a) // ratio, d))
    for j in range(len(a) // ratio):
        for i in range(d):
            own = d + i if overlap else i
            slots = [(z[p, own] + ape[p % ratio, own], a[p, own]) for p in range(ratio * j, ratio * (j + 1))]
            if overlap and j > 0:
                slots += [(z[p, i] + ape[p % ratio, i], a[p, i]) for p in range(ratio * (j - 1), ratio * j)]
            largest = max(s for s, _ in slots)
            total = sum(math.exp(s - largest) for s, _ in slots)
            out[j, i] = sum(math.exp(s - largest) * v for s, v in slots) / total
    return out


def material(
    lengths: list[int], ratio: int, width: int, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """values and scores of some sequences, and ape."""
    torch.manual_seed(seed)
    return [torch.randn(n, width) for n in lengths], [torch.randn(n, width) * 3 for n in lengths], torch.randn(ratio, width)


KINDS = [(4, True, 10), (128, False, 5), (8, True, 6), (3, False, 7)]  # ratio, overlap, channels of an entry


@pytest.mark.parametrize(("ratio", "overlap", "dim"), KINDS)
def test_pooling_is_the_formula(ratio: int, overlap: bool, dim: int) -> None:
    length = 2 * ratio + ratio // 2 + 1 + (13 if ratio < 100 else 0)
    values, scores, ape = material([length], ratio, dim * (2 if overlap else 1), seed=ratio)
    (got,), _ = run(values, scores, ape, [[(0, length)]], overlap=overlap)
    want = scalar_pool(values[0].double().numpy(), scores[0].double().numpy(), ape.double().numpy(), overlap=overlap)
    assert got.shape == want.shape == (length // ratio, dim) and got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ratio", "overlap", "dim"), KINDS)
def test_chunks_and_interleaving_change_nothing(ratio: int, overlap: bool, dim: int, seed: int) -> None:
    """Random splits of three sequences in one flat batch, bit for bit what each alone gives at once. The rings wrap."""
    rng = random.Random(seed)
    lengths = [300 + rng.randrange(60), 131, 5]
    values, scores, ape = material(lengths, ratio, dim * (2 if overlap else 1), seed=seed)
    left, steps = list(lengths), []
    while any(left):
        order = rng.sample(range(3), 3)  # sequences change places from step to step, and some sit out
        step = [(s, min(left[s], rng.choice([0, 1, 1, 2, 3, 7, 40, 150]))) for s in order]
        step = [(s, n) for s, n in step if n]
        for s, n in step:
            left[s] -= n
        steps.append(step)
    got, state = run(values, scores, ape, steps, overlap=overlap, rewind=seed)
    for s in range(3):
        whole: list[Step] = [[(0, lengths[s])]]
        (alone,), alone_state = run([values[s]], [scores[s]], ape, whole, overlap=overlap, rewind=seed)
        assert torch.equal(got[s], alone)
        assert torch.equal(state[s], alone_state[0])


@pytest.mark.parametrize(("ratio", "overlap", "dim"), KINDS)
def test_one_token_at_a_time(ratio: int, overlap: bool, dim: int) -> None:
    values, scores, ape = material([300], ratio, dim * (2 if overlap else 1), seed=9)
    (whole,), _ = run(values, scores, ape, [[(0, 300)]], overlap=overlap)
    (single,), _ = run(values, scores, ape, [[(0, 1)]] * 300, overlap=overlap)
    assert torch.equal(single, whole) and len(whole) == 300 // ratio


def test_block_zero_ignores_the_missing_half() -> None:
    values, scores, ape = material([8], 4, 2 * 6, seed=10)
    (first,), _ = run(values, scores, ape, [[(0, 8)]], overlap=True)
    weight = torch.softmax((scores[0][:4] + ape).double()[:, 6:], dim=0)
    torch.testing.assert_close(first[0], (weight * values[0][:4, 6:]).sum(0).float(), rtol=1e-6, atol=1e-7)
    values[0][:4, :6] += 100  # the first half of block 0 counts in entry 1 and only there
    (other,), _ = run(values, scores, ape, [[(0, 8)]], overlap=True)
    assert torch.equal(other[0], first[0]) and (other[1] - first[1]).abs().min() > 1e-3


def test_a_stale_ring_is_not_read() -> None:
    """A new sequence in an old place: what the last one left in the ring must not reach it, nor a NaN there."""
    values, scores, ape = material([7], 4, 8, seed=11)
    state = torch.full((1, 8, 2, 8), torch.nan)
    positions, zeros = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    args = (values[0][:4], scores[0][:4], ape, state, positions, zeros, zeros, torch.tensor([3]))
    got = compressor_pool(*args, ratio=4, overlap=True)
    (want,), _ = run([values[0][:4]], [scores[0][:4]], ape, [[(0, 4)]], overlap=True)
    assert torch.equal(got, want[:1])


def test_ring_holds_a_and_z_with_ape_at_position_mod_ring() -> None:
    values, scores, ape = material([11], 4, 6, seed=12)
    _, state = run(values, scores, ape, [[(0, 5)], [(0, 6)]], overlap=True, rewind=1)  # ring of 9
    for p in range(2, 11):
        assert torch.equal(state[0, p % 9, 0], values[0][p])
        assert torch.equal(state[0, p % 9, 1], scores[0][p] + ape[p % 4])


def test_rewound_tokens_are_replaced() -> None:
    """Rejected drafts: the same positions are written anew, and the entry they complete is the new one (spec 13.3)."""
    values, scores, ape = material([16], 4, 10, seed=13)
    state = new_state(1, 8 + 3, 10)

    def feed(first: int, a: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        n = len(a)
        positions, zeros = torch.arange(first, first + n), torch.zeros(n, dtype=torch.int64)
        last = torch.tensor([i for i in range(n) if (first + i) % 4 == 3], dtype=torch.int64)
        pooled = compressor_pool(a, z, ape, state, positions, zeros, zeros, last, ratio=4, overlap=True)
        compressor_state_update(a, z, ape, state, positions, zeros, torch.full((n,), first + n - 1))
        return pooled

    feed(0, values[0][:9], scores[0][:9])
    feed(9, torch.randn(3, 10), torch.randn(3, 10))  # drafts at 9, 10, 11: rejected
    again = feed(9, values[0][9:16], scores[0][9:16])
    (want,), _ = run(values, scores, ape, [[(0, 16)]], overlap=True)
    assert torch.equal(again, want[2:])


def test_no_entry_and_no_token() -> None:
    none = torch.empty(0, dtype=torch.int64)
    empty = torch.empty(0, 12)
    state = new_state(2, 8, 12)
    pooled = compressor_pool(empty, empty, torch.zeros(4, 12), state, none, none, none, none, ratio=4, overlap=True)
    assert pooled.shape == (0, 6)
    compressor_state_update(empty, empty, torch.zeros(4, 12), state, none, none, none)
    assert torch.equal(state, new_state(2, 8, 12))


# ---- the whole step ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    ("key", "ratio", "overlap", "dim"), [("kv", 4, True, 96), ("kv", 128, False, 96), ("index", 4, True, 64)]
)
def test_a_step_stores_what_pooling_gives(key: str, ratio: int, overlap: bool, dim: int, rounded: bool) -> None:
    """Entry j at place j mod 2 of page table[s, j / 2], rotated by j * ratio, a missing page left out; the ring moved on."""
    lengths, cuts = [3 * ratio + 2, 2 * ratio], ([ratio + 1, 2 * ratio - 1], [2 * ratio + 1, 1])
    values, scores, ape = material(lengths, ratio, dim * (2 if overlap else 1), seed=15)
    pooled, state = run(values, scores, ape, [[(0, cuts[0][0]), (1, cuts[0][1])], [(1, 1), (0, cuts[1][0])]], overlap=overlap)
    dtype = torch.bfloat16 if rounded else torch.float32
    weight, freq = torch.rand(dim) + 0.5, rope_frequencies(rope_dim=32, theta=1e4, scaling=None)
    table = torch.tensor([[3, 1], [0, -1]], dtype=torch.int32)
    shape = dict(num_pages=4, page_size=2, dim=dim, dtype=dtype, device="cpu")
    pages = allocate_kv_pages("plain", rope_dim=32, **shape) if key == "kv" else allocate_index_pages("plain", **shape)
    got = new_state(2, state.shape[1], state.shape[3])
    length = [0, 0]
    knobs = dict(ratio=ratio, overlap=overlap, eps=1e-6, record="plain", page_size=2, key=key, rounded=rounded)
    for step in ([(0, cuts[0][0]), (1, cuts[0][1])], [(1, 1), (0, cuts[1][0])]):
        rows = [(s, length[s] + i, n) for s, n in step for i in range(n)]
        first = {step[0][0]: 0, step[1][0]: step[0][1]}
        a, z = (torch.stack([source[s][p] for s, p, _ in rows]) for source in (values, scores))
        plan = ([p for _, p, _ in rows], [s for s, _, _ in rows], [first[s] for s, _, _ in rows])
        where = (*map(torch.tensor, plan), torch.tensor([length[s] + n - 1 for s, _, n in rows]), table)
        compress(a, z, ape, got, weight, freq, pages, *where, **knobs)
        for s, n in step:
            length[s] += n
    assert torch.equal(got, state)
    want = torch.zeros_like(pages)
    for s in range(2):
        keys = rmsnorm(pooled[s].to(dtype), weight, eps=1e-6)
        keys = rope(keys, torch.arange(len(keys)) * ratio, freq)
        for j, entry in enumerate(keys):
            if table[s, j // 2] >= 0:
                want[table[s, j // 2], j % 2] = entry
    assert torch.equal(pages, want) and len(pooled[0]) == 3 and len(pooled[1]) == 2
    with pytest.raises(ValueError, match=r"key must be one of \('kv', 'index'\), got 'keys'"):
        compress(a, z, ape, got, weight, freq, pages, *where, **(knobs | dict(key="keys")))


# ---- Transformers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["HCA", "CSA", "indexer"])
def test_entries_match_transformers(kind: str) -> None:
    """Projection, pooling, norm and rotation at the models' head dims, chunked against their single pass."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    flash = ModelConfig.flash()
    yarn = dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1)
    hf = transformers.DeepseekV4Config(
        hidden_size=48, q_lora_rank=16, index_n_heads=2, rope_parameters=yarn, num_hidden_layers=1, rms_norm_eps=1e-6
    )
    torch.manual_seed(14)
    module = modeling.DeepseekV4HCACompressor(hf) if kind == "HCA" else modeling.DeepseekV4CSACompressor(hf)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = 2 * 128 + 45
    x, qr = torch.randn(1, tokens, 48), torch.randn(1, tokens, 16)
    part = module.indexer if kind == "indexer" else module
    seen: list[torch.Tensor] = []
    if kind == "indexer":  # the indexer keeps its keys to itself: look at what its scorer is given
        part.scorer.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.no_grad():
        compressed, _ = module(x, qr, torch.arange(tokens)[None], None, 0)
        want = seen[0][0] if kind == "indexer" else compressed[0, 0]
        values, scores, ape = x[0] @ part.kv_proj.weight.T, x[0] @ part.gate_proj.weight.T, part.position_bias.detach()
    ratio, overlap = (128, False) if kind == "HCA" else (4, True)
    (pooled,), _ = run([values], [scores], ape, [[(0, 7)], [(0, 150)], [(0, tokens - 157)]], overlap=overlap)
    freq = rope_frequencies(rope_dim=64, theta=flash.compress_rope_theta, scaling=flash.rope_scaling)
    got = rope(rmsnorm(pooled, part.kv_norm.weight.detach(), eps=1e-6), torch.arange(len(pooled)) * ratio, freq)
    assert got.shape == want.shape == (tokens // ratio, 128 if kind == "indexer" else 512)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
