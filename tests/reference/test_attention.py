"""Core attention over the paged cache: scalar float64, visibility, sinks, window edges, chosen entries, Transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from dsv4lab.config import ModelConfig
from dsv4lab.records import allocate_kv_pages
from dsv4lab.reference.attention import attention, attention_probabilities, gather_keys
from dsv4lab.reference.cache import cache_read, cache_write

PAGE = 16  # records of a window page in these tests: rings are not multiples of it


@dataclass
class Scene:
    """Sequences in a cache of random keys. window[s] and entries[s] are what the cache holds for sequence s, dequantised."""

    lengths: list[int]
    ratio: int
    dim: int = 80
    rope_dim: int = 16
    window: int = 128
    ring: int = 200
    entry_page: int = 3
    record: str = "plain"
    seed: int = 0
    window_pages: torch.Tensor = field(init=False)
    entry_pages: torch.Tensor | None = field(init=False, default=None)
    block_table: torch.Tensor = field(init=False)
    keys: list[np.ndarray] = field(init=False, default_factory=list)
    entries: list[np.ndarray] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        seqs = len(self.lengths)
        knobs = dict(dim=self.dim, rope_dim=self.rope_dim)
        dtype = dict(dtype=torch.float32, device="cpu")
        window_count = -(-seqs * self.ring // PAGE)
        self.window_pages = allocate_kv_pages(self.record, num_pages=window_count, page_size=PAGE, **knobs, **dtype)
        blocks = max(self.lengths) // max(self.ratio, 1) // self.entry_page + 1 if self.ratio else 1
        self.block_table = torch.randperm(seqs * blocks).view(seqs, blocks).int()
        if self.ratio:
            self.entry_pages = allocate_kv_pages(
                self.record, num_pages=seqs * blocks, page_size=self.entry_page, **knobs, **dtype
            )
        for s, n in enumerate(self.lengths):
            first = max(n - self.ring, 0)
            positions = torch.arange(first, n)
            held = self._store(self.window_pages, s * self.ring + positions % self.ring, PAGE)
            self.keys.append(np.concatenate([np.full((first, self.dim), np.nan), held]))  # NaN: gone from the ring
            if self.entry_pages is not None:
                j = torch.arange(n // self.ratio)
                slots = self.block_table[s].long()[j // self.entry_page] * self.entry_page + j % self.entry_page
                self.entries.append(self._store(self.entry_pages, slots, self.entry_page))

    def _store(self, pages: torch.Tensor, slots: torch.Tensor, page_size: int) -> np.ndarray:
        n, knobs = len(slots), dict(record=self.record, page_size=page_size)
        freq = torch.zeros(self.rope_dim // 2)
        x = torch.randn(n, self.dim)
        cache_write(x, torch.ones(self.dim), torch.zeros(n), freq, pages, slots, eps=1e-6, **knobs)
        return cache_read(pages, slots, dim=self.dim, rope_dim=self.rope_dim, **knobs).double().numpy()

    @property
    def addresses(self) -> dict[str, int | str]:
        return dict(
            window=self.window,
            ring_len=self.ring,
            ratio=self.ratio,
            record=self.record,
            window_page=PAGE,
            entry_page=self.entry_page,
            rope_dim=self.rope_dim,
        )

    def attend(
        self, q: torch.Tensor, sinks: torch.Tensor, at: list[tuple[int, int]], topk: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`attention` for queries at (sequence, position)."""
        seq_idx, positions = torch.tensor([s for s, _ in at]), torch.tensor([p for _, p in at])
        where = (self.window_pages, self.entry_pages, self.block_table, positions, seq_idx, topk)
        return attention(q, sinks, *where, scale=self.dim**-0.5, **self.addresses)

    def by_hand(
        self, q: torch.Tensor, sinks: torch.Tensor, at: list[tuple[int, int]], topk: torch.Tensor | None = None
    ) -> np.ndarray:
        """Spec 4.3 and 4.5, key by key."""
        out = np.zeros(q.shape)
        for row, (s, t) in enumerate(at):
            attended = [self.keys[s][p] for p in range(max(0, t - self.window + 1), t + 1)]
            if self.ratio:
                seen = [j for j in range(len(self.entries[s])) if (j + 1) * self.ratio <= t + 1]
                attended += [self.entries[s][j] for j in seen if topk is None or j in topk[row].tolist()]
            for h in range(q.shape[1]):
                query = q[row, h].double().numpy()
                scores = [float(np.dot(query, key)) * self.dim**-0.5 for key in attended]
                largest = max(*scores, sinks[h].item())
                den = sum(math.exp(v - largest) for v in scores) + math.exp(sinks[h].item() - largest)
                for score, key in zip(scores, attended, strict=True):
                    out[row, h] += math.exp(score - largest) / den * key
        return out

    def seen(self, seq: int, position: int, topk: torch.Tensor | None = None) -> tuple[set[int], set[int]]:
        """Window positions and entries that a query attends to, as `gather_keys` has it."""
        knobs = dict(self.addresses, dim=self.dim)
        found = gather_keys(self.window_pages, self.entry_pages, self.block_table, torch.tensor([position]), seq, topk, **knobs)
        n = len(found.positions)
        return set(found.positions[found.visible[0, :n]].tolist()), set(found.entries[found.visible[0, n:]].tolist())


