"""Sampling kernels: noise, ids and accepted drafts equal to the reference's to the bit, in the simulator and on the GPU.

Top-p compares sums that are rounded differently here and there. A row is excused where an element's mass lies that close to
top_p; how rare that is, is asserted, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels.head.mtp.api import add_streams
from dsv4lab.kernels.head.mtp.config import AddConfig
from dsv4lab.kernels.head.operators import ENTRIES
from dsv4lab.kernels.head.sampler.api import accept_drafts, probabilities, sample
from dsv4lab.kernels.head.sampler.config import AcceptConfig, SamplerConfig
from dsv4lab.ops.weights import pack_all
from dsv4lab.reference import head
from dsv4lab.reference import sampling as S
from dsv4lab.reference.head import peaks_of
from tests.kernels.mixed import trained_weight
from tests.kernels.simulated import simulating

BF16, F32 = torch.bfloat16, torch.float32
INF = float("inf")
CLOSE = 2.0**-23  # of a mass to top_p, in parts of the whole: 2^-26 is the largest error seen, over 129,280 elements
BOUND = 2.0**-21  # relative, of a probability in float64; besides, x - max is rounded to float32

SMALL = SamplerConfig("sample", False, 512, cluster=2, warps=2)
PEAKS = replace(SMALL, peaks=True)
WIDE = SamplerConfig("sample", True, 0, cluster=8, warps=1, batch=1, integer="i32")


def simulated(function: Callable[..., Any], *args: Any, arch: str = "sm_90a", config: Any = None, **how: Any) -> Any:
    more = {} if config is None else {"config": config}
    with simulating(arch, multiprocessors=16, **how):
        return function(*args, **more)


def settings(batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every kind of row in turn: greedy, plain, each filter, both, neither though given; seeds and positions of 64 bits."""
    g = torch.Generator().manual_seed(seed)
    kinds = [
        (0.0, 0, 1.0),
        (1.0, 0, 1.0),
        (1.0, 5, 1.0),
        (0.6, 0, 0.7),
        (2.0, 40, 0.9),
        (1e-7, 0, 0.9),
        (0.8, 1, 1.0),
        (30.0, 7, 0.999),
        (1.0, 10**9, 0.0),
        (0.0, 3, 0.5),
    ]
    t, k, p = zip(*(kinds[i % len(kinds)] for i in range(batch)), strict=True)
    return {
        "temperature": torch.tensor(t),
        "top_k": torch.tensor(k),
        "top_p": torch.tensor(p),
        "seed": torch.randint(-(1 << 62), 1 << 62, (batch,), generator=g),
        "position": torch.randint(0, 1 << 40, (batch,), generator=g),
    }


