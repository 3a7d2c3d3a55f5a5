"""`run.py --counters` on pages as ncu writes them, cut down to what is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import common, counters, runner

_DETAILS = """==PROF== Disconnected
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","kernel_cutlass_kernel_dsv4labLinear_object_at_x","Speed","Duration","us","8.90"
"0","kernel_cutlass_kernel_dsv4labLinear_object_at_x","Launch","Registers Per Thread","register/thread","51"
"1","other","Speed","Duration","us","1.50"
"""
_SOURCE = """"Kernel Name","kernel_cutlass_kernel_dsv4labLinear_object_at_x",
"Source","# Samples","Instructions Executed","stall_wait","stall_selected","stall_wait (Not Issued)"
"   @!P0 FFMA.FTZ R1, R2","30","400","20","10","20"
"   EXIT;","10","100","0","10","0"
"Kernel Name","other",
"Source","# Samples","Instructions Executed","stall_wait","stall_selected","stall_wait (Not Issued)"
"   EXIT","0","1","0","0","0"
"""
_NCU = f"""#!{sys.executable}
import sys
from pathlib import Path
if "-i" in sys.argv:
    print({_DETAILS!r} if sys.argv[-1] == "details" else {_SOURCE!r})
elif {{watches}}:
    print("== flash 1", '==PROF== Profiling "kernel": 0%....100% - 15 passes', "== flash 8", sep="\\n")
    print('==PROF== Profiling "other": 0%....100% - 15 passes')
    Path(sys.argv[sys.argv.index("-o") + 1]).touch()
else:
    raise SystemExit("no counters here")
"""


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "ncu"


def install(path: Path, *, watches: bool) -> None:
    path.write_text(_NCU.replace("{watches}", str(watches)))
    path.chmod(0o755)


def test_a_report_says_of_each_launch_where_its_time_goes(ncu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(ncu, watches=True)
    assert counters.report("linear", ["true"]) == 0
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert first.splitlines()[:4] == [
        "linear flash 1",
        "dsv4labLinear: Duration 8.90 us, Issue Slots Busy ?, DRAM Throughput ?, Registers Per Thread 51 registers",
        "  stalls   wait 50%, selected 50%",
        "  opcodes  500: FFMA 400 (75%), EXIT 100 (25%)",
    ]
    assert first.splitlines()[4].split() == ["75.0%", "@!P0", "FFMA.FTZ", "R1,", "R2", "wait,", "selected"]
    assert second.startswith("linear flash 8\nother: Duration 1.50 us")


def test_without_ncu_or_without_counters_it_says_so(ncu: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="ncu"):
        counters.report("linear", ["true"])
    install(ncu, watches=False)
    assert counters.report("linear", ["true"]) == 1
    assert "no counters here" in capfd.readouterr().err


def test_whole_steps_have_no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="layers"):
        runner.main(["--counters", "--only", "linear,layers"])


def test_what_is_counted_is_one_warm_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    for name in ("start", "stop"):
        monkeypatch.setattr(counters.torch.cuda.profiler, name, lambda name=name: seen.append(name))
    monkeypatch.setattr(counters.torch.cuda, "synchronize", lambda: None)
    bench = counters.Counting(None, common.Ceilings(1.0, 1.0), Path("unused"), "linear")
    calls = {"ours": [lambda: seen.append("ours")], "peer": [lambda: seen.append("peer")]}
    bench.measure("flash", {"m": 3}, calls, nbytes=1.0, flops=1.0)
    assert seen == ["ours", "start", "ours", "stop"] and capsys.readouterr().out == "== flash 3\n"