def queries(count: int, heads: int, dim: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(count, heads, dim) * 2, torch.randn(heads)


# ---- the formula -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("record", ["plain", "fp8", "nvfp4"])
@pytest.mark.parametrize(("ratio", "entry_page"), [(0, 1), (4, 32), (4, 3), (128, 1)])
def test_attention_is_the_formula(ratio: int, entry_page: int, record: str) -> None:
    scene = Scene([300, 1, 131], ratio, entry_page=entry_page, record=record, seed=ratio)
    at = [(0, 230), (0, 299), (1, 0), (2, 5), (2, 127), (2, 130)]
    q, sinks = queries(len(at), 3, scene.dim)
    np.testing.assert_allclose(scene.attend(q, sinks, at).numpy(), scene.by_hand(q, sinks, at), rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [ModelConfig.flash(), ModelConfig.pro()], ids=["flash", "pro"])
def test_model_dimensions(config: ModelConfig) -> None:
    scene = Scene([140], 4, dim=config.head_dim, rope_dim=config.qk_rope_head_dim, entry_page=32, record="fp8")
    at = [(0, 3), (0, 139)]
    q, sinks = queries(2, config.num_attention_heads, config.head_dim)
    got = scene.attend(q.bfloat16(), sinks, at)
    want = torch.from_numpy(scene.by_hand(q.bfloat16(), sinks, at)).bfloat16()
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)  # float64 inside, one rounding


@pytest.mark.parametrize("ratio", [0, 128])
def test_attention_matches_transformers(ratio: int) -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    scene = Scene([270], ratio, ring=270, entry_page=1)
    q, sinks = queries(270, 4, scene.dim)
    position = torch.arange(270)
    distance = position[:, None] - position
    visible = (distance >= 0) & (distance < 128)
    keys = torch.from_numpy(scene.keys[0])
    if ratio:
        keys = torch.cat((keys, torch.from_numpy(scene.entries[0])))
        visible = torch.cat((visible, (torch.arange(len(scene.entries[0])) + 1) * ratio <= position[:, None] + 1), dim=1)
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = 4, sinks
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[None, None]
    kv = keys.float()[None, None]
    want, _ = modeling.eager_attention_forward(module, q.transpose(0, 1)[None], kv, kv, mask, scaling=scene.dim**-0.5)
    torch.testing.assert_close(scene.attend(q, sinks, [(0, t) for t in range(270)]), want[0], rtol=1e-4, atol=1e-5)


