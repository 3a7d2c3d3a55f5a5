"""The compressor's step against its oracle: the ring in every bit, keys up to roundings, and no races over the ring."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import dsv4lab
from dsv4lab import ops, sim
from dsv4lab.kernels.cache.plan import KeyPlan
from dsv4lab.kernels.compressor.api import compress
from dsv4lab.kernels.compressor.config import CompressConfig
from dsv4lab.kernels.compressor.operators import ENTRIES
from dsv4lab.records import allocate_index_pages, allocate_kv_pages
from dsv4lab.reference.cache import cache_read
from dsv4lab.reference.compressor import compress as oracle
from dsv4lab.reference.indexer import index_key_read
from dsv4lab.reference.rope import rope_frequencies
from tests.kernels.simulated import simulating

BF16, F32 = torch.bfloat16, torch.float32
PAGE = 4  # entries of a page, in the simulator
EPS = 1e-6
BOUND = 2.0**-20  # of a float32 key, relative to its largest value


@dataclass
class Scene:
    """A compressor of random weights, sequences that grow step by step, and everything twice: the oracle's and the kernel's."""

    ratio: int
    overlap: bool
    key: str
    record: str
    rounded: bool
    ring: int
    tokens: int  # that a sequence can have
    seqs: int = 3
    seed: int = 0
    page: int = PAGE
    contrast: float = 2.0  # of scores
    device: str = "cpu"
    config: CompressConfig | None = None
    lengths: list[int] = field(default_factory=list)  # of the sequences so far; nothing, unless given

    def __post_init__(self) -> None:
        self.g = torch.Generator().manual_seed(self.seed)
        self.dim = 512 if self.key == "kv" else 128
        self.width = self.dim * (2 if self.overlap else 1)
        self.dtype = BF16 if self.rounded else F32
        self.lengths = list(self.lengths) or [0] * self.seqs
        self.ape = self.rand(self.ratio, self.width)
        self.weight = (1 + 0.2 * self.rand(self.dim)).to(self.dtype)
        self.freq = rope_frequencies(rope_dim=64, theta=160000.0, scaling=None).to(self.device)
        blocks = -(-self.tokens // (self.page * self.ratio))
        table = torch.randperm(self.seqs * blocks, generator=self.g).int().view(self.seqs, blocks)
        table[-1, 0] = -1  # of a page that is not there
        self.table = table.to(self.device)
        state = self.rand(self.seqs, self.ring, 2, self.width)
        state[torch.tensor(self.lengths) == 0] = torch.nan  # what nobody may look at
        pool: dict[str, Any] = dict(num_pages=table.numel(), page_size=self.page, dim=self.dim, dtype=self.dtype)
        pool["device"] = self.device
        if self.key == "kv":
            pages = allocate_kv_pages(self.record, rope_dim=64, **pool)
        else:
            pages = allocate_index_pages(self.record, **pool)
        self.state, self.pages = [state, state.clone()], [pages, pages.clone()]

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.g).to(self.device)

    @property
    def knobs(self) -> dict[str, Any]:
        return dict(
            ratio=self.ratio,
            overlap=self.overlap,
            eps=EPS,
            record=self.record,
            page_size=self.page,
            key=self.key,
            rounded=self.rounded,
        )

    def inputs(self, step: list[tuple[int, int]], numbers: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """A step of (sequence, tokens): values and scores as halves of one matrix, and where they belong."""
        rows = [(s, self.lengths[s] + i, n) for s, n in step for i in range(n)]
        starts, at = {}, 0
        for s, n in step:
            starts[s], at = at, at + n
        if numbers is None:
            numbers = self.rand(len(rows), 2 * self.width)
        numbers = numbers.clone()
        plan = (
            [p for _, p, _ in rows],
            [s for s, _, _ in rows],
            [starts[s] for s, _, _ in rows],
            [self.lengths[s] + n - 1 for s, _, n in rows],
        )
        where = (torch.tensor(values, dtype=torch.int64, device=self.device) for values in plan)
        numbers[:, self.width :] *= self.contrast
        return numbers[:, : self.width], numbers[:, self.width :], *where

    def step(self, step: list[tuple[int, int]], numbers: torch.Tensor | None = None) -> None:
        """Both take the same step. The kernel is called as it stands, the oracle with the same arguments."""
        values, scores, *where = self.inputs(step, numbers)
        for which, function, more in ((0, oracle, {}), (1, compress, dict(config=self.config))):
            held = (self.ape, self.state[which], self.weight, self.freq, self.pages[which])
            function(values, scores, *held, *where, self.table, **self.knobs, **more)
        for s, n in step:
            self.lengths[s] += n

    def entries(self, which: int) -> torch.Tensor:
        """All records of the pool, decoded."""
        slots = torch.arange(self.table.numel() * self.page, device=self.device)
        where = dict(record=self.record, page_size=self.page, dim=self.dim)
        read = index_key_read if self.key == "index" else cache_read
        return read(self.pages[which], slots, **where, **(dict(rope_dim=64) if self.key == "kv" else {}))

    def check(self) -> None:
        """State in every bit; keys to float32's precision, or with few and small differences where roundings are."""
        want, got = (state.cpu().view(torch.int32) for state in self.state)
        assert torch.equal(want, got), f"{int((want != got).sum())} numbers of the ring differ"
        exact, found = (self.entries(which).cpu() for which in (0, 1))
        stored = exact.abs().amax(-1) > 0
        assert int(stored.sum()) > 0 and torch.equal(stored, found.abs().amax(-1) > 0)
        size = exact.abs().amax(-1, keepdim=True)
        error = (exact - found).abs()
        if not self.rounded and self.record == "plain":
            assert bool((error <= BOUND * size).all()), float((error / size.clamp(min=1e-30)).max())
            return
        # A pooled value next to a midpoint may be rounded the other way, and so may a code after it.
        step = {"plain": 2.0**-7, "fp8": 2.0**-3}.get(self.record, 0.5)
        assert bool((error <= step * size).all())
        assert float((error > 0).float().mean()) < 0.01


