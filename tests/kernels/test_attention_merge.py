"""A query's parts put together by the cluster of CTAs that have them: the same bits as by a second kernel."""

from __future__ import annotations

import pytest
import torch

from dsv4lab import sim
from dsv4lab.kernels._common.launch import running_on
from dsv4lab.kernels.attention.core import api
from dsv4lab.kernels.attention.core.config import CLUSTER, DIM, KEYS, ROWS, AttentionConfig, divide, merges
from tests.kernels.attention import RAGGED, WINDOW, Case, Silent, judge, make_case
from tests.kernels.simulated import simulating


def run(case: Case, parts: int | None, *, merge: bool | None, pair: bool | None = None) -> torch.Tensor:
    """Keys are decoded in the kernel."""
    return case.run(parts, False, pair=pair, merge=merge)


def simulated(case: Case, parts: int, *, merge: bool | None = True, pair: bool = False, **how: object) -> torch.Tensor:
    with simulating(multiprocessors=4, **how):
        return run(case, parts, merge=merge, pair=pair)


# ---- choice ------------------------------------------------------------------------------------------------------------
def test_a_cluster_merges_what_it_holds() -> None:
    for parts in (1, 2, 6, 7, CLUSTER, CLUSTER + 1, 130):
        assert merges(parts, 1) == (1 < parts <= CLUSTER)
        assert merges(parts, 2) == (1 < parts <= CLUSTER // 2)
    room = (ROWS + 2 * KEYS) * DIM * 2 + 2 * ROWS * KEYS * 2  # bytes of queries, keys and probabilities
    for parts in range(2, CLUSTER + 1):
        pairs = -(-16 // parts)  # of groups of eight dims that a CTA puts together, of each half
        assert pairs * parts * 2 * ROWS * 16 * 4 + (parts + 2 * CLUSTER) * ROWS * 4 <= room
        assert 16 // parts, "every CTA has some"
    case = make_case("fp8", "chosen", [(3, 1)], 4)
    for parts, pair in ((1, False), (CLUSTER + 1, False)):
        with pytest.raises(ValueError, match=f"merge must be false for {parts} parts of 1 CTAs each, got True"):
            simulated(case, parts, pair=pair)
    with pytest.raises(ValueError, match="merge must be false for 7 parts of 2 CTAs each, got True"):
        simulated(make_case("fp8", "chosen", [(3, 1)], 128), 7, pair=True)


H200 = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15, 9: 9, 10: 7, 11: 7, 12: 7}  # clusters at once
CHOICES = [
    # tokens, heads, chosen entries (none: a window): parts, whether they meet in a cluster
    (1, 64, 512, 10, True),
    (8, 64, 512, 5, True),  # of ten, seven at once
    (16, 64, 512, 5, True),
    (24, 64, 512, 4, True),
    (32, 64, 512, 3, True),
    (44, 64, 512, 2, True),
    (64, 64, 512, 2, True),
    (67, 64, 512, 1, False),
    (128, 64, 512, 1, False),
    (256, 64, 512, 1, False),
    (1, 64, 128, 4, True),
    (64, 64, 128, 2, True),
    (64, 64, None, 2, True),
    (1, 128, 1024, 18, False),  # pairs
    (16, 128, 1024, 3, True),
    (32, 128, 1024, 2, False),  # of four CTAs, thirty clusters at once
    (64, 128, 1024, 1, False),
    (4096, 128, 1024, 1, False),
]


def test_as_many_parts_as_run_at_once() -> None:
    """What an H200 was fastest with. A GPU without clusters has parts, too."""
    for queries, heads, k, parts, merge in CHOICES:
        keys = WINDOW + (k or 0)
        asked: list[int] = []

        def clusters(size: int, asked: list[int] = asked) -> int:
            asked.append(size)
            return H200[size]

        plan = divide(queries, heads, keys, 132, paired=heads == 128, clusters=clusters)
        assert (plan.parts, plan.merge) == (parts, merge), (queries, heads, k)
        assert len(asked) <= 3, "a question compiles a kernel"
    plan = divide(1, 64, WINDOW + 512, 132, clusters=lambda size: 0)
    assert plan.parts > 1 and not plan.merge


def test_the_call_takes_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[AttentionConfig] = []
    monkeypatch.setattr(api, "_compiled", lambda config, _: compiled.append(config))
    monkeypatch.setattr(api, "_compiled_combine", lambda _: None)
    for heads, queries, parts, wanted, launches, ctas in (
        (64, 3, 1, False, 1, 3),
        (64, 3, 2, True, 1, 6),
        (64, 70, 3, True, 1, 210),  # more than there are multiprocessors: a CTA has one item
        (64, 3, CLUSTER + 1, False, 2, 3 * (CLUSTER + 1)),
        (128, 3, 2, True, 1, 12),
        (128, 3, 7, False, 2, 42),
        (64, 70, None, False, 1, 70),
        (64, 3, None, True, 1, 6),
    ):
        runtime = Silent(132)
        with running_on(runtime):  # type: ignore[arg-type]
            run(make_case("fp8", "window", [(300, queries)], heads), parts, merge=None)
        found = (compiled[-1].merge, len(runtime.calls), runtime.calls[0][-1])
        assert found == (wanted, launches, ctas), (heads, queries, parts)
        assert runtime.calls[0][9].numel() == (DIM if launches == 1 else (parts or 0) * queries * heads * DIM), (
            "memory for parts"
        )


# ---- in the simulator --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sequences", "heads", "counts", "pair"),
    [
        # an odd batch: no entry yet, half a window, three to six blocks; parts without keys, gaps
        ([(1, 1), (65, 1), (1000, 1)], 64, (5, CLUSTER), False),
        ([(300, 1)], 72, (2,), True),  # pairs of CTAs, eight heads in the second
    ],
)
def test_the_same_bits(sequences: list[tuple[int, int]], heads: int, counts: tuple[int, ...], pair: bool) -> None:
    case = make_case("fp8", "chosen", sequences, heads, k=200, fewer=0.3)
    for parts in counts:
        found = simulated(case, parts, pair=pair)
        assert judge(case, found) < 0.004
        assert torch.equal(found, simulated(case, parts, merge=False, pair=pair)), parts


