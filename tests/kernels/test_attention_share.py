"""Attention by two CTAs that have their keys together, by multicast: tiles of a query's heads, or neighbouring queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.attention.core import api
from dsv4lab.kernels.attention.core.config import AttentionConfig, capacity, divide, shares
from tests.kernels.attention import RAGGED, Case, Silent, check_replays, in_order, judge, judge_orders, make_case
from tests.kernels.simulated import simulating


def run(case: Case, parts: int | None = 1, *, share: bool | None = True, **more: Any) -> torch.Tensor:
    return case.run(parts, share=share, **more)


def simulated(case: Case, ctas: int = 4, **how: object) -> torch.Tensor:
    with simulating(multiprocessors=ctas, **how):
        return run(case)


# ---- choice ------------------------------------------------------------------------------------------------------------
def way(kind: str, queries: int, heads: int, *, rings: int, ring: int, reach: int) -> bool:
    """reach: entries of a sequence."""
    division = divide(queries, heads, capacity(kind, 128, reach), 132)
    return shares(division, kind, rings=rings, ring_len=ring, entries=reach)


@pytest.mark.parametrize("heads", [64, 128])
def test_what_two_have_together(heads: int) -> None:
    for rings in (1, 16, 64):
        for reach in (64, 512):
            assert way("visible", 4096, heads, rings=rings, ring=4224, reach=reach)
        assert way("window", 4096, heads, rings=rings, ring=4224, reach=0)
    assert not way("chosen", 4096, heads, rings=1, ring=4224, reach=2048), "queries choose for themselves"
    assert not way("visible", 1, heads, rings=1, ring=192, reach=1024), "a query's keys have parts"
    assert not way("visible", 4096, heads, rings=64, ring=8320, reach=16384), "more than a GiB of keys"
    assert way("window", 1, 128, rings=1, ring=192, reach=0) is way("window", 1, 64, rings=1, ring=192, reach=0) is False


def test_choices_that_cannot_be_are_refused() -> None:
    plain = AttentionConfig("plain", "visible", share="queries")
    plain.check()
    for config in (
        replace(plain, record="fp8"),
        replace(plain, kind="chosen"),
        replace(plain, merge=True),
        replace(plain, pair=True, share="tiles"),
    ):
        with pytest.raises(ValueError, match="share must be '' but for plain records in line"):
            config.check()
    with pytest.raises(ValueError, match="share must be one of '', 'tiles', 'queries', got 'all'"):
        replace(plain, share="all").check()
    case = make_case("fp8", "visible", [(300, 2)], 64)
    refused = pytest.raises(ValueError, match="share must be false for several parts of a query, got True for 2")
    with refused, running_on(sim.Host("sm_90a")):  # type: ignore[arg-type]
        run(case, 2)


def test_the_call_takes_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[AttentionConfig] = []
    monkeypatch.setattr(api, "_compiled", lambda config, _: compiled.append(config))
    plain = torch.empty(1, 64, 512).bfloat16()
    found = {True: (plain[0], torch.empty(1, 4, dtype=torch.int32)), False: (plain, None)}
    monkeypatch.setattr(api, "unpack_keys", lambda *_, line, **__: found[line])
    runtime = Silent(7)
    for record, heads, queries, more, wanted, sizes in (
        ("fp8", 64, 300, {}, "queries", (1, 300, 6)),  # tiles of heads, items, CTAs
        ("nvfp4", 64, 301, {}, "queries", (1, 302, 6)),
        ("fp8", 72, 301, {}, "tiles", (2, 602, 6)),
        ("plain", 64, 301, {}, "", (1, 301, 7)),  # is not unpacked
        ("fp8", 64, 301, dict(unpack=True), "", (1, 301, 7)),
        ("fp8", 64, 301, dict(share=False), "", (1, 301, 7)),
        ("fp8", 64, 3, {}, "", (1, 3, 3)),
    ):
        with running_on(runtime):  # type: ignore[arg-type]
            run(make_case(record, "visible", [(9000, queries)], heads), 1, **(dict(share=None) | more))  # type: ignore[arg-type]
        assert (compiled[-1].share, runtime.calls[-1][-3:]) == (wanted, sizes), (record, heads, queries, more)
    runtime.multiprocessors = 1
    with running_on(runtime):  # type: ignore[arg-type]
        run(make_case("fp8", "window", [(9, 2)], 64), 1, share=True)
    assert runtime.calls[-1][-1] == 2


# ---- in the simulator --------------------------------------------------------------------------------------------------
CASES = [
    # queries side by side with 7 and 8 entries, in groups that are not full; windows from the first token on
    ("fp8", "visible", [(1030, 9)], 64, "lazy"),
    ("nvfp4", "window", [(5, 5)], 8, "random"),
    # neighbours of other sequences, which have two lists; an odd number; blocks of which a query sees none
    ("fp8", "visible", [(127, 3), (128, 1), (129, 8), (1300, 2), (640, 5)], 64, "random"),
    # 57 entries: two windows together would be a block more
    ("fp8", "visible", [(7300, 4), (7297, 2)], 64, "lazy"),
    # two tiles of heads, of which the second is 8; plain records; a sequence of one token; nine groups of entries
    ("plain", "visible", [(9000, 3), (1, 1)], 72, "lazy"),
]


@pytest.mark.parametrize(("record", "kind", "sequences", "heads", "schedule"), CASES)
@pytest.mark.parametrize("ordered", [True, False])
def test_any_queries(
    record: str, kind: str, sequences: list[tuple[int, int]], heads: int, schedule: str, ordered: bool
) -> None:
    case = make_case(record, kind, sequences, heads)
    case = in_order(case) if ordered else case
    judge(case, simulated(case, schedule=schedule, checks=sim.Checks(races=True)))


def test_queries_that_are_far_apart() -> None:
    """Of one sequence, 65 tokens and more between them: a list for each."""
    case = in_order(make_case("fp8", "visible", [(700, 140)], 4))
    q, sinks, window, entries, table, positions, seq_idx, chosen = case.args
    far = torch.tensor([0, 64, 1, 66, 3, 139, 7])
    judge_of = replace(case, args=(q[far], sinks, window, entries, table, positions[far], seq_idx[far], chosen))
    judge(judge_of, simulated(judge_of, ctas=2))


# ---- on a GPU ----------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("record", ["plain", "fp8", "nvfp4"])
@pytest.mark.parametrize("heads", [64, 128, 4])
def test_on_the_gpu(record: str, heads: int, seed: int) -> None:
    for kind in ("window", "visible"):
        for sequences in (*RAGGED, [(65_537, 600)]):
            case = make_case(record, kind, sequences, heads, seed=seed, device="cuda")
            judge_orders(run, case)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
def test_a_cuda_graph_replays_with_new_inputs(heads: int) -> None:
    """Positions change after capture: rows are put in line, and found, from what is on the device."""
    cases = [make_case("fp8", "visible", [(n, 150), (n // 2, 70)], heads, seed=n, device="cuda") for n in (9000, 400, 8999)]
    check_replays(run, cases)
