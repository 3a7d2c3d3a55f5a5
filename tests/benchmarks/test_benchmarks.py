"""What of the benchmarks runs without a GPU: plans, bounds, errors, rows, and every suite at a tiny size in the simulator."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import common, compiling, experts, linear, quantizers, runner
from benchmarks.common import Bench, Call, Ceilings, Failure, Timing
from dsv4lab import sim
from dsv4lab.dispatch import implementations
from dsv4lab.formats import BF16, FORMATS, PackedWeight
from dsv4lab.kernels._common import cache
from dsv4lab.kernels.gemm.mixed.layout import prepare
from dsv4lab.lab import machine
from dsv4lab.reference import quant
from tests.kernels.simulated import simulating

CEILINGS = Ceilings(copy=4e12, bf16=8e14)
LEAST_KERNELS = {"indexer": 5, "attention": 4, "head": 20, "mhc": 14}  # that a suite asks for; others ask for more than twenty


class Watch:
    """Makes every candidate's first call; all take 2 us."""

    def measure(self, candidates: Mapping[str, Sequence[Call]]) -> dict[str, Timing | Failure]:
        found: dict[str, Timing | Failure] = {}
        for name, calls in candidates.items():
            try:
                calls[0]()
                found[name] = Timing(2.0, 2.5)
            except Exception as error:
                found[name] = Failure(common.reason_of(error))
        return found


def bench(path: Path, suite: str = "linear", **options: object) -> Bench:
    return Bench(Watch(), CEILINGS, path, suite, **options)  # type: ignore[arg-type]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- plans -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suite", compiling.SUITES)
def test_every_case_asks_for_kernels_that_can_be(suite: str) -> None:
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    jobs, failures = compiling.plan([suite], quick=False)
    lacking = [f"{name} has no kernel for sm_90a" for name, where in implementations().items() if "sm_90a" not in where]
    assert not [failure for failure in failures if not any(reason in failure for reason in lacking)]
    assert len({job.name for job in jobs}) == len(jobs)
    if not failures:
        quick, _ = compiling.plan([suite], quick=True)
        assert len(jobs) >= LEAST_KERNELS.get(suite, 21) and 0 < len(quick) <= len(jobs)
    assert cache.kernel.__name__ == "kernel" and cache._link.__name__ == "_link", "what the plan replaced is back"


def test_the_shapes_are_the_models() -> None:
    shapes = {shape.name: (shape.n, shape.k, shape.groups) for shape in linear.SHAPES}
    assert shapes["flash wq_b"] == (32768, 1024, 1) and shapes["pro wq_b"] == (65536, 1536, 1)
    assert shapes["flash wo_a"] == (8192, 4096, 8) and shapes["pro wo_a"] == (16384, 4096, 16)
    assert shapes["flash wo_b"] == (4096, 8192, 1) and shapes["pro wo_b"] == (7168, 16384, 1)
    assert shapes["flash shared w1+w3"] == (2048, 4096, 1) and shapes["pro shared w2"] == (7168, 3072, 1)
    of_nvfp4 = [m for shape, fmt, m in linear.cases(quick=False) if fmt == "nvfp4" and shape.name == "pro wkv"]
    assert tuple(of_nvfp4) == linear.TOKENS
    assert {fmt for shape, fmt, _ in linear.cases(quick=False) if shape.name == "flash head"} == {"bf16"}


@pytest.mark.parametrize("fmt", linear.FORMATS)
@pytest.mark.parametrize("paired", [False, True])
def test_shapes_of_prepared_weights_are_those_of_prepare(fmt: str, paired: bool) -> None:
    parts = [linear.random_weight(fmt, 40, 320, "cpu", 3) for _ in range(1 + paired)]
    real, shape = prepare(*parts), linear.prepared_shape(*parts)
    assert (shape.records.shape, shape.alpha.shape, shape.shape) == (real.records.shape, real.alpha.shape, real.shape)
    assert (shape.format, shape.paired, shape.slabs) == (real.format, real.paired, real.slabs)


