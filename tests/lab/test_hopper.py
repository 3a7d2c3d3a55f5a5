"""Kernels in notebooks: simulated without a GPU, with what launches use; tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsv4lab import ops, sim
from dsv4lab.kernels._common import cache
from dsv4lab.lab import hopper
from dsv4lab.lab.roofline import Ceilings, Work
from dsv4lab.reference import quant

CPU = torch.device("cpu")


@pytest.fixture
def simulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skips where the simulator cannot be; compiled kernels go to the test's own folder."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    pytest.importorskip("tvm_ffi", reason="needs apache-tvm-ffi")
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    monkeypatch.setattr(cache, "_loaded", {})
    try:
        sim.enable(hopper.ARCH)
    except sim.ShimError as error:
        pytest.skip(str(error))
    yield
    sim.disable()


def test_a_launch_is_simulated_and_its_resources_are_found(simulator: None) -> None:
    x = torch.randn(3, 128).bfloat16()
    assert hopper.schedules(CPU) == ("eager", "lazy")
    with hopper.running(CPU, "lazy") as run:
        codes, scale = ops.quantize_mxfp4(x)
    want = quant.quantize_mxfp4(x)
    assert torch.equal(codes, want[0]) and torch.equal(scale.view(torch.uint8), want[1].view(torch.uint8))
    entries = [cache.read(path) for path in cache.folder().glob("*.kernel")]
    (use,) = hopper.uses(run.launches, entries, ["mxfp4"])
    assert use.name == "mxfp4" and 0 < use.registers <= hopper.REGISTERS and use.spill_bytes >= 0
    assert use.instructions == run.launches[0].stats.instructions and use.row()["kernel"] == "mxfp4"
    with pytest.raises(ValueError, match="names must be one for each of 1 launches, got 0"):
        hopper.uses(run.launches, entries, [])
    with pytest.raises(LookupError, match="got none of mxfp4"):
        hopper.uses(run.launches, [], ["mxfp4"])
    (trace,) = hopper.traces(CPU, lambda: ops.quantize_mxfp4(x))
    assert trace.traffic().of("x").factor == 1


def test_kernels_that_are_called_directly_are_collected(simulator: None) -> None:
    from dsv4lab.kernels._common.launch import running_on
    from dsv4lab.kernels.moe.permute.api import permute

    ids = torch.tensor([[1, 0], [1, 2]])
    with running_on(sim.Host(hopper.ARCH)), hopper.launching(CPU) as launches:
        order = permute(ids, num_experts=4, tile_tokens=8)
    assert order.slots.tolist() == [1, 0, 2, 3] and len(launches.executed) == 1


def test_tables_align_words_and_numbers() -> None:
    rows = [{"kernel": "a", "us": 1.5, "m": None}, {"kernel": "longer", "us": 12345.678, "m": 16}]
    assert hopper.table(rows).split("\n") == [
        "kernel         us   m",
        "a             1.5   -",
        "longer  1.235e+04  16",
    ]
    assert hopper.table([]) == "(no rows)"


def test_a_profile_holds_times_against_the_bound() -> None:
    work = {"sum": Work(8e6, 1e6)}
    (row,) = hopper.profile(CPU, {"sum": lambda: torch.ones(1000).sum()}, work, Ceilings(1e12, 1e12, "made up"), rounds=3)
    assert row["call"] == "sum" and row["bound us"] == 8.0 and row["bound by"] == "memory"
    assert row["% of bound"] == pytest.approx(100 * 8.0 / row["us"], rel=0.05)
