"""Measured rows of `benchmarks/baselines`: the newest file that has any of a suite, and what a notebook asks of them.

A row is one JSON object a line, as the benchmarks write it. Rows that were not timed are left out.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4lab.lab.machine import ROOT
from dsv4lab.lab.roofline import Ceilings, Work

FOLDER = ROOT / "benchmarks" / "baselines"
Row = dict[str, Any]


@dataclass(frozen=True)
class Baseline:
    """Timed rows of one suite. rows: none where nothing was found, and `source` then says so."""

    suite: str
    source: str
    rows: tuple[Row, ...]

    def __bool__(self) -> bool:
        return bool(self.rows)

    def __str__(self) -> str:
        return self.source

    def where(self, **fields: Any) -> list[Row]:
        """Rows whose fields have these values, in the file's order; a row without such a field does not count."""
        return [row for row in self.rows if all(key in row and row[key] == value for key, value in fields.items())]

    @property
    def ceilings(self) -> Ceilings:
        """What the rows are held against. Raises LookupError where there are none."""
        if not self.rows:
            raise LookupError(f"ceilings need rows: {self.source}")
        first = self.rows[0]
        return Ceilings(1e12 * first["copy_TBs"], 1e12 * first["bf16_TFLOPs"], f"measured: {first['device']}")


def newest(suite: str, folder: str | Path = "") -> Baseline:
    """The rows of a suite ("linear", "quantizers", "experts") in the file whose rows of it are the newest by their own date.

    folder: of files `.jsonl`, or `.jsonl.xz` where they are kept small; empty: the repository's. Lines that are no rows of a
    benchmark are passed over.
    """
    place = Path(folder) if folder else FOLDER
    best: tuple[str, str, list[Row]] | None = None
    for path in sorted(path for path in place.glob("*.jsonl*") if not path.name.startswith(".")):  # dots: being written
        rows = [row for row in rows_of(path) if row.get("benchmark") == suite and row.get("us")]
        date = max((str(row.get("date", "")) for row in rows), default="")
        if rows and (best is None or (date, path.name) > best[:2]):
            best = (date, path.name, rows)
    if best is None:
        return Baseline(
            suite, f"no measured rows of the suite {suite!r} in {place.name}/ yet: this section shows bounds alone", ()
        )
    date, name, rows = best
    return Baseline(suite, f"{len(rows)} measured rows of {suite!r} in {name}: {rows[0]['device']}, {date}", tuple(rows))


def lines_of(path: Path) -> list[str]:
    """Of a file of rows, compressed or not; none where there is none."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8").splitlines()


def rows_of(path: Path) -> list[Row]:
    """All rows of a file, in its order; lines that are none are passed over."""
    found = []
    for line in lines_of(path):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def work_of(row: Row) -> Work:
    """Bytes and flops that a row's bound counts."""
    return Work(float(row["bytes"]), float(row["flops"]))


def roofline_points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Arithmetic intensity in flop/byte and achieved TFLOP/s, for `viz.plot_roofline`; of rows that have flops."""
    return [work_of(r).intensity for r in rows], [1e-6 * r["flops"] / r["us"] for r in rows]


def bound_and_time(rows: Sequence[Row], label: str) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds of the bound and measured, for `viz.plot_predicted`. label: a format of a row's fields, "{shape} m={m}"."""
    names = [label.format(**row) for row in rows]
    return (
        {name: float(row["bound_us"]) for name, row in zip(names, rows, strict=True)},
        {name: float(row["us"]) for name, row in zip(names, rows, strict=True)},
    )


def summary(rows: Sequence[Row], fields: Sequence[str], peers: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows cut down to some fields, time, bound and percent of it, of a copy of as many bytes where that was measured, and the
    time of peers over ours, for `hopper.table`.
    """
    found = []
    copied = any("percent_of_copy" in row for row in rows)
    for row in rows:
        line = {key: row.get(key) for key in fields}
        line |= {"us": row["us"], "bound us": round(row.get("bound_us", 0.0), 2), "bound by": row.get("bound")}
        line |= {"% of bound": row.get("percent_of_bound")}
        if copied:
            line |= {"% of a copy": row.get("percent_of_copy")}
        line |= {f"{peer} /": (row.get("peers", {}).get(peer) or {}).get("ratio") for peer in peers}
        found.append(line)
    return found