@pytest.mark.parametrize("fmt", linear.FORMATS)
def test_random_weights_give_results_of_the_size_of_x(fmt: str) -> None:
    torch.manual_seed(0)
    weight = quant.dequantize(linear.random_weight(fmt, 256, 1024, "cpu"))
    size = (torch.randn(64, 1024) @ weight.t()).square().mean().sqrt()
    assert 0.5 < size < 2.5


def test_copies_and_repetitions() -> None:
    assert common.num_copies(100e6) == 3 and common.num_copies(1e9) == 2 and common.num_copies(8192) == 4
    calls: list[Call] = [lambda: None, lambda: 1, lambda: 2, lambda: 3, lambda: 4]
    assert len(common.repeated(calls, 1.0)) == 200 and common.repeated(calls, 100.0) == calls
    assert common.repeated(calls, 5000.0) == calls[:4], "four at least, that the cache stays cold"
    assert common.repeated(calls[:2], 5000.0) == calls[:2]


def test_memory_decides_how_many_experts_the_peer_has() -> None:
    assert experts.affordable(experts.FLASH, 70e9) == 256
    assert experts.affordable(experts.PRO, 50e9) == 192
    with pytest.raises(MemoryError, match="no room for BF16 weights of 6 experts"):
        experts.affordable(experts.PRO, 14.1e9)


# ---- figures -----------------------------------------------------------------------------------------------------------
def test_bounds_and_errors() -> None:
    assert CEILINGS.bound_us(4e6, 0.0) == (pytest.approx(1.0), "bytes")
    assert CEILINGS.bound_us(4e6, 8e9) == (pytest.approx(10.0), "flops")
    want = torch.tensor([[3.0, 4.0]])
    assert common.relative_error(want * 1.5, want) == pytest.approx(0.5)
    assert common.cosine(want * 7, want) == pytest.approx(1.0) and common.cosine(want, want.flip(1)) == pytest.approx(0.96)
    row = common.accuracy_fields(want * 1.2, want, want * 1.1)
    assert row["error_over_cublas"] == pytest.approx(2.0, abs=1e-3)


def test_small_copies_are_slower_than_large_ones() -> None:
    ceilings = replace(CEILINGS, copies={1e6: 2.0, 4e6: 3.5, 16e6: 6.5})
    assert ceilings.copy_us(0.9e6) is None and CEILINGS.copy_us(1e9) is None
    assert ceilings.copy_us(1e6) == 2.0 and ceilings.copy_us(2e6) == 2.5 and ceilings.copy_us(10e6) == 5.0
    assert ceilings.copy_us(20e6) == 6.5 + 1.0  # the rest at the rate of large ones
    row = {"us": 4.0, "bound": "bytes", "bytes": 4e6}
    assert common.copy_fields(row, ceilings) == {"copy_us": 3.5, "percent_of_copy": 87.5}
    for other in ({"bound": "flops"}, {"us": None}, {"bytes": 1e3}):
        assert common.copy_fields(row | other, ceilings) == {}


def test_small_copies_read_and_write_so_many_bytes_of_places_of_their_own() -> None:
    source, target = torch.arange(2.0**20), torch.zeros(2**20)
    calls = list(common.small_copies(source, target, 2**10))
    assert len(calls) == common.num_copies(2**10)
    for i, call in enumerate(calls):
        call()
        assert int((target != 0).sum()) == (i + 1) * 2**10 // 8 - 1  # the first number is a zero
    assert torch.equal(target[: len(calls) * 128], source[: len(calls) * 128])


def test_rows_are_json_whatever_happened() -> None:
    times = {"ours": Timing(2.0, 2.5), "good": Timing(5.0, 6.0), "bad": Failure("RuntimeError: no")}
    row = common.timing_fields(times, 1.0, "bytes")
    assert row["percent_of_bound"] == 50.0 and row["peers"]["good"]["ratio"] == 2.5
    assert row["peers"]["bad"] == {"us": None, "ratio": None, "reason": "RuntimeError: no"}
    failed = common.timing_fields({"ours": Failure("no"), "good": Timing(5.0, 6.0)}, 1.0, "bytes")
    assert failed["us"] is None and failed["reason"] == "no" and failed["peers"]["good"]["ratio"] is None
    assert json.dumps(common.finite({"a": math.nan, "b": [math.inf, 1.0], "c": ("x",)}), allow_nan=False)
    assert "good 2.50x" in common.line_of({"shape": "s"} | row) and "failed" in common.line_of({"shape": "s"} | failed)