def rows(kind: str, batch: int, vocab: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + vocab)
    x = 3 * torch.randn(batch, vocab, generator=g)
    if kind == "ties":
        return (x / 2).round()
    if kind == "equal":
        return torch.zeros(batch, vocab) * torch.tensor([1.0, -1.0])[torch.arange(vocab) % 2]  # of both signs
    if kind == "masked":
        x[torch.rand(batch, vocab, generator=g) < 0.7] = -INF
        x[:, vocab // 2] = 0.5
    if kind == "nothing":
        x.fill_(-INF)
    if kind == "close":
        return x * 1e-3
    if kind == "magnitudes":  # all exponents about equally often, so that every digit of the bits counts
        return x.sign() * 10.0 ** (-35 * torch.rand(batch, vocab, generator=g))
    if kind == "huge":
        return x * 1e30
    return x


def near_the_cut(logits: torch.Tensor, args: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B,) rows where top-p cuts so close to an element's mass that rounding may decide."""
    scaled = logits.double() / args["temperature"].clamp_min(1e-5).double()[:, None]
    ordered = scaled.sort(dim=-1, descending=True, stable=True).values
    rank = torch.arange(logits.shape[1], device=logits.device)
    kept = (rank < args["top_k"][:, None]) | (args["top_k"] <= 0)[:, None]
    before = ordered.masked_fill(~kept, -INF).softmax(-1).cumsum(-1)
    close = (before - args["top_p"].double()[:, None]).abs().amin(-1) < CLOSE
    return close & (args["top_p"] < 1) & (args["temperature"] > 0)


def check_sample(logits: torch.Tensor, args: dict[str, torch.Tensor], found: torch.Tensor) -> int:
    """Ids of the reference, but in excused rows; how many differ."""
    want = S.sample(logits, **args)
    assert found.dtype == torch.int64 and found.shape == want.shape
    different = found != want
    assert not different.any() or bool((~different | near_the_cut(logits, args)).all()), different.nonzero()
    return int(different.sum())


def check_probabilities(logits: torch.Tensor, args: dict[str, torch.Tensor], found: torch.Tensor) -> int:
    """The reference's elements are kept, but in excused rows, with its probabilities; how many rows differ."""
    args = {name: args[name] for name in ("temperature", "top_k", "top_p")}
    want = S.probabilities(logits, **args)
    undefined = want.isnan().any(-1)  # all logits -inf
    assert torch.equal(found.isnan().any(-1), undefined)
    normal = torch.maximum(found, want) > 1e-37
    different = (((found > 0) != (want > 0)) & normal).any(-1) & ~undefined
    assert not different.any() or bool((~different | near_the_cut(logits, args)).all()), different.nonzero()
    same = ~different & ~undefined
    scaled = (logits / args["temperature"].clamp_min(1e-5)[:, None]).double()[same].masked_fill(want[same] == 0, -INF)
    exact, down = scaled.softmax(-1), scaled.amax(-1, keepdim=True) - scaled
    error = (found[same].double() - exact).abs()
    close = error <= (BOUND + 2.0**-23 * down.nan_to_num(posinf=0.0)) * exact + 1e-37
    greedy = args["temperature"][same] <= 0
    assert bool((close.all(-1) | greedy).all()), float((error / exact.clamp_min(1e-30)).max())
    assert torch.equal(found[same][greedy], want[same][greedy])
    return int(different.sum())


def both(logits: torch.Tensor, args: dict[str, torch.Tensor], config: SamplerConfig, **how: Any) -> None:
    """Ids and distributions of the same rows; nothing in this material is close."""
    given = args | {"top_k": args["top_k"].int() if config.integer == "i32" else args["top_k"]}
    peaks = [peaks_of(logits)] if config.peaks else []
    found = simulated(sample, logits, *given.values(), *peaks, config=config, **how)
    assert check_sample(logits, args, found) == 0
    config = replace(config, what="probabilities")
    found = simulated(probabilities, logits, *list(given.values())[:3], *peaks, config=config, **how)
    assert check_probabilities(logits, args, found) == 0


# ---- noise -------------------------------------------------------------------------------------------------------------
def test_noise_is_the_reference_s_to_the_bit() -> None:
    from tests.kernels.noise_probe import probe

    g = torch.Generator().manual_seed(0)
    edges = [2**n + d for n in (0, 8, 22, 23, 24, 25, 30, 31) for d in (-1, 0, 1)] + [0, 2**32 - 1, 2**32 - 2, 2**32 - 129]
    quarter = [2**30 + d for d in range(-140, 140)]  # where the exponential changes its way
    word = torch.cat([torch.tensor(edges + quarter), torch.randint(0, 2**32, (2000,), generator=g)])
    word[300:800] = (1 << torch.randint(0, 33, (500,), generator=g)) - torch.randint(1, 3, (500,), generator=g)
    word.clamp_(0, 2**32 - 1)
    floats = [torch.zeros(word.numel()) for _ in range(3)]
    back, four = torch.zeros(word.numel()), torch.zeros(word.numel(), 4, dtype=torch.uint32)
    sim.enable("sm_90a")
    sim.run(probe, word.to(torch.uint32), *floats, four, back, options="--enable-tvm-ffi")
    w = S._uniform(word)
    for found, want in zip(floats, (w, S._exponential(w), -S._log(S._exponential(w))), strict=True):
        assert torch.equal(found, want)
    stream = torch.full_like(word, S.RESIDUAL)
    want = torch.stack(S.philox4x32((word, word[0].expand_as(word), word, stream), (word, word[1].expand_as(word))), -1)
    assert torch.equal(four.long(), want)
    value = word.to(torch.uint32).view(F32)
    assert torch.equal(back[~value.isnan()], value[~value.isnan()])


# ---- the simulator -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "vocab", "batch"),
    [
        ("plain", 515, 10),
        ("ties", 259, 10),
        ("masked", 515, 10),
        ("equal", 131, 5),
        ("nothing", 67, 10),
        ("close", 130, 10),
        ("magnitudes", 515, 10),
    ],
)
@pytest.mark.parametrize("config", [SMALL, PEAKS], ids=["", "peaks"])
def test_rows_of_every_kind(kind: str, vocab: int, batch: int, config: SamplerConfig) -> None:
    both(rows(kind, batch, vocab), settings(batch), config)


