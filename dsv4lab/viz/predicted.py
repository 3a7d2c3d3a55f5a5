"""Predicted against measured: what theory said before the run, and what the run gave."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from dsv4lab.viz._arrays import as_array, require_finite
from dsv4lab.viz._axes import label_log, one_axes
from dsv4lab.viz._palette import BLUE, INK, VERMILION


def plot_predicted(
    predicted: Mapping[str, float],
    measured: Mapping[str, float],
    *,
    quantity: str,
    spread: Mapping[str, float] | None = None,
    bounds: Mapping[str, float] | None = None,
    words: tuple[str, str] = ("predicted", "measured"),
    log: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """One row a case: the prediction as an open square, the measurement as a dot, their ratio at the right edge.

    predicted, measured: case name to a number > 0, the same names in both. quantity: the axis label, with unit. spread: case
    name to a standard error of the measurement, drawn as whiskers. bounds: case name to a limit that cannot be passed, drawn
    as a bar. words: what the two are called, where one of them is no measurement. log: a logarithmic axis.
    Raises ValueError (names differ, not positive).
    """
    names = list(predicted)
    if not names or set(names) != set(measured):
        raise ValueError(f"predicted and measured must name the same cases, got {sorted(predicted)} and {sorted(measured)}")
    want = as_array("predicted", [predicted[n] for n in names], "n")
    got = as_array("measured", [measured[n] for n in names], "n")
    error = as_array("spread", [(spread or {}).get(n, 0.0) for n in names], "n")
    limit = {names.index(n): float(v) for n, v in (bounds or {}).items() if n in names}
    for name, array in (("predicted", want), ("measured", got)):
        require_finite(name, array)
        if array.min() <= 0:
            raise ValueError(f"{name} must be > 0, got {array.min():g}")

    ax = one_axes(ax, (9.0, 1.1 + 0.34 * len(names)))
    rows = np.arange(len(names))
    ax.hlines(rows, np.minimum(want, got), np.maximum(want, got), color="#BBBBBB", linewidth=1.5, zorder=1)
    ax.plot(want, rows, linestyle="none", marker="s", markersize=9, markerfacecolor="none", markeredgewidth=1.5,
            color=BLUE, label=words[0])  # fmt: skip
    ax.errorbar(got, rows, xerr=error if spread else None, linestyle="none", marker="o", markersize=5, capsize=3,
                color=VERMILION, label=words[1])  # fmt: skip
    for k, (row, at) in enumerate(limit.items()):
        ax.vlines(at, row - 0.36, row + 0.36, color=INK, linewidth=2.2, label="_" if k else "bound")
    for row, ratio in enumerate(got / want):
        text = f"x {ratio:.3f}" if 0.1 < ratio < 10 else f"x {ratio:.3g}"
        ax.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8.5)
    ax.annotate(f"{words[1]} /\n{words[0]}", (1.01, -0.62), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_yticks(rows, names)
    ax.grid(False, axis="y")
    if log:
        ax.set_xscale("log")
        every = np.concatenate([want, got, np.array(list(limit.values()))])
        label_log(ax.xaxis, every.min(), every.max())
        ax.margins(x=0.06)
    else:
        ax.set_xlim(left=0)
    ax.set_xlabel(quantity)
    ax.set_ylabel("case")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.1)
    return ax
