"""Who has which cells of tensor memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.ticker import MultipleLocator

from dsv4lab.viz._arrays import as_array, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import EMPTY, INK, hue, text_on

_WARP_LANES = 32  # lanes that one warp of a warpgroup can load


def plot_tmem_map(owner: Any, names: Sequence[str], *, ax: Axes | None = None) -> Axes:
    """Lanes down, columns across; a colour for each owner, its name and columns on its first block, rules between warps' lanes.

    owner (lanes, columns) int: index into names, -1 where nobody has the cell. Raises ValueError (shapes, range), TypeError.
    """
    held = as_array("owner", owner, "L,C", kind="int")
    require_range("owner", held, -1, len(names) - 1)
    ax = one_axes(ax, (11.0, 3.4))
    lanes, columns = held.shape
    colors = [EMPTY, *(hue(i) for i in range(len(names)))]
    norm = BoundaryNorm(np.arange(-1.5, len(names)), len(colors))
    ax.imshow(
        held, cmap=ListedColormap(colors), norm=norm, aspect="auto", interpolation="nearest", extent=(0, columns, lanes, 0)
    )
    for lane in range(_WARP_LANES, lanes, _WARP_LANES):
        ax.axhline(lane, color="white", linewidth=1.2)
    narrow = 0
    for index, name in enumerate(names):
        places = np.flatnonzero((held == index).any(axis=0))
        if not len(places):
            continue
        first, last = int(places[0]), int(places[-1])
        middle, text = (first + last + 1) / 2, f"{name}\ncolumns {first} to {last}"
        if last - first + 1 > columns // 6:
            box = {"facecolor": hue(index), "edgecolor": "none", "pad": 1.5}
            ax.text(middle, lanes / 2, text, ha="center", va="center", fontsize=9, color=text_on(hue(index)), bbox=box)
            continue
        narrow += 1  # written beside the map, one below the other
        at = (1.01, 1.0 - 0.24 * narrow)
        arrow = {"arrowstyle": "-", "color": hue(index), "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
        ax.annotate(
            text, (middle, lanes * 0.24 * narrow), xytext=at, textcoords="axes fraction", fontsize=9, va="center", color=INK,
            arrowprops=arrow,
        )  # fmt: skip
    ax.set(xlabel="column (32 bits)", ylabel="lane")
    ax.xaxis.set_major_locator(MultipleLocator(64))
    ax.yaxis.set_major_locator(MultipleLocator(_WARP_LANES))
    ax.grid(False)
    return ax
