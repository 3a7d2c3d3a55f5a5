"""The suite of whole layers without a GPU: on the reference at nano's size, with launches and a trace that are made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import attention_layer, common, compiling, layers, operations, work
from benchmarks.common import Bench, Ceilings, Failure, Timing
from benchmarks.work import Shape
from dsv4lab import dispatch, ops
from dsv4lab.config import CSA, HCA, SWA, ModelConfig
from dsv4lab.kernels._common import cache, launch
from dsv4lab.kernels.moe.combine.api import moe_combine
from dsv4lab.lab import trace
from dsv4lab.lab.trace import Kernel

NANO = ModelConfig.nano()
CEILINGS = Ceilings(copy=4e12, bf16=8e14)
MODULES = {  # of the kernels that an operation on experts launches, in order
    "moe_layer": (*["gemm.mixed.sm90"] * 2, "moe.permute.kernel", *["gemm.mixed.sm90"] * 2, "moe.combine.kernel"),
}
SHAPES = {
    "swa": (Shape("swa", SWA, 1, 1, 256, NANO), Shape("swa prefill", SWA, 1, 8, 8, NANO)),
    "csa": (Shape("csa", CSA, 2, 1, 256, NANO), Shape("csa prefill", CSA, 1, 9, 9, NANO)),
    "hca": (Shape("hca", HCA, 2, 1, 384, NANO),),
}


class Watch:
    """Makes every candidate's first call; all take 40 us."""

    def measure(self, candidates: dict[str, Any]) -> dict[str, Timing | Failure]:
        return {name: Timing(40.0, 41.0) for name, calls in candidates.items() if calls[0]() is not None}


def bench(path: Path) -> Bench:
    return Bench(Watch(), CEILINGS, path, "layers", quick=True)


def symbol(module: str) -> str:
    return f"kernel_cutlass_kernel_dsv4labkernels{module.replace('.', '').replace('_', '')}Kernel_object_at__0"


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Kernel]]:
    """Kernels are the reference; an operation launches one, of 2 us, or what experts do. The list's ran too."""
    extra: list[Kernel] = []

    def observed(step: layers.Step) -> tuple[list[ops.Call], list[layers.Launched]]:
        with ops.observe() as calls:
            step()
        names = [
            layers.Launched(number, launch.Name(f"dsv4lab.kernels.{module}", ""))
            for number, call in enumerate(calls)
            for module in MODULES.get(call.name, (f"{call.name}.kernel",))
        ]
        launches[:] = [symbol(one.name.module.removeprefix("dsv4lab.kernels.")) for one in names]
        return calls, names

    def traced(call: Any, runs: int) -> list[Kernel]:
        names = [(name, 2.0 * i) for i, name in enumerate(launches)]
        found = [Kernel(name, 1e4 * run + at, 1e4 * run + at + 2.0) for run in range(runs) for name, at in names]
        return sorted(found + extra, key=lambda kernel: kernel.start_us)

    def captured(step: layers.Step) -> tuple[Any, torch.Tensor]:
        y = torch.empty_like(step.streams)
        return (lambda: y.copy_(step())), y

    launches: list[str] = []
    monkeypatch.setattr(layers, "backend", lambda name: dispatch.backend("reference"))
    monkeypatch.setattr(layers, "observed", observed)
    monkeypatch.setattr(layers, "traced", traced)
    monkeypatch.setattr(layers, "captured", captured)
    monkeypatch.setattr(layers, "symbols_of", lambda name, arch: {symbol(name.module.removeprefix("dsv4lab.kernels."))})
    monkeypatch.setattr(layers, "CHECKED", (1, 3, 300))
    monkeypatch.setattr(operations, "_UNIQUE", 96)
    torch.manual_seed(0)
    with launch.running_on(compiling.Nowhere()):
        yield extra


def rows_of(place: Bench) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.path.read_text().splitlines()]


