"""Checks that a notebook's reader sees, the executed file remembers, and a run fails on.

`check` compares two arrays, `check_that` one number with its bar, `record` keeps a result. Each shows a table, stores the
same facts as JSON under `MIME` in the executed notebook (the report reads them there), and the two checks raise
`CheckFailed` when the bar is missed, after the facts are stored.
"""

from __future__ import annotations

import html
import math
import operator
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MIME = "application/vnd.dsv4lab.check+json"

_DISTANCES = ("cosine", "worst_row_cosine", "max_rel", "mean_rel", "max_abs")
_OPERATORS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt, "==": operator.eq}


class CheckFailed(AssertionError):
    """A measured value missed its bar, or the arrays could not be compared; the message says which and by how much."""


@dataclass(frozen=True)
class Comparison:
    """How far `got` is from `want`. Errors are in units of the root mean square of `want`, except `max_abs`."""

    cosine: float  # of the two arrays, flattened
    worst_row_cosine: float  # smallest cosine of any row along the last dimension
    max_rel: float  # max |got - want| / rms(want)
    mean_rel: float  # mean |got - want| / rms(want)
    max_abs: float  # max |got - want|, in the unit of the arrays
    num_nan: int  # NaN elements in got and want together
    num_inf: int  # infinities that the other side does not share; equal infinities agree and are left out of the rest


def as_float64(values: Any) -> np.ndarray:
    """A torch tensor (any device and dtype), array, number or nested sequence as a float64 array on the host."""
    if hasattr(values, "detach"):  # a torch tensor, without importing torch here
        return np.asarray(values.detach().cpu().double().numpy())
    return np.asarray(values, dtype=np.float64)


