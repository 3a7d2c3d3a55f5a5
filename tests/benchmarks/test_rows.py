"""Files of rows: what a run keeps, replaces and merges, and that a stopped one leaves whole files."""

from __future__ import annotations

import argparse
import json
import lzma
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compiling, rows, runner
from dsv4lab.lab import baselines
from dsv4lab.lab.baselines import rows_of
from dsv4lab.lab.operator_map import DEVICES


def row(suite: str = "linear", m: int = 1, us: float = 1.0, **fields: Any) -> dict[str, Any]:
    common = {"benchmark": suite, "device": "NVIDIA H200", "date": "2026-11-20", "shape": "flash wq_b", "format": "nvfp4"}
    return common | {"m": m, "us": us} | fields


def times(path: Path) -> list[tuple[str, int, float]]:
    return [(one["benchmark"], one["m"], one["us"]) for one in rows_of(path)]


@pytest.fixture
def suite_writes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Suites that write the given rows, then end with a status, or raise."""

    def make(*new: dict[str, Any], status: int = 0, error: BaseException | None = None) -> None:
        def start(suite: str, part: Path, options: argparse.Namespace) -> int:
            with part.open("a") as file:
                file.write("".join(json.dumps(one) + "\n" for one in new))
            if error is not None:
                raise error
            return status

        monkeypatch.setattr(runner, "start", start)

    return make


def run(out: Path, *arguments: str) -> int:
    return runner.run("linear", out, runner.parser().parse_args([str(out), *arguments]))


def test_a_run_that_is_stopped_takes_its_suite_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would go on with the GPU, beside whatever comes next."""
    script, part = tmp_path / "run.py", tmp_path / "rows.part"
    script.write_text("import os, sys, time\nopen(sys.argv[1], 'w').write(f'{os.getpid()}\\n')\ntime.sleep(60)\n")
    monkeypatch.setattr(runner, "_SCRIPT", script)

    def stop() -> None:
        while not part.exists() or not part.read_text().endswith("\n"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(SystemExit) as ended:
        runner.start("linear", part, runner.parser().parse_args([]))
    thread.join()
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ProcessLookupError):
        os.kill(int(part.read_text()), 0)


@pytest.mark.parametrize("name", ["h200.jsonl", "h200.jsonl.xz"])
def test_a_file_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    path, both = tmp_path / name, [row(m=1, peers={"cublas": {"us": None}}), row(m=3)]
    rows.write(path, both)
    assert rows_of(path) == both
    text = lzma.decompress(path.read_bytes()) if name.endswith(".xz") else path.read_bytes()
    assert text == "".join(json.dumps(one, separators=(",", ":")) + "\n" for one in both).encode()


def test_compressed_bytes_depend_on_the_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on name or time."""
    rows.write(tmp_path / "a.jsonl.xz", [row()])
    monkeypatch.setattr("time.time", lambda: 2e9)
    rows.write(tmp_path / "b.jsonl.xz", [row()])
    assert (tmp_path / "a.jsonl.xz").read_bytes() == (tmp_path / "b.jsonl.xz").read_bytes()


def test_the_newest_row_of_a_case_stands_where_the_first_stood() -> None:
    old = [row(m=1, us=9.0), row(m=3, us=8.0, date="2026-12-24"), row(m=5, us=7.0)]
    new = [row(m=8, us=6.0), row(m=3, us=5.0, date="2026-12-23"), row(m=1, us=4.0, n=64), row(m=5, us=None, reason="failed")]
    found = rows.merged(old, new)
    assert [(one["m"], one["us"]) for one in found] == [(1, 4.0), (3, 8.0), (5, None), (8, 6.0)]
    for field, other in (
        ("device", "NVIDIA H100"),
        ("benchmark", "experts"),
        ("shape", "pro wq_b"),
        ("format", "bf16"),
        ("k", 7168),
    ):
        assert len(rows.merged([row()], [row(**{"suite" if field == "benchmark" else field: other})])) == 2, field


def test_rows_of_the_baselines_are_of_different_cases() -> None:
    """Or merging would lose some; and they are what the runner would write."""
    for name in DEVICES.values():
        path = baselines.FOLDER / name
        found = rows_of(path)
        assert found and rows.merged(found) == found
        assert len(lzma.decompress(path.read_bytes()).splitlines()) == len(found)
        assert runner.default_path(found[0]["device"]) == path and {one["benchmark"] for one in found} <= set(compiling.SUITES)


def test_the_default_is_the_devices_baseline() -> None:
    assert runner.default_path("NVIDIA H200") == baselines.FOLDER / "h200.jsonl.xz"
    assert runner.default_path("NVIDIA H100 80GB HBM3").name == "h100.jsonl.xz"


OLD = [row("linear w4a16"), row(m=1, us=9.0), row("experts", us=8.0), row(m=3, us=7.0)]


@pytest.mark.parametrize(
    ("arguments", "status", "want"),
    [
        ((), 0, [("experts", 1, 8.0), ("linear", 1, 2.0)]),
        (("--append",), 0, [("linear", 1, 2.0), ("experts", 1, 8.0), ("linear", 3, 7.0)]),
        ((), 71, [("linear", 1, 2.0), ("experts", 1, 8.0), ("linear", 3, 7.0)]),
    ],
)
def test_what_a_run_keeps(
    tmp_path: Path, suite_writes: Any, arguments: Sequence[str], status: int, want: list[tuple[str, int, float]]
) -> None:
    """Other suites' rows, with --append or a bad end its own that were not measured again; rows of suites that are gone go."""
    out = tmp_path / "h200.jsonl.xz"
    rows.write(out, OLD)
    suite_writes(row(m=1, us=2.0), status=status)
    assert run(out, *arguments) == status and times(out) == want
    assert os.listdir(tmp_path) == [out.name]


