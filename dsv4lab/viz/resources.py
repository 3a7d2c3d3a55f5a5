"""What something uses of what there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dsv4lab.viz._arrays import as_array, require_labels, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import BLUE, BOUND, EMPTY, INK, VERMILION


def plot_resources(used: Any, limits: Any, labels: Sequence[str], *, ax: Axes | None = None) -> Axes:
    """A bar for each resource, as a share of its limit, with both numbers; a limit of 0 marks what should not be used at all.

    used, limits (n,). labels: n names with units. Raises ValueError (shapes, negative values), TypeError (dtypes).
    """
    have = as_array("used", used, "n")
    most = as_array("limits", limits, "n", shape=have.shape)
    names = require_labels("labels", labels, len(have)) or []
    for name, values in (("used", have), ("limits", most)):
        require_range(name, values, 0, np.inf)
    share = np.where(most > 0, have / np.where(most > 0, most, 1), np.where(have > 0, 1.0, 0.0))
    ax = one_axes(ax, (8.0, float(np.clip(1.0 + 0.36 * len(have), 1.8, 7.0))))
    place = np.arange(len(have))
    ax.barh(place, np.maximum(share, 1.0), height=0.62, color=EMPTY)
    ax.barh(place, share, height=0.62, color=[VERMILION if s > 1 or (m == 0 and h > 0) else BLUE
                                              for s, m, h in zip(share, most, have, strict=True)])  # fmt: skip
    ax.axvline(1, color=BOUND, linewidth=1.4)
    for row, (value, limit) in enumerate(zip(have, most, strict=True)):
        text = f"{value:,.6g} of {limit:,.6g}" if limit else f"{value:,.6g}"
        ax.text(max(1.0, float(share.max())) * 1.015, row, text, va="center", fontsize=8.5, color=INK)
    ax.set(
        xlim=(0, 1.3 * max(1.0, float(share.max()))),
        ylim=(len(have) - 0.4, -0.6),
        xlabel="share of the limit (no unit)",
        ylabel="resource",
    )
    ax.set_yticks(place, names)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    return ax