def simulated(
    scene: Scene, steps: list[list[tuple[int, int]]], arch: str = "sm_90a", *, races: bool = True, **how: Any
) -> Scene:
    """Steps of (sequence, tokens) pairs; a tuple (sequence, -n) takes back n tokens first."""
    with simulating(arch, multiprocessors=12, checks=sim.Checks(races=races), **how):
        for step in steps:
            for s, n in step:
                scene.lengths[s] += min(n, 0)
            scene.step([(s, n) for s, n in step if n > 0])
    return scene


def long_step(scene: Scene, tokens: int = 10**6, **other: Any) -> CompressConfig:
    """What a step of so many tokens has, for a short one."""
    element = "bf16" if scene.rounded else "f32"
    keys = KeyPlan(
        scene.key, scene.record, scene.dim, scene.page, element, element, element if scene.record == "plain" else "u8"
    )
    return replace(CompressConfig.for_shape(tokens, scene.ratio, keys, overlap=scene.overlap), **other)


# Steps: M >= R and below, one token, starts within blocks, rewinds, sequences in changing order, several entries a CTA.
STEPS = [
    [(1, 5), (0, 3), (2, 11)],
    [(0, 1)],
    [(2, 1), (1, 2), (0, 14)],
    [(1, -2), (1, 3), (0, 9), (2, 26)],
    [(0, -3), (2, -3), (2, 4), (0, 1), (1, 6)],
]


@pytest.mark.parametrize(
    ("arch", "schedule", "seed", "record", "rounded", "ring"),
    [
        ("sm_90a", "eager", 0, "plain", False, 8),
        ("sm_90a", "lazy", 0, "plain", False, 11),
        ("sm_90a", "random", 1, "plain", False, 9),
        ("sm_100a", "random", 2, "fp4", True, 11),
    ],
)
def test_index_keys(arch: str, schedule: str, seed: int, record: str, rounded: bool, ring: int) -> None:
    scene = Scene(4, True, "index", record, rounded, ring, 80, seed=seed, contrast=2.0 if seed else 50.0)
    steps = STEPS if ring > 8 else [[(s, n) for s, n in step if n > 0] for step in STEPS]
    simulated(scene, steps, arch, schedule=schedule, seed=seed).check()


@pytest.mark.parametrize(
    ("arch", "schedule", "record", "rounded"), [("sm_90a", "lazy", "plain", False), ("sm_100a", "random", "nvfp4", True)]
)
def test_csa_keys(arch: str, schedule: str, record: str, rounded: bool) -> None:
    """Many rows a CTA, as in a long step: neighbours complete entries of several sequences, made in turn. Then few rows."""
    scene = Scene(4, True, "kv", record, rounded, 11, 80, seqs=5, lengths=[5, 2, 8, 3, 7])
    scene.config = long_step(scene)
    steps = [[(1, 2), (0, 3), (2, 14)], [(1, -1), (2, -2), (1, 1), (3, 1), (4, 1), (2, 2), (0, 4)]]
    simulated(scene, steps, arch, schedule=schedule)
    scene.config = None
    simulated(scene, [[(0, 1), (1, 1), (2, 1), (3, 3)]], arch, schedule=schedule).check()


