"""Errors that grow with a position, against their bound."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dsv4lab.viz._arrays import as_array, as_series, require_finite, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import BOUND, hue


def plot_growing_error(
    positions: Any, errors: Any, *, bound: Any = None, quantity: str = "error (no unit)", ax: Axes | None = None
) -> Axes:
    """A dot for each position, on log axes, and the bound as a line; errors of zero are counted in the legend.

    positions (n,) > 0. errors: series name to (n,) magnitudes, or one array. bound (n,): of each position. quantity: with unit.
    Raises ValueError (shapes, negative, not finite), TypeError (dtypes).
    """
    at = as_array("positions", positions, "n")
    if at.min() <= 0:
        raise ValueError(f"positions must be > 0, got {at.min():g}")
    series = as_series("errors", errors, "n")
    for name, values in series.items():
        label = f"errors[{name!r}]" if name else "errors"
        as_array(label, values, "n", shape=at.shape)
        require_finite(label, values)
        require_range(label, values, 0, np.inf)
    limit = None if bound is None else as_array("bound", bound, "n", shape=at.shape)
    ax = one_axes(ax, (9.0, 3.8))
    for index, (name, values) in enumerate(series.items()):
        some = values > 0
        text = (name or "errors") + (f", {int((~some).sum())} of zero" if not some.all() else "")
        ax.plot(at[some], values[some], linestyle="none", marker=".", markersize=3, color=hue(index), label=text)
    if limit is not None:
        order = np.argsort(at)
        ax.plot(at[order], limit[order], color=BOUND, linewidth=1.4, label="bound")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set(xlabel="position (token)", ylabel=quantity)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, markerscale=3)
    return ax
