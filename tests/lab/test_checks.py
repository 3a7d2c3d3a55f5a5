"""lab.check and its kin: numbers against hand-computed ones, records, and refusals."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from dsv4lab import lab
from dsv4lab.lab import checks


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the checks store, in order, each proven to survive strict JSON."""
    kept: list[dict[str, Any]] = []

    def keep(payload: dict[str, Any], *, caption: str, rows: list[Any], unit: str = "") -> None:
        kept.append(json.loads(json.dumps(payload, allow_nan=False)))

    monkeypatch.setattr(checks, "_publish", keep)
    return kept


def test_numbers_match_the_ones_worked_out_by_hand() -> None:
    got, want = [[3.0, 4.0], [0.0, 2.0]], [[3.0, 4.0], [2.0, 0.0]]
    measured = checks.compare(got, want)
    rms = math.sqrt((9 + 16 + 4 + 0) / 4)
    assert measured.cosine == pytest.approx(25 / 29)
    assert measured.worst_row_cosine == pytest.approx(0.0)
    assert measured.max_abs == 2.0
    assert measured.max_rel == pytest.approx(2 / rms)
    assert measured.mean_rel == pytest.approx(1 / rms)
    assert (measured.num_nan, measured.num_inf) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_every_dtype_compares_with_itself(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]).to(dtype)
    measured = checks.compare(values, values.clone())
    assert (measured.cosine, measured.max_abs, measured.max_rel) == (pytest.approx(1.0), 0.0, 0.0)


def test_extreme_magnitudes_keep_their_direction() -> None:
    for scale in (1e-200, 1e200):
        assert checks.compare([scale, 2 * scale], [2 * scale, 4 * scale]).cosine == pytest.approx(1.0)


def test_zero_rows_agree_only_with_zero_rows() -> None:
    assert checks.compare([[0.0, 0.0], [1.0, 2.0]], [[0.0, 0.0], [1.0, 2.0]]).worst_row_cosine == pytest.approx(1.0)
    assert checks.compare([[0.1, 0.0], [1.0, 2.0]], [[0.0, 0.0], [1.0, 2.0]]).worst_row_cosine == 0.0
    assert checks.compare([0.1], [0.0]).max_rel == math.inf


def test_a_passing_check_is_recorded(records: list[dict[str, Any]]) -> None:
    rng = np.random.default_rng(3)
    want = rng.standard_normal((7, 5))
    lab.check("close", want + 1e-6, want, cosine=0.999, row_cosine=0.99, rel=1e-3, mean_rel=1e-3, max_abs=1e-5)
    assert records[0]["passed"] is True
    assert records[0]["shape"] == [7, 5]
    assert records[0]["measured"]["max_abs"] == pytest.approx(1e-6, rel=1e-3)
    assert records[0]["bars"]["cosine"] == [">=", 0.999]


@pytest.mark.parametrize("bar", [{"cosine": 0.9}, {"row_cosine": 0.5}, {"rel": 0.1}, {"mean_rel": 0.1}, {"max_abs": 0.5}])
def test_each_bar_can_fail_and_is_recorded_before_it_raises(bar: dict[str, float], records: list[dict[str, Any]]) -> None:
    with pytest.raises(lab.CheckFailed, match=r"far: .*bar"):
        lab.check("far", [[3.0, 4.0], [0.0, 2.0]], [[3.0, 4.0], [2.0, 0.0]], **bar)
    assert records[0]["passed"] is False
    assert records[0]["shortfall"]


def test_one_bad_row_fails_the_row_bar_that_the_whole_cosine_would_hide(records: list[dict[str, Any]]) -> None:
    want = np.ones((100, 8))
    got = want.copy()
    got[41] = -1
    lab.check("whole", got, want, cosine=0.97)
    with pytest.raises(lab.CheckFailed, match="worst_row_cosine"):
        lab.check("rows", got, want, row_cosine=0.97)
    assert [r["passed"] for r in records] == [True, False]


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        ([1.0, math.nan], [1.0, 2.0], "1 NaN"),
        ([math.nan, 1.0], [math.nan, 1.0], "2 NaN"),
        ([math.inf, 1.0], [2.0, 1.0], "1 unshared infinities"),
        ([math.inf, 1.0], [-math.inf, 1.0], "2 unshared infinities"),
        ([[1.0, 2.0]], [1.0, 2.0], r"one shape, got \(1, 2\) and \(2,\)"),
        ([], [], r"something to compare, got shape \(0,\)"),
    ],
)
def test_what_cannot_be_compared_fails(got: Any, want: Any, message: str, records: list[dict[str, Any]]) -> None:
    with pytest.raises(lab.CheckFailed, match=message):
        lab.check("broken", got, want, max_abs=1e9)
    assert records[0]["passed"] is False


