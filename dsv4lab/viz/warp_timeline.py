"""Who does what when: rows of coloured spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch

from dsv4lab.viz._arrays import as_array, require_finite, require_labels, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import BLUE, EMPTY, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION, hue

_COLORS = {"math": BLUE, "memory": SKY, "sync": PURPLE, "copy": INK, "mma": VERMILION, "load": ORANGE, "store": GREEN}
_QUIET = "#D5D5D5"


def plot_warp_timeline(
    row: Any,
    start: Any,
    end: Any,
    kind: Any,
    *,
    rows: Sequence[str],
    kinds: Sequence[str],
    groups: Sequence[str] | None = None,
    quiet: Sequence[str] = ("wait",),
    unit: str = "modelled cycles",
    ax: Axes | None = None,
) -> Axes:
    """Spans as bars: a row for each warp and engine, a colour for each kind, kinds in `quiet` thin and grey.

    row (n,) int: index into `rows`. start, end (n,): in `unit`. kind (n,) int: index into `kinds`. groups: a word for each row;
    a rule is drawn where it changes, with the word beside the first row. At the right: the share of time that a row is not
    quiet. Raises ValueError (shapes, indices out of range, end before start), TypeError (dtypes).
    """
    where = as_array("row", row, "n", kind="int")
    low, high = (as_array(name, value, "n", shape=where.shape) for name, value in (("start", start), ("end", end)))
    what = as_array("kind", kind, "n", kind="int", shape=where.shape)
    require_range("row", where, 0, len(rows) - 1)
    require_range("kind", what, 0, len(kinds) - 1)
    for name, values in (("start", low), ("end", high)):
        require_finite(name, values)
    if (high < low).any():
        first = int(np.flatnonzero(high < low)[0])
        raise ValueError(f"end must be >= start, got {high[first]:g} < {low[first]:g} in span {first}")
    words = require_labels("groups", groups, len(rows)) or [""] * len(rows)
    ax = one_axes(ax, (11.0, float(np.clip(1.3 + 0.3 * len(rows), 2.2, 9.0))))
    total = float(high.max()) - min(0.0, float(low.min())) or 1.0
    handles = []
    for index, name in enumerate(kinds):
        chosen = what == index
        if not chosen.any():
            continue
        calm = name in quiet
        color = _QUIET if calm else _COLORS.get(name, hue(index))
        half = 0.1 if calm else 0.38
        x0, x1, y = low[chosen], high[chosen], where[chosen]
        corners = np.stack([x0, y - half, x0, y + half, x1, y + half, x1, y - half], axis=1).reshape(-1, 4, 2)
        # A hairline keeps spans visible that are narrower than a pixel.
        bars = PolyCollection(list(corners), facecolor=color, edgecolor=color, linewidth=0.0 if calm else 0.4, zorder=2 - calm)
        ax.add_collection(bars)
        handles.append(Patch(color=color, label=name))
    calm_kinds = [i for i, name in enumerate(kinds) if name in quiet]
    busy = np.bincount(where, weights=(high - low) * ~np.isin(what, calm_kinds), minlength=len(rows)) / total
    for index, share in enumerate(busy):
        ax.text(1.008, index, f"{100 * share:.0f} %", transform=ax.get_yaxis_transform(), va="center", fontsize=8.5, color=INK)
    for index in range(1, len(rows)):
        if words[index] != words[index - 1]:
            ax.axhline(index - 0.5, color=INK, linewidth=0.8)
    ax.set_yticks(range(len(rows)), [f"{w}  {r}" if w and (i == 0 or words[i - 1] != w) else r
                                     for i, (w, r) in enumerate(zip(words, rows, strict=True))])  # fmt: skip
    ax.set(
        xlim=(min(0.0, float(low.min())), float(high.max()) or 1.0),
        ylim=(len(rows) - 0.5, -0.5),
        xlabel=f"time ({unit})",
        ylabel="warp or engine",
    )
    ax.grid(False, axis="y")
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_color(EMPTY)
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=8, borderaxespad=0.1, frameon=False)
    ax.text(1.008, 1.01, "busy", transform=ax.transAxes, fontsize=8.5, color=INK, va="bottom")
    return ax