def test_a_suite_without_rows_changes_nothing(tmp_path: Path, suite_writes: Any) -> None:
    out = tmp_path / "h200.jsonl"
    suite_writes()
    assert run(out) == 0 and not os.listdir(tmp_path)
    rows.write(out, OLD)
    assert run(out) == 0 and rows_of(out) == OLD


def test_a_stopped_run_leaves_the_file_and_its_rows_for_the_next(tmp_path: Path, suite_writes: Any) -> None:
    out, part = tmp_path / "h200.jsonl.xz", tmp_path / "h200.linear.part"
    rows.write(out, OLD)
    suite_writes(row(m=1, us=2.0), error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(out, "--append")
    assert rows_of(out) == OLD and times(part) == [("linear", 1, 2.0)]
    assert baselines.newest("linear", tmp_path).rows == tuple(one for one in OLD if one["benchmark"] == "linear")
    with part.open("a") as file:
        file.write('{"benchmark":"linear","m":77,')  # killed in the middle of a row
    suite_writes(row(m=5, us=3.0))
    run(out, "--append")
    assert times(out) == [("linear", 1, 2.0), ("experts", 1, 8.0), ("linear", 3, 7.0), ("linear", 5, 3.0)]
    assert not part.exists()


def test_a_file_that_cannot_be_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "h200.jsonl.xz"
    rows.write(out, OLD)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        rows.write(out, [row()])
    assert rows_of(out) == OLD and os.listdir(tmp_path) == [out.name]


def test_files_are_merged_into_the_baseline_of_their_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "BASELINES", tmp_path)
    first, second, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl.xz", tmp_path / "h200.jsonl.xz"
    rows.write(out, OLD)
    rows.write(first, [row(m=1, us=2.0), row("linear, spot check")])
    rows.write(second, [row("mhc", us=1.5)])
    runner.main(["--merge", str(first), str(second)])
    assert times(out) == [("linear", 1, 2.0), ("experts", 1, 8.0), ("linear", 3, 7.0), ("mhc", 1, 1.5)]
    assert capsys.readouterr().out == f"{out}: 4 rows\n"
    other = tmp_path / "other.jsonl"
    runner.main([str(other), "--merge", str(second)])
    assert times(other) == [("mhc", 1, 1.5)]
    rows.write(second, [row(device="NVIDIA H100")])
    with pytest.raises(SystemExit, match=r"--merge needs files with rows of one device, or OUT, got rows of NVIDIA H100, NV"):
        runner.main(["--merge", str(first), str(second)])
    with pytest.raises(SystemExit, match=r"--merge must name files, got .*nothing\.jsonl"):
        runner.main(["--merge", str(tmp_path / "nothing.jsonl")])


def test_a_child_measures_into_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of a suite's process: the file beside the one for the rows."""
    commands: list[list[str]] = []

    class Done:
        returncode = 3

    monkeypatch.setattr("subprocess.run", lambda command, **_: commands.append(command) or Done)
    assert run(tmp_path / "h200.jsonl.xz", "--quick", "--match", "wq_b") == 3
    part = str(tmp_path / "h200.linear.part")
    assert commands[0][2:] == [part, "--only", "linear", "--child", "--quick", "--match", "wq_b"]
