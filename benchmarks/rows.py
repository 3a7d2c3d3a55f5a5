"""Files of rows, one JSON object a line, gzipped where the name ends in .gz. Each is written whole or not at all."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path

from dsv4lab.lab.baselines import Row
from dsv4lab.lab.files import write_atomically

CASE = ("device", "benchmark", "shape", "format", "m", "k")  # fields that say what a row measured


def write(path: Path, rows: Iterable[Row]) -> None:
    """All rows of a file. The bytes depend on the rows alone: no time, no name and no system is in them."""
    data = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode("utf-8")
    if path.suffix == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=packed, mtime=0) as file:
            file.write(data)
        data = packed.getvalue()
    write_atomically(path, data)


def merged(*parts: Iterable[Row]) -> list[Row]:
    """Of rows of one case the newest by its date, of one date the last, where the first stood."""
    found: dict[tuple[object, ...], Row] = {}
    for row in (row for part in parts for row in part):
        case = tuple(row.get(field) for field in CASE)
        if case not in found or row.get("date", "") >= found[case].get("date", ""):
            found[case] = row
    return list(found.values())