# ---- visibility --------------------------------------------------------------------------------------------------------
def test_visibility_facts_of_the_specification() -> None:
    """Spec 17 item 7, and 4.3: an entry is seen from the token that completes it on, also where it overlaps the window."""
    csa, hca = Scene([300], 4, ring=300), Scene([300], 128, ring=300, entry_page=1)
    assert csa.seen(0, 2)[1] == set() and csa.seen(0, 3)[1] == {0} and csa.seen(0, 6)[1] == {0} and csa.seen(0, 7)[1] == {0, 1}
    assert hca.seen(0, 126)[1] == set() and hca.seen(0, 127)[1] == {0} and hca.seen(0, 254)[1] == {0}
    assert hca.seen(0, 255)[1] == {0, 1}
    assert csa.seen(0, 299)[1] == set(range(75)), "all of them, without a choice"


@pytest.mark.parametrize(("position", "first"), [(0, 0), (126, 0), (127, 0), (128, 1), (129, 2), (299, 172)])
def test_window_edges(position: int, first: int) -> None:
    scene = Scene([300], 0, ring=300)
    assert scene.seen(0, position) == (set(range(first, position + 1)), set())
    q, sinks = queries(1, 2, scene.dim)
    got = scene.attend(q, sinks, [(0, position)])
    np.testing.assert_allclose(got.numpy(), scene.by_hand(q, sinks, [(0, position)]), rtol=0, atol=1e-6)
    pages = scene.window_pages.view(-1, scene.dim)
    for outside in {first - 1, position + 1} & set(range(300)):
        pages[outside] = 1e4  # the neighbours beyond either edge have no say
    assert torch.equal(scene.attend(q, sinks, [(0, position)]), got)
    pages[first] += 1.0
    assert not torch.equal(scene.attend(q, sinks, [(0, position)]), got)


def test_the_ring_forgets_what_no_query_needs() -> None:
    """A ring of window + step: 40 queries after 500 tokens see exactly their windows, wherever the ring stands."""
    scene = Scene([500, 333], 0, window=60, ring=99)
    for s, n in enumerate(scene.lengths):
        at = [(s, t) for t in range(n - 40, n)]
        q, sinks = queries(40, 2, scene.dim, seed=s)
        want = scene.by_hand(q, sinks, at)
        assert np.isfinite(want).all()
        np.testing.assert_allclose(scene.attend(q, sinks, at).numpy(), want, rtol=0, atol=1e-6)


# ---- sinks -------------------------------------------------------------------------------------------------------------
def test_sinks_are_in_the_denominator_only() -> None:
    scene = Scene([50], 4)
    q, _ = queries(1, 3, scene.dim)
    at = [(0, 49)]
    none = scene.attend(q, torch.full((3,), -torch.inf), at)
    np.testing.assert_allclose(none.numpy(), scene.by_hand(q, torch.full((3,), -1e9), at), rtol=0, atol=1e-6)
    sinks = torch.tensor([-3.0, 0.5, 30.0])
    knobs = dict(scene.addresses, dim=scene.dim)
    keys = gather_keys(scene.window_pages, scene.entry_pages, scene.block_table, torch.tensor([49]), 0, None, **knobs)
    p, share = attention_probabilities(q, keys, sinks, scale=scene.dim**-0.5)
    torch.testing.assert_close(p.sum(-1) + share, torch.ones(1, 3, dtype=torch.float64))
    with_sinks = scene.attend(q, sinks, at)  # the same direction, shorter by the sink's share
    torch.testing.assert_close(with_sinks.double(), none.double() * (1 - share)[..., None], rtol=1e-5, atol=1e-6)
    assert share[0, 2] > 0.99 and share[0, 0] < share[0, 1] < share[0, 2]
    huge = scene.attend(q, torch.full((3,), 1e5), at)  # exp(sink - max) must not overflow
    assert torch.equal(huge, torch.zeros_like(huge))