@pytest.mark.parametrize(
    ("arch", "schedule", "record", "rounded"), [("sm_90a", "lazy", "plain", False), ("sm_100a", "random", "fp8", True)]
)
def test_hca_keys(arch: str, schedule: str, record: str, rounded: bool) -> None:
    """One entry from the ring and this step, whose tokens go round and over it; one from the ring and one token; rewinds. The
    second step as long ones, and as its few tokens are: by clusters of eight, half a warp a token. Races of the many tokens are
    looked for once: how they go into the ring has no record in it.
    """
    scene = Scene(128, False, "kv", record, rounded, 130, 300, lengths=[68, 127, 253])
    scene.config = long_step(scene)
    simulated(scene, [[(0, 132), (1, 1), (2, 2)]], arch, races=record == "plain", schedule=schedule)
    simulated(scene, [[(2, -1), (2, 2)]], arch, schedule=schedule).check()
    scene.config = None
    simulated(scene, [[(1, -1), (2, -3), (1, 2), (2, 4)]], arch, schedule=schedule).check()


def test_many_entries_of_one_cluster() -> None:
    """A decode step whose entries a cluster makes in turn: the third one's parts are where the first one's were."""
    scene = Scene(128, False, "kv", "plain", False, 128, 150, seqs=4, lengths=[127, 127, 126, 127])
    scene.config = long_step(scene)
    simulated(scene, [[(s, 1) for s in range(4)]], schedule="lazy").check()


def test_a_guess_is_for_a_warp_s_first_entry() -> None:
    """Five entries come before the guessed one, so that it is its warp's second."""
    scene = Scene(8, False, "index", "plain", False, 16, 40, seqs=9, lengths=[8] + [7] * 5 + [0] * 3)
    scene.config = long_step(scene, 1200)
    simulated(scene, [[(s, 1) for s in range(1, 9)] + [(0, 8)]]).check()


@pytest.mark.parametrize(
    ("ratio", "overlap", "key", "cut", "tokens"),
    [(4, True, "index", [9, 1, 2, 3, 5], 10**6), (128, False, "kv", [58, 75], 10**6), (128, False, "kv", [58, 75], 1000)],
)
def test_chunks_change_nothing(ratio: int, overlap: bool, key: str, cut: list[int], tokens: int) -> None:
    """Keys and ring of a sequence, whole and in pieces: the same bits from the kernel."""
    whole, pieces = (Scene(ratio, overlap, key, "plain", False, ratio * 2 + 2, 140, seqs=2) for _ in range(2))
    numbers = whole.rand(sum(cut), 2 * whole.width)
    with simulating("sm_90a", multiprocessors=12):
        for scene, steps in ((whole, [sum(cut)]), (pieces, cut)):
            scene.config = long_step(scene, tokens)
            for count, part in zip(steps, numbers.split(steps), strict=True):
                scene.step([(0, count)], part)
            scene.check()
    assert torch.equal(whole.pages[1], pieces.pages[1]) and bool((whole.pages[1] != 0).any())
    assert torch.equal(whole.state[1].view(torch.int32)[0], pieces.state[1].view(torch.int32)[0])


def test_the_operator_on_nano_s_activations() -> None:
    """Compressors of the small model call it as it can be called; the indexer's keys of a text are the reference's."""
    model = dsv4lab.load(dsv4lab.nano(), dtype=BF16)
    with ops.observe() as calls:
        model.logits(torch.tensor(model.tokenizer.encode("import os\n\ndef main(argv):")))
    steps = [call.inputs for call in calls if call.name == "compress"]
    assert {(step["ratio"], step["key"]) for step in steps} == {(4, "kv"), (4, "index"), (128, "kv")}
    assert all(ENTRIES[0].refuses(**step) is None for step in steps)
    step = next(step for step in steps if step["key"] == "index")
    found, want = (step | {name: torch.zeros_like(step[name]) for name in ("state", "pages")} for _ in range(2))
    oracle(**want)
    with ops.backend("sim", arch="sm_90a") as simulated:
        ops.compress(**found)
    assert len(simulated.launches) == 1
    assert torch.equal(found["state"].view(torch.int32), want["state"].view(torch.int32))
    stored = want["pages"] != 0
    assert bool(stored.any()) and float((found["pages"] != want["pages"]).sum()) < 0.02 * float(stored.sum())
    # Constants that must be copied first are a kernel's results, which are read only when it has ended: the same bytes.
    strided = step | {name: torch.zeros_like(step[name]) for name in ("state", "pages")}
    strided["ape"] = step["ape"].t().contiguous().t()
    with ops.backend("sim", arch="sm_90a"):
        ops.compress(**strided)
    assert torch.equal(strided["state"].view(torch.int32), found["state"].view(torch.int32))
    assert torch.equal(strided["pages"], found["pages"])