def compare(got: Any, want: Any) -> Comparison:
    """Measure the distance between two arrays of one shape. Raises ValueError on unequal shapes and on empty arrays."""
    actual, expected = as_float64(got), as_float64(want)
    if actual.shape != expected.shape:
        raise ValueError(f"got and want must have one shape, got {actual.shape} and {expected.shape}")
    if actual.size == 0:
        raise ValueError(f"there must be something to compare, got shape {actual.shape}")
    num_nan = int(np.isnan(actual).sum() + np.isnan(expected).sum())
    agree_inf = np.isinf(actual) & (actual == expected)
    num_inf = int((np.isinf(actual) & ~agree_inf).sum() + (np.isinf(expected) & ~agree_inf).sum())
    if num_nan or num_inf:
        return Comparison(math.nan, math.nan, math.nan, math.nan, math.nan, num_nan, num_inf)
    actual, expected = np.where(agree_inf, 0.0, actual), np.where(agree_inf, 0.0, expected)
    error = np.abs(actual - expected)
    peak = float(np.abs(expected).max())
    rms = 0.0 if peak == 0 else peak * math.sqrt(float(np.mean(np.square(expected / peak), where=~agree_inf)))
    columns = actual.shape[-1] if actual.ndim else 1
    rows = _cosines(actual.reshape(-1, columns), expected.reshape(-1, columns))
    return Comparison(
        cosine=float(_cosines(actual.reshape(1, -1), expected.reshape(1, -1))[0]),
        worst_row_cosine=float(rows.min()),
        max_rel=_ratio(float(error.max()), rms),
        mean_rel=_ratio(float(error.mean()), rms),
        max_abs=float(error.max()),
        num_nan=0,
        num_inf=0,
    )


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(R, C), (R, C) -> (R,). Two zero rows point the same way; a zero row and another do not."""
    scale_a, scale_b = np.abs(a).max(axis=1), np.abs(b).max(axis=1)
    a = a / np.where(scale_a == 0, 1, scale_a)[:, None]  # by the largest element: squares neither overflow nor vanish
    b = b / np.where(scale_b == 0, 1, scale_b)[:, None]
    norms = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    dots = (a * b).sum(axis=1)
    both_zero = (scale_a == 0) & (scale_b == 0)
    return np.where(both_zero, 1.0, dots / np.where(norms == 0, 1, norms))


def _ratio(error: float, scale: float) -> float:
    if scale == 0:
        return 0.0 if error == 0 else math.inf
    return error / scale


def check(
    name: str,
    got: Any,
    want: Any,
    *,
    cosine: float | None = None,
    row_cosine: float | None = None,
    rel: float | None = None,
    mean_rel: float | None = None,
    max_abs: float | None = None,
) -> None:
    """Show and store how far `got` is from `want`; raise CheckFailed when a bar is missed.

    got, want: torch tensors, arrays or numbers of one shape. At least one bar: `cosine` (whole array) and `row_cosine`
    (worst row) are lower bounds; `rel`, `mean_rel` (units of the rms of want) and `max_abs` (unit of the arrays) are upper
    bounds, `max_abs=0` asks for equality. Unequal shapes, NaN and infinities on one side always fail.
    Raises ValueError when no bar is given.
    """
    bars = {
        "cosine": (">=", cosine),
        "worst_row_cosine": (">=", row_cosine),
        "max_rel": ("<=", rel),
        "mean_rel": ("<=", mean_rel),
        "max_abs": ("<=", max_abs),
    }
    given = {key: (op, bar) for key, (op, bar) in bars.items() if bar is not None}
    if not given:
        raise ValueError("check must be given at least one of cosine, row_cosine, rel, mean_rel, max_abs, got none")
    measured: dict[str, float] = {}
    shape = list(np.shape(want))
    try:
        measured = asdict(compare(got, want))
        shortfalls = [
            f"{key} {_measured(key, measured[key])}, bar {op} {_text(bar)}"
            for key, (op, bar) in given.items()
            if not _OPERATORS[op](measured[key], bar)
        ]
        if measured["num_nan"] or measured["num_inf"]:
            shortfalls = [f"{measured['num_nan']} NaN, {measured['num_inf']} unshared infinities"]
    except ValueError as error:
        shortfalls = [str(error)]
    rows = [
        (key, _measured(key, measured[key]), " ".join((given[key][0], _text(given[key][1]))) if key in given else "")
        for key in measured
    ]
    _publish(
        {
            "kind": "check",
            "name": name,
            "passed": not shortfalls,
            "shape": shape,
            "measured": {key: _jsonable(value) for key, value in measured.items()},
            "bars": {key: [op, bar] for key, (op, bar) in given.items()},
            "shortfall": "; ".join(shortfalls),
        },
        caption=f"{name} · shape {tuple(shape)}",
        rows=rows,
    )
    if shortfalls:
        raise CheckFailed(f"{name}: {'; '.join(shortfalls)}")


def check_that(name: str, value: Any, op: str, bound: float, unit: str = "") -> None:
    """Show and store one number and its bar, `value op bound`; raise CheckFailed when it does not hold (NaN never does).

    op: one of <=, <, >=, >, ==. `value` may be a one-element tensor. Raises ValueError for another operator.
    """
    if op not in _OPERATORS:
        raise ValueError(f"op must be one of {', '.join(_OPERATORS)}, got {op!r}")
    number = float(as_float64(value).item())
    passed = bool(_OPERATORS[op](number, bound))
    shortfall = "" if passed else f"{_text(number)}{_spaced(unit)}, bar {op} {_text(bound)}{_spaced(unit)}"
    _publish(
        {
            "kind": "bar",
            "name": name,
            "passed": passed,
            "value": _jsonable(number),
            "op": op,
            "bound": _jsonable(float(bound)),
            "unit": unit,
            "shortfall": shortfall,
        },
        caption=name,
        rows=[("value", number, f"{op} {_text(bound)}{_spaced(unit)}")],
        unit=unit,
    )
    if not passed:
        raise CheckFailed(f"{name}: {shortfall}")


def record(name: str, value: Any, unit: str = "") -> None:
    """Show and store one result: a number, a one-element tensor, or a string. Raises TypeError for anything else."""
    if isinstance(value, str | bool):
        stored: Any = value
    else:
        array = as_float64(value)
        if array.size != 1:
            raise TypeError(f"value must be one number or a string, got shape {array.shape}")
        number = float(array.item())
        stored = int(number) if isinstance(value, int | np.integer) else number
    _publish(
        {"kind": "value", "name": name, "value": _jsonable(stored), "unit": unit},
        caption=name,
        rows=[("value", stored, "")],
        unit=unit,
    )


def publish_environment(facts: dict[str, str]) -> None:
    """Show and store the facts about versions, device and commit."""
    _publish({"kind": "environment", "facts": facts}, caption="environment", rows=[(k, v, "") for k, v in facts.items()])


def line_of(record: dict[str, Any]) -> str:
    """What was stored, as one line of text. Of arrays that are equal it leaves out what equality says."""
    if record["kind"] == "environment":
        return "environment: " + ", ".join(f"{key} {value}" for key, value in record["facts"].items())
    if record["kind"] == "value":
        return f"{record['name']}: {_text(record['value'])}{_spaced(record['unit'])}"
    if record["kind"] == "bar":
        facts = f": {_text(record['value'])} {record['op']} {_text(record['bound'])}{_spaced(record['unit'])}"
    else:
        facts = _measurements(record)
    line = f"{'PASSED' if record['passed'] else 'FAILED'} {record['name']}{facts}"
    return f"{line}\n  {record['shortfall']}" if record["shortfall"] else line


def _measurements(record: dict[str, Any]) -> str:
    measured, bars = record["measured"], record["bars"]
    said = set(bars) | ({"max_abs"} if measured.get("max_abs") == 0 else set(_DISTANCES))
    said |= {key for key in ("num_nan", "num_inf") if measured.get(key)}
    parts = [
        f"{key} {_measured(key, measured[key])}" + (f" {bars[key][0]} {_text(bars[key][1])}" if key in bars else "")
        for key in (*_DISTANCES, "num_nan", "num_inf")
        if key in said and key in measured
    ]
    return f" {tuple(record['shape'])}: {', '.join(parts)}"


def _publish(payload: dict[str, Any], *, caption: str, rows: list[tuple[str, Any, str]], unit: str = "") -> None:
    """Display a payload with its text and table forms; outside a notebook, print the text."""
    verdict = {True: "PASSED", False: "FAILED", None: ""}[payload.get("passed")]
    text = line_of(payload)
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        print(text)
        return
    from IPython.display import display

    display({MIME: payload, "text/html": _table(caption, verdict, rows, unit, payload), "text/plain": text}, raw=True)


def _table(caption: str, verdict: str, rows: list[tuple[str, Any, str]], unit: str, payload: dict[str, Any]) -> str:
    """The facts of one payload as HTML: numbers side by side, so that a notebook of many checks stays readable."""
    colour = {"PASSED": "#0072b2", "FAILED": "#d55e00", "": "inherit"}[verdict]  # Okabe-Ito blue and vermilion
    left = "style='text-align:left'"
    keys = [html.escape(key) for key, _, _ in rows]
    values = [html.escape(_text(value) + _spaced(unit)) for _, value, _ in rows]
    bars = [html.escape(bar) for _, _, bar in rows]
    if payload["kind"] == "environment":
        cells = "".join(
            f"<tr><th scope='row' {left}>{k}</th><td {left}>{v}</td></tr>" for k, v in zip(keys, values, strict=True)
        )
    elif len(rows) == 1:
        cells = f"<tr><td>{values[0]}</td><td>{bars[0]}</td></tr>"
    else:
        cells = "<tr>" + "".join(f"<th scope='col'>{key}</th>" for key in keys) + "</tr>"
        cells += "<tr>" + "".join(f"<td>{value}</td>" for value in values) + "</tr>"
        if any(bars):
            cells += "<tr>" + "".join(f"<td>{bar}</td>" for bar in bars) + "</tr>"
    shortfall = (
        f"<p style='color:{colour};margin:0'>{html.escape(payload['shortfall'])}</p>" if payload.get("shortfall") else ""
    )
    return (
        f"<table style='margin:0'><caption {left[:-1]};white-space:nowrap'>{html.escape(caption)} "
        f"<strong style='color:{colour}'>{verdict}</strong></caption>{cells}</table>{shortfall}"
    )


def _measured(key: str, value: Any) -> str:
    # a cosine says how near it is to 1 only in its later digits
    return f"{value:.8f}" if "cosine" in key and isinstance(value, float) else _text(value)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _spaced(unit: str) -> str:
    return f" {unit}" if unit else ""


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are stored by name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
