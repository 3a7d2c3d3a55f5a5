"""Errors along the dims of a vector, some of which are stored otherwise than the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dsv4lab.viz._arrays import as_array, as_series, require_finite, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import BOUND, dash, hue


def plot_dim_errors(
    errors: Mapping[str, Any],
    *,
    split: int,
    words: tuple[str, str] = ("first part", "second part"),
    group: int = 16,
    quantity: str = "relative error (no unit)",
    ax: Axes | None = None,
) -> Axes:
    """A dot for each dim, on a log axis, and the mean square of each `group` dims as a line; a bar between the two parts.

    errors: series name to (c,) magnitudes; zeros are left out. split: dims of the first part. words: names of the parts.
    Raises ValueError (shapes, negative, not finite, split outside), TypeError (dtypes).
    """
    series = as_series("errors", errors, "c")
    dims = len(next(iter(series.values())))
    for name, values in series.items():
        as_array(f"errors[{name!r}]", values, "c", shape=(dims,))
        require_finite(f"errors[{name!r}]", values)
        require_range(f"errors[{name!r}]", values, 0, np.inf)
    if not 0 < split < dims or group < 1:
        raise ValueError(f"split must be in (0, {dims}) and group >= 1, got {split} and {group}")
    ax = one_axes(ax, (10.0, 3.9))
    edges = np.unique(np.r_[np.arange(0, dims, group), split, dims])
    for index, (name, values) in enumerate(series.items()):
        shown = np.where(values > 0, values, np.nan)
        ax.plot(shown, linestyle="none", marker=".", markersize=3, alpha=0.45, color=hue(index))
        level = np.sqrt(np.add.reduceat(values**2, edges[:-1]) / np.diff(edges))
        some = np.where(level > 0, level, np.nan)
        ax.stairs(some, edges - 0.5, baseline=None, color=hue(index), linestyle=dash(index), linewidth=1.8, label=name)
    ax.axvline(split - 0.5, color=BOUND, linewidth=1.4)
    for text, at in zip(words, (split / 2, (split + dims) / 2), strict=True):
        ax.annotate(text, (at, 1.01), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9)
    ax.set_yscale("log")
    ax.set(xlim=(-0.5, dims - 0.5), xlabel="dim", ylabel=quantity)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, title=f"dot: a dim\nline: {group} dims")
    return ax
