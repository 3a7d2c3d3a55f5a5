"""Hyper-connections against float64: coefficients within 1e-5 of the exact ones, streams and inputs within a last place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dsv4lab.kernels.mhc.api as api
from dsv4lab import paging, sim
from dsv4lab.kernels.mhc.config import EmbedConfig, MixConfig, PostConfig, TogetherConfig
from dsv4lab.kernels.mhc.operators import ENTRIES
from dsv4lab.kernels.mhc.prepared import prepare, prepare_fragments, prepared
from dsv4lab.reference import mhc
from tests.kernels.simulated import simulating

BF16, F32 = torch.bfloat16, torch.float32
HOW = dict(eps=1e-6, hc_eps=1e-6, sinkhorn_iters=20)
HEAD_HOW = dict(eps=1e-6, hc_eps=1e-6)
BOUND = 1e-5  # of post and comb, relative
ULP = 2.0**-7  # of a BF16, relative to its smallest neighbour
ROUNDED_APART = 0.005  # share of results whose exact value lies next to a boundary of BF16

# Two slices, two warps to sum them.
PRE = MixConfig(128, 24, False, "bf16", warps=4, ahead=3, finish=2, ring=2)
POST_PRE = MixConfig(64, 24, True, "f32", warps=2, ahead=2, finish=1, ring=3)
HEAD = MixConfig(80, 4, False, "bf16", warps=1, ahead=2, finish=1, ring=2)  # five slices, chunks that leave lanes idle
# Clusters of two CTAs finish, in one kernel with four slices.
ONE = MixConfig(256, 24, False, "bf16", warps=4, ahead=1, finish=4, ring=1, split=2)

# Clusters of 16 CTAs: two stages, so that every place is used again; blocks of `fn` in registers and in shared memory.
TOGETHER = TogetherConfig(2048, 24, False, "bf16", warps=4, held=64, collapse=8, stages=2)
TOGETHER_POST = TogetherConfig(1024, 24, True, "f32", warps=4, held=64, collapse=4, stages=3)
TOGETHER_HEAD = TogetherConfig(1024, 4, False, "bf16", warps=8, held=16, collapse=8, stages=2)

Mix = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def material(tokens: int, columns: int, outputs: int = 24, seed: int = 0, weight: torch.dtype = BF16) -> Mix:
    """streams of very different sizes, fn, base, scale, norm weight: logits of a few units."""
    g = torch.Generator().manual_seed(seed + 7 * tokens + columns)
    streams = torch.randn(tokens, 4, columns, generator=g) * torch.exp(2 * torch.randn(tokens, 1, 1, generator=g))
    fn = torch.randn(outputs, 4 * columns, generator=g) / (4 * columns) ** 0.5
    scale = 0.5 + torch.rand(3 if outputs > 4 else 1, generator=g)
    return (
        streams.to(BF16),
        fn,
        torch.randn(outputs, generator=g),
        scale,
        (1 + 0.1 * torch.randn(columns, generator=g)).to(weight),
    )


def written(tokens: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, post and comb of the sub-layer before."""
    g = torch.Generator().manual_seed(seed + tokens)
    comb = mhc.sinkhorn(torch.randn(tokens, 4, 4, generator=g), iters=20, eps=1e-6).float()
    return torch.randn(tokens, columns, generator=g).to(BF16), 2 * torch.rand(tokens, 4, generator=g), comb


