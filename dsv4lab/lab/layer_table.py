"""The kernels of whole layers, `docs/layers.md`: time, percent of bound and share of each, from rows of the suite `layers`.

    python -m dsv4lab.lab.layer_table            write the page
    python -m dsv4lab.lab.layer_table --check    exit status 1 if the page is not what the baseline gives

A table has a kind of layer and its steps side by side; a kernel stands beside the operation, or the part of one, that it is of.
What has not been measured is named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsv4lab.lab import pages
from dsv4lab.lab.baselines import FOLDER, Row, rows_of
from dsv4lab.lab.machine import ROOT

PAGE = ROOT / "docs" / "layers.md"
BASELINE = FOLDER / "h200.jsonl.xz"
SUITE, FORMAT = "layers", "w4a16"  # of the rows whose kernels are shown
KINDS = ("SWA", "CSA", "HCA")
STEPS = ("prefill", "decode 1", "decode 64")
Key = tuple[str, str]  # part, kernel


def shape_of(kind: str, step: str) -> str:
    """What the suite calls a layer and its step."""
    return f"flash {kind.lower()} block, {step}"


def newest(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """Timed rows of the suite by shape and format, of each the newest, which is the last of one date."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.get("benchmark") == SUITE and row.get("us"):
            key = (row["shape"], row["format"])
            if key not in found or row.get("date", "") >= found[key].get("date", ""):
                found[key] = row
    return found


def kernels_of(row: Row) -> list[dict[str, Any]]:
    """A row's kernels in the order of their launches: part, kernel, launches, us, percent of the part's bound, share of all us.

    The percent is that of all kernels of a part and stands at the first of them; None where a part has no bound.
    """
    merged: dict[Key, dict[str, Any]] = {}
    for line in row["parts"]:
        key = (line["part"], line["kernel"])
        first = not any(part == line["part"] for part, _ in merged)
        one = merged.setdefault(key, {"part": key[0], "kernel": key[1], "launches": 0, "us": 0.0, "% of bound": None})
        one["launches"] += line["count"]
        one["us"] += line["us"]
        if first:
            one["% of bound"] = line.get("percent_of_bound")
    total = sum(one["us"] for one in merged.values())
    return [one | {"us": round(one["us"], 3), "share %": round(100 * one["us"] / total, 1)} for one in merged.values()]


def in_order(*each: Sequence[Key]) -> list[Key]:
    """All keys once: those of the first, and of the others what is new, behind what they stand behind there."""
    found: list[Key] = []
    for keys in each:
        place = 0
        for key in keys:
            if key not in found:
                found.insert(place, key)
            place = found.index(key) + 1
    return found


# ---- the page ----------------------------------------------------------------------------------------------------------
def _number(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def _cells(one: dict[str, Any] | None) -> list[str]:
    """us with the number of launches where it is not one, percent of bound, share."""
    if one is None:
        return ["", "", ""]
    count = f" ({one['launches']})" if one["launches"] != 1 else ""
    percent = "" if one["% of bound"] is None else f"{one['% of bound']:.0f}"
    return [_number(one["us"]) + count, percent, f"{one['share %']:.1f}"]


def _line(cells: Iterable[str]) -> str:
    return f"|{'|'.join(cells)}|"


def table_of(rows: dict[str, Row]) -> list[str]:
    """Lines of one kind's table. rows: by step."""
    each = {step: {(one["part"], one["kernel"]): one for one in kernels_of(row)} for step, row in rows.items()}
    head = [cell for step in each for cell in (f"{step}, us", "%", "share")]
    lines = [_line(["part", "kernel", *head]), _line(["-", "-", *["-:"] * len(head)])]
    before = None
    for key in in_order(*(list(one) for one in each.values())):
        cells = [cell for one in each.values() for cell in _cells(one.get(key))]
        lines.append(_line(["" if key[0] == before else key[0], key[1], *cells]))
        before = key[0]
    sums = [cell for row in rows.values() for cell in (_number(row["kernels_us"]), f"{row['percent_of_bound']:.0f}", "100")]
    return [*lines, _line(["sum of kernels, and % of the step's time", "", *sums])]


def summary_of(row: Row) -> str:
    """A line for a layer and a step: what a graph of such steps takes, the sum of its parts' bounds, and what was checked."""
    replay = {None: "", True: "equal", False: "**differs**"}[row.get("replay_equal")]
    us, bound = _number(row["us"]), _number(row["bound_us"])
    cells = [row["shape"], row["format"], us, bound, f"{row['percent_of_bound']:.0f}", replay, f"{row['cosine']:.4f}"]
    return _line([*cells, f"{str(row.get('date', ''))[:10]} {row.get('commit') or ''}".strip()])


def render(path: Path = BASELINE) -> str:
    """The page as text."""
    rows = newest(rows_of(path))
    shapes = [shape_of(kind, step) for kind in KINDS for step in STEPS]
    missing = [shape for shape in shapes if (shape, FORMAT) not in rows]
    lines = [
        "# Layers",
        "",
        "Written by `python -m dsv4lab.lab.layer_table` from `benchmarks/baselines`; `make lint` checks it.",
        "",
        "Whole layers at Flash's true width, random weights in the official NVFP4 layout, on an H200: prefill of 4,096",
        "tokens, decode of 1 and 64 sequences of 16,384 (`benchmarks/layers.py`). us: a step in a graph of such steps; bound:",
        "the sum of its parts', each its bytes over copy bandwidth or its flops over the BF16 rate; replay: of a decode step's",
        "graph, against launches, bit by bit; cosine: with the reference. Last the day, and the commit where the row says.",
        "",
        "|layer and step|format|us|bound us|%|replay|cosine|measured|",
        "|-|-|-:|-:|-:|-|-:|-|",
        *(summary_of(row) for key, row in sorted(rows.items(), key=lambda item: _place(item[0], shapes))),
        "",
    ]
    if missing:
        lines += [f"Not measured yet: {', '.join(missing)}.", ""]
    lines += [
        "Kernels by torch's profiler: us is by how much a kernel made the step longer, launches in brackets where not one; %",
        "is its part's bound over all of the part's kernels (past 100 where weights arrived while the kernel ahead ran); share",
        f"is of their sum. {FORMAT}.",
        "",
    ]
    for kind in KINDS:
        here = {step: rows[key] for step in STEPS if (key := (shape_of(kind, step), FORMAT)) in rows}
        if here:
            lines += [f"## {kind}", "", *table_of(here), ""]
    return "\n".join(lines[:-1]) + "\n"


def _place(key: tuple[str, str], shapes: Sequence[str]) -> tuple[bool, int, str]:
    """The page's order: its own format first, then by layer and step."""
    shape, fmt = key
    return fmt != FORMAT, shapes.index(shape) if shape in shapes else len(shapes), f"{fmt} {shape}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line above; returns the exit status."""
    return pages.keep("dsv4lab.lab.layer_table", PAGE, render, argv)


if __name__ == "__main__":
    sys.exit(main())
