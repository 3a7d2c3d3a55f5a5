"""Measured rows as notebooks read them: the newest file of a suite, selections, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv4lab.lab import baselines


def row(**fields: Any) -> dict[str, Any]:
    common = {"benchmark": "linear", "device": "card", "date": "2026-11-20", "copy_TBs": 4.0, "bf16_TFLOPs": 800.0}
    numbers = {"shape": "wq_b", "m": 1, "us": 2.0, "bound_us": 1.0, "bound": "bytes", "bytes": 4e6, "flops": 8e6}
    return common | numbers | {"percent_of_bound": 50.0, "peers": {"cublas": {"us": 6.0, "ratio": 3.0}}} | fields


def write(path: Path, *rows: Any) -> None:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))


def test_the_newest_rows_of_a_suite_win_whatever_the_name(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", row(date="2026-11-28", device="new"), row(benchmark="experts"))
    write(tmp_path / "z.jsonl", row(device="old"), row(benchmark="quantizers", date="2026-12-24"))
    found = baselines.newest("linear", tmp_path)
    assert found and [one["device"] for one in found.rows] == ["new"]
    assert str(found) == "1 measured rows of 'linear' in a.jsonl: new, 2026-11-28"
    assert found.ceilings.bytes_per_s == 4e12 and found.ceilings.flops_per_s == 8e14


def test_rows_without_a_time_and_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "not json", "[1]", row(us=None, reason="failed"), row(m=16), row(m=3, format="nvfp4"))
    found = baselines.newest("linear", tmp_path)
    assert [one["m"] for one in found.rows] == [16, 3]
    assert [one["m"] for one in found.where(format="nvfp4")] == [3] and found.where(format="bf16") == []


def test_where_nothing_is_there_it_says_so(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", row())
    found = baselines.newest("experts", tmp_path)
    assert not found and found.where(m=1) == [] and "no measured rows of the suite 'experts'" in str(found)
    with pytest.raises(LookupError, match="ceilings need rows"):
        _ = found.ceilings


def test_the_repository_has_a_folder_of_baselines() -> None:
    assert baselines.FOLDER.is_dir()
    assert isinstance(baselines.newest("linear").source, str)


def test_what_figures_and_tables_are_given() -> None:
    rows = [row(), row(m=16, us=4.0, peers={"cublas": {"us": None, "ratio": None, "reason": "broken"}})]
    assert baselines.roofline_points(rows) == ([2.0, 2.0], [4.0, 2.0])
    bound, time = baselines.bound_and_time(rows, "{shape} m={m}")
    assert bound == {"wq_b m=1": 1.0, "wq_b m=16": 1.0} and time == {"wq_b m=1": 2.0, "wq_b m=16": 4.0}
    lines = baselines.summary(rows, ("shape", "registers"), ("cublas", "triton"))
    assert lines[0] == {
        "shape": "wq_b", "registers": None, "us": 2.0, "bound us": 1.0, "bound by": "bytes", "% of bound": 50.0,
        "cublas /": 3.0, "triton /": None,
    }  # fmt: skip
    assert lines[1]["cublas /"] is None