# ---- plan and refusals -------------------------------------------------------------------------------------------------
KINDS = [(4, True, "kv"), (4, True, "index"), (128, False, "kv")]


@pytest.mark.parametrize(("ratio", "overlap", "key"), KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 64, 511, 4097, 8192, 10**6])
def test_choices_fit(ratio: int, overlap: bool, key: str, tokens: int) -> None:
    keys = KeyPlan(key, "fp8", 512 if key == "kv" else 128, 32)
    config = CompressConfig.for_shape(tokens, ratio, keys, overlap=overlap)
    config.check()
    assert config.groups * config.lanes * 4 * config.cluster == keys.dim
    assert config.slices * config.rounds * 8 == config.span
    clusters = -(-tokens // config.rows)
    # Every row is moved by one CTA, as the kernel counts them, and no CTA makes more entries of one sequence than it has teams,
    # unless all CTAs are there at once.
    ctas = clusters * config.cluster
    assert len({row // ctas for row in range(tokens)}) <= config.moved
    assert config.rows <= ratio * config.teams or (config.rows <= 8 * ratio and ctas >= 66 * config.resident)
    assert clusters >= min(tokens, 33) // config.teams  # so that a decode step's entries are made side by side
    if tokens <= 8:
        assert config.rows <= config.teams


def test_bad_input_is_refused_and_none_is_nothing() -> None:
    scene = Scene(4, True, "index", "plain", False, 8, 40)
    values, scores, *where = scene.inputs([(0, 2), (1, 3)])
    good = dict(zip(NAMES, (values, scores, scene.ape, scene.state[0], scene.weight, scene.freq), strict=False))
    good |= dict(zip(NAMES[6:], (scene.pages[0], *where, scene.table), strict=True))
    refuses = ENTRIES[0].refuses
    assert refuses(*good.values(), **scene.knobs) is None
    for change, knobs, message in (
        (dict(values=values.bfloat16()), {}, "values must be float32"),
        (dict(scores=scores[:4]), {}, r"scores must be \(M, o d\), like values, got \(4, 256\)"),
        (dict(values=values[:, ::2]), {}, "like values|columns together"),
        (dict(values=torch.zeros(5, 258)[:, :256]), {}, r"rows 4 floats apart, got strides \(258, 1\)"),
        (dict(ape=scene.ape[:3]), {}, r"ape must be contiguous \(4, 256\)"),
        (dict(norm_weight=scene.weight.half()), {}, "norm_weight must be bfloat16 or float32"),
        (dict(inv_freq=scene.freq[:16]), {}, r"inv_freq must be contiguous \(32,\)"),
        (dict(pages=scene.pages[0].half()), {}, "plain pages must be bfloat16 or float32"),
        (dict(positions=where[0].int()), {}, "positions must be int64"),
        (dict(seq_idx=where[1][:4]), {}, r"seq_idx must be contiguous \(5,\), got \(4,\)"),
        (dict(block_table=scene.table.long()), {}, "block_table must be int32"),
        ({}, dict(ratio=8), "ratio must be 4 with overlap, got 8"),
        ({}, dict(key="keys"), "kind must be kv or index"),
        ({}, dict(record="fp5"), "record must be one of|pages must be uint8"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            compress(*(good | change).values(), **(scene.knobs | knobs))
    at = torch.tensor([50, 51, 1, 2, 3])
    for change, message in (
        (dict(state=scene.state[0][:, :7].contiguous()), "state must have R >= 8"),
        (dict(positions=at - 51), "positions must be 0 to"),
        (dict(positions=at), "entries of block_table must be below 12"),
        (dict(positions=at % 48, block_table=scene.table * 0), "slots must name no place twice"),
        (dict(first_row=where[2] - 1), r"first_row must agree with .*, got -1 for position \d+ \(token 0\)"),
        (dict(first_row=torch.arange(5) * 0), r"first_row must agree with .*, got 0"),
        (dict(last_position=where[0] - 1), "last_position must agree with"),
    ):
        for function in (compress, oracle):
            with pytest.raises(ValueError, match=message):
                function(*(good | change).values(), **scene.knobs)
    for change, knobs, message in (
        (dict(state=scene.state[0].double()), {}, "state must be float32"),
        (dict(first_row=where[2].int()), {}, "first_row and last_position must be int64"),
        (dict(block_table=scene.table.long()), {}, "block_table must be int32"),
        ({}, dict(ratio=8), "ratio must be 4 with overlap"),
        ({}, dict(key="kv"), "kv keys must have 512 dims"),
        (dict(inv_freq=scene.freq[:16]), {}, "inv_freq must be"),
    ):
        assert message in str(refuses(*(good | change).values(), **(scene.knobs | knobs)))
    config = long_step(scene)
    with pytest.raises(ValueError, match="config must be for ratio 4"):
        compress(*good.values(), **scene.knobs, config=replace(config, keys=replace(config.keys, page_size=8)))
    for other, message in (
        (dict(ratio=16), "ratio must be 4 with overlap, got 16"),
        (dict(overlap=False), "ratio must be a power of two with a span of 8"),
        (dict(cluster=2), "dim must be 128 or 512"),
        (dict(rows=100), "rows must be at least 1"),
        (dict(warps=33), "warps must be a multiple of 1 up to 32"),
        (dict(warps=16, resident=1), "warps must all pool one entry, or each 8 tokens"),
        (dict(ratio=128, overlap=False, warps=2), "warps must have a thread for each of 128 channels"),
        (dict(resident=40), "resident must be"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **other).check()
    none = {name: good[name][:0] for name in ("values", "scores", *NAMES[7:11])}
    compress(*(good | none).values(), **scene.knobs)


NAMES = ("values", "scores", "ape", "state", "norm_weight", "inv_freq", "pages")
NAMES += ("positions", "seq_idx", "first_row", "last_position", "block_table")


# ---- GPU ---------------------------------------------------------------------------------------------------------------
def shared(total: int, seqs: int, g: torch.Generator) -> list[tuple[int, int]]:
    """A step of so many tokens, ragged over up to so many sequences, in any order."""
    cuts = sorted({0, total, *torch.randint(0, total + 1, (seqs - 1,), generator=g).tolist()})
    counts = [b - a for a, b in pairwise(cuts)]
    return list(zip(torch.randperm(seqs, generator=g).tolist(), counts, strict=False))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [1, 3, 8, 64, 513, 1025, 4097, 8192])
@pytest.mark.parametrize(("ratio", "overlap", "key"), KINDS)
def test_on_the_gpu(ratio: int, overlap: bool, key: str, tokens: int, seed: int) -> None:
    """A step after another that left blocks half full and rings half old; then one token more of each sequence."""
    for record, rounded in (("plain", False), ("plain", True), ("fp8", True), ("nvfp4" if key == "kv" else "fp4", True)):
        seqs = min(max(tokens // (2 * ratio), 4), 24)
        ring = ratio * (2 if overlap else 1) + 4
        more = 200 + 4 * ratio  # of which one sequence at least has a whole block
        most = 2 * tokens + more + 100
        scene = Scene(ratio, overlap, key, record, rounded, ring, most, seqs, seed, 128 // ratio, device="cuda")
        for step in (shared(tokens + more, seqs, scene.g), shared(tokens, seqs, scene.g), [(s, 1) for s in range(seqs)]):
            scene.step(step)
        scene.check()


@pytest.mark.gpu
@pytest.mark.parametrize(("ratio", "overlap", "key"), KINDS)
def test_a_cuda_graph_replays_with_new_inputs(ratio: int, overlap: bool, key: str) -> None:
    """Decode steps of three tokens for eight sequences, replayed until each has completed an HCA entry."""
    scene = Scene(ratio, overlap, key, "fp8", True, 2 * ratio + 4, 600, 8, 0, 128 // ratio, device="cuda")
    scene.step([(s, 20 + 13 * s) for s in range(8)])
    step = [(s, 3) for s in range(8)]
    static = scene.inputs(step)
    tables = (scene.ape, scene.state[1], scene.weight, scene.freq, scene.pages[1])
    before = [scene.state[1].clone(), scene.pages[1].clone()]
    compress(*static[:2], *tables, *static[2:], scene.table, **scene.knobs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compress(*static[:2], *tables, *static[2:], scene.table, **scene.knobs)
    for held, old in zip((scene.state[1], scene.pages[1]), before, strict=True):
        held.copy_(old)
    for _ in range(45):
        new = scene.inputs(step)
        for held, value in zip(static, new, strict=True):
            held.copy_(value)
        graph.replay()
        oracle(
            *new[:2], scene.ape, scene.state[0], scene.weight, scene.freq, scene.pages[0], *new[2:], scene.table, **scene.knobs
        )
        for s, n in step:
            scene.lengths[s] += n
    scene.check()