def test_large_scores_do_not_overflow() -> None:
    scene = Scene([20], 4)
    q, sinks = queries(1, 2, scene.dim)
    got = scene.attend(q * 1e4, sinks, [(0, 19)])
    assert torch.isfinite(got).all()
    attended = np.concatenate([scene.keys[0], scene.entries[0]])
    best = attended[np.argmax(attended @ q[0, 0].double().numpy())]
    np.testing.assert_allclose(got[0, 0].numpy(), best, atol=1e-5)


# ---- chosen entries ----------------------------------------------------------------------------------------------------
def test_a_list_of_all_entries_equals_no_list() -> None:
    """Spec 17 item 8; the order of the list and the empty slots in it do not matter."""
    scene = Scene([203, 90], 4, ring=203)
    at = [(0, 100), (0, 202), (1, 89), (1, 2)]
    q, sinks = queries(4, 3, scene.dim)
    topk = torch.full((4, 64), -1, dtype=torch.int32)
    for row, (_, t) in enumerate(at):
        visible = torch.randperm((t + 1) // 4).int()
        topk[row, torch.randperm(64)[: len(visible)]] = visible
    assert torch.equal(scene.attend(q, sinks, at, topk), scene.attend(q, sinks, at))


@pytest.mark.parametrize("record", ["plain", "fp8", "nvfp4"])
def test_only_the_chosen_entries_count(record: str) -> None:
    scene = Scene([203, 90], 4, ring=203, record=record)
    at = [(0, 100), (0, 202), (1, 89), (1, 2), (1, 70)]
    q, sinks = queries(5, 3, scene.dim)
    topk = torch.tensor([[3, -1, 24, 0], [48, 49, -1, 7], [21, 0, 1, 2], [-1, -1, -1, -1], [-1, 5, 16, -1]], dtype=torch.int32)
    got = scene.attend(q, sinks, at, topk)
    np.testing.assert_allclose(got.numpy(), scene.by_hand(q, sinks, at, topk), rtol=0, atol=1e-6)
    assert (got - scene.attend(q, sinks, at)).abs().max() > 1e-2
    for row, (s, t) in enumerate(at):
        assert scene.seen(s, t, topk[row : row + 1])[1] == set(topk[row].tolist()) - {-1}


# ---- batches -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("ratio", "entry_page"), [(0, 1), (4, 3), (128, 1)])
def test_a_query_does_not_depend_on_its_batch(ratio: int, entry_page: int) -> None:
    """Three sequences, queries interleaved, more than one block of them: bit for bit what each query alone gives."""
    scene = Scene([300, 140, 77], ratio, entry_page=entry_page, ring=260)
    at = [(s, scene.lengths[s] - 1 - i) for i in range(70) for s in range(3)]
    q, sinks = queries(len(at), 2, scene.dim)
    topk = None
    if ratio == 4:
        topk = torch.full((len(at), 9), -1, dtype=torch.int32)
        for row, (_, t) in enumerate(at):
            chosen = torch.randperm((t + 1) // 4)[:9].sort().values.int()
            topk[row, : len(chosen)] = chosen
    together = scene.attend(q, sinks, at, topk)
    for row in range(0, len(at), 11):
        one = slice(row, row + 1)
        alone = scene.attend(q[one], sinks, at[one], None if topk is None else topk[one])
        assert torch.equal(alone, together[one])
    for s in range(3):  # and each sequence alone
        rows = [i for i, (seq, _) in enumerate(at) if seq == s]
        alone = scene.attend(q[rows], sinks, [at[i] for i in rows], None if topk is None else topk[rows])
        assert torch.equal(alone, together[rows])


def test_no_query() -> None:
    scene = Scene([10], 4)
    empty = torch.empty(0, dtype=torch.int64)
    where = (scene.window_pages, scene.entry_pages, scene.block_table, empty, empty, None)
    got = attention(torch.empty(0, 2, scene.dim), torch.zeros(2), *where, scale=1.0, **scene.addresses)
    assert got.shape == (0, 2, scene.dim)
