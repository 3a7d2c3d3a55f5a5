"""Attention by CTAs that keep the keys of many neighbouring queries in shared memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.attention.core import api
from dsv4lab.kernels.attention.core.config import ResidentConfig, capacity, divide, resident_config, resides
from tests.kernels.attention import Case, Silent, check_replays, error_of, in_order, judge, judge_orders, make_case
from tests.kernels.simulated import simulating


def run(case: Case, parts: int | None = 1, *, resident: bool | None = True, **more: Any) -> torch.Tensor:
    return case.run(parts, resident=resident, **more)


def simulated(case: Case, ctas: int = 2, **how: object) -> torch.Tensor:
    with simulating(multiprocessors=ctas, **how):
        return run(case)


# ---- choice ------------------------------------------------------------------------------------------------------------
def way(kind: str, queries: int, heads: int, *, rings: int, reach: int, record: str = "fp8") -> bool:
    """reach: entries of a sequence."""
    if resident_config(kind, 128, reach) is None:
        return False
    division = divide(queries, heads, capacity(kind, 128, reach), 132)
    return resides(division, record, multiprocessors=132, rings=rings, ring_len=4224, entries=reach)


@pytest.mark.parametrize("heads", [64, 128])
def test_many_queries_of_few_keys(heads: int) -> None:
    for rings in (1, 16, 64):
        for reach in (0, 1, 64):
            assert way("visible", 4096, heads, rings=rings, reach=reach)
        assert way("window", 4096, heads, rings=rings, reach=0)
    assert not way("visible", 4096, heads, rings=1, reach=65), "more entries than have a place"
    assert not way("chosen", 4096, heads, rings=1, reach=64), "queries choose for themselves"
    assert not way("window", 4096, heads, rings=4096, reach=0), "as many sequences as queries"
    assert not way("window", 4096, heads, rings=300, reach=0), "14 queries a sequence"
    assert not way("window", 64, 64, rings=1, reach=0), "half a query a multiprocessor"
    assert way("window", 512, 64, rings=1, reach=0)
    assert not way("window", 512, 64, rings=1, reach=0, record="plain"), "they would have to be put in line"


def test_places() -> None:
    """Blocks that any query of a block sees, and no more; slices of queries in what is left."""
    for window, blocks in ((1, 1), (2, 2), (16, 2), (17, 2), (18, 3), (128, 9), (129, 9), (130, 10)):
        config = ResidentConfig(window)
        first = [(p - window + 1) // 16 for p in range(1600, 1616)]
        assert config.ring == blocks == 1600 // 16 - min(first) + 1
    for config, stages in ((ResidentConfig(128, 64), 2), (ResidentConfig(128, 16), 8), (ResidentConfig(128), 8)):
        config.check()
        assert config.query_stages == stages
        assert config.rows * 1024 + stages * 8192 + 2048 <= 227 * 1024


def test_choices_that_cannot_be_are_refused() -> None:
    for config, rule in (
        (ResidentConfig(0), r"window must be at least 1, got 0"),
        (ResidentConfig(128, 8), "entries must be a multiple of 16, got 8"),
        (ResidentConfig(128, 80), "keys must have a place in shared memory, got 224 rows"),
    ):
        with pytest.raises(ValueError, match=rule):
            config.check()
    with running_on(sim.Host("sm_90a")):  # type: ignore[arg-type]
        case = make_case("fp8", "visible", [(300, 2)], 64)
        with pytest.raises(ValueError, match="resident must be false for several parts of a query, got True for 2"):
            run(case, 2)
        with pytest.raises(
            ValueError, match=r"resident must be false for keys that have no place .* got True for 'chosen' keys"
        ):
            run(make_case("fp8", "chosen", [(300, 2)], 64))
        case = make_case("fp8", "visible", [(9000, 2)], 64)
        with pytest.raises(ValueError, match=r"resident must be false for keys that have no place .* and 71 entries"):
            run(case)
        with pytest.raises(ValueError, match=r"max_entries must be at least what a query sees, got 64 for 70 \(query 0\)"):
            run(case, max_entries=64)


def test_the_call_takes_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, Any]] = []
    monkeypatch.setattr(api, "_compiled", lambda config, _: taken.append(("other", config)))
    monkeypatch.setattr(api, "_compiled_resident", lambda config, _: taken.append(("resident", config)))
    plain = torch.empty(1, 64, 512).bfloat16()
    found = {True: (plain[0], torch.empty(1, 4, dtype=torch.int32)), False: (plain, None)}
    monkeypatch.setattr(api, "unpack_keys", lambda *_, line, quads, **__: found[line])
    for record, kind, heads, queries, more, wanted in (
        ("fp8", "window", 64, 300, {}, "resident"),
        ("plain", "visible", 72, 300, {}, "resident"),
        ("fp8", "window", 64, 5, {}, "other"),
        ("plain", "window", 64, 50, {}, "other"),
        ("fp8", "visible", 64, 300, dict(max_entries=3), "resident"),
        ("fp8", "window", 64, 300, dict(resident=False), "other"),
        ("fp8", "window", 64, 300, dict(share=False), "other"),
        ("fp8", "window", 64, 300, dict(unpack=True), "other"),
        ("fp8", "chosen", 64, 300, {}, "other"),
    ):
        with running_on(Silent(7)):  # type: ignore[arg-type]
            run(make_case(record, kind, [(400, queries)], heads), 1, **(dict(resident=None) | more))  # type: ignore[arg-type]
        assert taken[-1][0] == wanted, (record, kind, heads, queries, more)


# ---- in the simulator --------------------------------------------------------------------------------------------------
CASES = [
    # blocks that follow each other, in two CTAs; entries in all places
    ("fp8", "visible", [(8190, 30)], 4, "lazy"),
    # the first tokens of a sequence; fewer heads than a tile
    ("nvfp4", "window", [(5, 5)], 8, "random"),
    # sequences of one query and of several, some without entries: everything anew
    ("fp8", "visible", [(127, 3), (128, 1), (129, 8), (1300, 2), (640, 5)], 64, "random"),
    # two tiles of heads, of which the second is 8; plain records; fewer units than CTAs at the end
    ("plain", "visible", [(5000, 3), (1, 1)], 72, "lazy"),
    ("fp8", "window", [(400, 16), (300, 6)], 72, "random"),
]


@pytest.mark.parametrize(("record", "kind", "sequences", "heads", "schedule"), CASES)
@pytest.mark.parametrize("ordered", [True, False])
def test_any_queries(
    record: str, kind: str, sequences: list[tuple[int, int]], heads: int, schedule: str, ordered: bool
) -> None:
    if not ordered:  # everything anew for every query
        sequences = [(tokens, min(queries, 8)) for tokens, queries in sequences]
    case = make_case(record, kind, sequences, heads)
    case = in_order(case) if ordered else case
    judge(case, simulated(case, schedule=schedule, checks=sim.Checks(races=True)))


def test_a_unit_or_none_a_cta() -> None:
    for queries in (1, 2, 3):
        case = make_case("fp8", "visible", [(500, queries)], 64)
        judge(case, simulated(case, ctas=4))


def test_tables_may_be_wider_than_what_is_seen() -> None:
    case = make_case("fp8", "visible", [(1030, 9)], 64)
    *_, table, _, _, _ = case.args
    wide = torch.cat((table, torch.full((table.shape[0], 200), -1, dtype=torch.int32)), dim=1)
    given = replace(case, args=tuple(wide if a is table else a for a in case.args), how=case.how | dict(max_entries=8))
    judge(case, simulated(given))


def test_other_windows() -> None:
    case = make_case("fp8", "visible", [(1000, 9)], 4)
    for window in (1, 20, 64):
        other = replace(case, how=case.how | dict(window=window))
        judge(other, simulated(other))


# ---- on a GPU ----------------------------------------------------------------------------------------------------------
MANY = ([(8191, 4096)], [(4096, 4096)], [(3000, 1000), (17, 17), (8191, 700), (2049, 1), (128, 128)])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("record", ["plain", "fp8", "nvfp4"])
@pytest.mark.parametrize("heads", [64, 128, 4])
def test_on_the_gpu(record: str, heads: int, seed: int) -> None:
    for kind in ("window", "visible"):
        for sequences in ([(127, 3), (128, 1), (129, 8), (512, 2), (640, 5), (1000, 1)], [(1, 1)], [(700, 40)]):
            case = make_case(record, kind, sequences, heads, seed=seed, device="cuda")
            judge_orders(run, case)


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", MANY)
@pytest.mark.parametrize("record", ["plain", "fp8", "nvfp4"])
@pytest.mark.parametrize("heads", [64, 128])
def test_long_prefill_on_the_gpu(record: str, sequences: list[tuple[int, int]], heads: int) -> None:
    """Every multiprocessor goes round its ring, as far as it can; the default way."""
    for kind in ("window", "visible"):
        case = in_order(make_case(record, kind, sequences, heads, device="cuda"))
        found = run(case, None, resident=None)
        assert error_of(case, found) < 0.004
        for _ in range(20):
            assert torch.equal(found, run(case))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
def test_a_cuda_graph_replays_with_new_inputs(heads: int) -> None:
    """Positions change after capture: rows are put in line, and found, from what is on the device."""
    cases = [make_case("fp8", "visible", [(n, 150), (n // 2, 70)], heads, seed=n, device="cuda") for n in (8000, 400, 7999)]
    check_replays(run, cases)
