"""How much of a matrix, or of what it gives, fits into fewer dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dsv4lab.viz._arrays import as_series, require_finite, require_positive, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import BOUND, dash, hue

_FLOOR = 1e-6  # shares below it are drawn here


def plot_spectrum(values: Mapping[str, Any], *, marks: Mapping[str, int] | None = None, ax: Axes | None = None) -> Axes:
    """Share of the energy that the best approximation of each rank leaves out, on a log axis; ranks to note as lines.

    values: series name to (n,) singular values >= 0, largest first. marks: name to a rank; what a series leaves out there is in
    the legend. Raises ValueError (shapes, negative, rising, all zero, a mark < 1), TypeError (dtypes).
    """
    series = as_series("values", values, "n")
    for name, one in series.items():
        what = f"values[{name!r}]"
        require_finite(what, one)
        require_range(what, one, 0, np.inf)
        if (np.diff(one) > 0).any() or not one[0] > 0:
            raise ValueError(f"{what} must be singular values, largest first, got {one[0]:g} first and {one.max():g} largest")
    for name, rank in (marks or {}).items():
        require_positive(f"marks[{name!r}]", rank)
    ax = one_axes(ax, (8.5, 3.6))
    for index, (name, one) in enumerate(series.items()):
        energy = np.square(one)
        left = np.r_[1.0, 1.0 - np.cumsum(energy) / energy.sum()]
        noted = [rank for rank in (marks or {}).values() if rank < len(one)]
        shares = ", ".join(f"{100 * left[rank]:.2g} %" for rank in noted)
        shown = np.maximum(left, _FLOOR)
        label = f"{name}: {shares}" if shares else name
        ax.plot(shown, color=hue(index), linestyle=dash(index), linewidth=1.7, label=label)
        ax.plot(noted, shown[noted], marker="o", markersize=5, color=hue(index), linestyle="none")
    for name, rank in (marks or {}).items():
        ax.axvline(rank, color=BOUND, linewidth=1.2)
        ax.annotate(name, (rank, 1.01), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9)
    ax.set_yscale("log")
    ax.set(xlim=(0, max(map(len, series.values()))), ylim=(_FLOOR / 2, 1.6), xlabel="rank", ylabel="share of energy left out")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return ax
