"""The log of a launch and its answers, against numbers worked out from the lesson kernels' own constants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dsv4lab import sim, viz
from dsv4lab.sim.timeline import TIMINGS, Timing, categories

SCHEDULES = ["eager", "lazy", "random"]
TILE_BYTES = 64 * 64 * 2


@pytest.fixture(scope="module")
def scale(kernels: ModuleType) -> Callable[..., sim.Trace]:
    """scale(stages=, swizzled=, schedule=, tiles=): a trace of the scaled copy of a (64, 64 * tiles) matrix, checked."""
    from dsv4lab.kernels.lessons.scaled_copy import scaled_copy

    known: dict[tuple[int, bool, int], sim.Compiled] = {}

    def run(*, stages: int = 2, swizzled: bool = True, tiles: int = 4, schedule: str = "eager") -> sim.Trace:
        source = torch.randn(64, 64 * tiles).half()
        target = torch.zeros_like(source)
        key = (stages, swizzled, tiles)
        if key not in known:
            known[key] = sim.compile(scaled_copy, source, target, 2.5, stages, swizzled, arch="sm_90a")
        trace = sim.trace(known[key], source, target, 2.5, schedule=schedule)
        torch.testing.assert_close(target, (2.5 * source.float()).half(), rtol=0, atol=0)
        return trace

    return run


@pytest.fixture(scope="module")
def gemm(kernels: ModuleType) -> sim.Trace:
    """(128, 256) x (192, 256)^T on 2 x 3 CTAs with 3 stages."""
    from dsv4lab.kernels.lessons.tiled_gemm import tiled_gemm

    a, b, c = torch.randn(128, 256).half(), torch.randn(192, 256).half(), torch.zeros(128, 192)
    trace = sim.trace(sim.compile(tiled_gemm, a, b, c, 3, arch="sm_90a"), a, b, c)
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-4, atol=1e-3)
    return trace


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_log_holds_every_event_once(scale: Callable[..., sim.Trace], schedule: str) -> None:
    trace = scale(tiles=5, schedule=schedule)
    assert (np.diff(trace.events["step"]) >= 0).all()
    kinds = [operation.kind for operation in trace.operations.values()]
    assert kinds.count("TMA load") == kinds.count("TMA store") == 5 and len(kinds) == 10
    assert {operation.bytes for operation in trace.operations.values()} == {TILE_BYTES}
    assert len(trace.select(kind="issue")) == len(trace.select(kind="perform")) == 10
    assert len(trace.select(kind="exit")) == 6
    # two stages of `full`, `ready` and `empty`, each completed once a tile
    mbarriers = [i for i, barrier in enumerate(trace.barrier_infos) if barrier.kind == "mbarrier"]
    assert [trace.barrier_infos[i].count for i in mbarriers] == [1, 4, 1, 1, 4, 1]
    assert len(trace.select(kind="flip")) == 3 * 5
    loads = trace.select(kind="shared", warp=1)
    assert len(loads) == 5 * 8 and set(loads["value"]) == {32 * 16} and set(loads["subject"]) == {0, 1}
    (line,) = {trace.line(int(i)) for i in trace.select(kind="issue", warp=0)["instruction"]}
    assert line.startswith("scaled_copy.py:")


def test_selecting_an_unknown_kind_is_an_error(scale: Callable[..., sim.Trace]) -> None:
    with pytest.raises(KeyError, match="sleep"):
        scale().select(kind="sleep")


def test_roles_come_from_what_warps_issue(scale: Callable[..., sim.Trace], gemm: sim.Trace) -> None:
    assert [scale().roles[0, warp] for warp in range(6)] == ["load", "math", "math", "math", "math", "store"]
    assert [gemm.roles[5, warp] for warp in range(5)] == ["wgmma"] * 4 + ["load"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_barrier_graph_is_the_kernels_protocol_under_every_schedule(scale: Callable[..., sim.Trace], schedule: str) -> None:
    figure = scale(schedule=schedule).barriers().figure()
    arrivals = {(who.split("\n")[0], barrier.split("\n")[0]): times for who, barrier, times in figure["arrivals"]}
    waits = {(barrier.split("\n")[0], who.split("\n")[0]): times for barrier, who, times in figure["waits"]}
    full, ready, empty = "mbarrier +0, count 1", "mbarrier +16, count 4", "mbarrier +32, count 1"
    assert {key: n for key, n in arrivals.items() if key[1] != "barrier 0"} == {
        ("warp 0 (load)", full): 4,
        ("TMA load", full): 4,
        ("warps 1-4 (math)", ready): 16,
        ("warp 5 (store)", empty): 4,
    }
    assert waits[full, "warps 1-4 (math)"] == 16 and waits[ready, "warp 5 (store)"] == 4
    assert waits[empty, "warp 0 (load)"] == 4


def test_bank_conflicts_of_rows_of_128_bytes_with_and_without_a_swizzle(scale: Callable[..., sim.Trace]) -> None:
    # Each phase is 8 lanes: 4 rows of 128 bytes, two 16-byte chunks of each; unswizzled, the rows' chunks share banks.
    for swizzled, degree in ((True, 1), (False, 4)):
        found = scale(swizzled=swizzled).bank_conflicts()
        assert len(found.rows) == 8 and {row.degree for row in found.rows} == {degree}
        assert {row.executions for row in found.rows} == {4 * 4} and {row.phases for row in found.rows} == {4 * 16}
        assert found.excess == 8 * 64 * (degree - 1)
        assert all(row.words.sum() == 4 * 128 * 4 for row in found.rows)
        assert found.lines[0].split("  ")[1] in ("ld.v4.b32", "st.v4.b32")
        figure = found.figure()
        assert len(figure["labels"]) == (2 if swizzled else 8)  # a line without conflicts is one row
        assert sum(figure["passes"]) == sum(row.passes for row in found.rows) and figure["words"].sum() == 8 * 4 * 512


def test_traffic_counts_what_tiling_reads_again(scale: Callable[..., sim.Trace], gemm: sim.Trace) -> None:
    copy = scale().traffic()
    assert copy.of("source").by == {"TMA": 4 * TILE_BYTES} and copy.of("source").factor == 1
    assert copy.of("target", "written").once == 4 * TILE_BYTES
    traffic = gemm.traffic()
    assert (traffic.of("a").factor, traffic.of("b").factor) == (3, 2)  # CTAs along the other dimension
    assert traffic.of("a").by == {"TMA": 3 * 128 * 256 * 2} and traffic.of("a").once == 128 * 256 * 2
    assert traffic.of("c", "written").by == {"threads": 128 * 192 * 4} and traffic.of("c", "written").factor == 1
    with pytest.raises(KeyError, match="c was not read; there are: a read, b read, c written"):
        traffic.of("c")


def test_tensors_of_one_name_are_counted_apart(kernels: ModuleType) -> None:
    from dsv4lab.kernels.lessons.tiled_gemm import tiled_gemm
    from dsv4lab.sim.memory import GlobalMemory

    a, b, c = torch.randn(64, 128).half(), torch.randn(64, 128).half(), torch.zeros(64, 64)
    (launch,) = sim.compile(tiled_gemm, a, b, c, 2, arch="sm_90a").capture(a, b, c)
    memory = GlobalMemory()
    for tensor in (a, b, c):
        memory.add("x", tensor.data_ptr(), tensor.nbytes)
    recorder = sim.Recorder()
    sim.execute(launch, memory, observers=[recorder])
    rows = recorder.traces[0].traffic().rows
    assert [(row.tensor, row.direction, row.factor) for row in rows] == [
        ("x", "read", 1), ("x #2", "read", 1), ("x", "written", 1),
    ]  # fmt: skip


def test_lanes_that_read_the_same_bytes_move_them_once(compiled: Callable[..., sim.Compiled]) -> None:
    a, b, c = torch.ones(1).expand(128), torch.ones(128), torch.zeros(128)
    trace = sim.trace(compiled("add", a, b, c), a, b, c)
    assert trace.traffic().of("a").by == {"threads": 4 * 4}  # four warps, four bytes
    assert trace.traffic().of("b").by == {"threads": 128 * 4}


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_shared_memory_holds_as_many_tiles_as_there_are_stages(scale: Callable[..., sim.Trace], stages: int) -> None:
    trace = scale(stages=stages, schedule="lazy")
    held = trace.shared()
    step, most = held.most()
    assert 0 < most <= stages * TILE_BYTES and most == trace.shared(step).held
    assert held.pieces["high"].max() - held.pieces["low"].min() == stages * TILE_BYTES
    written = {held.writers[w] for w in held.pieces["writer"]}
    assert written == {"TMA", "threads"}
    by_tma = held.pieces[held.pieces["writer"] == held.writers.index("TMA")]
    assert int((by_tma["high"] - by_tma["low"]).sum()) == 4 * TILE_BYTES


def test_tensor_memory_holds_the_accumulator(compiled: Callable[..., sim.Compiled]) -> None:
    a, b, c = torch.ones(128, 128).half(), torch.ones(64, 128).half(), torch.zeros(128, 64)
    trace = sim.trace(compiled("tcgen05_tile", a, b, c, arch="sm_100a"), a, b, c)
    (piece,) = trace.tensor_memory().pieces
    assert (piece["low"], piece["high"]) == (0, 64) and trace.tensor_memory().writers[piece["writer"]] == "tensor core"
    assert piece["start"] < piece["end"] and trace.tensor_memory().held == 64
    macs = [operation.macs for operation in trace.operations.values() if operation.kind == "tcgen05.mma"]
    assert macs == [128 * 64 * 16] * 8
    with pytest.raises(KeyError, match="no tmem of CTA 1; it has CTAs 0 to 0"):
        trace.tensor_memory(cta=1)


def test_only_the_first_ctas_are_kept_if_so_asked(kernels: ModuleType) -> None:
    from dsv4lab.kernels.lessons.scaled_copy import scaled_copy

    source, target = torch.randn(192, 128).half(), torch.zeros(192, 128).half()
    compiled = sim.compile(scaled_copy, source, target, 2.0, 2, arch="sm_90a")
    whole, part = sim.trace(compiled, source, target, 2.0), sim.trace(compiled, source, target, 2.0, ctas=2)
    assert (list(whole.ctas), list(part.ctas)) == ([0, 1, 2], [0, 1]) and set(part.events["cta"]) == {0, 1}
    kept = whole.events[whole.events["cta"] < 2]
    assert len(part.events) == len(kept) and (part.events["instruction"] == kept["instruction"]).all()
    assert part.traffic().of("source").once == 2 * 64 * 128 * 2
    assert len(part.timeline().rows) == 2 * 7
    with pytest.raises(ValueError, match="ctas must be at least 1, got 0"):
        sim.Recorder(0)


# the modelled timeline


def rows(timeline: sim.Timeline) -> dict[str, Any]:
    return {name: timeline.spans[timeline.spans["row"] == i] for i, name in enumerate(timeline.rows)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_model_gives_every_instruction_a_slot_and_every_operation_its_engine(
    scale: Callable[..., sim.Trace], schedule: str
) -> None:
    trace = scale(schedule=schedule)
    timeline = trace.timeline()
    timing = TIMINGS["sm_90a"]
    for name, spans in rows(timeline).items():
        assert (spans["end"] > spans["start"]).all() and (spans["start"][1:] >= spans["end"][:-1]).all(), name
    runs = trace.select(kind="run")
    passes = trace.select(kind="shared")
    for warp in range(6):
        name = timeline.rows[warp]
        slots = runs["value"][runs["warp"] == warp].sum() + passes["extra"][passes["warp"] == warp].sum()
        assert timeline.busy(name) * timeline.cycles == pytest.approx(slots)
    assert timeline.busy("TMA") * timeline.cycles == pytest.approx(8 * TILE_BYTES / timing.copy_bytes)
    with pytest.raises(KeyError, match="no row 'warp 9'; there are warp 0"):
        timeline.busy("warp 9")


def test_a_waiter_resumes_when_its_tile_has_arrived(scale: Callable[..., sim.Trace]) -> None:
    slow = Timing(copy_bytes=64, copy_latency=10_000, store_latency=0, macs=2048, narrowest=8, mma_latency=0)
    timeline = scale(tiles=1).timeline(slow)
    spans = rows(timeline)
    (load,) = [s for s in spans["TMA"] if timeline.kinds[s["kind"]] == "load"]
    waits = [s for s in spans["warp 1 (math)"] if timeline.kinds[s["kind"]] == "wait"]
    assert waits[-1]["end"] == load["start"] + TILE_BYTES / 64 + 10_000 + slow.barrier_latency
    assert timeline.waiting("warp 1 (math)") > 10_000


def test_more_stages_hide_more_latency(scale: Callable[..., sim.Trace]) -> None:
    cycles = [scale(stages=stages, tiles=8).timeline().cycles for stages in (1, 2, 3)]
    assert cycles[0] > 1.3 * cycles[1] and cycles[1] > cycles[2]


def test_conflicts_cost_time(scale: Callable[..., sim.Trace]) -> None:
    assert scale(swizzled=False).timeline().cycles > scale(swizzled=True).timeline().cycles


def test_a_gemms_tensor_core_works_for_as_long_as_its_products_take(gemm: sim.Trace) -> None:
    timeline = gemm.timeline()
    each = 64 * 64 * 256 / TIMINGS["sm_90a"].macs
    busy = [timeline.busy("tensor core", f"CTA {cta}") * timeline.cycles for cta in range(6)]
    assert busy == pytest.approx([each] * 6)
    assert {o.macs for o in gemm.operations.values() if o.kind == "wgmma"} == {64 * 64 * 16}


def test_categories() -> None:
    opcodes = ["ld.shared.v4.b32", "ld.param.b64", "add.f32", "tcgen05.ld.sync", "tcgen05.wait::ld.sync.aligned", "wgmma.fence"]
    names = ["memory", "math", "math", "memory", "sync", "mma"]
    assert [sim.Timeline.kinds[k] for k in categories(opcodes)] == names


# export, figures, failures


def test_export(scale: Callable[..., sim.Trace], tmp_path: Path) -> None:
    trace = scale(tiles=2)
    trace.to_json(tmp_path / "log.json")
    log = json.loads((tmp_path / "log.json").read_text())
    assert len(log["events"]["step"]) == len(trace.events) and len(log["operations"]) == 4
    assert log["kinds"][log["events"]["kind"][-1]] in ("exit", "run", "flip", "perform")
    trace.to_perfetto(tmp_path / "trace.json")
    records = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [r for r in records if r["ph"] == "X"]
    assert len(spans) == len(trace.timeline().spans) and {r["pid"] for r in records} == {0}
    assert {r["args"]["name"] for r in records if r["name"] == "thread_name"} == set(trace.timeline().rows)


def test_answers_fit_the_figures(scale: Callable[..., sim.Trace], gemm: sim.Trace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trace = scale()
    viz.plot_warp_timeline(**gemm.timeline().figure(("CTA 0", "CTA 3")))
    viz.plot_barrier_graph(**trace.barriers().figure())
    viz.plot_memory_occupancy(**trace.shared().figure())
    viz.plot_bank_conflicts(**trace.bank_conflicts().figure())
    viz.plot_traffic(**gemm.traffic().figure())
    plt.close("all")


def test_a_launch_that_fails_leaves_what_came_before(compiled: Callable[..., sim.Compiled]) -> None:
    a, b, c = torch.ones(128), torch.ones(128), torch.zeros(128)
    recorder = sim.Recorder()
    with pytest.raises(sim.SimulatorError, match="belongs to no tensor"):
        compiled("add_past_the_end", a, b, c)(a, b, c, observers=[recorder])
    assert recorder.traces == [] and len(recorder.trace().select(kind="run")) > 0


def test_a_launch_that_is_not_there(compiled: Callable[..., sim.Compiled]) -> None:
    a, b, c = torch.ones(128), torch.ones(128), torch.zeros(128)
    with pytest.raises(sim.CaptureError, match="launch 1 is to be traced, but the host function made 1"):
        sim.trace(compiled("add", a, b, c), a, b, c, launch=1)
