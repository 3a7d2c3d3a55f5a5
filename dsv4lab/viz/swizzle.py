"""Where the 16-byte chunks of a tile's rows lie in swizzled shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dsv4lab.viz._arrays import as_array, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import CYCLE, EMPTY, text_on

_HUES = (*CYCLE, "#999999")


def plot_swizzle(chunk: Any, *, marked: Any = None, ax: Axes | None = None) -> Axes:
    """Memory lines down, 16-byte places across: the number of the row's chunk that lies there, a colour for each number.

    chunk (lines, places) int: chunk numbers, -1 for an empty place. marked: a mask of the same shape; others are drawn pale.
    Raises ValueError (shapes), TypeError (dtypes).
    """
    numbers = as_array("chunk", chunk, "L,P", kind="int")
    require_range("chunk", numbers, -1, np.inf)
    shown = (
        np.ones(numbers.shape, bool) if marked is None else as_array("marked", marked, "L,P", kind="bool", shape=numbers.shape)
    )
    lines, places = numbers.shape
    ax = one_axes(ax, (6.4, 0.32 * lines + 1.0))
    for line in range(lines):
        for place in range(places):
            number = int(numbers[line, place])
            color = EMPTY if number < 0 else _HUES[number % len(_HUES)]
            strong = bool(shown[line, place])
            ax.add_patch(_cell(place, line, color, strong))
            if number >= 0:
                ax.text(
                    place + 0.5, line + 0.5, str(number), ha="center", va="center", fontsize=8.5,
                    color=text_on(color) if strong else "#666666", fontweight="bold" if strong else "normal",
                )  # fmt: skip
    ax.set(xlim=(0, places), ylim=(lines, 0), xlabel="16-byte place of the line (four banks each)", ylabel="row of the tile")
    ax.set_xticks(np.arange(places) + 0.5, [str(p) for p in range(places)])
    ax.set_yticks(np.arange(lines) + 0.5, [str(n) for n in range(lines)])
    ax.grid(False)
    return ax


def _cell(x: int, y: int, color: str, strong: bool) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white", linewidth=1.2, alpha=1.0 if strong else 0.18)
