"""The page of layers' kernels: every kernel of every row is on it, sums agree, and it stays small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv4lab.lab import baselines, layer_table


def row(shape: str, parts: list[tuple[str, str, int, float, float | None]], **fields: Any) -> dict[str, Any]:
    lines = [dict(part=p, kernel=k, count=n, us=us, percent_of_bound=percent) for p, k, n, us, percent in parts]
    base = {"benchmark": "layers", "shape": shape, "format": "w4a16", "us": 90.0, "bound_us": 45.0, "percent_of_bound": 50.0}
    return base | {"cosine": 0.999, "kernels_us": sum(p[3] for p in parts), "parts": lines, "date": "2026-11-28"} | fields


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


STEP = [
    ("pre", "Project", 1, 4.0, 12.0),
    ("pre", "Finish", 1, 6.0, 12.0),
    ("linear", "Mixed", 2, 90.0, 80.0),
    ("-", "fill", 1, 0, None),
]


def test_kernels_of_a_row() -> None:
    again = [*STEP, ("linear", "Mixed", 1, 100.0, 80.0)]
    first, second, third, other = layer_table.kernels_of(row("s", again))
    assert (first["us"], first["% of bound"], first["share %"]) == (4.0, 12.0, 2.0)
    assert second["% of bound"] is None, "a part's percent stands at its first kernel"
    assert (third["launches"], third["us"], third["% of bound"], third["share %"]) == (3, 190.0, 80.0, 95.0)
    assert other["% of bound"] is None and other["launches"] == 1


def test_what_only_a_later_step_has_stands_where_it_belongs() -> None:
    a, b, c, d, e = (("part", name) for name in "abcde")
    assert layer_table.in_order([a, b, d], [a, c, d, e], [d, e]) == [a, c, b, d, e]
    assert layer_table.in_order([], [b, a]) == [b, a]


def test_a_page_of_two_steps(tmp_path: Path) -> None:
    rows = [
        row("flash csa block, decode 1", STEP, us=1.0),
        row("flash csa block, decode 1", STEP, date="2026-11-29T01:02:03Z", commit="abc", replay_equal=True),
        row("flash csa block, prefill", [*STEP[:1], ("gather", "Gather", 1, 16.0, 70.0)]),
        row("flash csa block, prefill", STEP, format="official", us=200.0),
        row("flash csa block, decode 64", STEP, us=None),
    ]
    page = layer_table.render(written(tmp_path / "rows.jsonl", *rows))
    assert "|flash csa block, decode 1|w4a16|90.0|45.0|50|equal|0.9990|2026-11-29 abc|" in page
    assert "|flash csa block, prefill|official|200|45.0|50||0.9990|2026-11-28|" in page
    assert "|pre|Project|4.0|12|20.0|4.0|12|4.0|\n||Finish||||6.0||6.0|\n" in page
    assert "|linear|Mixed||||90.0 (2)|80|90.0|" in page and "|gather|Gather|16.0|70|80.0||||" in page
    assert "## SWA" not in page and "Not measured yet: flash swa block, prefill, " in page and "csa block, decode 64, " in page


def test_every_kernel_of_the_baseline_is_on_the_page() -> None:
    page = layer_table.render()
    rows = layer_table.newest(baselines.rows_of(layer_table.BASELINE))
    assert rows
    for (shape, fmt), one in rows.items():
        assert f"|{shape}|{fmt}|" in page
        if fmt == layer_table.FORMAT:
            assert sum(k["us"] for k in layer_table.kernels_of(one)) == pytest.approx(one["kernels_us"], abs=0.1)
            assert all(f"|{k['kernel']}|" in page for k in layer_table.kernels_of(one))


def test_nine_steps_and_three_more_fit(tmp_path: Path) -> None:
    """Were the longest of the baseline's rows that of each."""
    longest = max(layer_table.newest(baselines.rows_of(layer_table.BASELINE)).values(), key=lambda one: len(one["parts"]))
    shapes = [layer_table.shape_of(kind, step) for kind in layer_table.KINDS for step in layer_table.STEPS]
    rows = [longest | {"shape": shape, "format": layer_table.FORMAT} for shape in shapes]
    rows += [one | {"format": "official"} for one in rows[3:6]]
    page = layer_table.render(written(tmp_path / "rows.jsonl", *rows))
    assert "Not measured" not in page and len(page.encode()) < 12_000