def test_equals_that_division_makes() -> None:
    """Of logits that T makes equal the lowest id goes first, which is not the largest logit's."""
    logits, args = 1e-7 * rows("plain", 10, 131), settings(10)
    args["temperature"].fill_(1e38)
    args["top_k"].fill_(3)
    assert (logits / 1e38).unique().numel() < 20
    both(logits, args, PEAKS)


@pytest.mark.parametrize("vocab", [1, 2, 7])
def test_vocabularies_smaller_than_a_group_and_a_cluster(vocab: int) -> None:
    both(rows("plain", 10, vocab), settings(10), SMALL)
    both(rows("plain", 10, vocab), settings(10), PEAKS)


def test_huge_and_infinite_logits() -> None:
    logits = rows("huge", 10, 67)
    logits[1, [9, 30]], logits[2, [60, 61]], logits[0, 5] = INF, INF, INF
    args = settings(10)
    found = simulated(sample, logits, *args.values(), config=SMALL)
    assert torch.equal(found, S.sample(logits, **args)) and found[:3].tolist() == [5, 9, 60]
    assert torch.equal(simulated(sample, logits, *args.values(), peaks_of(logits), config=PEAKS), found)


def test_rows_read_again_from_memory_by_a_cluster_of_eight() -> None:
    logits = rows("ties", 5, 652)
    logits[3] = rows("plain", 5, 652)[3]
    both(logits, settings(5, 1), WIDE, arch="sm_100a")
    both(logits, settings(5, 1), replace(WIDE, peaks=True, room=84), arch="sm_100a")


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random"])
def test_any_schedule_and_no_race(schedule: str) -> None:
    logits = rows("plain", 5, 259)
    logits[2], logits[4] = logits[2].round(), logits[4].round()  # cuts among equals, whose ids all CTAs must agree on
    how = dict(schedule=schedule, seed=3, checks=sim.Checks(races=True))
    both(logits, settings(5, 2), SMALL, **how)
    both(logits, settings(5, 2), PEAKS, **how)
    drafts = verification(3, 2, 130, "drawn")
    found = simulated(accept_drafts, *drafts, config=AcceptConfig(False, 4, 2), **how)
    assert same(found, S.accept_drafts(*drafts[:3], seed=drafts[3], position=drafts[4]))


def test_a_draw_does_not_depend_on_its_batch() -> None:
    logits, args = rows("plain", 10, 259), settings(10, 4)
    together = simulated(sample, logits, *args.values(), config=SMALL)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))[:4]
    some = simulated(sample, logits[order], *(v[order] for v in args.values()), config=SMALL)
    assert torch.equal(some, together[order])


# ---- drafts ------------------------------------------------------------------------------------------------------------
def verification(batch: int, drafts: int, vocab: int, kind: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed + vocab + drafts)
    target = torch.randn(batch, drafts + 1, vocab, generator=g)
    draft = target[:, :drafts] + 0.4 * torch.randn(batch, drafts, vocab, generator=g)
    sharpness = 6 * torch.rand(batch, 1, 1, generator=g)
    target, draft = (target * sharpness).softmax(-1), (draft * sharpness).softmax(-1)
    ids = torch.randint(0, vocab, (batch, drafts), generator=g)
    if kind == "drawn" and drafts:
        ids = draft.flatten(0, 1).multinomial(1, generator=g).view(batch, drafts)
    if kind == "greedy":
        target, draft = (torch.nn.functional.one_hot(p.argmax(-1), vocab).float() for p in (target, draft))
        ids = draft.argmax(-1)
    if kind == "equal":
        draft = target[:, :drafts].clone()
    if kind == "below":
        draft = 1.5 * target[:, :drafts]  # nothing is left of p - q: the token comes from p
    if kind == "tiny":
        target, draft = 1e-41 * target, 1e-41 * draft  # keys are denormal numbers or 0
    if kind == "zero":
        target = torch.zeros_like(target)
    where = torch.randint(-(1 << 62), 1 << 62, (batch,), generator=g), torch.randint(0, 1 << 40, (batch,), generator=g)
    return (target, draft, ids, *where)