def test_sinks_and_parts_of_gaps() -> None:
    """A sink that takes all, or none; a whole part that chose nothing; a query that chose nothing."""
    sinks = torch.tensor([1e4, 60.0, -1e4, -torch.inf])
    case = make_case("fp8", "chosen", [(1200, 2), (100, 1)], 4, k=200, fewer=0.7, sinks=sinks)
    chosen = case.args[-1]
    chosen[0, :190] = -1
    chosen[1] = -1
    for parts in (2, 6):
        found = simulated(case, parts)
        judge(case, found)
        assert bool((found[:, 0] == 0).all()) and bool((found[:, 3].float().norm(dim=-1) > 0.1).all())


@pytest.mark.parametrize(
    ("sequences", "heads", "parts", "schedule", "pair"),
    [
        ([(700, 1)], 64, 2, "eager", False),
        ([(100, 2)], 64, 3, "lazy", False),  # a part without keys
        ([(300, 1)], 64, 5, "random", False),
        ([(200, 1)], 72, 2, "lazy", True),
        ([(300, 1)], 72, 2, "random", True),
    ],
)
def test_any_schedule_and_no_race(sequences: list[tuple[int, int]], heads: int, parts: int, schedule: str, pair: bool) -> None:
    case = make_case("fp8", "chosen", sequences, heads, k=200, fewer=0.3)
    found = simulated(case, parts, pair=pair, schedule=schedule, checks=sim.Checks(races=True))
    assert judge(case, found) < 0.004


# ---- on a GPU ----------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("record", "heads", "k"), [("fp8", 64, 512), ("nvfp4", 4, 100), ("plain", 64, 200), ("fp8", 128, 1024)]
)
def test_the_same_bits_on_the_gpu(record: str, heads: int, k: int, seed: int) -> None:
    most = CLUSTER // 2 if heads == 128 and record != "plain" else CLUSTER
    for kind in ("window", "chosen", "visible"):
        for sequences in RAGGED:
            case = make_case(record, kind, sequences, heads, k=k, seed=seed, device="cuda")
            for parts in range(2, most + 1):
                found = run(case, parts, merge=True)
                assert torch.equal(found, run(case, parts, merge=False)), parts
                assert torch.equal(found, run(case, parts, merge=True))  # not a matter of timing
            if sum(n for _, n in sequences) < 100:
                judge(case, found)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "parts"), [(64, 2), (64, 5), (128, 2)])
def test_a_cuda_graph_replays_with_new_inputs(heads: int, parts: int) -> None:
    """Calls that follow each other begin before the one before has ended."""
    cases = [make_case("fp8", "chosen", [(n, 3)], heads, k=512, seed=n, device="cuda") for n in (9000, 400, 5000, 8999)]
    wanted = [run(case, parts, merge=False) for case in cases]
    for case in cases:
        run(case, parts, merge=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [run(case, parts, merge=True) for case in cases for _ in range(3)]
    for _ in range(5):
        for y in found:
            y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(y, wanted[i // 3]) for i, y in enumerate(found))
