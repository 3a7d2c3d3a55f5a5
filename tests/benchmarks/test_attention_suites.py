"""The suites of the attention stack without a GPU: bounds, inputs, peers, and each suite at a tiny size on the reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention, attention_layer, common, compiling, eager, indexer, operations, rope_and_cache, work
from benchmarks.common import Bench, Ceilings, Failure, Timing
from dsv4lab import dispatch
from dsv4lab.config import CSA, HCA, SWA, ModelConfig
from dsv4lab.dispatch import MissingKernel
from dsv4lab.kernels._common import launch
from dsv4lab.reference import attention as reference_attention
from dsv4lab.reference import indexer as reference_indexer

FLASH = ModelConfig.flash()
SMALL = replace(FLASH, num_attention_heads=8, index_topk=16)
CEILINGS = Ceilings(copy=4e12, bf16=8e14)


class Watch:
    """Makes every candidate's first call; all take 2 us."""

    def measure(self, candidates: dict[str, Any]) -> dict[str, Timing | Failure]:
        found: dict[str, Timing | Failure] = {}
        for name, calls in candidates.items():
            try:
                calls[0]()
                found[name] = Timing(2.0, 2.5)
            except Exception as error:
                found[name] = Failure(common.reason_of(error))
        return found


def bench(path: Path, suite: str) -> Bench:
    return Bench(Watch(), CEILINGS, path, suite, quick=True)


def rows_of(place: Bench) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.path.read_text().splitlines()]


