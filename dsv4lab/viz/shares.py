"""How a share is spread over many cases, one row a way of doing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dsv4lab.viz._arrays import as_series, require_finite, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import BOUND, INK, hue


def plot_shares(
    shares: Mapping[str, Any],
    *,
    quantity: str = "share",
    quantiles: tuple[float, float] = (0.05, 0.95),
    mark: tuple[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A row a series: a line over the outer quantiles, a bar over the middle half, a dot at the median, the mean at the right.

    shares: series name to (n,) values in [0, 1]. quantity: the axis label. quantiles: the outer ones. mark: name and place of a
    line. Raises ValueError (shapes, range, not finite, quantiles out of order), TypeError (dtypes).
    """
    series = as_series("shares", shares, "n")
    low, high = quantiles
    if not 0 <= low <= 0.25 or not 0.75 <= high <= 1:
        raise ValueError(f"quantiles must be in [0, 0.25] and [0.75, 1], got {low:g} and {high:g}")
    for name, values in series.items():
        require_finite(f"shares[{name!r}]", values)
        require_range(f"shares[{name!r}]", values, 0.0, 1.0, slack=1e-6)
    ax = one_axes(ax, (9.0, 1.2 + 0.42 * len(series)))
    for row, values in enumerate(series.values()):
        outer, lower, middle, upper, last = np.quantile(values, [low, 0.25, 0.5, 0.75, high])
        ax.hlines(row, outer, last, color=hue(row), linewidth=1.6)
        ax.barh(row, upper - lower, left=lower, height=0.42, color=hue(row), alpha=0.35, linewidth=0)
        ax.plot(middle, row, marker="o", markersize=6, color=hue(row), linestyle="none", clip_on=False, zorder=3)
        ax.annotate(f"{values.mean():.3f}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK)
    ax.annotate("mean", (1.01, 1.0), xycoords="axes fraction", va="bottom", fontsize=8.5, color=INK)
    if mark is not None:
        ax.axvline(mark[1], color=BOUND, linewidth=1.4, linestyle="--", label=mark[0])
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderaxespad=0.1)
    ax.set_yticks(np.arange(len(series)), list(series))
    ax.set_ylim(len(series) - 0.5, -0.5)
    ax.grid(False, axis="y")
    words = f"bar: middle half, line: {100 * low:g} to {100 * high:g} %"
    ax.set(xlabel=f"{quantity} ({words})", ylabel="way")
    return ax
