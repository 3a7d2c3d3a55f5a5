"""Files of rows, one JSON object a line, compressed where the name ends in .xz. Each is written whole or not at all."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable
from pathlib import Path

from dsv4lab.lab.baselines import Row
from dsv4lab.lab.files import write_atomically

CASE = ("device", "benchmark", "shape", "format", "m", "k")  # fields that say what a row measured


def write(path: Path, rows: Iterable[Row]) -> None:
    """All rows of a file. The bytes depend on the rows alone: no time, no name and no system is in them."""
    data = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode("utf-8")
    if path.suffix == ".xz":
        data = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    write_atomically(path, data)


def merged(*parts: Iterable[Row]) -> list[Row]:
    """Of rows of one case the newest by its date, of one date the last, where the first stood."""
    found: dict[tuple[object, ...], Row] = {}
    for row in (row for part in parts for row in part):
        case = tuple(row.get(field) for field in CASE)
        if case not in found or row.get("date", "") >= found[case].get("date", ""):
            found[case] = row
    return list(found.values())