@pytest.mark.parametrize("kind", SHAPES)
def test_blocks_on_the_reference(made_up: list[Kernel], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """A row for each step, with a line for each kernel; everything that must hold does."""
    place, done = bench(tmp_path / "rows.jsonl"), []  # type: ignore[var-annotated]
    layers.measure(place, SHAPES[kind], "official" if kind == "hca" else "w4a16", done, "cpu")
    rows = rows_of(place)
    assert [row["shape"] for row in rows] == [shape.name for shape in SHAPES[kind]] == [row["shape"] for row in done]
    for row, shape in zip(rows, SHAPES[kind], strict=True):
        assert "reason" not in row and layers.faults(row) == [] and row["foreign"] == []
        assert row["cosine"] > 0.9999 and row["cosine_attn"] > 0.9999 and row["cosine_ffn"] > 0.9999
        assert row.get("replay_equal") == (True if shape.tokens == 1 else None)
        assert row["traced"] == ("replays" if shape.tokens == 1 else "launches")
        assert len({line["part"] for line in row["parts"]}) == len(row["parts"])
        names = [line["part"].split()[0] for line in row["parts"]]
        assert names[0] == "mhc_pre" and names[-1] == "mhc_post" and names.count("mhc_post_pre") == 1
        assert names.count("moe_layer") == 6 and names.count("attention") == 1
        assert ("index_topk" in names) == (shape.name == "csa") and names.count("compress") == {"swa": 0, "csa": 2, "hca": 1}[
            kind
        ]
        assert all(line["us"] == line["runs_us"] == 2.0 and line["count"] == 1 for line in row["parts"])
        assert row["kernels_us"] == 2.0 * len(names) and row["us"] == 40.0
        bounds = [line["bound_us"] for line in row["parts"]]
        assert row["bound_us"] == pytest.approx(sum(bounds), rel=1e-4) and all(bound > 0 for bound in bounds)
        assert all(line["percent_of_bound"] == pytest.approx(50 * line["bound_us"], abs=0.06) for line in row["parts"])
    printed = capsys.readouterr().out
    assert printed.count("mhc_post_pre") == len(rows) and "WRONG" not in printed


def test_what_must_hold_is_said_and_ends_the_suite(
    made_up: list[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel of another, a replay that leaves something undone, a cosine that is too small."""
    made_up += [Kernel("nvjet_tst", 1e4 * run - 5.0, 1e4 * run - 4.0) for run in range(7)]
    monkeypatch.setattr(layers, "captured", lambda step: (lambda: None, torch.zeros_like(step.streams)))
    monkeypatch.setattr(layers, "LEAST_COSINE", 1.1)
    monkeypatch.setattr(layers, "cases", lambda quick: iter([(SHAPES["swa"][0], "w4a16")]))
    measure = layers.measure
    monkeypatch.setattr(layers, "measure", lambda *args: measure(*args, "cpu"))
    place = bench(tmp_path / "rows.jsonl")
    with pytest.raises(
        RuntimeError, match=r"swa w4a16: cosine with the reference must be over 1\.1.*differs.*not ours: nvjet_tst"
    ):
        layers.run(place)
    (row,) = rows_of(place)
    assert row["foreign"] == ["nvjet_tst"] and row["replay_equal"] is False
    assert {"part": "-", "kernel": "nvjet_tst", "count": 1, "us": 1.0, "runs_us": 1.0} in row["parts"]
    printed = capsys.readouterr().out
    assert printed.count("WRONG") == 3 and "DIFFERS" in printed


def test_replays_without_names_give_way_to_launches(
    made_up: list[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that shows as one thing, and one of whose replays something was missed."""
    whole = layers.traced
    for replays in ([Kernel("graph", 1e4 * run, 1e4 * run + 9.0) for run in range(7)], [Kernel("a", 0.0, 1.0)]):
        monkeypatch.setattr(
            layers, "traced", lambda call, runs, seen=replays: whole(call, runs) if isinstance(call, layers.Step) else seen
        )
        done: list[dict[str, Any]] = []
        layers.measure(bench(tmp_path / "rows.jsonl"), SHAPES["swa"][:1], "w4a16", done, "cpu")
        assert done[0]["traced"] == "launches" and done[0]["foreign"] == [] and len(done[0]["parts"]) == 19


def test_a_layer_that_cannot_be_made_has_rows_with_the_reason(tmp_path: Path) -> None:
    place, done = bench(tmp_path / "rows.jsonl"), []  # type: ignore[var-annotated]
    layers.measure(place, SHAPES["csa"], "w4a16", done, "no device")
    rows = rows_of(place)
    assert [row["us"] for row in rows] == [None, None] and all("no device" in row["reason"] for row in rows) and done == []


def test_weights_are_those_of_official_nvfp4_checkpoints() -> None:
    torch.manual_seed(0)
    block = layers.random_block(NANO, CSA, layers.FORMATS["official"], "cpu")
    experts, shared, attn = block.ffn.experts, block.ffn.shared_experts, block.attn
    assert {m.format.name for m in (experts.w1, experts.w3, experts.w2)} == {"nvfp4"}
    assert experts.w1.weight.shape == (NANO.n_routed_experts, NANO.moe_intermediate_size, NANO.hidden_size)
    assert torch.equal(experts.w1.global_scale, experts.w3.global_scale) and experts.w2.global_scale.unique().numel() > 1
    assert len({bytes(codes.numpy()) for codes in experts.w2.codes}) == NANO.n_routed_experts, "every expert is another"
    assert (experts.w1.input_scale > 0).all()
    assert {m.format.name for m in (shared.w1, shared.w2, attn.wq_a, attn.wo_a, attn.wo_b, attn.indexer.wq_b)} == {"fp8_block"}
    assert {m.format.name for m in (attn.compressor.wkv, attn.indexer.weights_proj)} == {"bf16"}
    assert block.hc_attn.fn.shape == (NANO.hc_mix_dim, NANO.hc_mult * NANO.hidden_size)


def test_bounds_of_blocks_are_those_of_their_tensors() -> None:
    """Of a decode step of 64: what a launch is prepared for does not count, what the tokens need does."""
    shape = next(s for s in layers.SHAPES if s.name == "flash csa block, decode 64")
    block = layers.random_block(shape.config, shape.kind, layers.FORMATS["w4a16"], "meta")
    step = layers.Step.make(block, shape, "meta")
    with ops.observe() as calls:
        block(step.streams, step.batch, step.cache)
    by_name = {work.name_of(call): call for call in calls}
    scores, choice = by_name["index_scores"], by_name["index_topk"]
    assert scores.output.shape[1] > 4096, "planned for longer sequences"
    assert work.kept_bytes(shape, scores) == 64 * 4096 * 68
    assert work.moved_bytes(shape, scores) == 64 * (64 * 128 * 2 + 64 * 4 + 4096 * 4)
    assert work.bytes_of(shape, choice) == 64 * 4 * (4096 + 512)
    before = by_name["mhc_pre"]
    assert work.kept_bytes(shape, before) == 4 * 24 * 16384
    assert work.moved_bytes(shape, before) == 64 * (4 * 8192 + 8192 + 4 * 4 + 16 * 4)
    assert work.flops_of(shape, before) == 2 * 64 * 24 * 16384
    router = by_name["router_topk"]
    assert work.bytes_of(shape, router) == 256 * 4096 * 2 + 64 * (8192 + 6 * 12)
    experts, one = by_name["moe_layer"], 6 * 64 * 4096 * 2048
    assert work.expert_flops(shape, experts) == (6 * one, one) and work.flops_of(shape, experts) == 7 * one
    hit = replace(experts, inputs=experts.inputs | {"expert_idx": torch.arange(64 * 6).view(64, 6) % 100})
    assert work.experts_hit(hit) == 100
    routed, shared = work.expert_bytes(hit)
    assert routed == pytest.approx(100 * 3 * (4096 * 2048 * 9 / 16 + 4)) and shared == 3 * 4096 * 2048 + 3 * 32 * 16
    assert work.kept_bytes(shape, hit) == routed + shared
    apart, both = (work.layer_parts(shape, hit, apart=a) for a in (True, False))
    assert apart["shared product 2"] == (shared / 3, one / 3) and apart["product 1"] == (routed * 2 / 3, 6 * one * 2 / 3)
    assert both["product 1"] == pytest.approx(((routed + shared) * 2 / 3, 7 * one * 2 / 3)) and len(both) == len(apart) - 2


def test_early_tokens_have_no_window_before_them() -> None:
    shape = Shape("start", SWA, 1, 64, 64, NANO)
    call = ops.Call("attention", "", {"topk_indices": None, "record": "fp8"}, None)
    assert work.kept_bytes(shape, call) == 64 * 584
    assert work.kept_bytes(replace(shape, context=128), call) == 128 * 584
    assert work.kept_bytes(replace(shape, context=4096), call) == (127 + 64) * 584


# ---- launches ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fmt", layers.FORMATS)
@pytest.mark.parametrize("scene", ["prefill", "decode 1"])
def test_launches_of_experts_are_the_steps_they_are_taken_for(scene: str, fmt: str) -> None:
    """The kernels that the operations ask for, in the order of their launches."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    shape = next(s for s in layers.SHAPES if s.name == f"flash swa block, {scene}")
    block = layers.random_block(shape.config, shape.kind, layers.FORMATS[fmt], "meta")
    step = layers.Step.make(block, shape, "meta")
    with ops.observe() as calls:
        block(step.streams, step.batch, step.cache)
    call = next(call for call in calls if call.name == layers._EXPERTS)
    unprepared = mock.patch.object(layers.prepared_weights, "prepare", attention_layer.prepared_shape)
    with unprepared, compiling.asking(lambda name: False) as asked:
        work.again(call)
    plan = layers.steps_of([kernel.module for kernel in asked])
    products = [step for step in ("product 1", "product 2") for _ in range(1 + (fmt == "official"))]
    shared, plan = plan[: len(products)], plan[len(products) :]
    assert shared == [f"shared {step}" for step in products]  # FP8 beside NVFP4
    assert plan.count("permute") == plan.count("gather") == (scene == "prefill")  # a token alone has neither
    assert plan[0] in ("permute", "product 1") and plan[-1] == "combine"
    assert [s for s in plan if s.startswith("product")] == products
    routed = replace(call, inputs=call.inputs | {"expert_idx": torch.zeros(shape.rows, 6, dtype=torch.int64)})
    assert {*plan, *shared} <= work.layer_parts(shape, routed, apart=True).keys()
    joint = layers.steps_of(["a.gemm.b", "a.quant.b", "a.gemm.b", "a.moe.combine.b"])
    assert joint == ["product 1", "product 2", "product 2", "combine"]


def test_a_launch_belongs_to_the_operation_that_has_not_ended() -> None:
    runtime = layers.Launches(compiling.Nowhere())
    launch.give_name(first := lambda: None, "a.kernel", 1)
    launch.give_name(second := lambda: None, "b.kernel", 2)
    runtime.call(first)
    runtime.calls.append(ops.Call("a", "", {}, None))
    runtime.call(second)
    runtime.call(first)
    assert [(one.call, one.name.module) for one in runtime.launched] == [(0, "a.kernel"), (1, "b.kernel"), (1, "a.kernel")]
    assert [name.module for name in runtime.names] == ["a.kernel", "b.kernel"]


def test_bounds_stand_against_all_kernels_of_their_part() -> None:
    parts = [layers.Part("first", 8e6, 0.0, (0, 2)), layers.Part("second", 0.0, 8e8, (1,))]
    rows = [
        trace.Row("a", 0, 1, 1.0, 1.5),
        trace.Row("c", 1, 1, 4.0, 4.0),
        trace.Row("b", 2, 2, 3.0, 3.0),
        trace.Row("Memset (Device)", None, 1, 0.5, 0.5),
    ]
    lines = layers.table(parts, rows, CEILINGS)
    assert [(line["part"], line["kernel"]) for line in lines] == [
        ("first", "a"),
        ("first", "b"),
        ("second", "c"),
        ("-", "memset"),
    ]
    assert [line.get("percent_of_bound") for line in lines] == [50.0, 50.0, 25.0, None]
    assert [line.get("bound") for line in lines] == ["bytes", "bytes", "flops", None]


def test_compiled_kernels_are_known_by_their_symbols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a function's name to the kernels that it starts, whose names say that they are ours: compiled now, for Hopper."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(cache, "_link", lambda code, libraries: lambda *_: None)
    monkeypatch.setattr(cache, "_loaded", {})
    runtime = layers.Launches(compiling.Nowhere())
    with launch.running_on(runtime):
        moe_combine(torch.zeros(2, 64), torch.zeros(2, 64, dtype=torch.bfloat16))
    (one,) = runtime.launched
    names = layers.symbols_of(one.name, "sm_90a")
    assert [trace.short(name) for name in names] == ["Combine"] and all(trace.is_ours(name) for name in names)
    assert common.symbols(".visible .entry a_0(\n.param .u64 x)\n{}\n.entry b$1 (") == ["a_0", "b$1"]


def test_cases_and_quick_ones() -> None:
    everything, quick = list(layers.cases(quick=False)), list(layers.cases(quick=True))
    assert len(everything) == 12 and len(quick) == len(layers.QUICK) == 4 and set(quick) <= set(everything)
    assert {shape.kind for shape, _ in everything} == set(attention_layer.KINDS)
    assert {(shape.rows, shape.context) for shape, _ in everything} == {(4096, 4096), (1, 16384), (64, 16384)}