def test_a_shape_that_fails_has_a_row_with_the_reason(tmp_path: Path) -> None:
    place = bench(tmp_path / "rows.jsonl")
    linear.measure(place, linear.Shape("odd", 64, 128), "nvfp4", (2,), device="cpu")  # no runtime for CPU tensors here
    (row,) = rows_of(place.path)
    assert row["us"] is None and "a kernel needs CUDA tensors" in row["reason"] and row["m"] == 2


def test_time_limits_and_matches(tmp_path: Path) -> None:
    place = bench(tmp_path / "rows.jsonl", match="wq")
    assert place.wants("flash wq_a nvfp4") and not place.wants("flash head bf16") and not place.skipped
    late = bench(tmp_path / "rows.jsonl", stop_at=0.0)
    assert not late.wants("flash wq_a nvfp4") and late.skipped == ["flash wq_a nvfp4"]


def test_rows_say_when_and_of_which_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of git, with a "+" where files differ; what is set counts; neither is no error."""
    monkeypatch.delenv("DSV4LAB_COMMIT", raising=False)
    answers = {"rev-parse": "0123456ab", "status": ""}
    monkeypatch.setattr(machine, "_git", lambda command, *_: answers[command])
    assert common.commit() == "0123456ab"
    answers["status"] = " M benchmarks/common.py"
    assert common.environment()["commit"] == "0123456ab+"
    for given in ("89abcdef0", "89abcdef0" + "1" * 31):
        monkeypatch.setenv("DSV4LAB_COMMIT", given)
        assert common.environment()["commit"] == "89abcdef0"
    monkeypatch.delenv("DSV4LAB_COMMIT")
    monkeypatch.undo()
    monkeypatch.delenv("DSV4LAB_COMMIT", raising=False)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert common.commit() is None
    assert common.environment()["date"] > "2026-11-28T00:00:00Z" > "2026-11-28", "newer than a row with its day alone"


# ---- the command line --------------------------------------------------------------------------------------------------
def test_rejects_suites_that_are_not() -> None:
    with pytest.raises(SystemExit, match=r"--only must name some of linear, quantizers, experts, rope_and_cache.* got nothing"):
        runner.main(["x.jsonl", "--only", "nothing"])


def test_lists_cases(capsys: pytest.CaptureFixture[str]) -> None:
    runner.main(["--list", "--quick"])
    said = capsys.readouterr().out.splitlines()
    assert "linear flash wq_a nvfp4 16" in said and "experts flash 8192" in said


# ---- whole suites, tiny ------------------------------------------------------------------------------------------------
@pytest.fixture
def simulated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    pytest.importorskip("tvm_ffi", reason="needs apache-tvm-ffi")
    folder = tmp_path_factory.getbasetemp() / "kernels of the benchmarks"
    monkeypatch.setattr(cache, "folder", lambda: folder)
    monkeypatch.setattr(cache, "_loaded", {})  # what another test of this process compiled has no entry there
    monkeypatch.setattr(common, "num_copies", lambda nbytes: 2)
    torch.manual_seed(0)
    try:
        with simulating():
            yield
    except sim.ShimError as error:
        pytest.skip(str(error))
    finally:
        sim.disable()


@pytest.mark.parametrize(
    ("shape", "fmt"),
    [
        (linear.Shape("plain", 64, 256), "nvfp4"),
        (linear.Shape("pair", 32, 128, paired=True), "mxfp4"),
        (linear.Shape("groups", 128, 128, groups=2), "fp8_block"),
        (linear.Shape("w4a4", 64, 256, act="nvfp4"), "nvfp4"),
        (linear.Shape("two", 64, 128, act="fp8", beside=128), "fp8_block"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_linear_in_the_simulator(simulated: None, tmp_path: Path, shape: linear.Shape, fmt: str) -> None:
    place = bench(tmp_path / "rows.jsonl")
    linear.measure(place, shape, fmt, (3,), device="cpu")
    (row,) = rows_of(place.path)
    assert row["us"] == 2.0 and row["peers"]["cublas_bf16"]["ratio"] == 1.0 and row["copy_TBs"] == 4.0
    assert row["registers"] > 0 and row["spill_bytes"] >= 0
    if shape.act != "none":  # errors are those of quantising x
        assert row["operation"] == ("two_linears" if shape.beside else "linear") and row["act"] == shape.act
        assert len(row["kernels"]) == 2, "x is quantised once, and both products are one kernel"
        assert 0.99 < row["cosine"] < 0.9999
        return
    assert row["relative_error"] < 6e-3 and row["error_over_cublas"] < 2 and row["cosine"] > 0.9999
    assert row["config"].startswith("MixedConfig")


def test_quantizers_in_the_simulator(simulated: None, tmp_path: Path) -> None:
    place = bench(tmp_path / "rows.jsonl", "quantizers")
    for operation in (quantizers.OPERATIONS[1], quantizers.OPERATIONS[7], *quantizers.OPERATIONS[-2:]):
        quantizers.measure(place, operation, 3, 256, device="cpu")
    computed, gated, *plain = rows_of(place.path)
    assert [row["shape"] for row in plain] == ["rmsnorm", "swiglu"] and min(row["equal"] for row in plain) > 0.99
    assert computed["equal"] == gated["equal"] == 1.0 and len(computed["kernels"]) == 2
    assert computed["bytes"] == 2 * (3 * 256 * 2) + 3 * 128 + 3 * 16 + 4 and computed["peers"]["torch"]["us"] == 2.0
    assert "to save time" in computed["peers"]["torch.compile"]["reason"]


def test_experts_in_the_simulator(simulated: None, tmp_path: Path) -> None:
    model = experts.Model("tiny", 8, 128, 64, (3,), top_k=2)
    layer = experts.Layer.make(model, "cpu", copies=2)
    layer.prepare()
    place = bench(tmp_path / "rows.jsonl", "experts")
    experts.measure(place, layer, experts.attempt_dense(layer), 3, device="cpu")
    rows = {row["shape"]: row for row in rows_of(place.path)}
    whole = rows["tiny layer"]
    assert whole["relative_error"] < 0.02 and whole["error_over_cublas"] < 2 and whole["peer_experts"] == 8
    assert whole["bytes"] == common.finite((whole["experts_hit"] + 1) * model.expert_bytes)
    assert set(rows) == {f"tiny {part}" for part in PARTS}
    assert not [row["reason"] for row in rows.values() if "reason" in row]


@pytest.mark.parametrize(("fmt", "act", "least"), [("nvfp4", "nvfp4", 0.98), ("mxfp4", "none", 0.9999)])
def test_experts_of_other_formats_in_the_simulator(simulated: None, tmp_path: Path, fmt: str, act: str, least: float) -> None:
    model = experts.Model("tiny", 8, 128, 64, (3,), top_k=2, fmt=fmt, act=act, parts=False)
    layer = experts.Layer.make(model, "cpu", copies=2)
    layer.prepare()
    place = bench(tmp_path / "rows.jsonl", "experts")
    experts.measure(place, layer, experts.attempt_dense(layer), 3, device="cpu")
    rows = {row["shape"]: row for row in rows_of(place.path)}
    assert set(rows) == {"tiny layer", "tiny experts"} and not [row["reason"] for row in rows.values() if "reason" in row]
    assert rows["tiny layer"]["cosine"] > least and (rows["tiny layer"]["format"], rows["tiny layer"]["act"]) == (fmt, act)
    assert layer.w1.nbytes + layer.w3.nbytes + layer.w2.nbytes == pytest.approx(8 * model.expert_bytes, abs=100)


PARTS = ("layer", "experts", "router", "router_hash", "permute", "product 1", "product 2", "combine", "shared", "moe_combine")


def test_a_format_without_scales_counts_its_bytes() -> None:
    weights = linear.Weights.make(linear.Shape("s", 16, 128), "bf16", "cpu")
    assert weights.nbytes == 16 * 128 * 2 and isinstance(weights.parts[0], PackedWeight)
    assert weights.parts[0].format is BF16 and set(linear.FORMATS) <= set(FORMATS)
