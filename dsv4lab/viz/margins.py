"""How close decisions come to going the other way, against what could turn them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dsv4lab.viz._arrays import as_series, require_finite, require_positive, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import BOUND, dash, hue


def plot_margins(
    margins: Any, *, bounds: Mapping[str, float] | None = None, quantity: str = "margin (no unit)", ax: Axes | None = None
) -> Axes:
    """Share of decisions whose margin is below each size, on log axes; bounds as vertical lines. Zeros are counted apart.

    margins: mapping of series name to (n,) values >= 0, or one array. bounds: name to a size > 0, what moves a decision.
    Raises ValueError (negative, not finite, a series of zeros), TypeError (dtypes).
    """
    series = as_series("margins", margins, "n")
    ax = one_axes(ax, (8.5, 3.8))
    least = np.inf
    for index, (name, values) in enumerate(series.items()):
        label = f"margins[{name!r}]" if name else "margins"
        require_finite(label, values)
        require_range(label, values, 0, np.inf)
        ordered = np.sort(values)
        share = 100.0 * np.arange(1, len(ordered) + 1) / len(ordered)
        positive = ordered > 0
        if not positive.any():
            raise ValueError(f"{label} must hold a margin above zero, got only zeros")
        least = min(least, float(share[positive][0]))
        zeros = int((~positive).sum())
        text = (name or "margins") + (f", {zeros} of zero" if zeros else "")
        style: dict[str, Any] = {"color": hue(index), "linestyle": dash(index)}
        ax.step(ordered[positive], share[positive], where="post", linewidth=1.7, label=text, **style)
        ax.plot(ordered[positive][0], share[positive][0], marker="o", color=hue(index), linestyle="none")
    for name, size in (bounds or {}).items():
        require_positive(f"bounds[{name!r}]", size)
        ax.axvline(size, color=BOUND, linewidth=1.6, label=f"{name}: {size:.2g}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(least / 1.6, 150)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:g} %")
    ax.set(xlabel=quantity, ylabel="share of decisions below")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return ax