def same(found: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


KINDS = ("random", "drawn", "greedy", "equal", "below", "tiny", "zero")


@pytest.mark.parametrize(("drafts", "vocab", "vector"), [(0, 130, False), (1, 1, False), (3, 1027, False), (35, 516, True)])
def test_accepted_drafts_are_the_reference_s(drafts: int, vocab: int, vector: bool) -> None:
    counts = set()
    for kind in KINDS:
        args = verification(4, drafts, vocab, kind)
        found = simulated(accept_drafts, *args, config=AcceptConfig(vector, 4, 2))
        assert same(found, S.accept_drafts(*args[:3], seed=args[3], position=args[4])), kind
        counts |= set(found[0].tolist())
    assert {0, drafts} <= counts


# ---- the prediction block's entry --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("e", "f", "shape"), [(BF16, BF16, (5, 4, 136)), (BF16, F32, (33, 3, 264))])
def test_streams_are_added_to_the_bit(e: torch.dtype, f: torch.dtype, shape: tuple[int, int, int]) -> None:
    g = torch.Generator().manual_seed(1)
    one, many = torch.randn(shape[0], shape[2], generator=g).to(e), torch.randn(*shape, generator=g).to(f)
    found = simulated(add_streams, one, many, schedule="lazy", checks=sim.Checks(races=True))
    assert torch.equal(found, (one.float()[:, None] + many.float()).to(f))


@pytest.mark.parametrize(("fmt", "act", "dtype"), [("fp8_block", "fp8", BF16)])
def test_the_entry_of_the_prediction_block(fmt: str, act: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    embedding, streams = torch.randn(3, 256, generator=g).to(dtype), torch.randn(3, 4, 256, generator=g).to(dtype)
    norms = [(torch.rand(256, generator=g) + 0.5).bfloat16() for _ in range(2)]
    weights = [trained_weight(fmt, 256, 256, seed=seed) for seed in (1, 2)]
    entry = next(entry for entry in ENTRIES if entry.operation == "mtp_input")
    args, how = (embedding, streams, *norms, *pack_all(*weights)), {"eps": 1e-6, "act": act}
    assert entry.refuses(*args, **how) is None
    found = simulated(lambda: entry.function(*args, **how))
    want = head.mtp_input(embedding, streams, *norms, *weights, **how)
    assert found.dtype == dtype and found.shape == want.shape
    assert (found - want).float().norm() < (2.0**-9 if dtype == BF16 else 2.0**-20) * want.float().norm()


# ---- plans and refusals ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocab", [1, 259, 32_000, 129_280, 129_281, 300_000, 524_288])
def test_choices_fit(vocab: int) -> None:
    for batch in (1, 2, 5, 16, 17, 64, 256, 4096):
        for what in ("sample", "probabilities"):
            config = SamplerConfig.for_shape(what, batch, vocab)
            config.check(vocab)
            assert config.vector == (vocab % 4 == 0) and config.slice(vocab) * config.cluster >= vocab
            assert (config.room > 0) == (vocab < 420_000)
        AcceptConfig.for_shape(batch, vocab).check(vocab)


def test_bad_input_is_refused_and_none_is_nothing() -> None:
    logits, args = torch.zeros(2, 8), settings(2)
    for changed, error, message in (
        ({"logits": logits.half()}, TypeError, "logits must be float32"),
        ({"logits": logits[0]}, ValueError, r"logits must be contiguous \(B, V\) with V >= 1, got \(8,\)"),
        ({"logits": torch.zeros(8, 2).t()}, ValueError, "logits must be contiguous"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must be contiguous \(2,\), one value a row, got \(3,\)"),
        ({"top_k": torch.ones(2)}, TypeError, "top_k must be int32 or int64, got torch.float32"),
        ({"top_p": torch.ones(2).double()}, TypeError, "top_p must be float32"),
        ({"seed": torch.ones(2).int()}, TypeError, "seed must be int64, got torch.int32"),
        ({"position": torch.ones(4).long()[::2]}, ValueError, "position must be contiguous"),
    ):
        with pytest.raises(error, match=message):
            sample(*({"logits": logits} | args | changed).values())
    for peaks, error, message in (
        (torch.zeros(2, 1), TypeError, r"peaks must be int64, got torch.float32"),
        (torch.zeros(2, 0).long(), ValueError, r"peaks must be contiguous \(2, 1\), got \(2, 0\)"),
    ):
        with pytest.raises(error, match=message):
            probabilities(logits, *list(args.values())[:3], peaks)
    with pytest.raises(ValueError, match="config must be for sample with top_k i64 and peaks=False"):
        sample(logits, *args.values(), config=PEAKS)
    target, draft, ids, seed, position = verification(2, 3, 8, "drawn")
    for bad, error, message in (
        ((target[:, :0], draft, ids), ValueError, r"target_probs must be \(B, n \+ 1, V\)"),
        ((target, target, ids), ValueError, r"draft_probs must be contiguous \(2, 3, 8\), got \(2, 4, 8\)"),
        ((target, draft, ids.int()), TypeError, "draft_ids must be int64"),
        ((target.double(), draft, ids), TypeError, "target_probs must be float32, got torch.float64"),
    ):
        with pytest.raises(error, match=message):
            accept_drafts(*bad, seed, position)
    for config, message in (
        (replace(SMALL, cluster=3), "cluster must be 1, 2, 4 or 8, got 3"),
        (replace(SMALL, what="logits"), "what must be one of sample, probabilities, got 'logits'"),
        (replace(SMALL, room=60_000), "room must be a multiple of 4 that fits"),
        (replace(SMALL, batch=3), "batch must be 1, 2 or 4"),
    ):
        with pytest.raises(ValueError, match=message):
            config.check()
    with pytest.raises(ValueError, match="room must be >= 520 for V=1037, got 512"):
        SMALL.check(1037)
    with pytest.raises(ValueError, match="vector must be false where V % 4 != 0, got V=7"):
        AcceptConfig(True, 1).check(7)
    with pytest.raises(ValueError, match="V must be <= 65536 for each CTA of a cluster of 8"):
        WIDE.check(524_292)
    with pytest.raises(ValueError, match=r"e and f must be \(M, D\) and \(M, S, D\) with D % 8 == 0"):
        add_streams(torch.zeros(2, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="streams must be 1 to 8, got 9"):
        AddConfig("bf16", "bf16", 9).check()
    none = {name: value[:0] for name, value in args.items()}
    assert sample(logits[:0], *none.values()).shape == (0,)
    assert probabilities(logits[:0], *list(none.values())[:3]).shape == (0, 8)
    assert accept_drafts(target[:0], draft[:0], ids[:0], seed[:0], position[:0])[0].shape == (0,)
    assert add_streams(torch.zeros(0, 8), torch.zeros(0, 3, 8)).shape == (0, 3, 8)


def test_operators_say_what_they_do_not_take() -> None:
    refuses = {entry.operation: entry.refuses for entry in ENTRIES}
    args = tuple(settings(2).values())
    assert (
        refuses["sample"](torch.zeros(2, 9), *args) is None and refuses["probabilities"](torch.zeros(2, 9), *args[:3]) is None
    )
    assert "logits must be float32" in str(refuses["sample"](torch.zeros(2, 9).bfloat16(), *args))
    assert "V from 1 to 524288" in str(refuses["sample"](torch.zeros(1, 524_289), *args))
    drafts = verification(2, 3, 8, "drawn")
    assert refuses["accept_drafts"](*drafts) is None
    assert "must be float32" in str(refuses["accept_drafts"](drafts[0].double(), *drafts[1:]))
    on_blackwell = {entry.operation for entry in ENTRIES if entry.arch == "sm_100a"}
    sampling, between = {"sample", "probabilities", "accept_drafts"}, {"decode_plan", "match_drafts", "advance_decode"}
    assert on_blackwell == sampling | between


# ---- GPU ---------------------------------------------------------------------------------------------------------------
def on_gpu(args: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in args.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("batch", "vocab"), [(1, 129_280), (3, 129_281), (10, 129_280), (17, 32_003), (70, 129_280), (256, 259)]
)
def test_on_the_gpu(batch: int, vocab: int, seed: int) -> None:
    different = 0
    for start in range(10 if batch < 10 else 1):  # so that every kind of row comes
        args = on_gpu({name: value[start : start + batch] for name, value in settings(batch + 10, seed).items()})
        for kind in ("plain", "ties", "masked", "equal", "close", "magnitudes"):
            logits = rows(kind, batch, vocab, seed).cuda()
            found = sample(logits, *args.values())
            assert torch.equal(found, sample(logits, *args.values()))  # not a matter of timing
            peaks = peaks_of(logits)
            assert torch.equal(found, sample(logits, *args.values(), peaks))
            different += check_sample(logits, args, found)
            again = probabilities(logits, *list(args.values())[:3])
            assert torch.equal(again, probabilities(logits, *list(args.values())[:3]))
            assert torch.equal(again, probabilities(logits, *list(args.values())[:3], peaks))
            different += check_probabilities(logits, args, again)
    assert different <= 1 + batch // 50  # of more than ten times that


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_top_p_differs_from_the_reference_as_rarely_as_rounding_does(seed: int) -> None:
    logits = torch.cat([rows("plain", 64, 129_280, seed) * s for s in (0.2, 0.5, 1.0, 2.0)]).cuda()
    args = on_gpu(settings(256, seed)) | {"temperature": torch.ones(256, device="cuda")}
    args |= {"top_k": torch.zeros_like(args["top_k"]), "top_p": torch.linspace(0.3, 0.999, 64, device="cuda").repeat(4)}
    found = probabilities(logits, *list(args.values())[:3])
    assert check_probabilities(logits, args, found) <= 5  # of 256: one element more or less, at masses of 1e-5 and less


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("batch", "drafts", "vocab"), [(1, 1, 129_280), (5, 3, 129_280), (64, 2, 32_003), (300, 4, 259)])
def test_accepted_drafts_on_the_gpu(batch: int, drafts: int, vocab: int, seed: int) -> None:
    for kind in KINDS:
        args = tuple(t.cuda() for t in verification(batch, drafts, vocab, kind, seed))
        found = accept_drafts(*args)
        assert same(found, S.accept_drafts(*args[:3], seed=args[3], position=args[4])), kind
        assert same(found, accept_drafts(*args))


def chi_squared(ids: torch.Tensor, probs: torch.Tensor) -> None:
    """Counts against probabilities, within 5 sigma; what has none must not occur."""
    counts = torch.bincount(ids, minlength=probs.numel()).double()
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0].double() * ids.numel()
    assert expected.min() > 10
    chi2 = float(((counts[probs > 0] - expected) ** 2 / expected).sum())
    freedom = int((probs > 0).sum()) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * max(freedom, 1)), (chi2, freedom)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 20, 1.0), (1.0, 0, 0.8), (0.9, 30, 0.9)]
)
def test_a_million_draws_follow_the_probabilities(temperature: float, top_k: int, top_p: float) -> None:
    logits = rows("plain", 1, 61)[0].cuda() / 3
    for half in range(2):  # many positions of one seed, then many seeds of one position
        ids = []
        for start in range(0, 500_000, 50_000):
            count = torch.arange(start, start + 50_000, device="cuda")
            one = torch.full_like(count, 7)
            size = dict(device="cuda", dtype=F32)
            args = (
                torch.full((50_000,), temperature, **size),
                torch.full_like(count, top_k),
                torch.full((50_000,), top_p, **size),
            )
            where = (one, count) if half == 0 else (count, one)
            ids.append(sample(logits.expand(50_000, -1).contiguous(), *args, *where))
        want = S.probabilities(
            logits[None].cpu(), temperature=args[0][:1].cpu(), top_k=args[1][:1].cpu(), top_p=args[2][:1].cpu()
        )
        chi_squared(torch.cat(ids).cpu(), want[0])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 20])