def test_shared_infinities_are_left_out() -> None:
    measured = checks.compare([-math.inf, 3.0, 4.0], [-math.inf, 3.0, 5.0])
    assert measured.num_inf == 0
    assert measured.max_rel == pytest.approx(1 / math.sqrt((9 + 25) / 2))


def test_a_check_without_a_bar_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one of cosine"):
        lab.check("idle", [1.0], [1.0])


@pytest.mark.parametrize(
    ("value", "op", "bound", "holds"),
    [(1.02, "<=", 1.03, True), (1.03, "<", 1.03, False), (0.6, ">=", 0.5, True), (0.5, ">", 0.5, False), (3, "==", 3, True)],
)
def test_check_that_judges_one_number(value: float, op: str, bound: float, holds: bool, records: list[dict[str, Any]]) -> None:
    if holds:
        lab.check_that("ratio", value, op, bound)
    else:
        with pytest.raises(lab.CheckFailed, match="ratio"):
            lab.check_that("ratio", torch.tensor([value], dtype=torch.float64), op, bound)
    assert records[0]["passed"] is holds
    assert (records[0]["op"], records[0]["bound"]) == (op, bound)


def test_nan_meets_no_bar(records: list[dict[str, Any]]) -> None:
    with pytest.raises(lab.CheckFailed):
        lab.check_that("loss", math.nan, "<=", 1e9)
    assert records[0]["value"] == "nan"


def test_check_that_refuses_an_unknown_operator() -> None:
    with pytest.raises(ValueError, match="op must be one of"):
        lab.check_that("ratio", 1.0, "=<", 2.0)


def test_record_keeps_numbers_and_strings(records: list[dict[str, Any]]) -> None:
    lab.record("perplexity", torch.tensor(3.5))
    lab.record("tokens", 40, "token")
    lab.record("text", "def f():")
    assert [r["value"] for r in records] == [3.5, 40, "def f():"]
    with pytest.raises(TypeError, match="one number or a string"):
        lab.record("many", [1.0, 2.0])


def test_outside_a_notebook_checks_are_lines_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Of equal arrays only what the bars ask for is said; of others everything; NaN where there are some."""
    lab.check("twins", [1.0, 2.0], [1.0, 2.0], max_abs=0)
    lab.check("close", [3.0, 4.0], [3.0, 4.5], cosine=0.9)
    lab.check_that("time", 2.5, "<", 3.0, "us")
    lab.record("text", "a")
    with pytest.raises(lab.CheckFailed):
        lab.check("broken", [1.0, math.nan], [1.0, 2.0], rel=1)
    assert capsys.readouterr().out.splitlines() == [
        "PASSED twins (2,): max_abs 0 <= 0",
        "PASSED close (2,): cosine 0.99846035 >= 0.9, worst_row_cosine 0.99846035, "
        "max_rel 0.130744, mean_rel 0.065372, max_abs 0.5",
        "PASSED time: 2.5 < 3 us",
        "text: a",
        "FAILED broken (2,): cosine nan, worst_row_cosine nan, max_rel nan <= 1, mean_rel nan, max_abs nan, num_nan 1",
        "  1 NaN, 0 unshared infinities",
    ]


def test_setup_seeds_every_generator_and_resolves_the_device() -> None:
    assert lab.setup(7, "cpu").type == "cpu"
    first = (torch.rand(3), np.random.random(3))  # noqa: NPY002 - the global generator is what is tested
    lab.setup(7, "cpu")
    assert torch.equal(first[0], torch.rand(3))
    assert np.array_equal(first[1], np.random.random(3))  # noqa: NPY002
    with pytest.raises(ValueError, match="device must be one of"):
        lab.setup(7, "tpu")
