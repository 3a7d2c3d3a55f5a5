"""`dsv4lab sim SCRIPT`: a script written for a GPU runs unmodified, its faults are found, the exit status says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dsv4lab import cli
from dsv4lab.sim import script
from dsv4lab.sim.fake_gpu import fake_gpu

RACY = """
import torch
import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import from_dlpack
from cutlass.memory import SmemAllocator

@cute.kernel
def _mirror(x: cute.Tensor, y: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    held = SmemAllocator().allocate_tensor(cutlass.Float32, cute.make_layout(64), byte_alignment=16)
    held[thread] = 0.0
    cute.arch.barrier()
    held[thread] = x[thread]
    y[thread] = held[63 - thread]

@cute.jit
def mirror(x: cute.Tensor, y: cute.Tensor):
    _mirror(x, y).launch(grid=[1, 1, 1], block=[64, 1, 1])

x, y = torch.randn(64, device="cuda"), torch.zeros(64, device="cuda")
for _ in range(2):
    mirror(from_dlpack(x), from_dlpack(y))
"""
SOURCE = """
import sys
import torch
import cutlass.cute as cute
from cutlass.cute.runtime import from_dlpack

@cute.kernel
def _double(x: cute.Tensor, y: cute.Tensor, shift: cute.Int32):
    thread, _, _ = cute.arch.thread_idx()
    y[thread] = x[thread + shift] * 2.0

@cute.jit
def double(x: cute.Tensor, y: cute.Tensor, shift: cute.Int32):
    _double(x, y, shift).launch(grid=[1, 1, 1], block=[128, 1, 1])

assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (10, 0)
x, y = torch.randn(128, device="cuda"), torch.zeros(128).cuda()
assert x.data_ptr() % 256 == 0 or "unaligned" in sys.argv
double(from_dlpack(x), from_dlpack(y), int(sys.argv[1]))
torch.cuda.synchronize()
assert torch.equal(y.cpu(), 2 * x)
if "exit" in sys.argv:
    sys.exit(3)
"""


@pytest.fixture
def path(tmp_path: Path, kernels: ModuleType) -> Path:
    """The script as a file; what the simulator needs is there."""
    path = tmp_path / "double.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_the_command_runs_a_script_and_sums_up(path: Path, tmp_path: Path) -> None:
    argv = ["sim", "--arch", "sm_100a", "--json", str(tmp_path / "out.json"), "--ptx", str(tmp_path), str(path), "0"]
    done = subprocess.run([sys.executable, "-m", "dsv4lab.cli", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == cli.OK, done.stderr
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["ok"] and sum(facts["launches"].values()) == 1 and facts["instructions"] > 0
    assert "1 kernel launch, " in done.stdout and done.stdout.rstrip().endswith("found: nothing")
    assert ".target sm_100a" in (tmp_path / "double.0.ptx").read_text()


def test_findings_and_failures_are_told_apart(path: Path) -> None:
    fault = script.run_script(path, ["1", "unaligned"], arch="sm_100a")
    assert [kind for kind, _ in fault.findings] == ["memory fault"] and f"{path}:10" in fault.findings[0][1]
    assert not fault.ok and "found: memory fault" in str(fault)
    stopped = script.run_script(path, ["0", "unaligned", "exit"], arch="sm_100a")
    assert stopped.error == "exit status 3" and not stopped.findings and not stopped.ok
    failed = script.run_script(path, ["nonsense", "unaligned"], arch="sm_100a")
    assert str(failed.error).startswith("ValueError: ") and not failed.findings and "the script failed" in str(failed)


def test_exploring_collects_what_every_schedule_shows(path: Path) -> None:
    found = script.run_script(path, ["0", "unaligned"], arch="sm_100a", explore=1)
    assert found.ok and found.schedules == ["eager", "lazy", "random:0"]
    faulty = script.run_script(path, ["1", "unaligned"], arch="sm_100a", explore=1)
    assert [kind for kind, _ in faulty.findings] == ["memory fault"]
    assert "eager, lazy, random:0" in faulty.findings[0][1] and "AssertionError" in str(faulty.error)


def test_races_are_filed_once_and_do_not_stop_the_script(path: Path) -> None:
    path.write_text(RACY, encoding="utf-8")
    found = script.run_script(path, arch="sm_90a", checks=script.checks_without([], races=True))
    assert found.error is None and sum(found.launches.values()) == 2
    assert {kind for kind, _ in found.findings} == {"race"} and "races" in found.checks
    assert len(found.findings) == len(set(found.findings)) and f"{path}:15" in found.findings[0][1]
    assert script.run_script(path, arch="sm_90a", checks=script.checks_without(["races"], races=True)).ok


def test_bad_requests_get_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        ([str(path.with_name("none.py"))], "SCRIPT must be a file"),
        (["--schedule", "late", str(path)], "schedule must be one of eager, lazy, random, got 'late'"),
        (["--explore", "2", "--schedule", "lazy", str(path)], "explore chooses the schedules"),
        (["--explore", "-1", str(path)], "explore must be >= 0 random schedules, got -1"),
        (["--skip", "races_of_horses", str(path)], "checks to skip must be among"),
    ):
        assert cli.main(["sim", *argv]) == cli.USAGE
        assert message in capsys.readouterr().err


def test_torch_is_itself_again_afterwards(kernels: ModuleType) -> None:
    before = {name: getattr(torch.cuda, name) for name in ("is_available", "Stream", "synchronize")}
    moved, scaled = torch.Tensor.cuda, torch._scaled_mm
    with fake_gpu("sm_90a", multiprocessors=2):
        assert torch.zeros(3, device="cuda").device.type == "cpu" and torch.ones(2).to(torch.device("cuda", 0)).sum() == 2
        assert torch.cuda.get_device_properties(0).multi_processor_count == 2
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.Event().record()
    assert all(getattr(torch.cuda, name) is value for name, value in before.items())
    assert torch.Tensor.cuda is moved and torch._scaled_mm is scaled
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(1, device="cuda")
