"""Integers between decode steps: the reference against a plain loop, the kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv4lab import ops
from dsv4lab.kernels.head.decoding import api
from dsv4lab.kernels.head.decoding.config import AdvanceConfig, MatchConfig, PlanConfig
from dsv4lab.reference import decoding
from tests.kernels.simulated import simulating

RING = 192


def simulated(function: Callable[..., Any], *args: Any, arch: str = "sm_90a", schedule: str = "eager", **how: Any) -> Any:
    with simulating(arch, schedule=schedule):
        return function(*args, **how)


def scene(batch: int, drafts: int, seed: int = 0, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A step of few token ids, so that drafts stand; known counts up to a million; some sequences at their limit."""
    g = torch.Generator().manual_seed(seed + batch)

    def integers(high: int, *size: int) -> torch.Tensor:
        return torch.randint(1, high, size, generator=g)

    known = integers(2**20, batch)
    found = dict(
        known=known,
        seqs=torch.randperm(batch, generator=g) + 3,
        limit=known + torch.cat([torch.tensor([9]), integers(3, batch - 1) * 2 - 2]),
        step_ids=integers(4, batch, drafts + 1),
        choices=integers(4, batch, drafts + 1),
    )
    return {name: value.to(device) for name, value in found.items()}


def test_a_plain_loop_finds_the_same() -> None:
    s = scene(5, 3)
    plan = decoding.decode_plan(s["known"], s["seqs"], tokens=4, offset=-1, ring_len=RING, ratios=[4, 128])
    accepted, next_ids = decoding.match_drafts(s["choices"], s["step_ids"])
    before, counts = s["step_ids"].tolist(), s["known"].tolist()
    new_ids, rows = decoding.advance_decode(s["step_ids"], s["known"], s["limit"], accepted, next_ids)
    for r, seq in enumerate(s["seqs"].tolist()):
        for i in range(4):
            p = counts[r] - 1 + i
            want = [p, seq, seq * RING + p % RING, counts[r] + 2, (p + 1) // 4, (p + 1) // 128]
            assert plan[:, 4 * r + i].tolist() == want
        choices, count = s["choices"][r].tolist(), 0
        while count < 3 and choices[count] == before[r][count + 1]:
            count += 1
        assert (int(accepted[r]), int(next_ids[r]), int(rows[r])) == (count, choices[count], 4 * r + count)
        assert new_ids[r, : count + 1].tolist() == [*before[r][1 : count + 1], choices[count]]
        assert s["step_ids"][r].tolist() == [choices[count], *before[r][1:]]
        assert int(s["known"][r]) == min(counts[r] + count + 1, int(s["limit"][r]))
    assert int(accepted.max()) > 0


def check(call: Callable[..., Any], batch: int, drafts: int, seed: int = 0, device: str = "cpu") -> None:
    """All three through `call(function, ..)` against the reference, in every number."""
    s = scene(batch, drafts, seed, device)
    for tokens, ratios in ((drafts + 1, [4, 128]), (1, [])):
        how = dict(tokens=tokens, offset=drafts - 1, ring_len=RING, ratios=ratios)
        found, want = call(api.decode_plan, s["known"], s["seqs"], **how), decoding.decode_plan(s["known"], s["seqs"], **how)  # type: ignore[arg-type]
        assert torch.equal(found, want)
    found, want = (c(f, s["choices"], s["step_ids"]) for c, f in ((call, api.match_drafts), (_plainly, decoding.match_drafts)))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    mine, theirs = ({name: value.clone() for name, value in s.items()} for _ in range(2))
    names = ("step_ids", "known", "limit")
    got = call(api.advance_decode, *(mine[n] for n in names), *want)
    expected = decoding.advance_decode(*(theirs[n] for n in names), *want)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(mine[n], theirs[n]) for n in names)
    assert not torch.equal(mine["known"], s["known"])


def _plainly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@pytest.mark.parametrize(("batch", "drafts", "arch", "schedule"), [(5, 3, "sm_90a", "lazy"), (130, 0, "sm_100a", "random")])
def test_the_simulator_finds_the_reference_s(batch: int, drafts: int, arch: str, schedule: str) -> None:
    check(lambda f, *args, **how: simulated(f, *args, arch=arch, schedule=schedule, **how), batch, drafts)


def test_bad_arguments_are_refused_by_name() -> None:
    s = scene(5, 3)
    with pytest.raises(ValueError, match="tokens must be >= 1"):
        PlanConfig(0, ()).check()
    with pytest.raises(ValueError, match="ratios must be 4 at most"):
        PlanConfig(1, (1, 2, 3, 4, 5)).check()
    for config in (MatchConfig(16), AdvanceConfig(-1)):
        with pytest.raises(ValueError, match="drafts must be 0 to 15"):
            config.check()
    for module in (decoding, api):
        with pytest.raises(ValueError, match="ring_len"):
            module.decode_plan(s["known"], s["seqs"], tokens=1, offset=0, ring_len=0, ratios=[])
        with pytest.raises(TypeError, match="seqs must be int64"):
            module.decode_plan(s["known"], s["seqs"].int(), tokens=1, offset=0, ring_len=1, ratios=[])
        with pytest.raises(ValueError, match="step_ids must be"):
            module.match_drafts(s["choices"][:, :2], s["choices"][:, 0])
        with pytest.raises(ValueError, match="limit must be"):
            module.advance_decode(s["step_ids"], s["known"], s["limit"][:2], s["known"], s["known"])
    with pytest.raises(ValueError, match="contiguous"):
        api.match_drafts(s["choices"].t().contiguous().t(), s["step_ids"])
    assert api.match_drafts(s["choices"][:0], s["step_ids"][:0])[0].shape == (0,)
    refuses = {entry.operation: entry.refuses for entry in ops_entries()}
    assert "15 drafts at most" in str(refuses["match_drafts"](s["choices"].repeat(1, 5), s["step_ids"].repeat(1, 5)))
    assert refuses["advance_decode"](s["step_ids"], s["known"], s["limit"], s["known"], s["known"]) is None
    assert "in place" in str(refuses["advance_decode"](s["step_ids"].t(), s["known"], s["limit"], s["known"], s["known"]))
    how = dict(tokens=1, offset=0, ring_len=1)
    assert "4 ratios" in str(refuses["decode_plan"](s["known"], s["seqs"], ratios=[1] * 5, **how))


def ops_entries() -> list[Any]:
    from dsv4lab.kernels.head.operators import ENTRIES

    return [entry for entry in ENTRIES if entry.arch == "sm_90a"]


# ---- GPU ---------------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("batch", "drafts"), [(1, 0), (1, 1), (5, 3), (300, 15)])
def test_on_the_gpu(batch: int, drafts: int, seed: int) -> None:
    check(lambda f, *args, **how: f(*args, **how), batch, drafts, seed, "cuda")


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_inputs() -> None:
    s = scene(7, 2, device="cuda")
    names = ("step_ids", "known", "limit")

    def step(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        count, token = ops.match_drafts(values["choices"], values["step_ids"])
        return ops.advance_decode(*(values[n] for n in names), count, token)

    step({name: value.clone() for name, value in s.items()})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(s)
    for seed in range(3):
        new, other = scene(7, 2, seed, "cuda"), scene(7, 2, seed, "cuda")
        for name, value in new.items():
            s[name].copy_(value)
        graph.replay()
        with ops.backend("reference"):
            want = step(other)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        assert all(torch.equal(s[n], other[n]) for n in names)
