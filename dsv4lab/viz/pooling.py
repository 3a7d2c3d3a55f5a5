"""Which tokens an entry is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dsv4lab.viz._arrays import as_array, require_range
from dsv4lab.viz._axes import one_axes
from dsv4lab.viz._palette import CYCLE, EMPTY


def plot_pooling(reads: Any, kinds: Sequence[str], *, title: str = "", ax: Axes | None = None) -> Axes:
    """Entries as rows, tokens as columns; a coloured cell where the entry reads the token, pale where it does not.

    reads (E, P) int: 0 for nothing, else 1 + an index into kinds. kinds: names, at most seven; the legend has those that occur.
    Raises ValueError (shapes, range), TypeError (dtypes).
    """
    held = as_array("reads", reads, "E,P", kind="int")
    if not 1 <= len(kinds) <= len(CYCLE):
        raise ValueError(f"kinds must be 1 to {len(CYCLE)} names, got {len(kinds)}")
    require_range("reads", held, 0, len(kinds))
    entries, tokens = held.shape
    colors = [EMPTY, *CYCLE[: len(kinds)]]
    ax = one_axes(ax, (9.0, float(np.clip(1.5 + 0.26 * entries, 2.0, 5.0))))
    norm = BoundaryNorm(np.arange(len(colors) + 1) - 0.5, len(colors))
    ax.imshow(held, cmap=ListedColormap(colors), norm=norm, aspect="auto", interpolation="nearest")
    ax.hlines(np.arange(1, entries) - 0.5, -0.5, tokens - 0.5, color="white", linewidth=1.5)
    if tokens <= 96:
        ax.vlines(np.arange(1, tokens) - 0.5, -0.5, entries - 0.5, color="white", linewidth=0.8)
    ax.set(xlim=(-0.5, tokens - 0.5), ylim=(entries - 0.5, -0.5), xlabel="token (position)", ylabel="entry")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(False)
    handles = [Patch(color=colors[1 + i], label=name) for i, name in enumerate(kinds) if (held == 1 + i).any()]
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderaxespad=0.1,
        title=title or None, alignment="left", title_fontsize=9.5,
    )  # fmt: skip
    return ax
