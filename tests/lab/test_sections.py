"""What the last sections of kernel notebooks print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsv4lab import ops, sim
from dsv4lab.kernels._common import cache
from dsv4lab.lab import CheckFailed, hopper, sections
from dsv4lab.lab.baselines import Baseline
from dsv4lab.lab.roofline import Work

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


def test_uses_are_printed_and_spills_checked(simulator: None, capsys: pytest.CaptureFixture[str]) -> None:
    with hopper.running(CPU) as run:
        ops.quantize_mxfp4(torch.randn(3, 128).bfloat16())
    drawn = sections.print_uses(run.launches, cache, ["mxfp4"])
    assert drawn["labels"] == ["registers: mxfp4"] and drawn["limits"] == [255] and 0 < drawn["used"][0] <= 255
    assert "mxfp4" in capsys.readouterr().out
    with pytest.raises(CheckFailed, match="most spilled bytes"):
        sections.print_uses(run.launches, cache, ["mxfp4"], most_spilled=-1)


def test_floors_stand_beside_the_rows_that_carry_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    work = {"write fp8": Work(4.8e9, 0.0), "read fp8": Work(9.6e9, 0.0)}
    assert sections.print_floors(work, Baseline("s", "no rows yet", ()), 8192) == ({}, {})
    shown = capsys.readouterr().out
    assert "8192 tokens" in shown and "data sheet of an H200" in shown and "no rows yet" in shown and "1000" in shown
    one = {"shape": "write fp8", "m": 8192, "us": 5.0, "bound_us": 4.0, "copy_TBs": 4.2, "bf16_TFLOPs": 800.0, "device": "D"}
    rows = (one, one | {"m": 1}, one | {"shape": "other"})
    assert sections.print_floors(work, Baseline("s", "three rows", rows), 8192) == ({"write fp8": 4.0}, {"write fp8": 5.0})
    shown = capsys.readouterr().out
    assert "measured: D" in shown and shown.count("write fp8") == 3 and "other" not in shown
    twice = (one | {"format": "a"}, one | {"format": "b", "us": 6.0})
    _, time = sections.print_floors(work, Baseline("s", "two rows", twice), 8192)
    assert time == {"write fp8, a": 5.0, "write fp8, b": 6.0}