def exact(
    streams: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """pre, post and comb in float64 throughout: the reference rounds products to float32."""
    v = streams.double().flatten(1)
    mix = (v @ fn.double().t()) * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-6)
    base, scale = base.double(), scale.double()
    pre = torch.sigmoid(mix[:, :4] * scale[0] + base[:4]) + 1e-6
    if fn.shape[0] == 4:
        return pre, pre, pre
    post = 2 * torch.sigmoid(mix[:, 4:8] * scale[1] + base[4:8])
    logits = (mix[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4)
    return pre, post, mhc.sinkhorn(logits, iters=20, eps=1e-6)


def relative(found: torch.Tensor, want: torch.Tensor) -> float:
    return float(((found.double() - want).abs() / want.abs()).max())


def check_rounded(
    found: torch.Tensor, want: torch.Tensor, size: torch.Tensor | float = 0.0, apart: float = ROUNDED_APART
) -> None:
    """Equal but for the last place where the exact value is that near to a boundary. size: of the terms that were added."""
    assert found.dtype == want.dtype and found.shape == want.shape
    slack = ULP * want.double().abs() + 2.0**-20 * torch.as_tensor(size)
    assert bool(((found.double() - want.double()).abs() <= slack).all())
    assert float((found != want).double().mean()) <= apart


def check_input(x: torch.Tensor, streams: torch.Tensor, pre: torch.Tensor, weight: torch.Tensor) -> None:
    u = (pre[:, :, None] * streams.double()).sum(1)
    size = (pre[:, :, None] * streams.double().abs()).sum(1) / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    rounded = u.to(BF16).double()
    want = rounded * torch.rsqrt(rounded.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    # u itself may have been rounded the other way, and x has then one place more to be off
    assert bool(((x.double() - want).abs() <= 2 * ULP * want.abs() + 2.0**-18 * size * weight.double().abs()).all())
    assert float((x != want.to(BF16)).double().mean()) <= 4 * ROUNDED_APART


def check_mix(args: Mix, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> float:
    """The largest relative error of a coefficient, after everything that must hold has been asserted."""
    want = exact(*args[:4])
    assert x.dtype == BF16 and post.dtype == comb.dtype == F32 and comb.shape == want[2].shape
    error = max(relative(post, want[1]), relative(comb, want[2]))
    assert error < BOUND, error
    check_input(x, args[0], want[0], args[4])
    return error


def simulate(arch: str, function, *args: object, multiprocessors: int = 3, how: dict | None = None, **kwargs: object):  # type: ignore[no-untyped-def]
    with simulating(arch, multiprocessors=multiprocessors, **(how or {})):
        return function(*args, **kwargs)


RACES = dict(checks=sim.Checks(races=True))


@pytest.mark.parametrize(
    ("arch", "tokens", "how"),
    [
        ("sm_90a", 1, {}),
        ("sm_90a", 3, dict(schedule="lazy", **RACES)),
        ("sm_90a", 37, {}),
        ("sm_90a", 53, dict(schedule="random", seed=3, **RACES)),  # 18 tokens a CTA: three batches of Sinkhorn
        ("sm_90a", 129, {}),
    ],
)
def test_pre(arch: str, tokens: int, how: dict) -> None:
    args = material(tokens, 128)
    assert check_mix(args, *simulate(arch, api.mhc_pre, *args, config=PRE, how=how, **HOW)) < BOUND / 2


@pytest.mark.parametrize(
    ("arch", "tokens", "how"),
    [
        ("sm_100a", 37, dict(schedule="lazy", **RACES)),
        ("sm_100a", 129, dict(schedule="random", seed=1)),
        ("sm_100a", 20, dict(schedule="eager", **RACES)),
    ],
)
def test_post_pre_is_post_then_pre(arch: str, tokens: int, how: dict) -> None:
    args, before = material(tokens, 64, weight=F32), written(tokens, 64)
    y, post, comb = before
    new, *found = simulate(arch, api.mhc_post_pre, y, args[0], post, comb, *args[1:], config=POST_PRE, how=how, **HOW)
    assert torch.equal(new, simulate(arch, api.mhc_post, y, args[0], post, comb))  # in every bit
    check_rounded(new, mhc.mhc_post(y, args[0], post, comb), args[0].double().abs().sum(1, keepdim=True))
    check_mix((new, *args[1:]), *found)


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize(
    ("columns", "split", "tokens", "how"),
    [
        (256, 2, 1, dict(schedule="lazy", **RACES)),
        (1024, 8, 3, dict(schedule="random", seed=1, **RACES)),
        (512, 4, 16, dict(schedule="eager", **RACES)),
    ],
)
def test_one_kernel_projects_and_finishes(columns: int, split: int, tokens: int, post: bool, how: dict) -> None:
    args, before = material(tokens, columns, weight=F32), written(tokens, columns)
    config = replace(ONE, columns=columns, post=post, weight="f32", split=split)
    if not post:
        check_mix(args, *simulate("sm_90a", api.mhc_pre, *args, config=config, how=how, **HOW))
        return
    y, old_post, old_comb = before
    given = (y, args[0], old_post, old_comb)
    new, *found = simulate("sm_90a", api.mhc_post_pre, *given, *args[1:], config=config, how=how, **HOW)
    assert torch.equal(new, simulate("sm_90a", api.mhc_post, *given))  # in every bit
    check_mix((new, *args[1:]), *found)


@pytest.mark.parametrize("seed", range(4))
def test_a_slice_is_waited_for_by_one_warp_only(seed: int) -> None:
    """Three slices for two warps: a sum that another warp has cleared must not be waited for again, as it was on an H200."""
    args = material(4, 48)
    plan = MixConfig(48, 24, False, "bf16", warps=1, ahead=2, finish=2, ring=2)
    how = dict(schedule="random", seed=seed)
    assert check_mix(args, *simulate("sm_90a", api.mhc_pre, *args, config=plan, how=how, **HOW)) < BOUND


@pytest.mark.parametrize(("config", "tokens"), [(HEAD, 1), (HEAD, 37), (replace(ONE, outputs=4), 3)])
def test_head(config: MixConfig, tokens: int) -> None:
    args = material(tokens, config.columns, 4)
    how = dict(schedule="lazy", **RACES)
    x = simulate("sm_90a", api.mhc_head, *args, config=config, multiprocessors=2, how=how, **HEAD_HOW)
    check_input(x, args[0], exact(*args[:4])[0], args[4])


@pytest.mark.parametrize(
    ("columns", "tokens", "how"),
    [
        (1024, 16 * 16 + 1, dict(schedule="lazy")),  # 17 tiles: a third batch of Sinkhorn, of one token
        (2048, 33, dict(schedule="random", seed=2, **RACES)),
        (3072, 17, dict(schedule="lazy", **RACES)),
    ],
)
def test_pre_by_clusters(columns: int, tokens: int, how: dict) -> None:
    """`fn` as three BF16, and of 3072 columns as two FP16, where half of the warps have a block fewer; in registers, and in
    shared memory.
    """
    args, config = material(tokens, columns), replace(TOGETHER, columns=columns, buffers=columns // 1024 % 2 + 1)
    if columns == 3072:
        config = replace(config, scaled=True, warps=8)
    assert check_mix(args, *simulate("sm_90a", api.mhc_pre, *args, config=config, how=how, **HOW)) < BOUND / 2


def test_pre_by_clusters_of_blackwell() -> None:
    args = material(1, 2048)
    assert check_mix(args, *simulate("sm_100a", api.mhc_pre, *args, config=TOGETHER, **HOW)) < BOUND / 2


@pytest.mark.parametrize(
    ("columns", "tokens", "how"),
    [
        (1024, 130, dict(schedule="random", seed=1)),
        (1024, 20, dict(schedule="lazy", **RACES)),
        (3072, 20, dict(schedule="random", seed=2, **RACES)),  # two FP16, and warps with a block fewer
    ],
)
def test_post_pre_by_clusters(columns: int, tokens: int, how: dict) -> None:
    args, before = material(tokens, columns, weight=F32), written(tokens, columns)
    y, post, comb = before
    config, many = TOGETHER_POST, dict(multiprocessors=32)  # two clusters
    if columns == 3072:
        config = replace(config, columns=columns, scaled=True, warps=8, stages=2)
    new, *found = simulate("sm_90a", api.mhc_post_pre, y, args[0], post, comb, *args[1:], config=config, how=how, **many, **HOW)
    assert torch.equal(new, simulate("sm_90a", api.mhc_post, y, args[0], post, comb))  # in every bit
    check_mix((new, *args[1:]), *found)


@pytest.mark.parametrize("tokens", [1, 70])
def test_head_by_clusters(tokens: int) -> None:
    args = material(tokens, 1024, 4)
    x = simulate("sm_90a", api.mhc_head, *args, config=TOGETHER_HEAD, **HEAD_HOW)
    check_input(x, args[0], exact(*args[:4])[0], args[4])


def test_clusters_keep_numbers_that_are_none_and_zeros_with_their_token() -> None:
    streams, *rest = material(20, 1024)
    streams[3, 1, 5], streams[7, 0, 0], streams[17] = float("nan"), float("inf"), 0.0
    streams[9] *= 2.0**-120  # FP16 has no such numbers, the scale of its block does
    config = replace(TOGETHER, columns=1024)
    x, post, comb = simulate("sm_90a", api.mhc_pre, streams, *rest, config=config, **HOW)
    good = torch.tensor([token not in (3, 7) for token in range(20)])
    for value in (x, post, comb):
        assert bool(value[good].isfinite().all()) and bool(value[3].isnan().any()) and bool(value[7].isnan().any())
    assert not x[17].any()
    want = exact(streams[good], *rest[:3])
    assert relative(post[good], want[1]) < BOUND and relative(comb[good], want[2]) < BOUND


def test_streams_that_nearly_cancel() -> None:
    """The length of u is that of the streams' products, whose own last place shows where u is small beside its terms."""
    streams, fn, base, scale, weight = material(16, 1024, 4)
    streams[:, 1] = (-streams[:, 0].float() * torch.linspace(0.5, 0.95, 16)[:, None]).bfloat16()
    streams[:, 2:] = 0.0
    fn, base = fn * 0, torch.zeros(4)  # both weigh the same
    x = simulate("sm_90a", api.mhc_head, streams, fn, base, scale, weight, config=TOGETHER_HEAD, **HEAD_HOW)
    check_input(x, streams, exact(streams, fn, base, scale)[0], weight)
    streams[:, 1] = -streams[:, 0]
    x = simulate("sm_90a", api.mhc_head, streams, fn, base, scale, weight, config=TOGETHER_HEAD, **HEAD_HOW)
    assert float(x.abs().max()) < 0.01  # what is left of rounding pre X, and eps


def test_flash_s_own_choice_for_a_few_tokens() -> None:
    args = material(3, 4096)
    found = simulate("sm_90a", api.mhc_pre, *args, multiprocessors=132, **HOW)
    assert check_mix(args, *found) < 2e-6  # K = 16384, and no trace of the tensor core's rounding


@pytest.mark.parametrize(
    ("arch", "tokens", "columns", "config"), [("sm_90a", 3, 1040, None), ("sm_100a", 9, 64, PostConfig(1, 3))]
)
def test_post(arch: str, tokens: int, columns: int, config: PostConfig | None) -> None:
    streams, (y, post, comb) = material(tokens, columns)[0], written(tokens, columns)
    how = dict(schedule="random", **RACES)
    new = simulate(arch, api.mhc_post, y, streams, post, comb, config=config, how=how)
    check_rounded(new, mhc.mhc_post(y, streams, post, comb), streams.double().abs().sum(1, keepdim=True))


@pytest.mark.parametrize(("dtype", "ids", "streams"), [(BF16, torch.int64, 4), (F32, torch.int32, 1)])
def test_embedding(dtype: torch.dtype, ids: torch.dtype, streams: int) -> None:
    weight = torch.randn(50, 1032).to(dtype)  # a row's last piece is short
    token_ids = torch.randint(-50, 50, (37,)).to(ids)
    found = simulate("sm_90a", api.embed_streams, token_ids, weight, num_streams=streams)
    assert torch.equal(found, mhc.embed_streams(token_ids, weight, num_streams=streams))
    with paging.checked(False):
        wild = simulate("sm_90a", api.embed_streams, torch.full_like(token_ids, 2**30), weight, num_streams=streams)
    assert torch.equal(wild, weight[-1].expand_as(wild))


BOTH = pytest.mark.parametrize("config", [PRE, replace(TOGETHER, columns=1024)])


@BOTH
@pytest.mark.parametrize("size", [12.0, 60.0, 300.0, 1e4])
def test_saturated_coefficients(size: float, config: MixConfig | TogetherConfig) -> None:
    """Logits of both signs, where e^z is 0 or infinite in float32."""
    streams, fn, base, scale, weight = material(16, config.columns)
    base = base.sign() * size * torch.linspace(0.5, 1.0, 24)
    args = (streams, fn, base, scale, weight)
    x, post, comb = simulate("sm_90a", api.mhc_pre, *args, config=config, **HOW)
    want = exact(*args[:4])
    clear = want[1] > 1e-36  # what float32 keeps to its full precision
    assert relative(post[clear], want[1][clear]) < BOUND and bool((post[~clear] < 2e-36).all())
    assert relative(comb, want[2]) < BOUND
    if config is PRE:
        check_input(x, streams, want[0], weight)


@BOTH
@pytest.mark.parametrize("least", [-1e3, -torch.inf])
def test_first_logits_may_be_far_below_the_others(config: MixConfig | TogetherConfig, least: float) -> None:
    args = material(16, config.columns)
    args[2][8::4], args[1][7, 0] = least, torch.nan
    _, post, comb = simulate("sm_90a", api.mhc_pre, *args, config=config, **HOW)
    assert relative(comb, exact(*args[:4])[2]) < BOUND and bool(post[:, 3].isnan().all())


@pytest.mark.parametrize("hc_eps", [0.0, 0.5])
def test_what_is_added_to_sums(hc_eps: float) -> None:
    streams, fn, base, scale, weight = material(9, 128)
    _, _, comb = simulate("sm_90a", api.mhc_pre, streams, fn, base, scale, weight, config=PRE, **HOW | dict(hc_eps=hc_eps))
    logits = (mhc.mhc_mix(streams, fn, eps=1e-6)[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4)
    assert relative(comb, mhc.sinkhorn(logits, iters=20, eps=hc_eps)) < BOUND


def test_steep_logits_lose_what_float32_products_lose() -> None:
    """Steep: an error of 2^-22 of a logit of a hundred is one of 2^-15 of e^z, where another is near."""
    streams, fn, base, scale, weight = material(37, 128)
    args = (streams, fn, base, scale * 100, weight)
    _, _, comb = simulate("sm_90a", api.mhc_pre, *args, config=PRE, **HOW)
    assert relative(comb, exact(*args[:4])[2]) < 3e-4


@pytest.mark.parametrize(("config", "tokens"), [(PRE, 20), (ONE, 16)])
def test_numbers_that_are_none_stay_with_their_token(config: MixConfig, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams, fn, base, scale, weight = material(tokens, config.columns)
    last = tokens - 2  # of 20, in another tile of the projection
    streams[3, 1, 5], streams[last, 0, 0] = torch.nan, torch.inf
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = api._sums
    monkeypatch.setattr(api, "_sums", lambda *a: kept.append(original(*a)) or kept[-1])
    x, _, comb = simulate("sm_90a", api.mhc_pre, streams, fn, base, scale, weight, config=config, **HOW)
    assert bool(comb[[3, last]].isnan().all()) and bool(x[3].isnan().all())
    rest = [i for i in range(tokens) if i not in (3, last)]
    check_mix((streams[rest], fn, base, scale, weight), x[rest], simulate_post(streams[rest], fn, base, scale), comb[rest])
    assert len(kept) == 1 and bool((kept[0][0] == -1).all())  # cleared for the next launch, NaN or not


def test_many_tokens_take_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    args = material(37, 128)
    whole = simulate("sm_90a", api.mhc_pre, *args, config=PRE, **HOW)
    monkeypatch.setattr(api, "MAX_TOKENS", 16)
    parts = simulate("sm_90a", api.mhc_pre, *args, config=PRE, **HOW)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))  # a token does not depend on its neighbours


def simulate_post(streams: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return exact(streams, fn, base, scale)[1].float()


def test_fn_in_parts_is_fn() -> None:
    """Three BF16 give all 24 bits back; two would be 2^-17 off. And every number is where its lane looks for it."""
    g = torch.Generator().manual_seed(1)
    fn = torch.randn(24, 4 * 48, generator=g) * torch.exp(4 * torch.randn(24, 4 * 48, generator=g))
    words = prepare(fn)
    assert words.shape == (3, 18, 32, 4)
    parts = words.permute(0, 2, 1, 3).reshape(3, 32, 72).contiguous().view(BF16)
    parts = parts.view(3, 8, 4, 4, 3, 3, 2, 2).double()  # block, g, q, stream, part, tile, half, pair
    back = parts.sum(4).permute(4, 1, 3, 0, 2, 5, 6).reshape(24, 4 * 48)
    assert torch.equal(back.float(), fn)
    two = parts[:, :, :, :, :2].sum(4).permute(4, 1, 3, 0, 2, 5, 6).reshape(24, 4 * 48)
    assert 2.0**-19 < relative(two, fn.double()) < 2.0**-16
    assert prepare(fn[:4]).shape == (3, 6, 32, 4)


@pytest.mark.parametrize("scaled", [False, True])
def test_fn_in_fragments_is_fn(scaled: bool) -> None:
    """24 bits of every number, less a row of comb's first; scaled 22 bits within 2^-14 of the largest. Each where `ldmatrix`
    has its streams.
    """
    g = torch.Generator().manual_seed(1)
    fn = torch.randn(24, 4 * 48, generator=g) * torch.exp(4 * torch.randn(24, 1, generator=g))
    fn[5], fn[6, 1:], fn[6, 0], fn[8::4] = 0.0, 0.0, 1e-30, 2.0**-30 * fn[9::4]  # differences are float32, or nearly
    rows = torch.cat([fn[:8].double(), *(fn[i : i + 3].double() - fn[i - 1].double() for i in (9, 13, 17, 21))])
    for outputs in (4, 24):
        order = replace(TOGETHER, outputs=outputs, scaled=scaled).order
        words, unit = prepare_fragments(fn[:outputs], scaled=scaled)
        assert words.shape == (3, 2 * len(order), 32, 4) and unit.shape == (outputs - outputs // 6,)
        numbers = words.permute(0, 2, 1, 3).reshape(3, 32, -1).contiguous().view(torch.float16 if scaled else BF16)
        numbers = numbers.view(3, 8, 4, 4, len(order), 2, 2).double()  # block, g, q, stream, product, half, pair
        products = numbers.permute(4, 1, 3, 0, 5, 2, 6).reshape(len(order), 8, 4 * 48)
        tiles = products.new_zeros(max(order) + 1, 8, 4 * 48).index_add_(0, torch.tensor(order), products)
        back = torch.cat([*tiles[:-1], tiles[-1, :4] + tiles[-1, 4:]])
        want = rows[: len(back)] / unit.double()[:, None]
        if scaled:
            assert bool(((back - want).abs() <= want.abs() * 2.0**-22 + want.abs().amax(1, keepdim=True) * 2.0**-38).all())
            largest = back.abs().amax(1)
            assert bool(((largest >= 2**14) & (largest <= 2**15) | (rows[: len(back)] == 0).all(1)).all())
        else:
            assert torch.equal(back[:8].float(), fn[: min(outputs, 8)]) and bool((unit == 1).all())
            assert outputs == 4 or relative(back[8:], want[8:]) < 2.0**-24


def test_fn_is_prepared_once_and_again_when_it_changes() -> None:
    fn = torch.randn(24, 64)
    first = prepared(fn)
    assert prepared(fn) is first
    fn[0, 0] += 1
    second = prepared(fn)
    assert second is not first and torch.equal(second, prepare(fn))


@pytest.mark.parametrize(
    ("columns", "multiprocessors"), [(128, 132), (4096, 132), (7168, 132), (4096, 148), (7168, 148), (11 * 16, 132)]
)
def test_choices_fit_and_fill_the_gpu(columns: int, multiprocessors: int) -> None:
    for tokens in (1, 3, 16, 17, 37, 129, 132, 133, 1024, 4001, 8192):
        for post in (False, True):
            plan = MixConfig.for_shape(tokens, columns, 24, post, "bf16", multiprocessors)
            plan.check()
            groups = min(max(multiprocessors // plan.slices, 1), -(-tokens // 16))
            assert plan.slices * plan.warps * 16 == columns and groups * plan.slices <= multiprocessors
            if columns >= 4096:
                assert groups * plan.slices >= 0.75 * multiprocessors
            # One CTA of each kernel on a multiprocessor: a quarter's registers, by warps of either kernel, and shared memory.
            project, finish = (65536 // bound // 8 * 8 for bound in (plan.project_bound, plan.finish_bound))
            if tokens > multiprocessors:
                assert -(-plan.warps // 4) * project + -(-plan.finish_threads // 128) * finish <= 16384 // 32
                assert plan.slot_bytes * plan.ring + plan.fixed_bytes + 32 * 1024 <= 228 * 1024
    assert MixConfig.for_shape(1, 4096, 24, False, "bf16", 132).slices == 128
    assert MixConfig.for_shape(8192, 4096, 24, False, "bf16", 132).slices == 32
    for tokens, columns, many, split in (
        (8, 7168, 132, 8),
        (9, 7168, 132, 1),
        (4, 4096, 78, 8),
        (5, 4096, 78, 1),
        (1, 512, 132, 1),
    ):
        assert MixConfig.for_shape(tokens, columns, 24, True, "bf16", many).split == split


@pytest.mark.parametrize("columns", [1024, 2048, 4096, 7168])
def test_clusters_fit(columns: int) -> None:
    for outputs, post in ((24, False), (24, True), (4, False)):
        for weight in ("bf16", "f32"):
            plan = TogetherConfig.for_shape(8192, columns, outputs, post, weight)
            assert plan is not None and plan.stages >= 2
            plan.check()
            warps = plan.threads // 32
            start = 65536 // plan.threads // 8 * 8 * warps
            project, collapse, others = plan.registers
            assert plan.warps * project + plan.collapse * collapse + 4 * others <= start
            assert project >= plan.held + 4 * plan.tiles + 8 and plan.scaled == (columns == 7168 and outputs == 24)
            assert plan.per_warp * plan.warps >= plan.blocks and plan.slice * 16 == columns
    assert TogetherConfig.for_shape(8192, 1024 + 512, 24, False, "bf16") is None
    assert TogetherConfig.for_shape(1, 4096, 24, True, "bf16") is not None
    assert TogetherConfig.for_shape(8, 7168, 24, True, "bf16") is None
    wrong = dict(columns=1000, warps=5, held=70, buffers=3, collapse=6)
    for name, value in [*wrong.items(), ("held", 148), ("stages", 1), ("stages", 60)]:
        with pytest.raises(ValueError, match="must"):
            replace(TOGETHER, **{name: value}).check()


def test_bad_input_is_refused_and_none_is_nothing() -> None:
    streams, fn, base, scale, weight = args = material(4, 64)
    y, post, comb = written(4, 64)
    for bad, message in (
        ((streams.float(), *args[1:]), "streams must be bfloat16, got torch.float32"),
        ((streams[:, :2].contiguous(), *args[1:]), r"streams must be \(M, 4, D\) with D % 16 == 0, got S=2, D=64"),
        ((streams[:, :, :40].contiguous(), *args[1:]), "with D % 16 == 0, got S=4, D=40"),
        ((streams.transpose(0, 1), *args[1:]), "streams must be contiguous"),
        ((streams, fn[:4], *args[2:]), r"fn must be contiguous \(24, 256\), got \(4, 256\)"),
        ((streams, fn.double(), *args[2:]), "fn must be float32, got torch.float64"),
        ((streams, fn, base, scale[:1], weight), r"scale must be contiguous \(3,\), got \(1,\)"),
        ((*args[:4], weight.half()), "norm_weight must be bfloat16 or float32"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            api.mhc_pre(*bad, **HOW)
    for wrong, message in (
        (dict(sinkhorn_iters=0), "sinkhorn_iters must be at least 1, got 0"),
        (dict(hc_eps=1.0), "hc_eps must be at least 0 and below 1, got 1.0"),
        (dict(eps=0.0), "eps must be finite and at least 1e-30, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            api.mhc_pre(*args, **HOW | wrong)
    many = material(17, 256)
    with pytest.raises(ValueError, match="config with split must be for up to 16 tokens, got 17"):
        simulate("sm_90a", api.mhc_pre, *many, config=ONE, **HOW)
    with pytest.raises(ValueError, match=r"post must be contiguous \(4, 4\), got \(3, 4\)"):
        api.mhc_post(y, streams, post[:3], comb)
    with pytest.raises(TypeError, match=r"y must be bfloat16, got torch\.float32"):
        api.mhc_post(y.float(), streams, post, comb)
    with pytest.raises(ValueError, match="config must have"):
        simulate("sm_90a", api.mhc_pre, *args, config=PRE, **HOW)
    for config, message in (
        (replace(PRE, warps=3), "warps must be 1 to 8 and divide 8, got 3"),
        (replace(PRE, outputs=8), "outputs must be 4 or 24, got 8"),
        (replace(HEAD, post=True), "post must be false for the head"),
        (replace(PRE, ring=300), "ring must be >= 1 and fit"),
        (replace(PRE, ahead=1), "ahead must be 2, 3 or 4, got 1"),
        (replace(ONE, split=3), "split must be 1, 2, 4 or 8, in whole groups of 256 columns, got 3"),
        (replace(ONE, ring=2), "one kernel must have ahead 1, ring 1 and finish from warps to 7, got"),
        (PostConfig(3), "units must be 1, 2 or 4"),
        (EmbedConfig(0, 4, "i32"), "streams, words and warps must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            config.check()
    with pytest.raises(ValueError, match="rows must be a multiple of 16 bytes and num_streams >= 1, got 8 and 4"):
        api.embed_streams(torch.zeros(2).long(), torch.zeros(3, 2), num_streams=4)
    x, post, comb = api.mhc_pre(streams[:0], *args[1:], **HOW)
    assert x.shape == (0, 64) and post.shape == (0, 4) and comb.shape == (0, 4, 4)
    assert api.mhc_post(y[:0], streams[:0], post, comb).shape == (0, 4, 64)
    assert api.embed_streams(torch.zeros(0).long(), torch.zeros(3, 8), num_streams=4).shape == (0, 4, 8)


def test_operators_say_what_they_do_not_take() -> None:
    args = material(4, 64)
    y, post, comb = written(4, 64)
    refuses = {entry.operation: entry.refuses for entry in ENTRIES if entry.arch == "sm_100a"}
    assert refuses["mhc_pre"](*args, **HOW) is None
    assert "streams must be bfloat16" in str(refuses["mhc_pre"](args[0].float(), *args[1:], **HOW))
    assert "streams must be (M, 4, D)" in str(refuses["mhc_head"](args[0][:, :2], *args[1:], **HEAD_HOW))
    assert "y must be bfloat16" in str(refuses["mhc_post"](y.float(), args[0], post, comb))
    assert "fn must be float32" in str(refuses["mhc_post_pre"](y, args[0], post, comb, args[1].bfloat16(), *args[2:], **HOW))
    assert refuses["mhc_post_pre"](y, args[0], post, comb, *args[1:], **HOW) is None
    assert "rows of a multiple of 16 bytes" in str(refuses["embed_streams"](y[0].long(), args[1][:, :3], num_streams=4))
    assert len(ENTRIES) == 14 and {entry.arch for entry in ENTRIES} == {"sm_90a", "sm_100a"}


# ---- GPU ---------------------------------------------------------------------------------------------------------------
def on_gpu(values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(t.cuda() for t in values)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 17, 37, 129, 133, 1000, 4001, 8192, 8200])
def test_on_the_gpu(tokens: int, seed: int) -> None:
    for columns in (128, 4096, 7168):
        args = on_gpu(material(tokens, columns, seed=seed))
        y, post, comb = on_gpu(written(tokens, columns, seed))
        found = api.mhc_pre(*args, **HOW)
        check_mix(args, *found)  # type: ignore[arg-type]
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(found, api.mhc_pre(*args, **HOW), strict=True))  # whatever the timing
        new = api.mhc_post(y, args[0], post, comb)
        size = args[0].double().abs().sum(1, keepdim=True)
        check_rounded(new, mhc.mhc_post(y, args[0], post, comb), size)
        both = api.mhc_post_pre(y, args[0], post, comb, *args[1:], **HOW)
        assert torch.equal(both[0], new)
        check_mix((new, *args[1:]), *both[1:])  # type: ignore[arg-type]
        head = on_gpu(material(tokens, columns, 4, seed))
        check_input(api.mhc_head(*head, **HEAD_HOW), head[0], exact(*head[:4])[0], head[4])
        table = torch.randn(1000, columns, device="cuda").bfloat16()
        ids = torch.randint(0, 1000, (tokens,), device="cuda")
        assert torch.equal(api.embed_streams(ids, table, num_streams=4), mhc.embed_streams(ids, table, num_streams=4))
    assert all(bool((sums == -1).all()) for sums in api._scratch.values())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 200, 1000])
@pytest.mark.parametrize("columns", [4096, 7168])
def test_a_cuda_graph_replays_with_new_inputs(columns: int, tokens: int) -> None:
    """A chain of sub-layers, which start before the one ahead has ended; one of fewer tokens has the same room for sums."""
    args = on_gpu(material(tokens, columns))
    streams = args[0]

    def chain() -> tuple[torch.Tensor, ...]:
        fewer = api.mhc_pre(streams[: -(-5 * tokens // 8)], *args[1:], **HOW)
        x, post, comb = api.mhc_pre(*args, **HOW)
        new = streams
        for _ in range(4):
            new, x, post, comb = api.mhc_post_pre(x, new, post, comb, *args[1:], **HOW)
        return api.mhc_post(x, new, post, comb), x, post, comb, *fewer

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for seed in range(3):
        streams.copy_(material(tokens, columns, seed=seed + 1)[0])
        want = chain()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    # against float64, by steps: each is fed what the kernels gave the one before
    x, post, comb = api.mhc_pre(*args, **HOW)
    check_mix(args, x, post, comb)  # type: ignore[arg-type]