@pytest.fixture
def on_reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are the reference, pools have few different keys, and calls two copies of what they read."""
    monkeypatch.setattr(operations, "call", lambda name, *args, **how: getattr(torch.ops.dsv4lab, name)(*args, **how))
    monkeypatch.setattr(attention_layer, "backend", lambda name: dispatch.backend("reference"))
    monkeypatch.setattr(operations, "_UNIQUE", 96)
    monkeypatch.setattr(operations, "_MOST_COPIES", 2)
    monkeypatch.setattr(common, "num_copies", lambda nbytes: 2)
    torch.manual_seed(0)
    with launch.running_on(compiling.Nowhere()):
        yield


# ---- bounds ------------------------------------------------------------------------------------------------------------
def test_attention_bounds() -> None:
    shapes = {shape.name: shape for shape, _ in attention.cases(quick=False)}
    flash, pro = shapes["flash csa prefill"], shapes["pro csa prefill"]
    assert flash.flops == 4 * 64 * 512 * 4096 * 640 and pro.flops == 4 * 128 * 512 * 4096 * 1152
    assert (flash.bar, pro.bar, flash.ring, flash.page) == (("tflops", 480.0), ("tflops", 540.0), 4224, 32)
    dense = shapes["flash hca prefill 64k"]
    at_8k = shapes["flash hca prefill"]
    assert at_8k.bar == dense.bar == ("tflops", 480.0)
    assert at_8k.attended == sum(128 + (t + 1) // 128 for t in range(4096, 8192))
    assert dense.attended == sum(128 + (t + 1) // 128 for t in range(61440, 65536)) and dense.page == 1
    step = shapes["pro csa decode 128"]
    assert step.flops == 4 * 128 * 512 * 128 * 1152 and (step.ring, step.bar) == (192, ("us", 105.0))
    assert step.nbytes("fp8") == 128 * (1152 * 584 + 2 * 128 * 1024 + 4 * 1024)
    assert flash.nbytes("nvfp4") == 4096 * (2 * 64 * 1024 + 4 * 512) + (4096 + 127 + 2048) * 384
    early = attention.Shape("early", FLASH, CSA, 4, 400)
    assert early.attended == sum(128 + (t + 1) // 4 for t in range(396, 400)), "fewer entries than are chosen"


def test_indexer_bounds() -> None:
    shapes = {shape.name: shape for shape, _ in indexer.cases(quick=False)}
    prefill, everything = shapes["scores prefill"], shapes["scores all visible"]
    assert prefill.total_visible == int(prefill.visible("cpu").sum()) == sum((t + 1) // 4 for t in range(61440, 65536))
    assert everything.flops == 2 * 64 * 128 * 4096 * 16384 and int(everything.visible("cpu").min()) == 16384
    assert shapes["scores decode 8 x 4096"].nbytes("fp4") == 8 * (64 * 260 + 4096 * 68 + 4 * 4096)
    choice = shapes["topk 1024 of 4096 x 16384"]
    assert choice.nbytes == 4 * int(choice.visible("cpu").sum()) + 4 * 4096 * 1024
    assert shapes["topk 512 of 1 x 262144"].nbytes == 4 * 262144 + 4 * 512
    assert {record for shape, record in indexer.cases(quick=True)} == {"", "fp4", "fp8"}


def test_cold_copies() -> None:
    assert operations.cold_copies(1e9) == 2 and operations.cold_copies(32e6) == 10 and operations.cold_copies(1e3) == 256


def test_figures() -> None:
    want = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [0.0, 0.0]]])
    got = want.clone()
    got[1, 0] = torch.tensor([4.0, 3.0])
    assert operations.worst_row(got, want) == pytest.approx(0.96) and operations.worst_row(want, want) == pytest.approx(1.0)
    assert operations.worst_row(got + torch.tensor([1.0, 0.0]), want) < 0.8, "a row that should be zero counts"
    row = {"us": 2.0, "flops": 1e9, "percent_of_bound": 40.0}
    assert common.bar_fields(row, {"bar_us": 3.0}) == {"tflops": 500.0, "percent_of_bar": 150.0}
    assert common.bar_fields(row, {"bar_tflops": 400.0})["percent_of_bar"] == 125.0
    assert common.bar_fields(row | {"flops": 0.0}, {"bar_percent": 80.0}) == {"percent_of_bar": 50.0}
    assert common.bar_fields({"us": None, "flops": 1e9, "percent_of_bound": None}, {"bar_us": 3.0}) == {}


# ---- inputs ------------------------------------------------------------------------------------------------------------
def test_picks_are_random_ascending_and_visible() -> None:
    torch.manual_seed(0)
    visible = torch.tensor([0, 3, 16, 40])
    chosen = operations.picks(visible, 40, 16)
    assert chosen.shape == (4, 16) and chosen.dtype == torch.int32
    for row, count in zip(chosen.tolist(), visible.tolist(), strict=True):
        kept = [entry for entry in row if entry >= 0]
        assert len(kept) == min(count, 16) and row[len(kept) :] == [-1] * (16 - len(kept))
        assert kept == sorted(set(kept)) and all(entry < count for entry in kept)
    assert chosen[3].tolist() != list(range(16)), "not always the first"
    assert operations.picks(torch.tensor([5]), 5, 8).tolist() == [[0, 1, 2, 3, 4, -1, -1, -1]]


@pytest.mark.parametrize(
    ("record", "index"), [("plain", False), ("fp8", False), ("nvfp4", False), ("fp4", True), ("fp8", True)]
)
def test_pools_are_full_of_normalised_keys(on_reference: None, record: str, index: bool) -> None:
    pages = operations.pages_of(record, 7, 32, "cpu", index=index)
    keys = operations.dense(pages, record, 32, index=index)
    assert keys.shape == (224, 128 if index else 512) and keys.dtype == torch.bfloat16
    size = keys.float().square().mean(-1).sqrt()
    assert size.min() > 0.8 and size.max() < 1.25, "a page past the different ones repeats them"


def test_a_kernel_that_is_not_there_is_named() -> None:
    with launch.running_on(compiling.Nowhere()), pytest.raises(MissingKernel, match="nothing has no kernel for sm_90a"):
        operations.call("nothing", torch.zeros(1))
    with launch.running_on(compiling.Nowhere()), pytest.raises(MissingKernel, match="takes these arguments: group must be"):
        operations.call("quantize_fp8_rows", torch.zeros(1, 64), group=3)


# ---- rope_and_cache ----------------------------------------------------------------------------------------------------
SMALL_OPERATIONS = [operation for operation in rope_and_cache.OPERATIONS if not operation.name.endswith(" pro")]


@pytest.mark.parametrize("operation", SMALL_OPERATIONS, ids=lambda operation: operation.name)
def test_rope_and_cache_on_the_reference(on_reference: None, tmp_path: Path, operation: rope_and_cache.Operation) -> None:
    """The row is whole, and the peer computes what the reference does, for a step and for a new sequence."""
    place = bench(tmp_path / "rows.jsonl", "rope_and_cache")
    for m in (2, 256) if operation.kernel in ("compress", "cache_write") else (2,):
        rope_and_cache.measure(place, operation, m, "cpu")
        row = rows_of(place)[-1]
        assert (row["us"], row["equal"], row["m"]) == (2.0, 1.0, m) and row["worst_row"] > 0.999999
        assert row["peers"]["torch"]["us"] == 2.0 and "to save time" in row["peers"]["torch.compile"]["reason"]
        args = operation.make(m, "cpu")
        ours, theirs = operation.fresh(args), operation.fresh(args)
        want, got = operation.parts(operation(ours), ours), operation.parts(operation.eager(*theirs[0], **theirs[1]), theirs)
        values = operation.values(tuple(want), ours), operation.values(tuple(got), theirs)
        assert common.cosine(*values) > 0.998 and operations.worst_row(*values) > 0.99  # a code may be the next one
        if operation.kernel == "compress":
            torch.testing.assert_close(got[0], want[0])  # the ring


@pytest.mark.parametrize("operation", rope_and_cache.OPERATIONS[:8], ids=lambda operation: operation.name)
def test_bytes_of_heads_are_those_of_the_tensors(on_reference: None, operation: rope_and_cache.Operation) -> None:
    args = operation.make(3, "cpu")
    parts = operation.parts(operation(args), args)
    assert operation.nbytes(3) == args[0][0].nbytes + sum(part.nbytes for part in parts)


def test_bytes_of_keys() -> None:
    found = {operation.name: operation.nbytes(8192) for operation in rope_and_cache.OPERATIONS}
    assert found["cache_write fp8"] == 8192 * (1024 + 584) and found["cache_read nvfp4"] == 8192 * (2048 + 384)
    assert found["compress hca"] == (8192 + 128) * 4096 + 64 * 584
    assert found["compress csa index"] == (8192 + 8) * 2048 + 2048 * 68
    step = {operation.name: operation.nbytes(1) for operation in rope_and_cache.OPERATIONS}
    assert step["compress csa kv"] == 2 * 8192 + 7 * 4096 + 584, "a token comes and goes, seven more are read by half"


# ---- indexer -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("record", indexer.RECORDS)
@pytest.mark.parametrize("shape", [indexer.Scores("prefill", 5, 1, 70, True), indexer.Scores("decode", 2, 2, 40, False)])
def test_scores_on_the_reference(on_reference: None, tmp_path: Path, shape: indexer.Scores, record: str) -> None:
    place = bench(tmp_path / "rows.jsonl", "indexer")
    indexer.measure_scores(place, shape, record, "cpu")
    (row,) = rows_of(place)
    assert row["us"] == 2.0 and row["equal_mask"] and row["worst_row"] > 0.999999 and row["flops"] == shape.flops
    assert ("torch" in row["peers"]) == (record == "fp8") and row["tflops"] is not None


def test_peer_scores_are_the_scores(on_reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "_PEER_QUERIES", 2)
    for shape in (indexer.Scores("all", 5, 1, 70, False), indexer.Scores("decode", 2, 2, 40, False)):
        sets = indexer.scores_args(shape, "fp8", "cpu", 2)
        for (args, named), call in zip(sets, indexer.peer_calls(shape, sets), strict=True):
            got = torch.cat(call(), dim=1).flatten(0, 1)  # type: ignore[arg-type]
            assert common.cosine(got, reference_indexer.index_scores(*args, **named)) > 0.9999


def test_topk_on_the_reference(on_reference: None, tmp_path: Path) -> None:
    place = bench(tmp_path / "rows.jsonl", "indexer")
    indexer.measure_choice(place, indexer.Choice("topk", 70, 200, 16), "cpu")
    (row,) = rows_of(place)
    assert row["equal"] == 1.0 and row["peers"]["torch.topk"]["us"] == 2.0 and row["bound"] == "bytes"


# ---- attention ---------------------------------------------------------------------------------------------------------
SHAPES = (
    attention.Shape("csa prefill", SMALL, CSA, 6, 260),
    attention.Shape("csa early", SMALL, CSA, 3, 40),
    attention.Shape("hca prefill", SMALL, HCA, 4, 386, bar=("tflops", 480.0)),
    attention.Shape("csa decode", SMALL, CSA, 3, 520, decode=True, bar=("us", 13.0)),
    attention.Shape("hca decode", SMALL, HCA, 2, 520, decode=True),
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_attention_on_the_reference(on_reference: None, tmp_path: Path, shape: attention.Shape) -> None:
    """The row is whole; torch's composition gives the reference's result, SDPA the same without the sink."""
    place = bench(tmp_path / "rows.jsonl", "attention")
    attention.measure(place, shape, "fp8", "cpu")
    (row,) = rows_of(place)
    assert row["us"] == 2.0 and row["worst_row"] > 0.9999 and row["heads"] == 8 and row["flops"] == shape.flops
    assert ("percent_of_bar" in row) == (shape.bar is not None)
    assert row["peers"]["sdpa"]["us"] == row["peers"]["torch"]["us"] == 2.0 and "triton" in row["peers"]
    sets = attention.inputs(shape, "fp8", "cpu", 2)
    for (args, named), listed in zip(sets, attention.listed(shape, sets), strict=True):
        for sinks, call in (
            (args[1], attention._eager_call(attention.eager_attention, listed, args[1])),
            (torch.full((8,), -1e9), attention._sdpa_call(*listed)),
        ):
            got: Any = call()
            got = torch.cat(got) if isinstance(got, list) else got[:, 0]
            want = reference_attention.attention(args[0].double(), sinks, *args[2:], **named)
            assert operations.worst_row(got, want) > 0.9999


@pytest.mark.parametrize("record", ["plain", "nvfp4"])
def test_other_records_have_no_peers(on_reference: None, tmp_path: Path, record: str) -> None:
    place = bench(tmp_path / "rows.jsonl", "attention")
    attention.measure(place, SHAPES[0], record, "cpu")
    (row,) = rows_of(place)
    assert row["us"] == 2.0 and row["peers"] == {} and row["cosine"] > 0.9999


def test_attention_without_a_kernel_is_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "KERNELS", ())
    monkeypatch.setattr(operations, "_UNIQUE", 96)
    monkeypatch.setattr(operations, "_MOST_COPIES", 2)
    place = bench(tmp_path / "rows.jsonl", "attention")
    with launch.running_on(compiling.Nowhere()):
        attention.measure(place, SHAPES[3], "fp8", "cpu")
    (row,) = rows_of(place)
    assert row["us"] is None and "attention has no kernel for sm_90a" in row["reason"]
    assert row["peers"]["torch"]["us"] == 2.0 and "percent_of_bar" not in row


# ---- attention_layer ---------------------------------------------------------------------------------------------------
NANO = ModelConfig.nano()


@pytest.mark.parametrize(
    "shape",
    [
        attention_layer.Shape("swa", SWA, 2, 1, 256, NANO),
        attention_layer.Shape("csa", CSA, 2, 1, 256, NANO),
        attention_layer.Shape("hca", HCA, 1, 64, 384, NANO),
    ],
    ids=lambda shape: shape.name,
)
def test_layers_on_the_reference(
    on_reference: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: attention_layer.Shape
) -> None:
    place = bench(tmp_path / "rows.jsonl", "attention_layer")
    attention_layer.measure(place, shape, "nvfp4", "cpu")
    (row,) = rows_of(place)
    names = [part["part"].split()[0] for part in row["parts"]]
    assert names.count("attention") == names.count("cache_write") == names.count("grouped_linear") == 1
    assert ("index_topk" in names) == (shape.kind == CSA) and names.count("compress") == {SWA: 0, CSA: 2, HCA: 1}[shape.kind]
    assert row["us"] == 2.0 and row["parts_us"] == 2.0 * len(names) and row["worst_row"] > 0.999
    assert row["percent_of_bound"] > 0 and capsys.readouterr().out.count(" us ") == len(names) + 1


def test_bounds_of_layers() -> None:
    """The products' flops are those of the dims; keys and index keys are read once."""
    shape = next(s for s in attention_layer.SHAPES if s.name == "flash csa layer, decode 64")
    calls = attention_layer.Layer.make(shape, "nvfp4", "meta").observed()
    by_name = {attention_layer.name_of(call): call for call in calls}
    wide = by_name["linear 32768x1024 nvfp4"]
    assert attention_layer.flops_of(shape, wide) == 2 * 64 * 32768 * 1024
    assert attention_layer.kept_bytes(shape, wide) == 32768 * 1024 * 9 / 16 + 4
    assert work.moved_bytes(shape, wide) == 64 * (1024 + 32768) * 2
    attended, scored = by_name["attention"], by_name["index_scores"]
    assert attention_layer.kept_bytes(shape, attended) == 64 * 640 * 584
    assert attention_layer.flops_of(shape, attended) == 4 * 64 * 640 * 64 * 512
    assert attention_layer.kept_bytes(shape, scored) == 64 * 4096 * 68
    assert attention_layer.flops_of(shape, scored) == 2 * 64 * 4096 * 64 * 128


def test_torch_compile_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    assert eager.compiled(eager.rmsnorm, torch.ones(1, 4), torch.ones(4)) == Failure("RuntimeError: no compiler")
