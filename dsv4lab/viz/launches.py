"""A chain of launches, laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dsv4lab.viz._arrays import as_array, require_finite, require_labels, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import hue


def plot_launches(lengths: Any, names: Sequence[str], *, unit: str = "modelled cycles", ax: Axes | None = None) -> Axes:
    """A row a launch, in order, each bar from the end of the one before; launches of one name share a colour. At the right, the
    share of the whole.

    lengths (n,) >= 0 in `unit`; names: n. Raises ValueError (shapes, negative, not finite, all zero), TypeError (dtypes).
    """
    values = as_array("lengths", lengths, "n")
    require_finite("lengths", values)
    require_range("lengths", values, 0, np.inf)
    if not values.sum() > 0:
        raise ValueError(f"lengths must not all be zero, got {len(values)} of them")
    texts = require_labels("names", names, len(values)) or []
    ends = np.cumsum(values)
    order = list(dict.fromkeys(texts))
    ax = one_axes(ax, (9.0, float(np.clip(1.0 + 0.21 * len(values), 2.0, 8.0))))
    rows = np.arange(len(values))
    ax.barh(rows, values, left=ends - values, height=0.8, color=[hue(order.index(text)) for text in texts], linewidth=0)
    for row, share in enumerate(values / ends[-1]):
        ax.annotate(f"{100 * share:.0f} %", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    ax.set_yticks(rows, texts)
    ax.tick_params(axis="y", length=0, labelsize=8)
    ax.grid(False, axis="y")
    ax.set(xlim=(0, ends[-1]), ylim=(len(values) - 0.4, -0.6), xlabel=f"time, end to end ({unit})", ylabel="launch")
    return ax