def test_a_cuda_graph_replays_with_new_inputs(batch: int) -> None:
    logits, args = rows("plain", batch, 129_280).cuda(), on_gpu(settings(batch))
    drafts = [t.cuda() for t in verification(batch, 2, 129_280, "drawn")]

    peaks = peaks_of(logits)

    def step() -> tuple[torch.Tensor, ...]:
        ids = sample(logits, *args.values(), peaks)
        return (ids, probabilities(logits, *list(args.values())[:3]), *accept_drafts(*drafts))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for seed in range(1, 8):
        logits.copy_(rows("plain", batch, 129_280, seed))
        peaks.copy_(peaks_of(logits))
        for name, value in settings(batch + seed, seed).items():
            args[name].copy_(value[seed:])
        for to, value in zip(drafts, verification(batch, 2, 129_280, "drawn", seed), strict=True):
            to.copy_(value)
        for _ in range(2):  # counters are as they were
            graph.replay()
        torch.cuda.synchronize()
        check_sample(logits, args, found[0])
        check_probabilities(logits, args, found[1])
        assert same(found[2:], S.accept_drafts(*drafts[:3], seed=drafts[3], position=drafts[4]))


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [4096, 7168])
@pytest.mark.parametrize("tokens", [1, 3, 129, 4097])
def test_streams_are_added_on_the_gpu(tokens: int, depth: int) -> None:
    for seed in range(3):
        g = torch.Generator(device="cuda").manual_seed(seed)
        one = torch.randn(tokens, depth, device="cuda", generator=g).bfloat16()
        many = torch.randn(tokens, 4, depth, device="cuda", generator=g).bfloat16()
        assert torch.equal(add_streams(one, many), (one.float()[:, None] + many.float()).bfloat16())
